"""Products of 16 bits where the CPU has no instructions for them: rounded once, whatever the sizes and however operands lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import deepseed
from deepseed import ops
from deepseed.ops import products

SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
EMULATED = products.emulated  # before a test puts another in its place
sizes = st.integers(0, 9)


@pytest.fixture(autouse=True)
def emulates() -> Iterator[None]:
    """As on a CPU without the instructions, in pieces of 12 elements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "emulated", lambda dtype: dtype in (torch.bfloat16, torch.float16))
        patch.setattr(products, "_PIECE", 12)
        patch.setattr(products, "_LEAST", 0)
        patch.setattr(products, "_FEW", 0)
        yield


def drawn(shape: tuple[int, ...], dtype: torch.dtype, seed: int, lies: int) -> Tensor:
    """Contiguous, transposed, or every second column."""
    wide = (*shape[:-1], 2 * shape[-1]) if lies == 2 else (*shape[:-2], shape[-1], shape[-2]) if lies == 1 else shape
    x = torch.randn(wide, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x[..., ::2] if lies == 2 else x.mT if lies == 1 else x


def rounded_once(got: Tensor, exact: Callable[..., Tensor], operands: list[Tensor], *factors: float) -> None:
    """Half a unit in the last place of the exact result, and what sums of 10 numbers in float32 may be off: less than 16 roundings of the sum of magnitudes."""
    want = exact(*[x.double() for x in operands], *factors)
    of = exact(*[x.double().abs() for x in operands], *map(abs, factors))
    unit = torch.finfo(got.dtype).eps
    assert got.shape == want.shape
    assert ((got.double() - want).abs() <= want.abs() * unit / 2 + of * 16 * 2**-24 + torch.finfo(got.dtype).smallest_normal * unit).all()


@SIXTEEN
@settings(deadline=None)
@given(m=sizes, k=sizes, n=sizes, seed=st.integers(0, 99), lies=st.tuples(*[st.integers(0, 2)] * 3), row=st.booleans(), beta=st.sampled_from([1, 0.5]), alpha=st.sampled_from([1, -2]))
def test_products(dtype: torch.dtype, m: int, k: int, n: int, seed: int, lies: tuple[int, int, int], row: bool, beta: float, alpha: float) -> None:
    a, b = drawn((m, k), dtype, seed, lies[0]), drawn((k, n), dtype, seed + 1, lies[1])
    c = drawn((m, n), dtype, seed + 2, lies[2])
    rounded_once(ops.mm(a, b), lambda a, b: a @ b, [a, b])
    out = torch.full((m, n), torch.nan, dtype=dtype)
    assert torch.equal(ops.mm(a, b, out=out), ops.mm(a, b)) and torch.equal(out, ops.mm(a, b))
    rounded_once(ops.accumulate_mm(c.clone(), a, b), lambda c, a, b: c + a @ b, [c, a, b])
    total = c.clone()
    assert ops.accumulate_mm(total, a, b) is total
    if row:
        c = drawn((1, n), dtype, seed + 2, lies[2])[0]
    rounded_once(ops.addmm(c, a, b, beta=beta, alpha=alpha), lambda c, a, b, beta, alpha: beta * c + alpha * (a @ b), [c, a, b], beta, alpha)


@SIXTEEN
@settings(deadline=None)
@given(many=st.integers(0, 3), m=sizes, k=sizes, n=sizes, seed=st.integers(0, 99), lies=st.tuples(*[st.integers(0, 2)] * 3))
def test_products_of_many(dtype: torch.dtype, many: int, m: int, k: int, n: int, seed: int, lies: tuple[int, int, int]) -> None:
    a, b = drawn((many, m, k), dtype, seed, lies[0]), drawn((many, k, n), dtype, seed + 1, lies[1])
    c = drawn((many, m, n), dtype, seed + 2, lies[2])
    rounded_once(ops.bmm(a, b), lambda a, b: a @ b, [a, b])
    rounded_once(ops.baddbmm(c, a, b, beta=0.5), lambda c, a, b: 0.5 * c + a @ b, [c, a, b])
    rounded_once(ops.baddbmm(c[:1], a, b, alpha=-2), lambda c, a, b, alpha: c + alpha * (a @ b), [c[:1], a, b], -2)
    nothing = torch.full((n,), torch.nan, dtype=dtype)  # of which nothing is taken
    assert torch.equal(ops.baddbmm(nothing, a, b, beta=0), ops.bmm(a, b))
    assert not many or torch.equal(ops.addmm(nothing, a[0], b[0], beta=0), ops.mm(a[0], b[0]))


@SIXTEEN
@settings(deadline=None)
@given(many=st.integers(1, 3), m=sizes, k=sizes, n=sizes)
def test_copies_are_of_one_piece(dtype: torch.dtype, many: int, m: int, k: int, n: int) -> None:
    copied = [0]
    widened = torch.Tensor.float

    def watched(x: Tensor) -> Tensor:
        copied.append(x.numel())
        return widened(x)

    a, b, c = drawn((many, m, k), dtype, 0, 0), drawn((1, k, n), dtype, 1, 0).expand(many, k, n), drawn((many, m, n), dtype, 2, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", watched)
        ops.mm(a[0], b[0]), ops.accumulate_mm(c[0], a[0], b[0]), ops.bmm(a, b), ops.baddbmm(c, a, b)
    assert max(copied) <= 12 and (len(copied) > 8 or not many * m * k * n)


def test_what_cannot_be_seen_as_pieces_is_rounded_once_too() -> None:
    """The long dimension is the one that is summed over: nothing is rounded between its pieces."""
    a, b = torch.ones(1, 4096, dtype=torch.bfloat16), torch.ones(4096, 1, dtype=torch.bfloat16)
    assert ops.mm(a, b).item() == 4096 and ops.accumulate_mm(torch.ones(1, 1, dtype=torch.bfloat16), a, b).item() == 4096


@SIXTEEN
def test_rows_of_experts(dtype: torch.dtype) -> None:
    x, w, ids = drawn((6, 4), dtype, 0, 0), drawn((3, 4, 5), dtype, 1, 0), torch.tensor([2, 0, 2, 2, 0, 0])
    rounded_once(ops.routed_mm(x, w, ids), lambda x, w: torch.stack([row @ w[e] for row, e in zip(x, ids.tolist(), strict=True)]), [x, w])
    g = drawn((6, 5), dtype, 2, 0)
    rounded_once(ops.routed_outer(x, g, ids, 3), lambda x, g: torch.stack([x[ids == e].mT @ g[ids == e] for e in range(3)]), [x, g])


def test_float32_and_small_ones_are_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = drawn((7, 5), torch.float32, 0, 0), drawn((5, 3), torch.float32, 1, 0)
    assert torch.equal(ops.mm(a, b), a @ b) and torch.equal(ops.bmm(a[None], b[None]), torch.bmm(a[None], b[None]))
    assert torch.equal(ops.addmm(b[0], a, b), torch.addmm(b[0], a, b)) and torch.equal(ops.baddbmm(b[0], a[None], b[None]), torch.baddbmm(b[0], a[None], b[None]))
    monkeypatch.setattr(products, "_mm", None)
    for name, least in (("_LEAST", 106), ("_FEW", 4)):
        with monkeypatch.context() as patch:
            patch.setattr(products, name, least)
            assert torch.equal(ops.mm(a.bfloat16(), b.bfloat16()), a.bfloat16() @ b.bfloat16())  # so are small ones
            with pytest.raises(TypeError):
                ops.mm(a.bfloat16(), torch.cat([b, b], 1).bfloat16())


def test_one_op_where_ops_are_counted() -> None:
    seen = []

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    a, b = drawn((2, 7, 5), torch.bfloat16, 0, 0), drawn((2, 5, 3), torch.bfloat16, 1, 0)
    with Counting():
        ops.mm(a[0], b[0]), ops.bmm(a, b)
    assert [op for op in seen if "select" not in op] == ["aten.mm.default", "aten.bmm.default"]


def test_what_does_not_fit_torch_refuses() -> None:
    a, b = drawn((7, 5), torch.bfloat16, 0, 0), drawn((6, 3), torch.bfloat16, 1, 0)
    c, fits = torch.zeros(7, 3), b[:5]
    refused: list[Callable[[], Tensor]] = [
        *(lambda y=y: ops.mm(a, y) for y in (b, fits.half(), fits.float(), fits[0], fits[None])),
        lambda: ops.mm(a, fits, out=c), lambda: ops.addmm(c, a, fits), lambda: ops.addmm(c[0], a, fits), lambda: ops.accumulate_mm(c, a, fits),
        lambda: ops.mm(torch.ones(1, 24).bfloat16(), torch.ones(36, 1).bfloat16()),  # in pieces the rows beyond would be seen by none
        lambda: ops.bmm(a, fits), lambda: ops.bmm(a[None], torch.stack([fits] * 2)), lambda: ops.baddbmm(c[None], a[None], fits[None]),
    ]  # fmt: skip
    for wrong in refused:
        with pytest.raises(RuntimeError):
            wrong()
    assert not c.any()


HAS: list[tuple[dict[str, Any], list[torch.dtype]]] = [
    ({"architecture": "x86_64"}, [torch.bfloat16, torch.float16]),
    ({"architecture": "x86_64", "avx512_bf16": True, "amx_fp16": False}, [torch.float16]),
    ({"architecture": "x86_64", "amx_bf16": True, "avx512_fp16": True}, []),
    ({"architecture": "aarch64"}, []),
    ({}, []),
]


@pytest.mark.parametrize(("has", "want"), HAS)
def test_which_dtypes_a_cpu_has_no_instructions_for(has: dict[str, Any], want: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    real = EMULATED.__wrapped__
    assert [dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64) if real(dtype)] == want


@pytest.mark.parametrize("plan", ["bf16+mb2", "mb2"])
def test_a_compiled_step_runs_them(plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    inner = products._mm

    def watched(a: Tensor, b: Tensor, *others: Any, **more: Any) -> Tensor:
        seen.append(a.dtype)
        return inner(a, b, *others, **more)

    monkeypatch.setattr(products, "_mm", watched)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    step = deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, x: m(x).square().mean())
    step(torch.randn(4, 6))
    source = step.programs.current().executables[0].source
    if "bf16" in plan:
        assert set(seen) == {torch.bfloat16} and len(seen) >= 10 and "torch.mm(" not in source and "torch.addmm(" not in source
    else:
        assert not seen and "ops.mm(" not in source and "ops.addmm(" not in source

"""C++ for attention: what torch's kernels and plain products compute, for any sizes, strides and sharing of heads, forward and backward; and where it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import needs
import pytest
import torch
from test_cpp_nests import compiled, kernel_of
from torch import Tensor

from deepseed.codegen import cpp_attention, cpp_files, inductor
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.ops.attention import sdpa, sdpa_backward
from deepseed.passes.fuse_products import alone

pytestmark = needs.compiler
DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
Code = Callable[..., Sequence[Tensor]]
Sizes = tuple[int, int, int, int, int, int, int]  # batch, heads, kv heads, queries, keys, width, width of values
SIZES: dict[str, tuple[Sizes, bool]] = {
    "one of each": ((1, 1, 1, 1, 1, 1, 1), True),
    "shared heads": ((2, 4, 2, 40, 40, 16, 16), True),
    "all keys": ((2, 3, 3, 40, 40, 16, 16), False),
    "no whole vectors": ((1, 6, 2, 37, 53, 11, 7), False),
    "more queries than keys": ((1, 2, 1, 70, 33, 8, 24), True),
    "fewer queries than keys": ((1, 2, 2, 5, 90, 24, 8), True),
    "longer than a block": ((1, 2, 1, 300, 300, 4, 4), True),
    "wider than a block": ((2, 2, 1, 70, 150, 137, 150), True),
    "a block and a row": ((1, 2, 1, 65, 129, 65, 33), False),
}
SCALE = 0.3


def lines(dtype: str, sizes: Sizes, causal: bool) -> tuple[str, str]:
    b, h, kv, s, t, d, e = sizes
    wide = "f64" if dtype == "f64" else "f32"
    q, k, v, o, lse = f"{dtype}[{b}, {h}, {s}, {d}]", f"{dtype}[{b}, {kv}, {t}, {d}]", f"{dtype}[{b}, {kv}, {t}, {e}]", f"{dtype}[{b}, {h}, {s}, {e}]", f"{wide}[{b}, {h}, {s}]"
    given, how = f'%q : {q} batch "q"\n%k : {k} batch "k"\n%v : {v} batch "v"\n', f"causal={str(causal).lower()}, scale={SCALE}"
    forward = f'{given}%o, %l = sdpa(%q, %k, %v, {how}) : {o}, {lse}\nreturn %o output "o"\nreturn %l output "l"\n'
    given = f'%g : {o} batch "g"\n{given}%o : {o} batch "o"\n%l : {lse} batch "l"\n'
    backward = f'{given}%dq, %dk, %dv = sdpa_backward(%g, %q, %k, %v, %o, %l, {how}) : {q}, {k}, {v}\nreturn %dq output "dq"\nreturn %dk output "dk"\nreturn %dv output "dv"\n'
    return forward, backward


def operands(dtype: str, sizes: Sizes, turned: bool) -> list[Tensor]:
    """q, k, v, gradient; ``turned``: heads lie inside rows, as behind a projection."""
    b, h, kv, s, t, d, e = sizes
    torch.manual_seed(0)
    shapes = [(b, h, s, d), (b, kv, t, d), (b, kv, t, e), (b, h, s, e)]
    made = [torch.randn(x, dtype=torch.float64).to(DTYPES[dtype]) for x in shapes]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) if turned else x for x in made]


NARROW = {"f32": list(SIZES)[1:], "bf16": ["shared heads", "no whole vectors"], "f16": ["shared heads", "no whole vectors"]}
CASES = [("f64", case, turned) for case in SIZES for turned in (True, False)] + [(dtype, case, True) for dtype in NARROW for case in NARROW[dtype]]


@pytest.fixture(scope="module")
def codes(kernels_folder: Path) -> dict[tuple[str, str, bool], tuple[Code, Code]]:
    """Forward and backward of each case, all in one library."""
    wanted = []
    for n, (dtype, case, turned) in enumerate(CASES):
        (sizes, causal), (q, k, v, g) = SIZES[case], operands(dtype, SIZES[case][0], turned)
        _, h, _, s, _, _, e = sizes
        out = (s * h * e, e, h * e, 1)
        for way, text, xs in zip(("forward", "backward"), lines(dtype, sizes, causal), ((q, k, v), (g, q, k, v)), strict=True):
            strides = [x.stride() for x in xs] + ([out, (h * s, s, 1)] if way == "backward" else [])
            k = kernel_of(text, strides)
            wanted.append(replace(k, name=f"{way}_{n}", source=k.source.replace(k.name, f"{way}_{n}")))
    said: list[str] = []
    made = iter(cpp_files.compiled(wanted, kernels_folder, said.append))
    assert not said
    return {case: (next(made), next(made)) for case in CASES}


def both(codes: dict[tuple[str, str, bool], tuple[Code, Code]], dtype: str, case: str, turned: bool) -> tuple[list[Tensor], list[Tensor]]:
    """out, logsumexp and gradients: of C++, and of ops in float64 on the same numbers."""
    (sizes, causal), (forward, backward) = SIZES[case], codes[dtype, case, turned]
    q, k, v, g = operands(dtype, sizes, turned)
    out, lse = forward(q, k, v)
    grads = backward(g, q, k, v, out, lse)
    wide = [x.double().contiguous() for x in (q, k, v, g)]
    exact = sdpa(*wide[:3], None, causal, SCALE)
    slopes = sdpa_backward(wide[3], *wide[:3], None, *exact, causal, SCALE)
    return [out, lse, *grads], [*exact, *slopes]


@pytest.mark.parametrize("case", SIZES)
def test_attention_is_that_of_the_ops(case: str, codes: dict[tuple[str, str, bool], tuple[Code, Code]]) -> None:
    """float64: sums in another order."""
    for turned in (True, False):
        for a, b in zip(*both(codes, "f64", case, turned), strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "least"), [("f32", 2**-20), ("bf16", 2**-8), ("f16", 2**-11)])
def test_16_bits_are_computed_in_32(dtype: str, least: float, codes: dict[tuple[str, str, bool], tuple[Code, Code]]) -> None:
    """Of the largest number: half a unit of the last bit of what is rounded once, and the rounding of %o, which the backward reads."""
    for case in NARROW[dtype]:
        for a, b in zip(*both(codes, dtype, case, True), strict=True):
            assert float((a.double() - b).abs().max() / b.abs().max()) < 1.5 * least


def test_threads_change_no_bit(codes: dict[tuple[str, str, bool], tuple[Code, Code]]) -> None:
    one, _ = both(codes, "f32", "shared heads", True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many, _ = both(codes, "f32", "shared heads", True)
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, one, many))


@pytest.mark.parametrize("dtype", ["f64", "f32", "bf16"])
@pytest.mark.turn
def test_elements_that_lie_apart(dtype: str, tmp_path: Path) -> None:
    """Columns of a matrix as rows of keys, values and gradients: the same bits as of rows that lie together."""
    sizes = (1, 4, 2, 37, 53, 19, 11)
    together = operands(dtype, sizes, False)
    apart = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in together]
    found = []
    for q, k, v, g in (together, apart):
        forward, backward = lines(dtype, sizes, True)
        out, lse = compiled(kernel_of(forward, [x.stride() for x in (q, k, v)]), tmp_path)(q, k, v)
        code = compiled(kernel_of(backward, [x.stride() for x in (g, q, k, v, out, lse)]), tmp_path)
        found.append([out, lse, *code(g, q, k, v, out, lse)])
    assert all(map(torch.equal, *found))


def test_one_tensor_as_keys_and_values(tmp_path: Path) -> None:
    text = '%q : f64[1, 2, 5, 4] batch "q"\n%k : f64[1, 2, 5, 4] batch "k"\n%o, %l = sdpa(%q, %k, %k, causal=true, scale=0.3) : f64[1, 2, 5, 4], f64[1, 2, 5]\nreturn %l output "l"\n'
    q, k = torch.randn(1, 2, 5, 4, dtype=torch.float64), torch.randn(1, 2, 5, 4, dtype=torch.float64)
    (lse,) = compiled(kernel_of(text), tmp_path)(q, k)
    torch.testing.assert_close(lse, sdpa(q, k, k, None, True, 0.3)[1], rtol=0.0, atol=1e-13)


MASKED = """%q : f32[1, 2, 5, 4] batch "q"
%k : f32[1, 2, 5, 4] batch "k"
%m : bool[1, 1, 5, 5] batch "m"
%o, %l = sdpa(%q, %k, %k, %m, causal=false, scale=0.5) : f32[1, 2, 5, 4], f32[1, 2, 5]
%o2, %l2 = sdpa(%q, %k, %k, causal=true, scale=0.5) : f32[1, 2, 5, 4], f32[1, 2, 5]
return %o output "o"
return %o2 output "p"
"""


def test_attention_without_a_mask_is_a_group() -> None:
    p = verify(alone(verify(parse("program p mesh() facts()\n" + "".join(f'{line} {{phase="forward"}}\n' if " = " in line else f"{line}\n" for line in MASKED.splitlines())))))
    assert [op.kernel for op in p.ops] == ["", "o2"]


def test_attention_with_a_mask_is_refused() -> None:
    k = kernel_of("\n".join(line for line in MASKED.splitlines() if "2" not in line.split("=")[0] and '"p"' not in line) + "\n")
    with pytest.raises(CodegenError, match="attention with a mask"):
        cpp_attention.source(k)


@pytest.mark.parametrize("back_end", [cpp_files.compiled, inductor.compiled])
def test_every_back_end_has_attention(back_end: Callable[..., list[Code]], tmp_path: Path) -> None:
    """Inductor's runs torch's kernel, and compiles nothing for it."""
    k: Kernel = kernel_of(lines("f64", (1, 2, 1, 6, 6, 4, 4), True)[0])
    said: list[str] = []
    (code,) = back_end([k], tmp_path, said.append)
    xs = operands("f64", (1, 2, 1, 6, 6, 4, 4), False)[:3]
    torch.testing.assert_close(tuple(code(*xs)), sdpa(*xs, None, True, SCALE), rtol=0.0, atol=1e-13)
    assert not said

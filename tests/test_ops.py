"""The ops' meanings in torch: own ops against aten, shards against the whole, attention kernels against plain products."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deepseed import ops
from deepseed.ir.layout import Layout, Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Op, Program, Ref, Type
from deepseed.ir.text import parse
from deepseed.ops import OpError, attention, evaluate, run
from deepseed.ops.table import _FAST, arguments, overload

F64 = torch.float64


def program(*lines: str) -> Program:
    return parse("program p mesh() facts()\n" + "\n".join(lines))


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


OWN: list[tuple[str, str, Callable[[Tensor], Tensor]]] = [
    ("reshape(%x)", "f64[3, 8]", lambda x: x.view(3, 8)),
    ("permute(%x, dims=[1, 0])", "f64[6, 4]", lambda x: x.t()),
    ("expand(%x)", "f64[2, 4, 6]", lambda x: x.expand(2, 4, 6)),
    ("cast(%x)", "bf16[4, 6]", lambda x: x.bfloat16()),
    ("full(value=2.5)", "f32[3]", lambda x: torch.full((3,), 2.5)),
    ("full(value=true)", "bool[3]", lambda x: torch.ones(3, dtype=torch.bool)),
    ("iota(start=3, step=-2)", "i64[4]", lambda x: torch.tensor([3, 1, -1, -3])),
    ("iota(start=0, step=1, index=[[[2, 1, 1], [3]]])", "i64[3]", lambda x: torch.tensor([3, 4, 5])),
    ("iota(start=1, step=2, index=[[[3], [2, 0, 1], [2]]])", "f64[6]", lambda x: (1 + 2 * torch.tensor([0, 1, 4, 5, 8, 9])).double()),
    ("slice(%x, dim=1, start=1, step=2)", "f64[4, 3]", lambda x: x[:, 1::2]),
    ("slice(%x, dim=0, start=2, step=1)", "f64[0, 6]", lambda x: x[2:2]),
    ("unslice(%x, dim=0, start=1, step=2)", "f64[8, 6]", lambda x: torch.zeros(8, 6, dtype=F64).index_copy(0, torch.tensor([1, 3, 5, 7]), x)),
    ("pad(%x, pads=[1, 0, 2, 3], value=-1.0)", "f64[5, 11]", lambda x: F.pad(x, (2, 3, 1, 0), value=-1.0)),
    ("cat([%x, %x], dim=1)", "f64[4, 12]", lambda x: torch.cat([x, x], 1)),
    ("sum(%x, dims=[0], keepdim=true)", "f64[1, 6]", lambda x: x.sum(0, keepdim=True)),
    ("sum(%x, dims=[], keepdim=false)", "f32[4, 6]", lambda x: x.float()),
    ("sum(%x, dims=[0, 1], keepdim=false)", "f64[]", lambda x: x.sum()),
    ("amax(%x, dims=[1], keepdim=false)", "f64[4]", lambda x: x.amax(1)),
    ("amax(%x, dims=[], keepdim=false)", "f64[4, 6]", lambda x: x),
    ]


@pytest.mark.parametrize(("text", "type_", "want"), OWN, ids=[case[0] for case in OWN])
def test_own_op(text: str, type_: str, want: Callable[[Tensor], Tensor]) -> None:
    x = rand(4, 6)
    p = program('%x : f64[4, 6] batch "x"', f'%y = {text} : {type_} {{phase="forward"}}', 'return %y output "0"')
    y = evaluate(p, {"x": x})["y"]
    assert y.dtype == want(x).dtype and torch.equal(y, want(x))


def test_indexed_ops_on_shards_sum_up_to_the_whole() -> None:
    w, g = rand(6, 3), rand(2, 4, 3)
    ids = torch.tensor([[0, 5, 3, 3], [1, 0, 4, 2]])
    halves = (w[:3], 0), (w[3:], 3)
    assert torch.equal(sum(ops.embedding(part, ids, start) for part, start in halves), F.embedding(ids, w))
    whole = ops.embedding_backward(g, ids, 6)
    assert torch.equal(torch.cat([ops.embedding_backward(g, ids, 3, start) for start in (0, 3)]), whole)
    torch.testing.assert_close(whole, torch.zeros(6, 3, dtype=F64).index_add(0, ids.view(-1), g.view(-1, 3)), rtol=1e-14, atol=1e-14)
    x, index = rand(2, 6), torch.tensor([[5, 0, 1], [2, 2, 3]])
    parts = [ops.gather(x[:, s : s + 2], index, 1, s) for s in (0, 2, 4)]
    assert torch.equal(sum(parts), x.gather(1, index))
    src = rand(2, 3)
    parts = [ops.scatter_add(x[:, s : s + 2], index, src, 1, s) for s in (0, 2, 4)]
    assert torch.equal(torch.cat(parts, 1), x.scatter_add(1, index, src))


def test_shards_do_not_spread_infinities() -> None:
    w = torch.full((3, 2), torch.inf)
    assert torch.equal(ops.embedding(w, torch.tensor([7]), 0), torch.zeros(1, 2))
    assert torch.equal(ops.gather(w, torch.full((1, 2), 9), 0, 0), torch.zeros(1, 2))


# attention ----------------------------------------------------------------------------------------------------------


def masks(b: int, h: int, s: int, t: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    some = torch.rand(b, 1, s, t, generator=generator) > 0.3
    none_left = some.clone()
    none_left[0, 0, 1] = False
    return {
        "none": None,
        "bool": torch.rand(b, h, s, t, generator=generator) > 0.3,
        "row": torch.rand(s, t, generator=generator) > 0.2,
        "padding": torch.arange(t).expand(b, 1, 1, t) < t - 1,
        "added": torch.randn(b, h, s, t, generator=generator, dtype=F64),
        "no key left": none_left,
    }


@pytest.mark.parametrize("kernel", ["fused", "math"])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize(("s", "t"), [(5, 5), (3, 7), (40, 40)])
@pytest.mark.parametrize("mask", [*masks(2, 4, 5, 5), "causal"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 2e-5), (torch.bfloat16, 6e-2)], ids=["f64", "f32", "bf16"])
def test_sdpa(monkeypatch: pytest.MonkeyPatch, kernel: str, heads: int, kv: int, s: int, t: int, mask: str, dtype: torch.dtype, tolerance: float) -> None:
    if kernel == "math":
        monkeypatch.setattr(attention, "_kernel", lambda *_: "math")
    q, k, v = (rand(2, h, n, 8).to(dtype).requires_grad_() for h, n in ((heads, s), (kv, t), (kv, t)))
    g = rand(2, heads, s, 8).to(dtype)
    m, causal = masks(2, heads, s, t).get(mask), mask == "causal"
    m = m.to(dtype) if m is not None and m.is_floating_point() else m
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=m, is_causal=causal, scale=0.3, enable_gqa=True)
    grads = torch.autograd.grad(want, (q, k, v), g)
    with torch.no_grad():
        out, lse = ops.sdpa(q, k, v, m, causal, 0.3)
        found = ops.sdpa_backward(g, q, k, v, m, out, lse, causal, 0.3)
    assert lse.shape == (2, heads, s) and lse.dtype is (F64 if dtype is F64 else torch.float32)
    for a, b in zip((out, *found), (want, *grads), strict=True):
        assert a.dtype is dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# aten ---------------------------------------------------------------------------------------------------------------

POSITIVE = {"log", "log1p", "sqrt", "rsqrt", "pow"}
SAMPLES: dict[str, list[Any]] = {
    "Tensor": [rand(3, 4), rand(3, 4) + 0.1], "Scalar": [rand(3, 4), 0.5], "": [rand(3, 4)], "mm": [rand(3, 4), rand(4, 2)], "bmm": [rand(2, 3, 4), rand(2, 4, 2)],
    "addmm": [rand(2), rand(3, 4), rand(4, 2)], "baddbmm": [rand(2, 3, 2), rand(2, 3, 4), rand(2, 4, 2)], "where.self": [rand(3, 4) > 0, rand(3, 4), rand(4)],
    "maximum": [rand(3, 4), rand(4)], "minimum": [rand(3, 4), rand(4)], "masked_fill.Scalar": [rand(3, 4), rand(3, 4) > 0, 2.0],
    "masked_fill.Tensor": [rand(3, 4), rand(3, 4) > 0, rand(1)[0]], "addcmul": [rand(3, 4), rand(3, 4), rand(4)], "addcdiv": [rand(3, 4), rand(3, 4), rand(4) + 3],
    "lerp.Scalar": [rand(3, 4), rand(3, 4), 0.3], "lerp.Tensor": [rand(3, 4), rand(3, 4), rand(3, 4)], "pow.Tensor_Scalar": [rand(3, 4).abs(), 3],
    "pow.Tensor_Tensor": [rand(3, 4).abs(), rand(4)], "pow.Scalar": [2.0, rand(3, 4)], "convolution": [rand(2, 3, 5, 5), rand(4, 3, 3, 3), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1],
    "native_layer_norm": [rand(3, 4), [4], rand(4), rand(4), 1e-5], "cumsum": [rand(3, 4), 1], "topk": [rand(3, 4), 2], "index_select": [rand(3, 4), 0, torch.tensor([1, 1])],
    "_softmax": [rand(3, 4), 1, False], "_log_softmax": [rand(3, 4), 1, False], "bitwise_not": [rand(3, 4) > 0], "div.Tensor_mode": [rand(3, 4), rand(4)],
    **{f"bitwise_{n}.Tensor": [rand(3, 4) > 0, rand(4) > 0] for n in ("and", "or", "xor")}, "logical_and": [rand(3, 4) > 0, rand(4) > 0], "logical_or": [rand(3, 4) > 0, rand(4) > 0],
}  # fmt: skip


@pytest.mark.parametrize("target", sorted(_FAST))
def test_fast_binding_is_the_overload(target: str) -> None:
    name = target.removeprefix("aten.")
    packet, _, which = name.partition(".")
    sample = SAMPLES[name] if name in SAMPLES else SAMPLES[which]
    sample = [x.abs() if packet in POSITIVE and isinstance(x, Tensor) else x for x in sample]
    kwargs = {"rounding_mode": "floor"} if which == "Tensor_mode" else {}
    a, b = _FAST[target](*sample, **kwargs), overload(target)(*sample, **kwargs)
    for x, y in zip(*(((r,) if isinstance(r, Tensor) else r) for r in (a, b)), strict=True):
        assert x.dtype == y.dtype and torch.equal(x, y)


def test_any_aten_overload_runs() -> None:
    p = program(
        '%x : f64[3, 4] batch "x"',
        '%v, %i = aten.sort(%x, 1, true) : f64[3, 4], i64[3, 4] {phase="forward"}',
        '%c = aten._to_copy(%v, dtype="f32") : f32[3, 4] {phase="forward"}',
        '%y = aten.index.Tensor(%c, [none, %k]) : f32[3, 2] {phase="forward"}',
        'return %y output "0"',
    )
    p = Program(p.name, p.mesh, (*p.inputs, type(p.inputs[0])("k", Type("i64", (2,)), "constant", "k")), p.ops, p.outputs)
    x = rand(3, 4)
    assert torch.equal(evaluate(p, {"x": x, "k": torch.tensor([0, 3])})["y"], x.sort(1, descending=True)[0].float()[:, [0, 3]])


def test_results_that_were_not_asked_for_are_left_out() -> None:
    x, w, g = rand(2, 3, 5, 5), rand(4, 3, 3, 3), rand(2, 4, 3, 3)
    args = (Ref("g"), Ref("x"), Ref("w"), None, (1, 1), (0, 0), (1, 1), False, (0, 0), 1, (False, True, False))
    op = Op(("dw",), "aten.convolution_backward", args, (Type("f64", (4, 3, 3, 3)),))
    (dw,) = run(op, (g, x, w), Mesh())
    assert dw.shape == w.shape
    assert ops.present((None, dw, None)) is dw and ops.present(dw) is dw
    assert ops.present((None, dw, x)) == (dw, x)


def test_fused_optimizers_run() -> None:
    """Parameter and moments anew, the operands untouched; torch.optim is the yardstick."""
    w, g = rand(4, 3), rand(3, 4).t()
    p = torch.nn.Parameter(w.clone())
    p.grad = g
    torch.optim.AdamW([p], lr=0.1).step()
    options = (("states", ("step", "exp_avg", "exp_avg_sq")), ("betas", (0.9, 0.999)), ("eps", 1e-8), ("weight_decay", 0.01))
    names = ("w", "g", "step", "m", "v", "lr")
    op = Op(("w2", "m2", "v2"), "optim.adamw", tuple(map(Ref, names)), (Type("f64", (4, 3)),) * 3, options)
    new, m, _ = run(op, (w, g, torch.tensor(1.0), torch.zeros_like(w), torch.zeros_like(w), torch.tensor(0.1, dtype=F64)), Mesh())
    torch.testing.assert_close(new, p.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(m, 0.1 * g, rtol=1e-12, atol=1e-12)
    assert torch.equal(w, rand(4, 3))


def test_local_shapes_on_a_mesh() -> None:
    mesh = Mesh((("tp", 2),))
    op = Op(("y",), "reshape", (Ref("x"),), (Type("f64", (4, 6), Layout.of(tp=Split(0))),))
    assert run(op, (rand(12),), mesh)[0].shape == (2, 6)


def test_global_meaning_of_a_lowered_program() -> None:
    """evaluate reads whole values: reshards and collectives change nothing."""
    p = parse(
        'program p mesh(tp=2) facts(lowered)\n%x : f64[4@tp] batch "x"\n%s = all_gather.start(%x, axis="tp") : f64[4] {phase="forward"}\n'
        '%w = wait(%s) : f64[4] {phase="forward"}\n%y = aten.neg(%w) : f64[4] {phase="forward"}\nreturn %y output "0"\n'
    )
    assert torch.equal(evaluate(p, {"x": rand(4)})["y"], -rand(4))


def test_errors_name_the_op_and_both_sides() -> None:
    op = Op(("y",), "aten.mm", (Ref("a"), Ref("b")), (Type("f64", (3, 2)),), path="layers.0.mlp", line="m.py:4")
    with pytest.raises(OpError, match=r"%y = aten.mm at layers.0.mlp \(m.py:4\) on f64\[3, 4\], f64\[5, 2\]"):
        run(op, (rand(3, 4), rand(5, 2)), Mesh())
    wrong = Op(("y",), "aten.mm", (Ref("a"), Ref("b")), (Type("f32", (3, 3)),))
    with pytest.raises(OpError, match=r"came out as f64\[3, 2\], its type says f32\[3, 3\]"):
        run(wrong, (rand(3, 4), rand(4, 2)), Mesh())
    with pytest.raises(OpError, match=r"no op is called aten\.nothing"):
        run(Op(("y",), "aten.nothing", (), (Type("f64", ()),)), (), Mesh())
    with pytest.raises(OpError, match="no value for input %x"):
        evaluate(program('%x : f64[] batch "x"', 'return %x output "0"'), {})


def test_values_are_freed_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    p = program(
        '%x : f64[4] batch "x"',
        '%a = aten.neg(%x) : f64[4] {phase="forward"}',
        '%b = aten.exp(%a) : f64[4] {phase="forward"}',
        '%c = aten.abs(%b) : f64[4] {phase="forward"}',
        'return %c output "0"',
    )
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    whole = ops._run

    def counted(op: Op, operands: Any, shapes: Any) -> Any:
        alive.append(sum(r() is not None for r in made))
        out = whole(op, operands, shapes)
        made.extend(weakref.ref(t) for t in out)
        return out

    monkeypatch.setattr(ops, "_run", counted)
    evaluate(p, {"x": rand(4)})
    assert alive == [0, 1, 1]


def test_arguments_keep_their_places() -> None:
    op = Op(("y",), "aten.add.Tensor", (Ref("a"), Ref("b")), (Type("f64", ()),), (("alpha", 2), ("dtype", "bf16")))
    args, kwargs = arguments(op, (rand(1), rand(2)))
    assert [a.shape for a in args] == [(1,), (2,)] and kwargs == {"alpha": 2, "dtype": torch.bfloat16}


def test_sized_ops_take_their_shape_from_the_result() -> None:
    x = rand(2, 3, 4)
    for name, extra in (("upsample_nearest1d", ()), ("upsample_linear1d", (False,))):
        grad = getattr(torch.ops.aten, name)(x, [6], *extra)
        want = getattr(torch.ops.aten, f"{name}_backward")(grad, [6], [2, 3, 4], *extra)
        given = ", ".join(["[6]", '"shape"', *(str(e).lower() for e in extra)])
        p = program('%g : f64[2, 3, 6] batch "g"', f'%y = sized.{name}_backward(%g, given=[{given}]) : f64[2, 3, 4] {{phase="backward"}}', 'return %y output "0"')
        assert torch.equal(evaluate(p, {"g": grad})["y"], want)


def test_sized_ops_are_those_with_a_rule() -> None:
    from deepseed.ops.own import SIZED
    from deepseed.rules import RULES

    assert {f"sized.{name}" for name in SIZED} == {target for target in RULES if target.startswith("sized.")}

"""Canonicalize: texts in and out, and every decomposition against the aten op in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from decomposition_cases import bag_cases, product_cases
from torch import Tensor

from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Arg, Input, Op, Output, Program, Ref, Type
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.ops import dtype_name, evaluate, overload
from deepseed.passes.canonicalize import DECOMPOSITIONS, canonicalize
from deepseed.passes.simplify import SIMPLIFICATIONS

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


def type_of(x: Tensor) -> Type:
    return Type(dtype_name(x.dtype), tuple(x.shape))


def program_of(target: str, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> tuple[Program, dict[str, Tensor]]:
    """The program of one aten op and its operands."""
    values: dict[str, Tensor] = {}

    def plain(a: Any) -> Arg:
        if isinstance(a, Tensor):
            values[f"x{len(values)}"] = a
            return Ref(f"x{len(values) - 1}")
        if isinstance(a, list | tuple):
            return tuple(plain(x) for x in a)
        return dtype_name(a) if isinstance(a, torch.dtype) else a

    plain_args = tuple(plain(a) for a in args)
    plain_kwargs = tuple((k, plain(v)) for k, v in (kwargs or {}).items())
    out = overload(target)(*args, **(kwargs or {}))
    results = [r for r in ((out,) if isinstance(out, Tensor) else out) if r is not None]
    names = tuple(f"y{i}" if i else "y" for i in range(len(results)))
    op = Op(names, target, plain_args, tuple(map(type_of, results)), plain_kwargs, "forward", "m", "train.py:1")
    inputs = tuple(Input(n, type_of(v), "batch", n) for n, v in values.items())
    outputs = tuple(Output(Ref(n), "output", n) for n in names)
    return Program("one", Mesh(), inputs, (op,), outputs, frozenset({"captured"})), values


def check(target: str, args: Sequence[Any], kwargs: dict[str, Any] | None = None, tolerance: float = 1e-12, kept: bool = False) -> Program:
    """The canonical program gives what the op gives; nothing of ``target`` is left."""
    p, values = program_of(target, args, kwargs)
    before = evaluate(p, values)
    q = verify(canonicalize(p))
    assert parse(str(q)) == q
    assert kept or all(op.target != target for op in q.ops)
    after = evaluate(q, values)
    for old, new in zip(p.outputs, q.outputs, strict=True):
        x, y = before[old.ref.name], after[new.ref.name]
        assert x.dtype == y.dtype and x.shape == y.shape
        if target.startswith("aten._embedding_bag") and old != p.outputs[0]:
            break  # bag numbers and sizes are for its own backward, and partly left as they came
        torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance, equal_nan=True)
    return q


def rand(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


X = rand(4, 6)
MASKED = X.masked_fill(rand(4, 6) > 0.8, -torch.inf)
LOGP = torch.log_softmax(rand(7, 5), 1)
LABELS = torch.tensor([0, 4, -100, 2, -100, 1, 3])
IMAGE = rand(2, 6, 3, 5)
LABELS2D = torch.tensor([0, 1, -100, 4, 5]).repeat(2, 3, 1)
WEIGHT6 = torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(0)) + 0.5
UNIT = torch.sigmoid(rand(4, 6))


def norm_cases() -> list[tuple[str, list[Any]]]:
    cases: list[tuple[str, list[Any]]] = []
    aten = torch.ops.aten
    for shape, normalized in (((2, 3, 6), [6]), ((2, 3, 6), [3, 6]), ((6,), [6])):
        x, w, b, g = rand(*shape), rand(*normalized), rand(*normalized) + 1, rand(*shape) * 2
        for weight, bias in ((w, b), (w, None), (None, None)):
            cases.append(("aten.native_layer_norm", [x, normalized, weight, bias, 1e-5]))
            _, mean, rstd = aten.native_layer_norm(x, normalized, weight, bias, 1e-5)
            mask = [True, weight is not None, bias is not None]
            cases.append(("aten.native_layer_norm_backward", [g, x, normalized, mean, rstd, weight, bias, mask]))
            if bias is None:
                for eps in (None, 1e-6):
                    cases.append(("aten._fused_rms_norm", [x, normalized, weight, eps]))
    n, c, inner = 2, 6, 15
    for weight, bias in ((WEIGHT6, WEIGHT6 + 1), (None, None)):
        for groups in (1, 2, 6):
            cases.append(("aten.native_group_norm", [IMAGE, weight, bias, n, c, inner, groups, 1e-5]))
            _, mean, rstd = aten.native_group_norm(IMAGE, weight, bias, n, c, inner, groups, 1e-5)
            mask = [True, weight is not None, bias is not None]
            cases.append(("aten.native_group_norm_backward", [IMAGE * 2 + 1, IMAGE, mean, rstd, weight, n, c, inner, groups, mask]))
        for x in (IMAGE, rand(8, 6)):
            rm, rv = rand(6), rand(6).abs() + 0.1
            for training in (True, False):
                cases.append(("aten._native_batch_norm_legit_functional", [x, weight, bias, rm, rv, training, 0.1, 1e-5]))
                mean, rstd = aten._native_batch_norm_legit_functional(x, weight, bias, rm, rv, training, 0.1, 1e-5)[1:3]
                mask = [True, weight is not None, bias is not None]
                cases.append(("aten.native_batch_norm_backward", [x * 2 + 1, x, weight, rm, rv, mean, rstd, training, 1e-5, mask]))
            cases.append(("aten._native_batch_norm_legit_no_training", [x, weight, bias, rm, rv, 0.1, 1e-5]))
            cases.append(("aten._native_batch_norm_legit.no_stats", [x, weight, bias, True, 0.1, 1e-5]))
            cases.append(("aten._batch_norm_with_update_functional", [x, weight, bias, rm, rv, 0.1, 1e-5]))
            reserve = aten._batch_norm_with_update_functional(x, weight, bias, rm, rv, 0.1, 1e-5)
            if weight is not None:
                saved = [rm, rv, reserve[1], reserve[2], True, 1e-5, [True, True, True], reserve[3]]
                cases.append(("aten.batch_norm_backward", [x * 2 + 1, x, weight, *saved]))
    return cases


def nll_cases() -> list[tuple[str, list[Any]]]:
    cases: list[tuple[str, list[Any]]] = []
    x2d = torch.log_softmax(IMAGE, 1)
    for suffix, x, labels, w in (("", LOGP, LABELS, WEIGHT6[:5]), ("", LOGP[0], torch.tensor(2), None), ("2d", x2d, LABELS2D, WEIGHT6)):
        for weight in (w, None):
            for reduction in (0, 1, 2):
                for ignore in (-100, 1):
                    valid = labels.masked_fill(labels == -100, ignore)
                    cases.append((f"aten.nll_loss{suffix}_forward", [x, valid, weight, reduction, ignore]))
                    out, total = overload(f"aten.nll_loss{suffix}_forward")(x, valid, weight, reduction, ignore)
                    g = torch.randn_like(out)
                    cases.append((f"aten.nll_loss{suffix}_backward", [g, x, valid, weight, reduction, ignore, total]))
    cases.append(("aten.nll_loss_forward", [LOGP, torch.full_like(LABELS, -100), None, 1, -100]))  # nothing is counted: nan
    return cases


def loss_cases() -> list[tuple[str, list[Any]]]:
    cases: list[tuple[str, list[Any]]] = []
    a, b = rand(4, 6) * 2, rand(4, 6) + 0.3
    for r in (0, 1, 2):
        g = rand(4, 6) if r == 0 else torch.tensor(0.7, dtype=F64)
        cases += [("aten.mse_loss", [a, b, r]), ("aten.mse_loss_backward", [g, a, b, r])]
        for beta in (0.5, 1.0):
            cases += [("aten.smooth_l1_loss", [a, b, r, beta]), ("aten.smooth_l1_loss_backward", [g, a, b, r, beta])]
            cases += [("aten.huber_loss", [a, b, r, beta]), ("aten.huber_loss_backward", [g, a, b, r, beta])]
        for weight in (None, UNIT + 1):
            x, t = UNIT.clone(), torch.sigmoid(b)
            x[0, 0], x[1, 1] = 0, 1
            cases.append(("aten.binary_cross_entropy", [x, t, weight, r]))
            cases.append(("aten.binary_cross_entropy_backward", [g, UNIT, t, weight, r]))
    cases += [("aten.mse_loss", [a, b]), ("aten.mse_loss", [a, b[:1]])]
    return cases


def convolution_cases() -> list[tuple[Any, ...]]:
    """Plain, grouped and strided, transposed; the op itself stays, without its bias."""
    cases: list[tuple[Any, ...]] = []
    for w, bias, options in (
        (rand(4, 6, 2, 3), rand(4), [[1, 1], [0, 0], [1, 1], False, [0, 0], 1]),
        (rand(4, 3, 2, 2), rand(4), [[2, 1], [1, 0], [1, 2], False, [0, 0], 2]),
        (rand(6, 4, 2, 3), rand(4), [[2, 1], [0, 1], [1, 1], True, [1, 0], 1]),
    ):
        cases.append(("aten.convolution", [IMAGE, w, bias, *options], None, 1e-12, True))
        out = overload("aten.convolution")(IMAGE, w, bias, *options)
        for mask in ([True, True, True], [False, True, False], [False, False, True], [True, False, True]):
            cases.append(("aten.convolution_backward", [out * 2 + 1, IMAGE, w, [4], *options, mask], None, 1e-12, True))
    return cases


CASES: list[tuple[Any, ...]] = [
    *convolution_cases(),
    ("aten.addmm", [rand(6), rand(4, 3), rand(3, 6)]),
    ("aten.addmm", [X, rand(4, 3), rand(3, 6)], {"beta": 0.5, "alpha": -2}),
    ("aten.addmm", [X * torch.nan, rand(4, 3), rand(3, 6)], {"beta": 0}),
    ("aten.baddbmm", [rand(2, 1, 6), rand(2, 4, 3), rand(2, 3, 6)], {"alpha": 0.3}),
    ("aten.linear", [rand(2, 4, 3), rand(6, 3), rand(6)]),
    ("aten.linear", [rand(3), rand(6, 3)]),
    ("aten.mv", [X, rand(6)]),
    ("aten.dot", [rand(6), rand(6) * 2]),
    ("aten.sum", [X]),
    ("aten.sum.dim_IntList", [X, [-1], True]),
    ("aten.sum.dim_IntList", [X > 0, [0]]),
    ("aten.sum.dim_IntList", [X, None]),
    ("aten.amax", [X, [0, -1]]),
    ("aten.max", [X]),
    ("aten.min", [X]),
    ("aten.amin", [X, [1], True]),
    ("aten.mean", [X]),
    ("aten.mean.dim", [X, [-1], True]),
    ("aten.mean.dim", [X.float(), [0]], {"dtype": F64}),
    ("aten.mean.dim", [rand(2, 3, 4), [0, 2]]),
    *[(f"aten.{n}", [X, unbiased]) for n in ("var", "std", "var_mean", "std_mean") for unbiased in (True, False)],
    *[(f"aten.{n}.dim", [X, [1], False, True]) for n in ("var", "std", "var_mean", "std_mean")],
    *[(f"aten.{n}.correction", [X, [0]], {"correction": c}) for n in ("var", "std", "var_mean", "std_mean") for c in (0, 1, 2.5, 4)],
    ("aten.var.correction", [X]),
    *[("aten.linalg_vector_norm", [X, p, dim, keep]) for p in (2, 1, 0, 3.5, float("inf")) for dim, keep in ((None, False), ([1], True))],
    ("aten.linalg_vector_norm", [X.float()], {"dtype": F64}),
    ("aten.norm.Scalar", [X, 2]),
    ("aten.norm.ScalarOpt_dim", [X, 2, [0], True]),
    ("aten.logsumexp", [X, [1]]),
    ("aten.logsumexp", [torch.full((2, 3), -torch.inf, dtype=F64), [0], True]),
    *[(f"aten.{n}", [x, d, False]) for n in ("_softmax", "_log_softmax") for x in (X, MASKED) for d in (0, -1)],
    ("aten._softmax", [torch.tensor(2.0, dtype=F64), 0, False]),
    *[(f"aten.{n}_backward_data", [X * 2, f(rand(4, 6), -1), -1, F64]) for n, f in (("_softmax", torch.softmax), ("_log_softmax", torch.log_softmax))],
    ("aten._safe_softmax", [torch.cat([MASKED, torch.full((1, 6), -torch.inf, dtype=F64)]), -1]),
    ("aten._safe_softmax", [X.float(), -1, F64]),
    *nll_cases(),
    *product_cases(),
    *bag_cases(),
    *loss_cases(),
    *norm_cases(),
    ("aten.embedding", [X, torch.tensor([[1, 3], [0, 0]]), 0]),
    ("aten.embedding_dense_backward", [rand(2, 2, 5), torch.tensor([[1, 3], [0, 0]]), 4, 0, False]),
    ("aten.embedding_dense_backward", [rand(2, 2, 5), torch.tensor([[1, 3], [0, 0]]), 4, -1, False]),
    ("aten.glu", [X, 0]),
    ("aten.glu_backward", [rand(4, 3), X, -1]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_decomposition_in_float64(case: Any) -> None:
    check(*case)


def test_every_decomposition_has_a_case() -> None:
    assert set(DECOMPOSITIONS) - {c[0] for c in CASES} == {
        "aten.l1_loss",  # PyTorch takes it apart itself
        "aten._fused_rms_norm_backward",  # has no CPU kernel: the next test
    }


def test_rms_norm_backward() -> None:
    x, w, g = rand(2, 3, 6).requires_grad_(), rand(6).requires_grad_(), rand(2, 3, 6) * 2
    out = torch.nn.functional.rms_norm(x, [6], w, 1e-6)
    want = torch.autograd.grad(out, (x, w), g)
    operands = {"g": g, "x": x.detach(), "rstd": torch.rsqrt(x.detach().square().mean(-1, keepdim=True) + 1e-6), "w": w.detach()}
    args = (Ref("g"), Ref("x"), (6,), Ref("rstd"), Ref("w"), (True, True))
    op = Op(("dx", "dw"), "aten._fused_rms_norm_backward", args, (type_of(x), type_of(w)))
    inputs = tuple(Input(n, type_of(v), "batch", n) for n, v in operands.items())
    outputs = tuple(Output(Ref(n), "output", n) for n in op.results)
    p = canonicalize(Program("one", Mesh(), inputs, (op,), outputs, frozenset({"captured"})))
    got = evaluate(p, operands)
    torch.testing.assert_close([got["dx"], got["dw"]], list(want), rtol=1e-12, atol=1e-12)


LOW = (
    "aten.native_layer_norm", "aten.native_layer_norm_backward", "aten._log_softmax", "aten._softmax", "aten.mean.dim",
    "aten._log_softmax_backward_data", "aten._softmax_backward_data", "aten.logsumexp", "aten.linalg_vector_norm", "aten.var.correction",
)  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c[0] in LOW and len(c) == 2], ids=lambda case: case[0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
def test_lower_precision(case: Any, dtype: torch.dtype) -> None:
    """The same steps in the same dtypes: float32 to rounding, bfloat16 to one unit in the last place."""

    def lower(a: Any) -> Any:
        return a.to(dtype) if isinstance(a, Tensor) and a.dtype is F64 else dtype if a is F64 else a

    check(case[0], [lower(a) for a in case[1]], tolerance=2e-6 if dtype is F32 else 2**-7)


# texts --------------------------------------------------------------------------------------------------------------


def canonical(*lines: str) -> Program:
    """The canonical form of a program given by its lines."""
    return verify(canonicalize(parse("program p mesh() facts(captured)\n" + "\n".join(lines))))


def test_softmax(golden: Callable[[object], None]) -> None:
    golden(canonical('%x : f32[4, 8] batch "x"', '%y = aten._softmax(%x, 1, false) : f32[4, 8] {at="attn", phase="forward", line="t.py:3"}', 'return %y output "0"'))


def test_layer_norm_in_bf16_computes_in_f32(golden: Callable[[object], None]) -> None:
    golden(
        canonical(
            '%x : bf16[2, 8] batch "x"',
            '%w : bf16[8] param "w"',
            '%y, %m, %r = aten.native_layer_norm(%x, [8], %w, none, 1e-05) : bf16[2, 8], f32[2, 1], f32[2, 1] {phase="forward"}',
            'return %y output "0"',
            'return %r output "1"',
        )
    )


def test_cross_entropy(golden: Callable[[object], None]) -> None:
    golden(
        canonical(
            '%x : f32[4, 8] batch "x"',
            '%t : i64[4] batch "t"',
            '%p = aten._log_softmax(%x, 1, false) : f32[4, 8] {phase="forward"}',
            '%loss, %n = aten.nll_loss_forward(%p, %t, none, 1, -100) : f32[], f32[] {phase="forward"}',
            '%one = full(value=1.0) : f32[] {phase="backward"}',
            '%dp = aten.nll_loss_backward(%one, %p, %t, none, 1, -100, %n) : f32[4, 8] {phase="backward"}',
            '%dx = aten._log_softmax_backward_data(%dp, %p, 1, "f32") : f32[4, 8] {phase="backward"}',
            'return %loss loss "loss"',
            'return %dx output "dx"',
        )
    )


def test_views_merge_and_copies_go(golden: Callable[[object], None]) -> None:
    golden(
        canonical(
            '%x : bf16[4, 6] batch "x"',
            '%a = reshape(%x) : bf16[24] {phase="forward"}',
            '%b = reshape(%a) : bf16[2, 12] {phase="forward"}',
            '%c = permute(%b, dims=[1, 0]) : bf16[12, 2] {phase="forward"}',
            '%d = permute(%c, dims=[1, 0]) : bf16[2, 12] {phase="forward"}',
            '%e = cast(%d) : f32[2, 12] {phase="forward"}',
            '%f = cast(%e) : bf16[2, 12] {phase="forward"}',
            '%g = aten.clone(%f) : bf16[2, 12] {phase="forward"}',
            '%h = aten.neg(%g) : bf16[2, 12] {phase="forward"}',
            '%i = aten.neg(%d) : bf16[2, 12] {phase="forward"}',
            '%j = aten.mul.Tensor(%h, %i) : bf16[2, 12] {phase="forward"}',
            'return %j output "0"',
        )
    )


def test_index_by_aranges_is_a_view(golden: Callable[[object], None]) -> None:
    golden(
        canonical(
            '%mask : bool[2, 5] batch "mask"',
            '%i = iota(start=0, step=1) : i64[2] {phase="forward"}',
            '%i4 = reshape(%i) : i64[2, 1, 1, 1] {phase="forward"}',
            '%j = iota(start=0, step=1) : i64[5] {phase="forward"}',
            '%wide = aten.index.Tensor(%mask, [%i4, %j]) : bool[2, 1, 1, 5] {phase="forward"}',
            '%j2 = reshape(%j) : i64[5, 1] {phase="forward"}',
            '%turned = aten.index.Tensor(%mask, [%i, %j2]) : bool[5, 2] {phase="forward"}',
            '%one = iota(start=1, step=2) : i64[2] {phase="forward"}',
            '%odd = aten.index.Tensor(%mask, [none, %one]) : bool[2, 2] {phase="forward"}',
            '%far = iota(start=1, step=1) : i64[2] {phase="forward"}',
            '%kept = aten.index.Tensor(%mask, [%i, %far]) : bool[2] {phase="forward"}',
            'return %wide output "0"',
            'return %turned output "1"',
            'return %odd output "2"',
            'return %kept output "3"',
        )
    )


def test_norm_of_norms_is_one_sum_of_squares(golden: Callable[[object], None]) -> None:
    golden(
        canonical(
            '%a : f32[4, 6] batch "a"',
            '%b : f32[3] batch "b"',
            '%na = aten.linalg_vector_norm(%a) : f32[] {phase="update"}',
            '%nb = aten.linalg_vector_norm(%b) : f32[] {phase="update"}',
            '%ra = reshape(%na) : f32[1] {phase="update"}',
            '%rb = reshape(%nb) : f32[1] {phase="update"}',
            '%all = cat([%ra, %rb], dim=0) : f32[2] {phase="update"}',
            '%norm = aten.linalg_vector_norm(%all) : f32[] {phase="update"}',
            'return %norm norm "norm"',
        )
    )


def test_native_batch_norm_returns_its_statistics(golden: Callable[[object], None]) -> None:
    golden(
        canonical(
            '%x : f32[4, 3] batch "x"',
            '%rm : f32[3] buffer "rm"',
            '%rv : f32[3] buffer "rv"',
            '%y, %m, %r = aten.native_batch_norm(%x, none, none, %rm, %rv, true, 0.1, 1e-05) : f32[4, 3], f32[3], f32[3] {phase="forward"}',
            'return %y output "0"',
            'return %rm buffer "rm"',
            'return %rv buffer "rv"',
        )
    )


def test_attention_reads_the_few_heads(golden: Callable[[object], None]) -> None:
    attend = "causal=true, scale=0.5"
    golden(
        canonical(
            '%q : f32[2, 6, 8, 4] batch "q"',
            '%k : f32[2, 2, 8, 4] batch "k"',
            '%v5 : f32[2, 2, 1, 8, 4] batch "v"',
            '%k5 = reshape(%k) : f32[2, 2, 1, 8, 4] {phase="forward"}',
            '%ke = expand(%k5) : f32[2, 2, 3, 8, 4] {phase="forward"}',
            '%kr = reshape(%ke) : f32[2, 6, 8, 4] {phase="forward"}',
            '%ve = expand(%v5) : f32[2, 2, 3, 8, 4] {phase="forward"}',
            '%vr = reshape(%ve) : f32[2, 6, 8, 4] {phase="forward"}',
            f'%o, %l = sdpa(%q, %kr, %vr, none, {attend}) : f32[2, 6, 8, 4], f32[2, 6, 8] {{phase="forward"}}',
            f'%dq, %dk, %dv = sdpa_backward(%o, %q, %kr, %vr, none, %o, %l, {attend}) : f32[2, 6, 8, 4], f32[2, 6, 8, 4], f32[2, 6, 8, 4] {{phase="backward"}}',
            '%dk5 = reshape(%dk) : f32[2, 2, 3, 8, 4] {phase="backward"}',
            '%dks = sum(%dk5, dims=[2], keepdim=true) : f32[2, 2, 1, 8, 4] {phase="backward"}',
            '%dv5 = reshape(%dv) : f32[2, 2, 3, 8, 4] {phase="backward"}',
            '%dvs = sum(%dv5, dims=[2], keepdim=false) : f32[2, 2, 8, 4] {phase="backward"}',
            'return %dq output "dq"',
            'return %dks output "dk"',
            'return %dvs output "dv"',
        )
    )


def test_attention_gradients_that_are_read_by_head_stay() -> None:
    """A second reader of the repeated heads' gradient wants it whole."""
    p = canonical(
        '%q : f32[2, 6, 8, 4] batch "q"',
        '%k5 : f32[2, 2, 1, 8, 4] batch "k"',
        '%l : f32[2, 6, 8] batch "l"',
        '%ke = expand(%k5) : f32[2, 2, 3, 8, 4] {phase="forward"}',
        '%kr = reshape(%ke) : f32[2, 6, 8, 4] {phase="forward"}',
        '%dq, %dk, %dv = sdpa_backward(%q, %q, %kr, %kr, none, %q, %l, causal=true, scale=0.5) : f32[2, 6, 8, 4], f32[2, 6, 8, 4], f32[2, 6, 8, 4] {phase="backward"}',
        '%dk5 = reshape(%dk) : f32[2, 2, 3, 8, 4] {phase="backward"}',
        '%dks = sum(%dk5, dims=[2], keepdim=false) : f32[2, 2, 8, 4] {phase="backward"}',
        'return %dks output "dk"',
        'return %dv output "dv"',
    )
    assert [op.target for op in p.ops] == ["expand", "reshape", "sdpa_backward", "reshape", "sum"]


def test_random_ops_of_different_sites_stay_apart() -> None:
    p = canonical(
        '%rng : i64[2] rng "rng"',
        '%a = bernoulli(%rng, p=0.5, site="a") : f32[8] {phase="forward"}',
        '%b = bernoulli(%rng, p=0.5, site="b") : f32[8] {phase="forward"}',
        '%c = bernoulli(%rng, p=0.5, site="a") : f32[8] {phase="forward"}',
        'return %a output "0"',
        'return %b output "1"',
        'return %c output "2"',
    )
    assert [op.kw("site") for op in p.ops] == ["a", "b"]


@pytest.mark.parametrize("seed", range(40))
def test_index_by_lines_against_aten(seed: int) -> None:
    """Random views of aranges as indices: what is rewritten is what aten gives."""
    draw = torch.Generator().manual_seed(seed)

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=draw))

    shape = [2 + pick(4) for _ in range(2 + pick(2))]
    x = torch.randn(shape, dtype=F64, generator=draw)
    rank = 1 + pick(4)
    lines, values, ops = ['%x : f64' + str(shape) + ' batch "x"'], {"x": x}, []
    given = []
    for d, n in enumerate(shape[: 1 + pick(len(shape))]):
        axis, step = pick(rank), 1 + pick(2)
        taken = 1 + pick((n + step - 1) // step)
        start = pick(n - (taken - 1) * step)
        spread = [1] * axis + [taken] + [1] * (rank - axis - 1)
        ops.append(f'%i{d} = iota(start={start}, step={step}) : i64[{taken}] {{phase="forward"}}')
        ops.append(f'%r{d} = reshape(%i{d}) : i64{spread} {{phase="forward"}}')
        given.append((start + step * torch.arange(taken)).reshape(spread))
    try:
        want = torch.ops.aten.index.Tensor(x, given)
    except (RuntimeError, IndexError):
        return  # two aranges of different length along one axis
    names = ", ".join(f"%r{d}" for d in range(len(given)))
    ops.append(f'%y = aten.index.Tensor(%x, [{names}]) : f64{list(want.shape)} {{phase="forward"}}')
    p = canonical(*lines, *ops, 'return %y output "0"')
    assert torch.equal(evaluate(p, values)[p.outputs[0].ref.name], want)


def test_simplifications_are_of_known_ops() -> None:
    assert not set(SIMPLIFICATIONS) & set(DECOMPOSITIONS)


# whole programs -----------------------------------------------------------------------------------------------------


def transformer(kind: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, max_position_embeddings=32)
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**small, num_key_value_heads=2))
    if kind == "bert":
        return transformers.BertForMaskedLM(transformers.BertConfig(**small))
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0))


class Image(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.batch, self.group, self.head = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.GroupNorm(2, 8), torch.nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.group(torch.relu(self.batch(self.conv(x)))).mean((2, 3)))


def image_loss(model: Any, batch: Any) -> Tensor:
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)


def widened(p: Program) -> Program:
    """float32 read as float64, in casts and dtype arguments too."""
    return parse(str(p).replace("f32", "f64"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "image"])
@pytest.mark.parametrize("update", [False, True], ids=["gradients", "clip+adamw"])
def test_a_captured_program_keeps_its_meaning(kind: str, update: bool) -> None:
    """Padding mask, ignored labels, dropout, batch statistics: float64, relative to the largest gradient."""
    from deepseed.capture import capture

    if kind == "image":
        torch.manual_seed(0)
        model: torch.nn.Module = Image()
        batch: Any = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 4]))
    else:
        model = transformer(kind)
        ids = torch.randint(0, 40, (2, 12), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, 8:] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    options = {"optimizer": torch.optim.AdamW(model.parameters(), eps=1e-3), "clip_grad_norm": 0.1} if update else {}
    c = capture(model, batch, loss_fn=image_loss if kind == "image" else None, seed=5, **options)
    p = widened(c.program)
    q = verify(canonicalize(p))
    assert parse(str(q)) == q
    assert not {op.target for op in q.ops} & ({*DECOMPOSITIONS, "aten.index.Tensor"} - {"aten.convolution", "aten.convolution_backward"})
    values: dict[tuple[str, str], Tensor] = {("param", k): v.detach().clone() for k, v in c.parameters.items()}
    values |= {("buffer", k): v for k, v in c.buffers.items()} | {("constant", k): v for k, v in c.constants.items()}
    values |= {("batch", k): v for k, v in c.batch.flatten(batch).items()} | {("hyper", k): torch.tensor(read()) for k, read in c.hyper.items()}
    values |= {("state", k): torch.full(s.type.shape, s.fill) for k, s in c.state.items()}
    values["rng", "rng"] = torch.tensor([5, 1])

    def outputs(p: Program) -> dict[tuple[str, str], Tensor]:
        given = {i.name: values[i.role, i.key].clone() for i in p.inputs}
        given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        found = evaluate(p, given)
        written = {(i.role, i.key): given[i.name] for i in p.inputs if i.role == "buffer"}  # batch norm writes into its operands
        return written | {(o.role, o.key): found[o.ref.name] for o in p.outputs}

    before, after = outputs(p), outputs(q)
    largest = max(float(v.abs().max()) for (role, _), v in before.items() if role in ("grad", "param", "loss"))
    assert before.keys() == after.keys()
    for key, x in before.items():
        torch.testing.assert_close(after[key], x, rtol=1e-11, atol=1e-12 * largest, msg=lambda m, key=key: f"{key}: {m}")


def test_integers_and_numbers_make_floats_of_the_result_s_width() -> None:
    """Widened to float64, a program must not fall back to torch's default dtype."""
    p = parse("""program p mesh() facts(captured)
%m : bool[4] batch "m"
%n : i64[4] batch "n"
%a = aten.add.Tensor(0.25, %m, alpha=0.75) : f64[4] {phase="forward"}
%b = aten.mul.Tensor(%n, 0.5) : f64[4] {phase="forward"}
%c = aten.div.Tensor(%n, %m) : f64[4] {phase="forward"}
%d = aten.add.Tensor(%a, %b) : f64[4] {phase="forward"}
%e = aten.add.Tensor(%d, %c) : f64[4] {phase="forward"}
return %e output "e"
""")
    m, n = torch.tensor([True, True, True, True]), torch.tensor([3, 1, 2, 0])
    assert evaluate(canonicalize(p), {"m": m, "n": n})["e"].tolist() == [1 + 1.5 * k for k in n.tolist()]

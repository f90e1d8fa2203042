"""Generated source: what it says, that it computes what the ops mean, and that state is updated in place, safely."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from placed import MLP, lowered, random_inputs, sources
from torch import Tensor

from deepseed import ops
from deepseed.codegen.expressions import _BINDINGS, CodegenError
from deepseed.codegen.python import generate
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program
from deepseed.ir.text import parse
from deepseed.ir.verify import verify
from deepseed.runtime.executable import Executable
from deepseed.runtime.host import SimulatedHost


def program(body: str, inputs: str, outputs: str) -> Program:
    return verify(parse(f"program p mesh() facts(explicit, local, lowered, placed)\n{inputs}\n{body}\n{outputs}\n"))


def run(p: Program, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return SimulatedHost(Mesh()).run([Executable(generate(p))], [inputs])[0]


def test_source_of_the_small_model(golden: Callable[[object], None]) -> None:
    golden(sources(lowered(MLP))[0])


def test_every_value_is_deleted_or_returned() -> None:
    source = sources(lowered(MLP))[0]
    made = set(re.findall(r"^    (\w+) = ", source, re.M)) - {"device"} | {"w1", "w2", "x", "target"}
    deleted = {name for line in re.findall(r"^    del (.*)", source, re.M) for name in line.split(", ")}
    assert made == deleted | {"loss_whole_dp", "y"}


def test_source_is_a_file_that_tracebacks_show() -> None:
    p = program('%y = aten.mm(%x, %x) : f32[2, 2] {phase="forward"}', '%x : f32[2, 2] batch "x"', 'return %y output "y"')
    executable = Executable(generate(p), "shown")
    assert executable.path.read_text() == executable.source
    with pytest.raises(RuntimeError) as caught:
        SimulatedHost(Mesh()).run([executable], [[torch.ones(2, 3)]])
    assert str(caught.traceback[-1].path) == str(executable.path)


def test_bindings_are_those_of_the_reference() -> None:
    for name in sorted(_BINDINGS):
        assert ops.function(f"aten.{name}") is getattr(torch, name.partition(".")[0]), name


def test_names_become_identifiers() -> None:
    p = program(
        '%for = aten.neg(%a-b) : f32[2] {phase="forward"}\n%a.b = aten.neg(%for) : f32[2] {phase="forward"}\n%0 = aten.add.Tensor(%a.b, %rt) : f32[2] {phase="forward"}',
        '%a-b : f32[2] batch "x"\n%rt : f32[2] batch "y"',
        'return %0 output "0"',
    )
    assert run(p, [torch.ones(2), torch.ones(2)])[0].tolist() == [2, 2]


def test_an_unknown_own_op_is_refused_with_its_place() -> None:
    p = program('%y = frobnicate(%x) : f32[2] {at="blocks.3", phase="forward"}', '%x : f32[2] batch "x"', 'return %y output "y"')
    with pytest.raises(CodegenError, match=r"%y = frobnicate at blocks.3"):
        generate(p)


OWN = """
reshape(%x) : f32[12, 2]
reshape(%s) : f32[1, 1]
permute(%x, dims=[1, 0]) : f32[6, 4]
permute(%z, dims=[2, 0, 1]) : f32[4, 2, 3]
expand(%r) : f32[4, 6]
expand(%s) : f32[2, 3]
cast(%x) : f64[4, 6]
cast(%i) : f32[5]
full(value=2.5) : f32[3, 1]
full(value=true) : bool[2]
full(value=-inf) : f32[]
iota(start=3, step=2) : i64[4]
iota(start=0, step=1) : f32[0]
slice(%x, dim=1, start=1, step=2) : f32[4, 3]
slice(%z, dim=2, start=3, step=1) : f32[2, 3, 1]
unslice(%x, dim=1, start=1, step=2) : f32[4, 13]
pad(%x, pads=[0, 1, 2, 0], value=0.5) : f32[5, 8]
cat([%x, %x], dim=1) : f32[4, 12]
sum(%x, dims=[0], keepdim=true) : f32[1, 6]
sum(%x, dims=[], keepdim=false) : f32[4, 6]
sum(%x, dims=[0, 1], keepdim=false) : f64[]
sum(%b, dims=[0], keepdim=false) : i64[6]
amax(%z, dims=[0, 2], keepdim=false) : f32[3]
amax(%x, dims=[], keepdim=false) : f32[4, 6]
embedding(%x, %i) : f32[5, 6]
embedding(%x, %i, start=2) : f32[5, 6]
embedding_backward(%g, %i) : f32[4, 6]
embedding_backward(%g, %i, start=1) : f32[2, 6]
gather(%x, %j, dim=1) : f32[4, 2]
gather(%x, %j, dim=1, start=1) : f32[4, 2]
scatter_add(%x, %j, %h, dim=1) : f32[4, 6]
bernoulli(%rng, p=0.4, site="a") : f32[4, 6]
bernoulli(%rng, p=0.4, site="a", index=[[[2, 1, 1], [4]], [[6]]]) : f32[4, 6]
uniform(%rng, low=-1.0, high=2.0, site="b") : f32[4, 6]
normal(%rng, mean=0.5, std=2.0, site="c") : f32[4, 6]
sized.upsample_nearest1d_backward(%z, given=[[4], "shape", none]) : f32[2, 3, 2]
aten.add.Tensor(%x, %x, alpha=2) : f32[4, 6]
aten.nan_to_num(%x) : f32[4, 6]
aten.gelu(%x, approximate="tanh") : f32[4, 6]
aten.pow.Tensor_Scalar(%x, 2) : f32[4, 6]
aten.cumsum(%i, 0, dtype="f32") : f32[5]
aten.index.Tensor(%x, [none, %i]) : f32[4, 5]
aten.max.dim(%x, 1) : f32[4], i64[4]
"""
OPERANDS = {
    "x": "f32[4, 6]", "z": "f32[2, 3, 4]", "r": "f32[1, 6]", "s": "f32[]", "i": "i64[5]", "j": "i64[4, 2]", "g": "f32[5, 6]", "h": "f32[4, 2]",
    "b": "bool[3, 6]", "rng": "i64[2]",
}  # fmt: skip


@pytest.mark.parametrize("line", OWN.strip().splitlines())
def test_an_expression_computes_what_its_op_means(line: str) -> None:
    used = [name for name in OPERANDS if re.search(rf"%{name}\b", line)]
    names = "%y, %k" if line.endswith("i64[4]") and "max" in line else "%y"
    p = program(f'{names} = {line} {{phase="forward"}}', "\n".join(f'%{n} : {OPERANDS[n]} batch "{n}"' for n in used), 'return %y output "y"')
    generator = torch.Generator().manual_seed(1)
    values: dict[str, Tensor] = {}
    for n in used:
        t = p.types[n]
        dtype = ops.torch_dtype(t.dtype)
        random = torch.rand(t.shape, generator=generator)
        values[n] = random * 2 - 1 if dtype is torch.float32 else (random * 4).to(torch.int64) if dtype is torch.int64 else random > 0.5
    (expected, *_) = ops.run(p.ops[0], [values[ref.name] for ref in p.ops[0].refs], p.mesh)
    (got,) = run(p, list(values.values()))
    assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_attention() -> None:
    p = program(
        '%o, %l = sdpa(%q, %k, %v, none, causal=true, scale=0.5) : f32[2, 4, 5, 8], f32[2, 4, 5] {phase="forward"}\n'
        '%dq, %dk, %dv = sdpa_backward(%q, %q, %k, %v, none, %o, %l, causal=true, scale=0.5) : f32[2, 4, 5, 8], f32[2, 2, 5, 8], f32[2, 2, 5, 8] {phase="backward"}',
        '%q : f32[2, 4, 5, 8] batch "q"\n%k : f32[2, 2, 5, 8] batch "k"\n%v : f32[2, 2, 5, 8] batch "v"',
        'return %dk output "dk"\nreturn %o output "o"',
    )
    torch.manual_seed(0)
    given = {"q": torch.randn(2, 4, 5, 8), "k": torch.randn(2, 2, 5, 8), "v": torch.randn(2, 2, 5, 8)}
    expected = ops.evaluate(p, given)
    dk, o = run(p, list(given.values()))
    assert torch.equal(dk, expected["dk"]) and torch.equal(o, expected["o"])


# state in place -------------------------------------------------------------------------------------------------------


def test_new_state_is_written_after_the_last_reader_of_the_old() -> None:
    p = program(
        '%new = aten.add.Tensor(%w, 1) : f32[2, 2] {phase="update"}\n%t = permute(%w, dims=[1, 0]) : f32[2, 2] {phase="forward"}\n'
        '%late = aten.mul.Tensor(%t, 10) : f32[2, 2] {phase="forward"}',
        '%w : f32[2, 2] param "w"',
        'return %late output "late"\nreturn %new param "w"',
    )
    w = torch.arange(4.0).reshape(2, 2)
    where = w.data_ptr()
    (late,) = run(p, [w])
    assert late.tolist() == [[0, 20], [10, 30]] and w.tolist() == [[1, 2], [3, 4]] and w.data_ptr() == where


def test_a_returned_view_of_old_state_is_a_copy() -> None:
    p = program(
        '%t = permute(%w, dims=[1, 0]) : f32[2, 2] {phase="forward"}\n%new = aten.add.Tensor(%w, 1) : f32[2, 2] {phase="update"}',
        '%w : f32[2, 2] param "w"',
        'return %t output "t"\nreturn %w output "old"\nreturn %new param "w"',
    )
    w = torch.arange(4.0).reshape(2, 2)
    t, old = run(p, [w])
    assert t.tolist() == [[0, 2], [1, 3]] and old.tolist() == [[0, 1], [2, 3]] and w.tolist() == [[1, 2], [3, 4]]


def test_state_can_change_places_and_stay() -> None:
    p = program(
        '%t = permute(%c, dims=[1, 0]) : f32[2, 2] {phase="update"}',
        '%a : f32[2] state "a"\n%b : f32[2] state "b"\n%c : f32[2, 2] buffer "c"\n%d : f32[2] buffer "d"',
        'return %b state "a"\nreturn %a state "b"\nreturn %t buffer "c"\nreturn %d buffer "d"',
    )
    a, b, c, d = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0]), torch.arange(4.0).reshape(2, 2), torch.ones(2)
    assert run(p, [a, b, c, d]) == ()
    assert (a.tolist(), b.tolist(), c.tolist(), d.tolist()) == ([3, 4], [1, 2], [[0, 2], [1, 3]], [1, 1])


def test_inputs_are_released() -> None:
    p = program('%y = aten.neg(%x) : f32[2] {phase="forward"}', '%x : f32[2] batch "x"\n%unused : f32[2] batch "u"', 'return %y output "y"')
    given = [torch.ones(2), torch.ones(2)]
    run(p, given)
    assert given == []


# fused optimizers -----------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, ("step", "exp_avg", "exp_avg_sq"), {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}),
    "amsgrad": (torch.optim.Adam, ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    "sgd": (torch.optim.SGD, (), {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, ("momentum_buffer",), {"momentum": 0.9, "dampening": 0.2}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["f64", "f32"])
@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_fused_update_is_torchs_own(kind: str, dtype: str) -> None:
    make, states, options = OPTIMIZERS[kind]
    target = {"adamw": "adamw", "amsgrad": "adam"}.get(kind, "sgd")
    words = {True: "true", False: "false"}
    kwargs = "".join(f", {k}={words[v] if isinstance(v, bool) else list(v) if isinstance(v, tuple) else v}" for k, v in options.items())
    shapes = {"a": "[3, 4]", "b": "[5]"}
    inputs, body, outputs = ['%lr : f64[] hyper "lr"'], [], []
    for n, shape in shapes.items():
        inputs += [f'%{n} : {dtype}{shape} param "{n}"', f'%{n}.g : {dtype}{shape} batch "{n}.g"']
        for s in states:
            inputs.append(f'%{n}.{s} : {"f32[]" if s == "step" else dtype + shape} state "{s}/{n}"')
            outputs.append(f'return %{n}.{s}.new state "{s}/{n}"')
        outputs.append(f'return %{n}.new param "{n}"')
        if "step" in states:
            body.append(f'%{n}.step.new = aten.add.Tensor(%{n}.step, 1) : f32[] {{phase="update"}}')
    for n, shape in shapes.items():
        moments = [s for s in states if s != "step"]
        given = [f"%{n}", f"%{n}.g", *(f"%{n}.{s}{'.new' if s == 'step' else ''}" for s in states), "%lr"]
        made = ", ".join([f"%{n}.new", *(f"%{n}.{s}.new" for s in moments)])
        names = "[" + ", ".join(f'"{s}"' for s in states) + "]"
        body.append(f'{made} = optim.{target}({", ".join(given)}, states={names}{kwargs}) : {", ".join([dtype + shape] * (1 + len(moments)))} {{phase="update"}}')
    p = program("\n".join(body), "\n".join(inputs), "\n".join(outputs))
    source = generate(p)
    assert source.count("torch._fused_") == 1 and ".clone(" not in source  # both parameters in one call, in place
    torch.manual_seed(0)
    full = {i.name: torch.randn(i.type.shape, dtype=ops.torch_dtype(i.type.dtype)) for i in p.inputs}
    stored = {n: torch.zeros_like(t) if "." in n else t.clone() for n, t in full.items() if not n.endswith(".g") and n != "lr"}
    mine = [torch.nn.Parameter(full[n].clone()) for n in shapes]
    optimizer = make(mine, lr=0.05, **options)
    for step in range(3):
        grads = {f"{n}.g": torch.randn_like(full[n]) for n in shapes}
        if kind == "momentum" and step == 0:
            for n in shapes:  # torch's first step starts the buffer from the gradient, undamped
                stored[f"{n}.momentum_buffer"].copy_(grads[f"{n}.g"] * (1 - 0.8) / 0.9)
        for parameter, n in zip(mine, shapes, strict=True):
            parameter.grad = grads[f"{n}.g"].clone()
        optimizer.step()
        everything = {**stored, **grads, "lr": torch.tensor(0.05, dtype=torch.float64)}
        run(p, [everything[i.name] for i in p.inputs])
        for parameter, n in zip(mine, shapes, strict=True):
            torch.testing.assert_close(stored[n], parameter.detach(), rtol=1e-13 if dtype == "f64" else 2e-6, atol=1e-14 if dtype == "f64" else 1e-6)
            for s in states:
                torch.testing.assert_close(stored[f"{n}.{s}"], optimizer.state[parameter][s], rtol=1e-12 if dtype == "f64" else 2e-6, atol=1e-6 if dtype == "f32" else 1e-14)


def test_an_update_that_is_not_the_last_reader_works_on_a_copy() -> None:
    p = program(
        '%new = optim.sgd(%w, %g, %lr, states=[]) : f32[2] {phase="update"}\n%late = aten.add.Tensor(%w, %new) : f32[2] {phase="update"}',
        '%w : f32[2] param "w"\n%g : f32[2] batch "g"\n%lr : f64[] hyper "lr"',
        'return %late output "late"\nreturn %new param "w"',
    )
    w = torch.tensor([1.0, 2.0])
    (late,) = run(p, [w, torch.ones(2), torch.tensor(0.5, dtype=torch.float64)])
    assert late.tolist() == [1.5, 3.5] and w.tolist() == [0.5, 1.5]


def test_a_transposed_gradient_is_read_in_its_own_order() -> None:
    p = program(
        '%t = permute(%g, dims=[1, 0]) : f32[2, 3] {phase="update"}\n%new = optim.sgd(%w, %t, %lr, states=[]) : f32[2, 3] {phase="update"}',
        '%w : f32[2, 3] param "w"\n%g : f32[3, 2] batch "g"\n%lr : f64[] hyper "lr"',
        'return %new param "w"',
    )
    w, g = torch.zeros(2, 3), torch.arange(6.0).reshape(3, 2)
    run(p, [w, g.clone(), torch.tensor(1.0, dtype=torch.float64)])
    assert torch.equal(w, -g.t())


@pytest.mark.parametrize("second", ["%g", "%view"])
def test_a_gradient_of_two_parameters_is_scaled_once_for_each(second: str) -> None:
    """Parallel branches give their biases one gradient: the update scales it in place, and must not do so twice."""
    p = program(
        f"""%h = aten.mul.Tensor(%x, 1.0) : f32[2] {{phase="backward"}}
%g = reshape(%h) : f32[2] {{phase="backward"}}
%view = reshape(%h) : f32[2] {{phase="backward"}}
%a.new = optim.sgd(%a, %g, %lr, states=[], scale=%s) : f32[2] {{phase="update"}}
%b.new = optim.sgd(%b, {second}, %lr, states=[], scale=%s) : f32[2] {{phase="update"}}""",
        '%a : f32[2] param "a"\n%b : f32[2] param "b"\n%x : f32[2] batch "x"\n%s : f32[] batch "s"\n%lr : f64[] hyper "lr"',
        'return %a.new param "a"\nreturn %b.new param "b"',
    )
    a, b = torch.zeros(2), torch.zeros(2)
    run(p, [a, b, torch.tensor([4.0, 8.0]), torch.tensor(0.5), torch.tensor(1.0, dtype=torch.float64)])
    assert a.tolist() == b.tolist() == [-2.0, -4.0]


def test_mlp_on_one_rank_is_the_reference() -> None:
    text = re.sub(r" sum@\w+| as \[[^]]*\]|@\(tp,dp\)|@dp|@tp", "", MLP).replace("mesh(dp=2, tp=2)", "mesh()")
    p = lowered(text)
    full = random_inputs(p)
    expected = ops.evaluate(p, full)
    loss, y = run(p, [full[i.name].clone() for i in p.inputs])
    assert torch.equal(loss, expected["loss"]) and torch.equal(y, expected["y"])

"""An optimizer's update as one kernel over all tensors, in C++ and in Triton, against torch's own on one tensor in float64; and steps that are made of it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import needs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_worker import Interpreter

import deepseed
from deepseed import kernels as back_ends
from deepseed.codegen import cpp_files, triton_files, triton_updates
from deepseed.codegen.expressions import DTYPES, CodegenError
from deepseed.codegen.optim import UPDATES, call_from
from deepseed.codegen.updates import SIZE, Formula, formula
from deepseed.ir.program import ITEMSIZE, Program
from deepseed.ir.text import parse
from deepseed.lion import Lion
from deepseed.ops.optim import in_place

ADAM = ("step", "exp_avg", "exp_avg_sq")
KINDS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "adamw": ("adamw", ADAM, "betas=[0.9, 0.99], eps=1e-6, weight_decay=0.1"),
    "adamw, no decay, maximize": ("adamw", ADAM, "betas=[0.4, 0.95], eps=1e-8, maximize=true"),
    "adam, decay": ("adam", ADAM, "betas=[0.9, 0.999], eps=1e-8, weight_decay=0.1"),
    "amsgrad": ("adam", (*ADAM, "max_exp_avg_sq"), "betas=[0.9, 0.99], eps=1e-6, weight_decay=0.01, amsgrad=true, maximize=true"),
    "sgd": ("sgd", (), "weight_decay=0.1"),
    "momentum": ("sgd", ("momentum_buffer",), "momentum=0.9, dampening=0.2, maximize=true"),
    "nesterov": ("sgd", ("momentum_buffer",), "momentum=0.9, nesterov=true, weight_decay=0.1"),
}
DTYPED = (("f64", "f64"), ("f64", "bf16"), ("f32", "f32"), ("f32", "bf16"), ("f32", "f16"), ("bf16", "bf16"), ("f16", "f16"))  # of parameter and gradient
WITHIN = {"f64": (1e-13, 2e-15), "f32": (3e-6, 1e-6), "bf16": (2**-7, 1e-6), "f16": (2**-10, 1e-5)}  # relative: a few roundings, of 16 bits one; absolute: of sums of numbers up to 4 that cancel, and what a half holds near 0
SIZES = ((), (1,), (5,), (0,), (3, 7), (1030,), (2, 9, 11))


def update(kind: str, dtype: str = "f32", grad: str = "f32", more: Sequence[str] = ()) -> tuple[Program, Formula]:
    """Of one parameter; ``more``: "skip" and "scale" where they are operands."""
    target, states, options = KINDS[kind]
    operands = {"param": dtype, "grad": grad, **{s: "f32" if s == "step" else dtype for s in states}, "lr": "f64", **{k: {"skip": "bool", "scale": "f32"}[k] for k in more}}
    scalars = ("step", "lr", "skip", "scale")
    inputs = [f'%{name} : {d}{"[]" if name in scalars else "[4]"} batch "{name}"' for name, d in operands.items()]
    results = ["param", *(s for s in states if s != "step")]
    names = "[" + ", ".join(f'"{s}"' for s in states) + "]"
    given = ", ".join(f"%{name}" for name in operands if name not in more)
    op = f"{', '.join(f'%{r}.new' for r in results)} = optim.{target}({given}, states={names}, {options}{''.join(f', {k}=%{k}' for k in more)}) : {', '.join([f'{dtype}[4]'] * len(results))} {{phase=\"update\"}}"
    p = parse("\n".join(["program p mesh() facts()", *inputs, op, *(f'return %{r}.new output "{r}"' for r in results)]))
    return p, formula(p, p.ops)


def tensor(dtype: str) -> torch.dtype:
    found = getattr(torch, DTYPES[dtype].removeprefix("torch."))
    assert isinstance(found, torch.dtype)
    return found


def operands(f: Formula, shapes: Sequence[tuple[int, ...]], skip: bool = False, seed: int = 0) -> list[Any]:
    g = torch.Generator().manual_seed(seed)

    def drawn(name: str, shape: tuple[int, ...]) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64)
        return (x.square() + 0.1 if "_sq" in name else x).to(tensor(f.program.types[name].dtype))

    lists: list[Any] = [[torch.tensor(float(3 + n)) if name == "step" else drawn(name, shape) for n, shape in enumerate(shapes)] for name in f.each]
    numbers = {"lr": torch.tensor(0.05, dtype=torch.float64), "skip": torch.tensor(skip), "scale": torch.tensor(0.7)}
    return [*lists, *(numbers[name] for name in f.shared)]


def wide(given: list[Any]) -> list[Any]:
    """Copies in float64, but for truth values."""
    return [[x.to(x.dtype if x.dtype == torch.bool else torch.float64, copy=True) for x in each] if isinstance(each, list) else each if each.dtype == torch.bool else each.double() for each in given]


def close(f: Formula, got: list[Any], want: list[Any]) -> None:
    for name, mine, theirs in zip(f.each, got, want, strict=False):
        dtype = f.program.types[name].dtype
        if dtype == "bool":  # which way a branch goes: read only
            continue
        rtol, atol = WITHIN[dtype]
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == tensor(dtype)
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol, msg=lambda said, name=name: f"{f.name} {name}: {said}\n{f.program}")


def reference(f: Formula, given: list[Any]) -> list[Any]:
    """Torch's kernels in float64, one tensor after another."""
    out = wide(given)
    in_place(f.kind, f.each, f.shared, dict(f.options))(*out)
    return out


def check(f: Formula, run: Callable[..., object], given: list[Any]) -> None:
    want, before = reference(f, given), copy.deepcopy(given)
    assert run(*given) is None
    close(f, given, want)
    assert all(torch.equal(a, b) for name, mine, old in zip(f.each, given, before, strict=False) if name not in f.updated for a, b in zip(mine, old, strict=True)), "what is no state changed"
    if "skip" in f.shared and bool(given[len(f.each) + f.shared.index("skip")]):
        assert all(torch.equal(a, b) for mine, old in zip(given[: len(f.each)], before, strict=False) for a, b in zip(mine, old, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("updates")


@needs.compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.turn
def test_cpp_is_torchs_update(kind: str, folder: Path) -> None:
    for n, (dtype, grad) in enumerate(DTYPED):
        for more in ((), ("scale",), ("skip", "scale"))[n % 2 :: 2] if kind != "adamw" else ((), ("scale",), ("skip",), ("skip", "scale")):
            _, f = update(kind, dtype, grad, more)
            run = cpp_files.update([f], folder)
            for skip in (False, True) if "skip" in more else (False,):
                check(f, run, operands(f, SIZES, skip))


@needs.compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_cpp_shares_elements_among_threads(threads: int, folder: Path) -> None:
    """Wherever tensors end; with all of one tensor's elements for several threads, and all tensors for one."""
    _, f = update("adamw", "f32", "bf16", ("scale",))
    run, before = cpp_files.update([f], folder), torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(f, run, operands(f, [(100_003,), (0,), (1,), (40_000,)] + [(7,)] * 50))
        check(f, run, operands(f, []))
    finally:
        torch.set_num_threads(before)


@needs.triton
@pytest.mark.parametrize("kind", KINDS)
def test_triton_is_torchs_update(kind: str, interpreter: Interpreter) -> None:
    """One launch, which reads what the formula names once, and writes once."""
    for n, (dtype, grad) in enumerate(DTYPED):
        more: tuple[str, ...] = ((), ("scale",), ("skip", "scale"))[n % 3]
        _, f = update(kind, dtype, grad, more)
        given = operands(f, SIZES, skip=dtype == "f16")
        want = reference(f, given)
        got, traffic = interpreter.run(triton_updates.source([f]), given)
        close(f, got, want)
        assert traffic.launches == 1 and traffic.again == 0
        tensors = [x for each in given for x in (each if isinstance(each, list) else [each])]
        ends = [x for name, each in zip((*f.each, *f.shared), given, strict=True) for x in (each if isinstance(each, list) else [each]) if f.program.types[name].shape]
        read = {n: traffic.read.get(n, 0) for n in range(len(tensors))}
        assert all(read[n] == x.nbytes for n, x in enumerate(tensors) if any(x is e for e in ends)), traffic
        assert traffic.written == sum(x.nbytes for name, each in zip(f.each, given, strict=False) if name in f.updated for x in each)


@needs.triton
def test_triton_has_nothing_to_do_without_elements(interpreter: Interpreter) -> None:
    _, f = update("adamw")
    _, traffic = interpreter.run(triton_updates.source([f]), operands(f, [(0,), (0, 4)]))
    assert traffic.launches == 0
    _, f = update("adamw", more=("scale",))
    given = operands(f, [(150_000,)])  # more than one chunk
    want = reference(f, given)
    got, traffic = interpreter.run(triton_updates.source([f]), given)
    close(f, got, want)


@needs.compiler
@settings(max_examples=25, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 40), max_size=2).map(tuple), min_size=1, max_size=5), seed=st.integers(0, 99), offset=st.integers(0, 3), n=st.integers(0, len(DTYPED) - 1))
def test_tensors_that_begin_anywhere(folder: Path, shapes: list[tuple[int, ...]], seed: int, offset: int, n: int) -> None:
    """Blocks of larger tensors: no address is taken to be a multiple of a vector's."""
    _, f = update("adamw", *DTYPED[n])

    def moved(x: Tensor) -> Tensor:
        held = torch.empty(x.numel() + offset, dtype=x.dtype)
        held[offset:].copy_(x.flatten())
        return held[offset:].view(x.shape)

    check(f, cpp_files.update([f], folder), [[moved(x) for x in each] if isinstance(each, list) else each for each in operands(f, shapes, seed=seed)])


def test_a_formula_is_the_same_for_all_sizes_and_another_for_other_options() -> None:
    p, f = update("adamw", "f32", "bf16", ("scale",))
    q = parse(str(p).replace("[4]", "[7, 2]"))
    assert formula(q, q.ops) is f and f.updated == ("param", "exp_avg", "exp_avg_sq") and f.shared == ("lr", "scale") and f.program.types["grad"].shape == (SIZE,)
    other = parse(str(p).replace("0.99", "0.98"))
    assert formula(other, other.ops).name != f.name


def test_a_formula_as_text() -> None:
    _, f = update("nesterov", "f32", "bf16", ("scale",))
    assert str(f.program).split("facts()\n")[1].replace(' {phase="forward"}', "").replace(f"[{SIZE}]", "[n]") == """%param : f32[n] batch "param"
%grad : bf16[n] batch "grad"
%momentum_buffer : f32[n] batch "momentum_buffer"
%lr : f64[] batch "lr"
%scale : f32[] batch "scale"
%v0 = cast(%grad) : f32[n]
%v1 = aten.mul.Tensor(%v0, %scale) : f32[n]
%v2 = aten.add.Tensor(%v1, %param, alpha=0.1) : f32[n]
%v3 = aten.mul.Tensor(%momentum_buffer, 0.9) : f32[n]
%v4 = aten.add.Tensor(%v3, %v2, alpha=1.0) : f32[n]
%v5 = aten.add.Tensor(%v2, %v4, alpha=0.9) : f32[n]
%v6 = cast(%lr) : f32[]
%v7 = aten.mul.Tensor(%v5, %v6) : f32[n]
%v8 = aten.sub.Tensor(%param, %v7) : f32[n]
return %v8 output "param"
return %v4 output "momentum_buffer"
"""


def test_bytes_are_those_of_each_tensor_once() -> None:
    from deepseed.explain_kernels import explain_kernels

    p, f = update("adamw", "f32", "bf16", ("scale",))
    (k,) = explain_kernels(p, p).kernels
    elements, step, shared = 4, ITEMSIZE["f32"], ITEMSIZE["f64"] + ITEMSIZE["f32"]
    assert (k.name, k.launches, k.bytes_read, k.bytes_written) == (f.name, 1, elements * (4 + 2 + 4 + 4) + step + shared, elements * 12) and k.bytes_minimum == k.bytes_read + k.bytes_written


# several formulas --------------------------------------------------------------------------------------------------------

GROUPS = (("adamw", ("scale",)), ("adamw, no decay, maximize", ("scale",)), ("momentum", ()), ("adamw", ("scale",)))


def of_groups(grad: str, skip: bool = False) -> tuple[list[Formula], list[Any], list[Any]]:
    """Formulas, operands and what torch's kernels make of them."""
    formulas, given, want = list[Formula](), list[Any](), list[Any]()
    for n, (kind, more) in enumerate(GROUPS):
        _, f = update(kind, "f32", grad, (*(("skip",) if skip else ()), *more))
        each = operands(f, SIZES[n:] if n else [], skip=skip, seed=n)  # the first group has no tensors
        formulas.append(f)
        want.append(reference(f, each))
        given += each
    return formulas, given, want


def check_groups(formulas: list[Formula], got: list[Any], want: list[Any]) -> None:
    for f, theirs in zip(formulas, want, strict=True):
        n = len(f.each) + len(f.shared)
        close(f, got[:n], theirs)
        got = got[n:]


@needs.compiler
@pytest.mark.parametrize("skip", [False, True])
def test_parameter_groups_are_one_function(skip: bool, folder: Path) -> None:
    formulas, given, want = of_groups("bf16", skip)
    cpp_files.update(formulas, folder)(*given)
    check_groups(formulas, given, want)


@needs.triton
@pytest.mark.parametrize("skip", [False, True])
def test_parameter_groups_are_one_launch(skip: bool, interpreter: Interpreter) -> None:
    formulas, given, want = of_groups("bf16", skip)
    got, traffic = interpreter.run(triton_updates.source(formulas), given)
    check_groups(formulas, got, want)
    assert traffic.launches == 1 and traffic.again == 0


# where nothing is compiled -----------------------------------------------------------------------------------------------


def test_torchs_kernels_where_nothing_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    _, f = update("adamw", "f32", "bf16", ("scale",))
    said: list[str] = []

    def fails(formulas: Sequence[Formula], folder: Path) -> None:
        raise CodegenError("no C++ compiler\n  fix: install one")

    monkeypatch.setattr(cpp_files, "update", fails)
    run = back_ends.update((f,), "cpp", False, said.append)
    assert said == [f"{f.name} is torch's, one tensor after another: no C++ compiler\n  fix: install one"]
    check(f, run, operands(f, SIZES))


def test_what_triton_has_no_expression_for_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of nothing."""
    p, _ = update("adamw")
    q = parse(str(p).replace("betas=[0.9, 0.99]", "betas=[0.0, 0.99]"))
    f, said = formula(q, q.ops), list[str]()
    run = back_ends.update((f,), "triton", False, said.append)
    assert len(said) == 1 and "no Triton expression for powers of 0" in said[0]
    check(f, run, operands(f, SIZES))


@needs.compiler
def test_where_a_kernel_runs_decides_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host it is C++, whatever the device has; `cpp` and `inductor` never ask for Triton, though a device be there."""
    _, f = update("adamw")
    asked: list[str] = []
    monkeypatch.setattr(triton_files, "update", lambda formulas, folder: asked.append("triton") or (lambda *given: asked.append("run")))
    assert isinstance(back_ends.update((f,), "triton", True, print), cpp_files.Update) and not asked
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert isinstance(back_ends.update((f,), "cpp", False, print), cpp_files.Update) and not asked
    run = back_ends.update((f,), "inductor", False, print)
    check(f, run, operands(f, SIZES))
    assert not asked
    back_ends.update((f,), "triton", False, print)(1)
    assert asked == ["triton", "run"]


@needs.triton
def test_a_launch_among_several_devices_is_on_the_operands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entered: list[torch.device] = []

    class On:
        def __init__(self, device: torch.device) -> None:
            entered.append(device)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", On)
    run = triton_files.launch_of("one", "def launch(*given):\n    return given", tmp_path)
    x = torch.ones(2)
    assert run([], [x], x)[2] is x and run(x)[0] is x and entered == [x.device, x.device]


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_torchs_kernels_are_scaled_and_skipped(kind: str) -> None:
    """What the tests above compare with."""
    _, f = update(kind, "f64", "f64", ("skip", "scale"))
    run, (_, plain) = in_place(f.kind, f.each, f.shared, dict(f.options)), update(kind, "f64", "f64")
    given = operands(f, SIZES)
    scaled = wide(given)
    scaled[1] = [x * scaled[-1] for x in scaled[1]]
    run(*given)
    in_place(plain.kind, plain.each, plain.shared, dict(plain.options))(*scaled[: len(plain.each) + 1])
    assert all(torch.equal(a, b) for name, mine, theirs in zip(f.each, given, scaled, strict=False) if name != "grad" for a, b in zip(mine, theirs, strict=True))
    skipped = operands(f, SIZES, skip=True)
    before = copy.deepcopy(skipped)
    run(*skipped)
    assert all(torch.equal(a, b) for mine, old in zip(skipped[: len(f.each)], before, strict=False) for a, b in zip(mine, old, strict=True))


# steps -------------------------------------------------------------------------------------------------------------------


PLANS = ("fp32", "bf16", "fp16", "zero1+dp2+bf16", "zero3+dp2+mb2+bf16", "zero2+dp2+offload(optimizer)", "tp2", "pp2+mb2+bf16")


def trained(plan: str, codegen: str, make: Callable[[Any], torch.optim.Optimizer], clip: float = 0.1, large: float = 1.0) -> tuple[list[float], dict[str, Tensor], Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.LayerNorm(40), torch.nn.Linear(40, 8))
    step = deepseed.compile(model, plan, optimizer=make(model.parameters()), loss_fn=lambda m, x: m(x).float().square().mean() * large, clip_grad_norm=clip, codegen=codegen, backend="simulate")
    g = torch.Generator().manual_seed(1)
    losses = [float(step(torch.randn(8, 24, generator=g))) for _ in range(4)]
    return losses, {**step.state_dict(), **step.optimizer_state()}, step


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def nesterov(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, nesterov=True)


@needs.compiler
@pytest.mark.parametrize("make", [adamw, nesterov])
@pytest.mark.parametrize(("plan", "codegen"), [*((plan, "cpp") for plan in PLANS), ("bf16", "inductor"), ("fp16", "inductor")])
def test_steps_are_those_of_torchs_update(plan: str, codegen: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    """Beside the python back end, whose groups are the same ops: in float32 sums come in another order, in 16 bits a sum may round to the next number, and AdamW turns that into as much as lr."""
    (a, mine, step), (b, theirs, _) = trained(plan, codegen, make), trained(plan, "python", make)
    sources = [e.source for e in step.programs.current().executables]
    calls = [len(re.findall(r"\n    update_\w+\(params, ", source)) for source in sources]
    assert not any("torch._fused_" in source for source in sources) and set(calls) == ({0, 1} if "pp" in plan else {1})  # one stage has no parameters
    narrow = "16" in plan
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=2e-2 if narrow else 1e-5, atol=0)
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=5e-2 if narrow else 1e-4, atol=2e-2 if narrow else 1e-4, msg=lambda said, name=name: f"{name}: {said}")


@needs.compiler
def test_a_step_that_overflows_changes_nothing() -> None:
    """float16 with a loss of infinity in all its gradients: parameters, moments and step counts stay as they were."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 8))
    step = deepseed.compile(model, "fp16", optimizer=adamw(model.parameters()), loss_fn=lambda m, x: m(x).float().square().mean(), codegen="cpp")
    x = torch.randn(8, 24)
    step(x)
    before = {k: v.clone() for k, v in {**step.state_dict(), **step.optimizer_state()}.items()}
    step(x * 1e30)
    after = {**step.state_dict(), **step.optimizer_state()}
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"loss_scale", "good_steps", "skipped_steps"}
    step(x)
    assert not torch.equal(step.state_dict()["0.weight"], before["0.weight"])


# any optimizer ------------------------------------------------------------------------------------------------------------

OTHERS: dict[str, Callable[[Any], Any]] = {
    "lion": lambda ps: Lion(ps, lr=1e-2, weight_decay=0.1),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=1e-2, lr_decay=0.1),
    "adadelta": lambda ps: torch.optim.Adadelta(ps, lr=1.0, weight_decay=0.1),
    "adamax": lambda ps: torch.optim.Adamax(ps, lr=1e-2),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=1e-2, weight_decay=0.1),
    "radam": lambda ps: torch.optim.RAdam(ps, lr=1e-2),
    "asgd": lambda ps: torch.optim.ASGD(ps, lr=1e-2),
    "rprop": lambda ps: torch.optim.Rprop(ps, lr=1e-2),
    "damped": lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.3),
    "groups": lambda ps: torch.optim.AdamW([{"params": ps[::2], "weight_decay": 0.1, "lr": 3e-3}, {"params": ps[1::2], "weight_decay": 0.0, "betas": (0.8, 0.9)}], lr=1e-2),
    "two": lambda ps: [torch.optim.AdamW(ps[::2], lr=1e-2), Lion(ps[1::2], lr=1e-3)],
}


def doubled(plan: str, codegen: str, kind: str) -> tuple[list[float], dict[str, Tensor], list[str]]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.GELU(), torch.nn.LayerNorm(40), torch.nn.Linear(40, 8)).double()
    step = deepseed.compile(model, plan, optimizer=OTHERS[kind](list(model.parameters())), loss_fn=lambda m, x: m(x).square().mean(), clip_grad_norm=0.1, codegen=codegen, backend="simulate")
    g = torch.Generator().manual_seed(1)
    losses = [float(step(torch.randn(8, 24, generator=g, dtype=torch.float64))) for _ in range(4)]
    return losses, {**step.state_dict(), **step.optimizer_state()}, [e.source for e in step.programs.current().executables]


@needs.compiler
@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("plan", ["fp64", pytest.param("zero1+dp2+fp64", marks=pytest.mark.wide), pytest.param("zero3+dp2+mb2+fp64", marks=pytest.mark.wide), pytest.param("tp2+fp64", marks=pytest.mark.wide)])
@pytest.mark.turn
def test_any_optimizer_that_works_element_by_element_is_one_kernel(plan: str, kind: str) -> None:
    """In float64 the python back end's numbers, which calls torch op by op; parameters are changed in their own memory. But for the bias of ASGD that all ranks of tp2 have whole:
    only its average reads its average, so each rank keeps a part of that, made of a part of the new bias behind its update."""
    (a, mine, sources), (b, theirs, _) = doubled(plan, "cpp", kind), doubled(plan, "python", kind)
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-12, atol=0)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-10, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}")
    for source in sources:
        assert len(re.findall(r"\n    update_\w+\(params, ", source)) == 1, source
        whole = "" if (plan, kind) == ("tp2+fp64", "asgd") else r"|_3_bias"
        assert not re.search(rf"\n    (_0_weight{whole}|state_exp_avg\w*)\.copy_\(", source), source


@needs.triton
@pytest.mark.parametrize("kind", OTHERS)
def test_the_same_through_triton(kind: str, interpreter: Interpreter) -> None:
    """The formulas of a step in the interpreter against their own ops, on tensors of any size."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 8)).double()
    step = deepseed.compile(model, "fp64", optimizer=OTHERS[kind](list(model.parameters())), loss_fn=lambda m, x: m(x).square().mean(), clip_grad_norm=0.1, codegen="cpp", example_batch=torch.randn(8, 24, dtype=torch.float64))
    p = step.passes[-1].program
    formulas = [formula(p, run) for run in call_from(next(n for n, op in enumerate(p.ops) if op.target in UPDATES), p)]
    given, want = list[Any](), list[Any]()
    for n, f in enumerate(formulas):
        g = torch.Generator().manual_seed(n)
        types = f.program.types

        def drawn(name: str, shape: tuple[int, ...], types: Any = types, g: torch.Generator = g) -> Tensor:
            x = 0.2 * torch.rand(shape, generator=g, dtype=torch.float64) + 0.1  # so that a mean of squares is above the square of a mean, whichever state is which
            return torch.ones(shape, dtype=torch.bool) if types[name].dtype == "bool" else x.to(tensor(types[name].dtype))

        each: list[Any] = [[drawn(name, shape if types[name].shape else ()) for shape in SIZES[1:]] for name in f.each]
        each += [drawn(name, ()) for name in f.shared]
        given += each
        want.append(reference(f, each))
    got, traffic = interpreter.run(triton_updates.source(formulas), given)
    check_groups(formulas, got, want)
    assert traffic.launches == 1


class Own(torch.optim.Optimizer):
    """A user's: ``body`` changes a parameter with its gradient and a state."""

    def __init__(self, params: Any, body: Callable[[Tensor, Tensor, dict[str, Tensor], float], None], *names: str) -> None:
        super().__init__(params, {"lr": 0.01})
        self.body, self.names = body, names

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                for name in self.names:
                    if name not in state:
                        state[name] = torch.zeros_like(p)
                self.body(p, p.grad, state, group["lr"])


def follow(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: float) -> None:
    p.copy_(0.9 * p + 0.1 * s["slow"] - lr * g)
    s["slow"].copy_(p)


def by_norm(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: float) -> None:
    s["m"].mul_(0.9).add_(g)
    p.sub_(lr * s["m"] / (s["m"].norm() + 1e-3))


def rounded(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: float) -> None:
    u = g + s["error"]
    q = u.to(torch.bfloat16).to(p.dtype)
    s["error"].copy_(u - q)
    p.sub_(lr * q)


def strangely_named(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: float) -> None:
    for n, name in enumerate(("grad", "param", "n0", "a b", "a-b", "1st", "a", "op", "v0", "end")):
        s[name].mul_(0.5).add_(g, alpha=1 + n)
        p.sub_(lr * s[name])


def twice(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: float) -> None:
    new = 0.9 * s["u"] + 0.1 * s["w"] + g
    s["u"].copy_(new)
    s["w"].copy_(new)
    p.sub_(lr * new)


def by_coarse_norm(p: Tensor, g: Tensor, s: dict[str, Tensor], lr: float) -> None:
    p.sub_(lr * g / (g.norm().to(torch.bfloat16).to(p.dtype) + 0.3))


OWN = {
    "follow": (follow, ("slow",), 0), "by norm": (by_norm, ("m",), 0), "rounded": (rounded, ("error",), 1), "by coarse norm": (by_coarse_norm, (), 1), "twice": (twice, ("u", "w"), 0),
    "strangely named": (strangely_named, ("grad", "param", "n0", "a b", "a-b", "1st", "a", "op", "v0", "end"), 1),
}  # fmt: skip


class Named(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.params, self.grads = torch.nn.Parameter(torch.linspace(0.1, 1, 24).view(24, 1)), torch.nn.Parameter(torch.linspace(1, 2, 24))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.grads) @ self.params


@needs.compiler
@pytest.mark.parametrize("kind", [*OWN, "adafactor"])
@pytest.mark.parametrize("plan", ["fp64", "zero1+dp2+fp64", pytest.param("zero3+dp2+mb2+fp64", marks=pytest.mark.wide)])
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.turn
def test_an_optimizer_of_the_users_own(kind: str, plan: str, named: bool) -> None:
    """Taken as a kernel or left as it is, its numbers are those of torch op by op: what reads a norm of a new state, what gives two tensors one new value, what rounds on the way; any names."""
    runs = []
    for codegen in ("cpp", "python"):
        torch.manual_seed(0)
        model = (Named() if named else torch.nn.Sequential(torch.nn.Linear(24, 10), torch.nn.Linear(10, 1))).double()
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2) if kind == "adafactor" else Own(model.parameters(), *OWN[kind][:1], *OWN[kind][1])
        step = deepseed.compile(model, plan, optimizer=optimizer, loss_fn=lambda m, x: m(x).square().mean(), clip_grad_norm=0.5, codegen=codegen, backend="simulate")
        g = torch.Generator().manual_seed(1)
        losses = [float(step(torch.randn(8, 24, generator=g, dtype=torch.float64))) for _ in range(3)]
        runs.append((losses, {**step.state_dict(), **step.optimizer_state()}))
        if codegen == "cpp" and plan == "fp64" and kind in OWN:
            assert len(re.findall(r"\n    update_\w+\(", step.programs.current().executables[0].source)) == OWN[kind][2]
    (a, mine), (b, theirs) = runs
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=1e-12, atol=0)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-10, atol=1e-12, msg=lambda said, name=name: f"{name}: {said}")


@needs.compiler
def test_a_gradient_that_is_another_parameter_is_copied() -> None:
    """Of a product of two parameters: each is the other's gradient, and a kernel has no order."""
    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.linspace(k, 1, 7)) for k in (0.1, 0.5))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a * self.b).sum() + 0 * x.sum()

    runs = []
    for codegen in ("cpp", "python"):
        model = Product()
        step = deepseed.compile(model, "zero0", optimizer=torch.optim.SGD(model.parameters(), lr=0.5), loss_fn=lambda m, x: m(x), codegen=codegen)
        step(torch.ones(2))
        runs.append({k: v.clone() for k, v in step.state_dict().items()})
        (e,) = step.programs.current().executables
        lists = {line.split(" = ")[0].strip(): line for line in e.source.splitlines() if re.match(r"    (params|grads) = ", line)}
        assert codegen == "python" or (lists["params"].count("clone") + lists["grads"].count("clone")) == 2, lists
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])
    want_a = torch.linspace(0.1, 1, 7) - 0.5 * torch.linspace(0.5, 1, 7)
    torch.testing.assert_close(runs[0]["a"], want_a)


@needs.compiler
def test_a_gradient_of_float32_is_widened_for_a_parameter_of_float64() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(512, 512) for _ in range(4)]).double()
    step = deepseed.compile(model, "fp32", optimizer=torch.optim.AdamW(model.parameters()), loss_fn=lambda m, x: m(x).square().mean(), example_batch=torch.randn(4, 512, dtype=torch.float64), codegen="cpp")
    p = step.passes[-1].program
    assert {p.types[op.refs[1].name].dtype for op in p.ops if op.target == "optim.adamw"} == {"f32"}
    assert len(re.findall(r"\n    update_\w+\(params, ", step.programs.current().executables[0].source)) == 1

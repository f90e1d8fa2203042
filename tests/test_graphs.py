"""Steps that are replayed as one graph: what they compute, what is not captured and why, when they are captured anew. On a CPU, with a stand-in (tests/tape.py)."""

from __future__ import annotations

import gc
import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rule_examples import EXAMPLES, example, pointwise_examples
from small import TOKENS, WORDS, small
from tape import Tape, TapeRecorder, not_listed
from torch import Tensor, nn
from typer.testing import CliRunner

import deepseed
from deepseed import ops
from deepseed.api import Module, TrainStep
from deepseed.check.instances import _drawn
from deepseed.check.shrink import Instance
from deepseed.cli import app
from deepseed.graphs import refusal
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Input, Output, Program, Ref
from deepseed.nonfinite import NonFiniteError
from deepseed.ops import rng
from deepseed.rules.pointwise import POINTWISE
from deepseed.runtime import graphs
from deepseed.runtime.graphs import BRIEF, WARM, CudaRecorder, GraphError, Replayed
from deepseed.target import load

STEPS = WARM + 5


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[TapeRecorder]]:
    """The recorders that were made; a CPU is a device with graphs meanwhile, whose random bits are computed there."""
    made: list[TapeRecorder] = []

    def recorder(device: torch.device) -> TapeRecorder:
        made.append(TapeRecorder(device))
        return made[-1]

    monkeypatch.setitem(graphs.RECORDERS, "cpu", recorder)
    monkeypatch.setattr(rng, "_key", lambda key, site: rng._key_on_device(key, rng.site_hash(site)))
    yield made


def batches(n: int = STEPS, rows: int = 8) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, WORDS, (rows, TOKENS), generator=g) for _ in range(n)]
    return [(i, torch.where(torch.arange(TOKENS)[None] > torch.arange(rows)[:, None] % 4, i.roll(-1, 1), -100)) for i in ids]


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(6, 8), nn.Dropout(0.25), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(torch.tanh(self.up(x))))


def squares(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return (model(x.to(model.up.weight.dtype) / WORDS) - y / WORDS).pow(2).mean()  # type: ignore[union-attr, operator]


def made(cuda_graphs: bool | str = True, plan: str = "zero0", whole: bool = False, **said: Any) -> TrainStep:
    """``whole``: the model with a part of every kind, not the tiny one."""
    model, _, loss = small() if whole else (Tiny(), None, squares)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.3)
    model = model if "16" in plan else model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = deepseed.compile(model, plan, optimizer=optimizer, loss_fn=loss, clip_grad_norm=0.01, cuda_graphs=cuda_graphs, **said)
    assert isinstance(step, TrainStep)
    return step


def schedule(step: TrainStep) -> torch.optim.lr_scheduler.LRScheduler:
    assert isinstance(step.optimizer, torch.optim.Optimizer)
    return torch.optim.lr_scheduler.LinearLR(step.optimizer, 0.1, 1.0, STEPS)


def replayed(step: TrainStep) -> Replayed:
    (e,) = step.programs.current().executables
    assert isinstance(e, Replayed)
    return e


def values(step: TrainStep) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in {**step.state_dict(), **step.optimizer_state()}.items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys() and not [key for key in a if not torch.equal(a[key], b[key])]


# what they compute --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["zero0", "zero0+mb2", "zero0+remat", "zero0+fp16", "zero0+bf16"])
def test_steps_are_those_that_are_not_captured(plan: str, tapes: list[TapeRecorder]) -> None:
    """Bit for bit: losses, norms, parameters, buffers and optimizer state, with dropout, another batch and another learning rate at each step. What was returned stays as it was."""
    runs = []
    for chosen in (False, True):
        step = made(chosen, plan, plan != "zero0+fp16")
        rates, losses, norms = schedule(step), list[Tensor](), list[Tensor]()
        for batch in batches():
            losses.append(step(batch))
            norms.append(step.grad_norm)
            rates.step()
        runs.append((torch.stack(losses), torch.stack(norms), values(step), (step.loss_scale, step.skipped)))
    (tape,) = tapes
    assert (tape.warmed, tape.captured, tape.replayed) == (WARM, 1, STEPS - WARM)
    (losses, norms, state, scaling), (have, have_norms, have_state, have_scaling) = runs
    assert losses.isfinite().all() and len(set(losses.tolist())) == STEPS and (norms > 0.01).all()
    assert torch.equal(losses, have) and torch.equal(norms, have_norms) and scaling == have_scaling
    same(state, have_state)


def test_a_graph_of_one_batch_draws_anew_at_each_step(tapes: list[TapeRecorder]) -> None:
    """The same rows at a learning rate of 0: losses differ by the draws alone, and are those of a step that is not captured."""
    found = []
    for chosen in (False, True):
        step = made(chosen)
        assert isinstance(step.optimizer, torch.optim.Optimizer)
        step.optimizer.param_groups[0]["lr"] = 0.0
        found.append([float(step(batches()[0])) for _ in range(STEPS)])
    assert found[0] == found[1] and len(set(found[0])) == STEPS and tapes[0].replayed == STEPS - WARM


def test_losses_and_gradients_without_an_optimizer(tapes: list[TapeRecorder]) -> None:
    """What a replay returned is the caller's own: the next one does not write it."""
    found = []
    for chosen in (False, "auto"):
        torch.manual_seed(0)
        module = deepseed.compile(Tiny().double(), loss_fn=squares, cuda_graphs=chosen)
        found.append([module.loss_and_grads(batch) for batch in batches()])  # type: ignore[union-attr]
    for (loss_a, grads_a), (loss_b, grads_b) in zip(*found, strict=True):
        assert torch.equal(loss_a, loss_b)
        same(grads_a, grads_b)
    assert tapes[0].replayed == STEPS - WARM


def test_what_a_replay_writes_has_another_version(tapes: list[TapeRecorder]) -> None:
    """As an op in place does it: autograd finds that what it has kept was overwritten."""
    step = made()
    for batch in batches(WARM):
        step(batch)
    for batch in batches():
        stored = step.states[0].tensors["param", "up.weight"]
        before = stored._version
        step(batch)
        assert stored._version > before


def test_a_check_for_what_is_not_finite_sees_the_replayed_step(tapes: list[TapeRecorder]) -> None:
    step = made(check_finite=True)
    for batch in batches(WARM + 2):
        step(batch)
    before = values(step)
    with torch.no_grad():
        step.model.get_parameter("up.weight").fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"up\.weight"):
        step(batches()[0])
    with torch.no_grad():
        step.model.get_parameter("up.weight").copy_(before["up.weight"])
    assert tapes[0].replayed == 3
    same({**before, "skipped_steps": torch.ones_like(before["skipped_steps"])}, values(step))
    assert torch.isfinite(step(batches()[1]))


# captured anew ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_into_the_graphs_memory(tmp_path: Path, tapes: list[TapeRecorder]) -> None:
    """Loads write into the tensors that are there: the graph stays, and goes on from what was loaded."""
    runs = []
    for chosen in (False, True):
        step = made(chosen)
        for batch in batches(WARM + 2):
            step(batch)
        step.save(tmp_path / str(chosen))
        after = [float(step(batch)) for batch in batches(3)]
        step.load(tmp_path / str(chosen))
        assert [float(step(batch)) for batch in batches(3)] == after
        step.load_state_dict({name: t / 2 if t.is_floating_point() else t for name, t in step.state_dict().items()})
        assert isinstance(step.optimizer, torch.optim.Optimizer)
        step.optimizer.load_state_dict(step.optimizer.state_dict())
        runs.append([*after, *(float(step(batch)) for batch in batches(3))])
    assert runs[0] == runs[1] and tapes[0].captured == 1


def test_a_tensor_in_a_parameters_place_is_captured_anew(tapes: list[TapeRecorder]) -> None:
    runs = []
    for chosen in (False, True):
        step = made(chosen)
        losses = [float(step(batch)) for batch in batches(WARM + 2)]
        step.model.up.weight = nn.Parameter(step.model.up.weight.detach() * 0.5)  # type: ignore[union-attr, operator]
        losses += [float(step(batch)) for batch in batches(2)]
        step.model.get_parameter("down.weight").data = step.model.get_parameter("down.weight").detach() * 0.5
        runs.append((losses + [float(step(batch)) for batch in batches(2)], values(step)))
    assert runs[0][0] == runs[1][0] and tapes[0].captured == 3
    same(runs[0][1], runs[1][1])


def test_parameters_that_move_at_each_step_end_captures(tapes: list[TapeRecorder], capfd: pytest.CaptureFixture[str]) -> None:
    runs = []
    for chosen in (False, True):
        step, losses = made(chosen), []
        for batch in batches(WARM + BRIEF + 4):
            losses.append(float(step(batch)))
            step.model.get_parameter("up.weight").data = step.model.get_parameter("up.weight").detach().clone()
        runs.append(losses)
    assert runs[0] == runs[1] and tapes[0].captured == BRIEF
    assert "param 'up.weight' lies in other memory at each call" in replayed(step).why and replayed(step).why in capfd.readouterr().err
    assert "not captured: param 'up.weight'" in str(step.explain())


def test_graphs_go_with_their_programs(tapes: list[TapeRecorder]) -> None:
    """One a program, of which ``max_programs`` are kept; the last reference goes with the program, cycles or not."""
    step, kept = made(max_programs=2), []
    gc.disable()
    try:
        for rows in (8, 4, 2, 6):
            for batch in batches(WARM + 1, rows):
                step(batch)
            graph = replayed(step).graph
            assert graph is not None
            kept.append(weakref.ref(graph))
            del graph
        assert [each() is not None for each in kept] == [False, False, True, True] and tapes[0].captured == 4
        for batch in batches(3, 2):
            step(batch)
        assert tapes[0].captured == 4
    finally:
        gc.enable()


def test_a_new_graph_is_made_when_the_old_one_is_gone(tapes: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device holds the memory of one, not of both."""
    step = made()
    for batch in batches(WARM + 2):
        step(batch)
    before = weakref.ref(replayed(step).graph)  # type: ignore[arg-type]
    seen, capture = [], tapes[0].capture
    monkeypatch.setattr(tapes[0], "capture", lambda run: (seen.append(before()), capture(run))[1])
    step.model.get_parameter("up.weight").data = step.model.get_parameter("up.weight").detach().clone()
    step(batches()[0])
    assert seen == [None]


# refusals -----------------------------------------------------------------------------------------------------------


def test_a_device_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(graphs.RECORDERS, "cpu")
    with pytest.raises(GraphError, match=r"cuda_graphs=True: the step runs on cpu, which has no graphs\n  fix: a model on a CUDA device"):
        made(True)
    for chosen in (False, "auto"):
        step = made(chosen)
        step(batches()[0])
        assert type(step.programs.current().executables[0]).__name__ == "Executable" and "graphs" not in str(step.explain())
    with pytest.raises(GraphError, match=r"cuda_graphs='always'\n  fix: True, False or \"auto\""):
        made("always")


def test_what_the_device_refuses(tapes: list[TapeRecorder], capfd: pytest.CaptureFixture[str]) -> None:
    """``auto`` runs the step as it is, from the very call that was to be captured, and says so once; True raises, and nothing was computed."""
    plain = [float(loss) for loss in map(made(False), batches())]
    step = made("auto")
    step.compile(batches()[0])
    tapes[-1].fails = "operation not permitted when stream is capturing\nand more"
    assert [float(loss) for loss in map(step, batches())] == plain
    assert capfd.readouterr().err.count("the device refused: RuntimeError: operation not permitted when stream is capturing") == 1
    assert "not captured: the device refused" in str(step.explain())

    step = made(True)
    losses = [float(step(batch)) for batch in batches(WARM)]
    tapes[-1].fails, before = "out of memory", values(step)
    with pytest.raises(GraphError, match=r"could not be captured as a graph: RuntimeError: out of memory\n  fix: cuda_graphs=\"auto\""):
        step(batches()[WARM])
    same(before, values(step))
    tapes[-1].fails = ""
    assert losses + [float(step(batch)) for batch in batches()[WARM:]] == plain


def test_a_number_that_is_read_while_capturing(tapes: list[TapeRecorder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in refuses what a device refuses: the key of the random bits as a CPU makes it is read."""
    monkeypatch.setattr(rng, "_key", lambda key, site: int(key[0]))
    step = made("auto")
    for batch in batches(WARM + 1):
        step(batch)
    assert "not permitted when stream is capturing" in replayed(step).why


def alone(line: str) -> Program:
    """A program of one example op."""
    op, types = example(line)
    inputs = tuple(Input(f"x{n}", t, "batch", f"x{n}") for n, t in enumerate(types))
    return Program("step", Mesh(), inputs, (op,), (Output(Ref(op.name), "loss", "loss"),))


def test_what_reads_numbers_is_refused_and_nothing_else() -> None:
    """Every example of every rule, while capturing."""
    lines = [*EXAMPLES, *(line for target in POINTWISE for line in pointwise_examples(target))]
    wrong = []
    for line in lines:
        op, types = example(line)
        if op.target == "paged_attention" or any(t.dtype == "c128" for t in (*types, *op.types)):  # which pages are whose is the runtime's to say
            continue
        operands, _ = _drawn(Instance(op, types, Mesh()))
        try:
            with not_listed(), Tape():
                ops.run(op, operands, Mesh())
            read = ""
        except ops.OpError as error:
            read = str(error)
        if bool(read) != bool(why := refusal(alone(line))):
            wrong.append(f"{line}: {read or 'reads nothing'}, {why or 'captured'}")
    assert not wrong and len(lines) > 800


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("aten.nonzero(f32[4]) : i64[4, 1]", "numbers that are in its operands decide what is launched"),
        ("aten.index.Tensor(f32[4, 2], [bool[4]]) : f32[3, 2]", "numbers that are in its operands decide what is launched"),
        ("aten.index.Tensor(bool[4, 2], [i64[3]]) : bool[3, 2]", ""),
        ("aten._local_scalar_dense(f32[]) : f32[]", "numbers that are in its operands decide what is launched"),
        ("paged_attention(f32[6, 24, 8], f32[6, 24, 8], f32[6, 24, 4], layer=0, scale=0.3, window=0, softcap=0.0) : f32[6, 24, 4]", "which pages it reads is another thing at each step"),
        ("aten.add.Tensor(f32[4], f32[4]) : f32[4]", ""),
    ],
)
def test_refusals_of_ops(line: str, why: str) -> None:
    assert refusal(alone(line)) == (f"%y0 = {line.partition('(')[0]}: {why}" if why else "")


def test_refusals_of_inputs() -> None:
    """What a loop brings for an update lies elsewhere each time, and what is on the host is not the device's."""
    p = alone("aten.add.Tensor(f32[4], f32[4]) : f32[4]")
    first, *rest = p.inputs
    for changed, why in ((replace(first, role="pending"), "its gradients are the user's loop's to give, in other memory each time"), (replace(first, type=first.type.on(True)), "batch 'x0' lies in the host's memory")):
        assert refusal(replace(p, inputs=(changed, *rest))) == why


def test_each_reason_is_named() -> None:
    for plan, world, why in (
        ("zero0+offload(optimizer)", 1, r"param 'up.weight' lies in the host's memory"),
        ("zero0+mb2+offload(activations)", 1, r"%.* = to_host.start.*: the host waits for what is moved"),
        ("zero1+dp2", 2, "the ranks of a simulation take turns"),
        ("pp2+mb2", 2, "the ranks of a simulation take turns"),
    ):
        whole = "activations" in plan
        step = made("auto", plan, whole, world_size=world)
        step(batches()[0])
        assert re.search(f"not captured: {why}", str(step.explain())), str(step.explain())
        with pytest.raises(GraphError, match=rf"cuda_graphs=True: step cannot be captured as a graph: {why}.*\n  fix: cuda_graphs=\"auto\""):
            made(True, plan, whole, world_size=world).compile(batches()[0])
        program = step.program
        if plan == "zero1+dp2":
            assert re.fullmatch(r"%.*\.start.*: it is a collective, which only cuda_graphs=True captures", refusal(program)) and not refusal(program, collectives=True)
        if plan == "pp2+mb2":
            assert re.search(r"%.* = transfer.*: the host sends and receives what passes between the stages", refusal(program, collectives=True))
    module = deepseed.compile(Tiny(), cuda_graphs="auto")
    assert isinstance(module, Module)
    module(torch.ones(8, 6)).sum().backward()
    assert "not captured: forward and backward are called one by one, by autograd" in str(module.explain())


def test_explain_says_so_without_a_device() -> None:
    run = CliRunner().invoke
    said = run(app, ["explain", "hf:GPT2LMHeadModel(num_hidden_layers=1)", "--plan", "zero2+dp2", "--cuda-graphs"]).output
    assert "CUDA graphs: captured at the call after 2, and replayed from then on" in said
    said = run(app, ["explain", "hf:GPT2LMHeadModel(num_hidden_layers=1)", "--plan", "zero0+offload(optimizer)", "--cuda-graphs"]).output
    assert re.search(r"CUDA graphs: not captured: (param|state) '.*' lies in the host's memory", said)
    done = run(app, ["verify", "hf:GPT2LMHeadModel(num_hidden_layers=1)", "--cuda-graphs"])
    assert done.exit_code == 2 and "memory is counted op by op" in done.output


# models, ranks and the device ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", *(pytest.param(n, marks=pytest.mark.wide) for n in ("LlamaForCausalLM", "BertForMaskedLM", "T5ForConditionalGeneration", "ViTForImageClassification"))])
def test_models_train_as_they_do(name: str, tapes: list[TapeRecorder]) -> None:
    """Nothing in a model's step is read on the host, and losses are those of steps that are not captured, bit for bit."""
    found = []
    for chosen in (False, True):
        torch.manual_seed(0)
        target = load(f"hf:{name}(num_hidden_layers=1)" if "T5" not in name else f"hf:{name}(num_layers=1)")
        step = deepseed.compile(target.model, optimizer=torch.optim.AdamW(target.model.parameters(), lr=1e-3), clip_grad_norm=1.0, cuda_graphs=chosen)
        found.append([float(step(target.batch)) for _ in range(WARM + 2)])  # type: ignore[arg-type]
    assert found[0] == found[1] and tapes[0].replayed == 2


def test_routed_experts_are_refused() -> None:
    target = load("hf:MixtralForCausalLM(num_hidden_layers=1)")
    with pytest.raises(GraphError, match=r"routed_(mm|outer).* at .*: numbers that are in its operands decide what is launched"):
        deepseed.compile(target.model, optimizer=torch.optim.SGD(target.model.parameters(), lr=0.1), cuda_graphs=True, example_batch=target.batch)


def test_ranks_do_not_capture_anew_by_themselves() -> None:
    """Where several run one program, one that captured while others replay would leave them waiting: moved memory is an error."""
    step = made()
    for batch in batches(WARM + 1):
        step(batch)
    e, given = replayed(step), step._given(step._find(batches()[0], "step"))
    at = next(n for n, i in enumerate(e.inputs) if i.role == "param")
    given[0][at] = given[0][at].clone()

    class Two:
        mesh = Mesh((("dp", 2),))

    with pytest.raises(GraphError, match=r"param '.*' lies in other memory than when the step was captured, and ranks would have to capture anew together\n  fix: write into"):
        e(Two(), given[0])  # type: ignore[arg-type]


def test_what_is_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream of warm-ups waits for the caller's and the caller's for it; captures are on that stream, in one pool of memory, and leave other threads' calls alone."""
    said: list[object] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            self.name = f"stream on {device}"

        def wait_stream(self, other: Any) -> None:
            said.append(f"{self.name} waits for {other.name}")

    here = Stream("here")
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: here)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: object())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (), {"replay": lambda self: said.append("replay")}))
    wanted = inspect.signature(torch.cuda.graph.__init__)

    @contextmanager
    def inside(what: object) -> Iterator[None]:
        said.append(what)
        yield
        said.append("end")

    def graph(*args: Any, **kwargs: Any) -> Any:
        bound = wanted.bind(None, *args, **kwargs).arguments
        return inside(("capture", bound["pool"], bound["stream"].name, bound["capture_error_mode"]))

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: inside(s.name))
    monkeypatch.setattr(torch.cuda, "device", lambda d: inside(str(d)))
    recorder = CudaRecorder(torch.device("cuda", 1))
    side = "stream on cuda:1"
    assert recorder.warm(lambda: (said.append("run"),)) == (None,)  # type: ignore[func-returns-value, arg-type, return-value]
    assert said == ["cuda:1", f"{side} waits for stream on here", side, "run", "end", f"stream on here waits for {side}", "end"]
    said.clear()
    replays = [recorder.capture(lambda: ())[1] for _ in range(2)]
    first, second = said[1], said[5]
    assert first == second == ("capture", recorder._pool, side, "thread_local") and [said[n] for n in (0, 2, 3)] == ["cuda:1", "end", "end"]
    replays[0]()
    assert said[-1] == "replay"

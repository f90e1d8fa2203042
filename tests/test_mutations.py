"""Checking catches errors: programs with one error each, drawn at random in the output of every pass, are all caught.

A mutation counts if the numbers change by more than 1e-6 (of the largest of their role) or the program no longer runs. What may
catch it, in order: ``verify``, ``typing``, ``instances`` and ``translation``, which every compile runs (deepseed.pipeline), and,
for what these let through, ``lock-step``: the execution of the program beside the one before the pass, by which
``deepseed.verify`` names pass, node and module path once eager PyTorch disagrees. The table of a run is printed (pytest -s).
"""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from matrix import built
from mutate import Mutation, mutate
from torch import Tensor, nn

from deepseed import pipeline, zoo
from deepseed.bisect import inputs_of
from deepseed.build import Built
from deepseed.capture import Captured, capture
from deepseed.capture.batch import rebuild, tensors
from deepseed.check.equivalence import compare
from deepseed.check.execution import ExecutionError, Values, execute
from deepseed.check.shards import ShardsError, assemble
from deepseed.check.translation import Numbering, follow, number
from deepseed.check.typing import MOVES, Typed, check_types
from deepseed.codegen.python import generate
from deepseed.ir.contract import Pass
from deepseed.ir.layout import LayoutError
from deepseed.ir.program import Program
from deepseed.ir.widen import widen
from deepseed.plan import parse_plan
from deepseed.runtime.executable import Executable
from deepseed.runtime.simulate import simulate
from deepseed.runtime.state import shard
from deepseed.target import load
from deepseed.verify import adamw, verify

COUNTS = 1e-6
CHECKS = {"ProgramError": "verify", "TypingError": "typing", "InstanceError": "instances", "TranslationError": "translation"}
FEWER = {  # options that leave a model one layer of each kind, or one
    **dict.fromkeys(("BertForMaskedLM", "ModernBertForMaskedLM", "AlbertForMaskedLM", "ViTForImageClassification", "MambaForCausalLM"), "num_hidden_layers=1"),
    **{f"{name}ForCausalLM": "num_hidden_layers=1" for name in ("Llama", "OPT", "GPTNeoX", "GPTJ", "Mpt", "Bloom", "Phi3", "Olmo2", "Mixtral", "Qwen3Moe", "Gemma3")},
    "GPT2LMHeadModel": "n_layer=1", "XLNetLMHeadModel": "n_layer=1", "SwinForImageClassification": "depths=[1, 1], num_heads=[2, 4]",
    "ResNetForImageClassification": 'layer_type="basic", depths=[1, 1], embedding_size=8, hidden_sizes=[8, 16]',
}  # fmt: skip
EXPERTS = ("Mixtral", "Qwen3Moe", "DeepseekV3", "GptOss", "Jamba")


def small_form(text: str) -> str:
    """A target of the zoo, with fewer layers where ``FEWER`` has it."""
    name = text.partition("(")[0].removeprefix("hf:")
    return f"hf:{name}({FEWER[name]})" if name in FEWER else text


WIDE = [small_form(text) for text in zoo.TARGETS]
WIDE_PLANS = ("zero1+dp2", "zero3+dp2", "tp2", "sp2", "zero3+tp2+dp2", "zero2+dp3")
TARGETS = {"llama": "hf:LlamaForCausalLM", "gpt2": "hf:GPT2LMHeadModel(n_layer=1)", "bert": "hf:BertForMaskedLM(num_hidden_layers=1)"}
MODELS = ("mlp", "llama", "gpt2", "bert")
PLANS = ("zero1+dp2", "zero3+dp2", "tp2", "zero3+tp2+dp2")
SOME = (("mlp", "zero1+dp2"), ("mlp", "zero3+tp2+dp2"), ("llama", "zero3+tp2+dp2"), ("gpt2", "tp2"), ("bert", "zero3+dp2"))


@cache
def target(model: str) -> tuple[nn.Module, Any, Any]:
    if model not in TARGETS and ":" not in model:
        return built(model)
    found = load(TARGETS.get(model, model))
    return found.model, found.batch, found.loss_fn


@pytest.fixture(autouse=True, scope="module")
def instances_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path_factory.mktemp("instances")))
        yield


@dataclass(frozen=True)
class Stage:
    """The program after one pass (of every rank, once localized), executed."""

    name: str
    program: Program
    ranks: tuple[Program, ...]
    values: Values
    numbering: Numbering | None
    typed: Typed  # what the programs up to this one have shown


@cache
def taken(model: str) -> Captured:
    """The captured training step, in float64."""
    module, _, loss_fn = target(model)
    ours = copy.deepcopy(module).double()
    found = capture(ours, wide_batch(model), loss_fn=loss_fn, optimizer=adamw(list(ours.parameters())), clip_grad_norm=1.0, grads=True, wide=True)
    return replace(found, program=widen(found.program))


def wide_batch(model: str) -> Any:
    _, batch, _ = target(model)
    return rebuild(batch, {k: wide(t) for k, t in tensors(batch).items() if t.is_floating_point()})


def wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


@lru_cache(maxsize=8)
def stages(model: str, plan: str) -> tuple[dict[str, Tensor], tuple[Stage, ...]]:
    """Inputs, then the captured program and the one after each pass, every check on."""
    module, _, _ = target(model)
    captured, said = taken(model), parse_plan(plan)
    mesh = said.mesh()
    done = pipeline.run(captured.program, pipeline.arguments(mesh, said.stage, mesh.coordinate(0)))
    shared = done[-2].program
    mesh = shared.mesh
    constants = {k: wide(v) for k, v in captured.constants.items()}
    built_ = Built(captured, shared, done, (), constants, "", 0.0, "")
    values = {("param", k): t.detach().double() for k, t in module.named_parameters()} | {("buffer", k): wide(t) for k, t in module.named_buffers()}
    inputs = inputs_of(built_, values | {("batch", k): t for k, t in captured.batch.flatten(wide_batch(model)).items()}, torch.tensor([0, 0]))
    numbering: Numbering | None = number(captured.program)
    typed = Typed()
    found = [Stage("capture", captured.program, (), execute(captured.program, inputs), numbering, copied(typed))]
    for each in done:
        ranks: tuple[Program, ...] = ()
        if "local" in each.program.facts:
            ranks = tuple(pipeline.BY_NAME[each.name](shared, mesh.coordinate(r)) for r in range(mesh.ranks))
        numbering = None if numbering is None or ranks else follow(numbering, each.program)
        if "placed" in each.program.facts and not ranks:
            check_types(each.program, typed)
        found.append(Stage(each.name, each.program, ranks, execute(each.program, inputs, ranks=ranks), numbering, copied(typed)))
    return inputs, tuple(found)


def copied(typed: Typed) -> Typed:
    return replace(typed, types=dict(typed.types), ops=dict(typed.ops), keys=set(typed.keys))


# one draw -----------------------------------------------------------------------------------------------------------


@dataclass
class Draw:
    where: str  # model, plan, pass
    mutation: Mutation
    caught: str = ""  # by which check; "" where it does not count
    report: str = ""
    wrong: str = ""  # what is missing of the report
    exact: bool = False


@dataclass
class Table:
    draws: list[Draw] = field(default_factory=list)

    def __str__(self) -> str:
        columns = ["drawn", "counted", "verify", "typing", "instances", "translation", "lock-step", "missed"]
        rows = [f"{'':22}" + "".join(f"{c:>11}" for c in columns)]
        for title, of in (("pass", lambda d: d.where.split()[-1]), ("mutation", lambda d: d.mutation.kind)):
            keys = list(dict.fromkeys(sorted(map(of, self.draws)) if title == "mutation" else map(of, sorted(self.draws, key=_order))))
            for key in [*keys, "all"]:
                draws = [d for d in self.draws if key in (of(d), "all")]
                by = Counter(d.caught for d in draws)
                counts = [len(draws), len(draws) - by[""], *(by[c] for c in columns[2:])]
                rows.append(f"{key:22}" + "".join(f"{n:>11}" for n in counts))
            rows.append("")
        return "\n".join(rows)


def _order(d: Draw) -> int:
    return list(pipeline.BY_NAME).index(d.where.split()[-1])


def draw(model: str, plan: str, at: int, rng: Random, *, translation: bool = True) -> Draw:
    """One mutation of the program after pass ``at``, and which check catches it; without ``translation``, as if that were none."""
    inputs, all_stages = stages(model, plan)
    before, stage = all_stages[at], all_stages[at + 1]
    mutation, programs = _mutated(stage, rng)
    out = Draw(f"{model} {plan} {stage.name}", mutation)
    bad = mutation.program
    failed = _checked(before, stage, bad, programs, translation)
    values: Values | ExecutionError | Exception
    try:
        values = execute(bad, inputs, ranks=programs, known=_untouched(stage, bad, programs))
    except (ValueError, KeyError, AssertionError, StopIteration) as error:
        values = error
    if isinstance(values, dict) and not _changed(stage, bad, values):
        return out
    if failed is not None:
        out.report = str(failed)
        out.caught = CHECKS.get(type(failed.__cause__).__name__, "typing")
        out.wrong = _missing_in(out.report, stage.name, stage.program, bad, mutation.node)
        return out
    if not isinstance(values, (dict, ExecutionError)):
        raise values
    found = compare(before.program, before.values, bad, values)
    out.caught, out.report = ("lock-step", f"after pass {stage.name}: {found}") if found is not None else ("missed", "")
    if found is not None:
        out.exact = mutation.node in out.report
        out.wrong = _missing_in(out.report, stage.name, stage.program, bad, mutation.node)
    return out


def _checked(before: Stage, stage: Stage, bad: Program, programs: Sequence[Program], translation: bool) -> pipeline.CheckError | None:
    """What the checks of a compile say of the wrong program, the cheapest first."""
    try:
        for program in programs or (bad,):
            pipeline.check_program(program, stage.name, typed=copied(before.typed))
        for rank, program in enumerate(programs if translation else ()):
            pipeline.check_translation(before.program, program, stage.name, None, {"coordinate": stage.program.mesh.coordinate(rank)})
        if not programs and translation:
            pipeline.check_translation(before.program, bad, stage.name, before.numbering)
    except pipeline.CheckError as error:
        return error
    return None


def _mutated(stage: Stage, rng: Random) -> tuple[Mutation, tuple[Program, ...]]:
    """A mutation of the stage's program; of every rank's, once localized, or of one rank's alone where only arguments changed."""
    while True:
        if not stage.ranks:
            return mutate(stage.program, rng), ()
        seed, alone = rng.random(), rng.randrange(len(stage.ranks)) if rng.random() < 0.5 else None
        each = [mutate(p, Random(seed)) for p in stage.ranks]
        if len({(m.kind, m.node, len(m.program.ops)) for m in each}) > 1:
            continue
        if alone is None:
            return each[0], tuple(m.program for m in each)
        same = tuple(m.program if r == alone else p for r, (m, p) in enumerate(zip(each, stage.ranks, strict=True)))
        if _skeleton(same[alone]) == _skeleton(stage.ranks[alone]):
            return each[alone], same


def _skeleton(p: Program) -> object:
    """All but the arguments of ops that no other rank takes part in."""
    return p.inputs, p.outputs, [(op.results, op.target, op.types, op.kwargs if op.target.endswith(".start") else (), op.refs) for op in p.ops]


def _untouched(stage: Stage, bad: Program, ranks: Sequence[Program]) -> Values:
    """The values that the mutation cannot reach."""
    olds = [*(stage.ranks or (stage.program,))]
    touched = {i.name for i, old in zip(bad.inputs, stage.program.inputs, strict=True) if i.type != old.type}
    old = [{op.name: op for op in p.ops} for p in olds]
    for ops in zip(*(p.ops for p in ranks or (bad,)), strict=True):
        if any(was.get(op.name) != op for was, op in zip(old, ops, strict=True)) or any(r.name in touched for r in ops[0].refs):
            touched.update(ops[0].results)
    return {name: parts for name, parts in stage.values.items() if name not in touched}


def _changed(stage: Stage, bad: Program, values: Values) -> bool:
    """Whether an output differs by more than 1e-6 of the largest of its role, on any rank."""
    p = stage.program
    largest: dict[str, float] = {}
    wholes = {(o.role, o.key): assemble(stage.values[o.ref.name], p.types[o.ref.name], p.mesh) for o in p.outputs}
    for (role, _), x in wholes.items():
        largest[role] = max(largest.get(role, 0.0), float(x.abs().max()))
    for now, was in zip(bad.outputs, p.outputs, strict=True):
        t = bad.types[now.ref.name]
        try:
            x, y = [assemble(values[now.ref.name], t, bad.mesh)], [wholes[was.role, was.key]]
        except LayoutError:
            return True  # no such parts exist
        except ShardsError:
            x, y = values[now.ref.name], stage.values[was.ref.name]
        for a, b in zip(x, y, strict=True):
            if a.shape != b.shape or not bool(((a - b).abs() <= COUNTS * largest[was.role]).all()):
                return True
    return False


def _missing_in(report: str, name: str, good: Program, bad: Program, node: str) -> str:
    """A report names the pass, a node that is wrong or reads or feeds what is, and its module path. What this one lacks."""
    if f"after pass {name}: " not in report:
        return f"pass {name}"
    near: dict[str, str] = {}  # value -> module path
    touched = {node}
    for p in (good, bad):
        for op in p.ops:
            if touched.intersection((*op.results, *(r.name for r in op.refs))):
                near.update(dict.fromkeys(op.results, op.path))
                touched.update(op.results if node in op.results or op.target in (*MOVES, "wait", "reshard") else ())
    words = set(re.split(r"[ ,:()\n]+", report))
    named = [path for value, path in near.items() if f"%{value}" in words]
    said = [f"{i.role} {i.key!r}" for i in good.inputs if i.name == node] + [node]
    if not named and not any(text in report for text in said):
        return f"node {node}"
    return "" if not named or any(not path or f"at {path}" in report for path in named) else "module path"


def drawn(count: int, cases: Sequence[tuple[str, str]], seed: int) -> Table:
    rng = Random(seed)
    table = Table()
    places = list(itertools.product(cases, range(len(pipeline.PIPELINE))))
    for n in range(count):
        (model, plan), at = places[n % len(places)]
        table.draws.append(draw(model, plan, at, rng))
    print(f"\n{table}")
    return table


def all_caught(table: Table) -> None:
    counted = [d for d in table.draws if d.caught]
    missed = [d for d in counted if d.caught == "missed"]
    assert not missed, "\n".join(f"{d.where}: {d.mutation.kind} of {d.mutation.node}" for d in missed)
    vague = [d for d in counted if d.wrong]
    assert not vague, "\n\n".join(f"{d.where}: {d.mutation.kind} of {d.mutation.node}: no {d.wrong} in\n{d.report}" for d in vague[:5])


def test_every_error_is_caught_and_named() -> None:
    table = drawn(140, SOME, seed=0)
    all_caught(table)
    assert sum(bool(d.caught) for d in table.draws) >= 110


def plans_of(model: str) -> list[str]:
    """Two of the plans for each model, in turn, so that each plan meets every third one; those with experts also under ``ep``."""
    n = WIDE.index(model)
    some = [WIDE_PLANS[(n + k) % len(WIDE_PLANS)] for k in (0, 3)]
    if not zoo._has_sequence(target(model)[1]):
        some = ["tp2" if plan == "sp2" else plan for plan in some]
    return some + ["ep2"] * any(f"hf:{name}For" in model for name in EXPERTS)


COUNTED, MOST_DRAWS = 5, 10  # of a pass of a model under a plan: so many that count, and no more than this


def every_pass(model: str, plan: str) -> Table:
    table = Table()
    for at in range(len(pipeline.PIPELINE)):
        rng = Random(f"{model} {plan} {at}")
        counted = 0
        for _ in range(MOST_DRAWS):
            table.draws.append(draw(model, plan, at, rng))
            counted += bool(table.draws[-1].caught)
            if counted == COUNTED:
                break
    return table


def written(table: Table) -> None:
    """Added to the file ``$DEEPSEED_MUTATIONS``: ``python tests/mutation_report.py FILE`` adds the draws of all models up."""
    if (file := os.environ.get("DEEPSEED_MUTATIONS")) is not None:
        with Path(file).open("a") as f:
            for d in table.draws:
                f.write("\t".join((d.where.replace(", ", ","), d.mutation.kind, d.mutation.node, d.caught, d.wrong)) + "\n")


@pytest.mark.wide
@pytest.mark.parametrize("model", WIDE)
def test_every_error_is_caught_and_named_wide(model: str) -> None:
    tables = []
    try:
        for plan in plans_of(model):
            tables.append(every_pass(model, plan))
            written(tables[-1])
            stages.cache_clear()
    finally:
        stages.cache_clear()
        taken.cache_clear()
        target.cache_clear()
    for table in tables:
        all_caught(table)


def test_the_wide_run_has_every_model_and_plan() -> None:
    assert len(WIDE) == len(set(WIDE)) == 30
    assert {zoo.short(t) for t in WIDE} == {zoo.short(t) for t in zoo.TARGETS}


# from end to end ----------------------------------------------------------------------------------------------------


def broken(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[[Program], Program]) -> None:
    """The pipeline, with a pass that makes an error."""

    def wrong(each: Pass) -> Pass:
        return replace(each, run=lambda p, **kw: change(each.run(p, **kw))) if each.name == name else each

    monkeypatch.setattr(pipeline, "SHARED", tuple(map(wrong, pipeline.SHARED)))
    monkeypatch.setattr(pipeline, "EACH_RANK", tuple(map(wrong, pipeline.EACH_RANK)))


def lock_step(model: str, plan: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> bool:
    """One mutation that, translation aside, only the lock-step sees, made by its pass inside ``verify``; False where the draw is none."""
    at = seed % len(pipeline.PIPELINE)
    _, found = stages(model, plan)
    name = found[at + 1].name
    if found[at + 1].ranks:
        return False
    one = draw(model, plan, at, Random(seed), translation=False)
    if one.caught != "lock-step" or "reads %" in one.report or "does not run" in one.report:
        return False
    module, batch, loss_fn = target(model)
    with monkeypatch.context() as patch:
        broken(patch, name, lambda p: mutate(p, Random(seed)).program)
        patch.setattr(pipeline, "check_translation", lambda *args: None)
        report = verify(module, batch, plan, optimizer_factory=adamw, loss_fn=loss_fn, clip_grad_norm=1.0, steps=2)
    made = found[at + 1].program.producers.get(one.mutation.node)
    healed = made is not None and bool(made.origin)  # group_kernels puts the whole op, which is right, in the place of its group
    if report.ok:
        assert healed, f"{one.where}: {one.mutation.kind} of {one.mutation.node} is not seen by eager PyTorch\n{one.report}"
        return False
    assert report.blame.startswith(f"after pass {name}: "), report.blame
    assert not _missing_in(report.blame, name, found[at + 1].program, one.mutation.program, one.mutation.node), report.blame
    return True


def test_verify_names_pass_node_and_module_path(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(lock_step("mlp", plan, monkeypatch, seed) for plan in ("zero1+dp2", "zero3+tp2+dp2") for seed in range(8)) >= 5


@pytest.mark.wide
@pytest.mark.parametrize(("model", "plan"), list(itertools.product(("mlp", "llama"), PLANS)))
def test_verify_names_pass_node_and_module_path_wide(model: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(lock_step(model, plan, monkeypatch, seed) for seed in range(28)) >= 3


def test_verify_tells_a_wrong_back_end_from_a_wrong_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepseed.build

    generate = deepseed.build.generate
    monkeypatch.setattr(deepseed.build, "generate", lambda p, lane, **kw: generate(replace(p, ops=tuple(replace(o, target="aten.neg") if o.target == "aten.relu" else o for o in p.ops)), lane, **kw))
    module, batch, loss_fn = built("mlp")
    report = verify(module, batch, "tp2", loss_fn=loss_fn, steps=1)
    assert not report.ok and report.blame.startswith("execution: ")


def test_no_false_alarm() -> None:
    no_false_alarm(SOME)


@pytest.mark.wide
def test_no_false_alarm_wide() -> None:
    no_false_alarm(list(itertools.product(MODELS, PLANS)))


def no_false_alarm(cases: Sequence[tuple[str, str]]) -> None:
    """Unchanged, every pass's program passes every check and equals the one before."""
    for model, plan in cases:
        _, found = stages(model, plan)
        for before, stage in itertools.pairwise(found):
            assert compare(before.program, before.values, stage.program, stage.values) is None
            pipeline.check_program(stage.program, stage.name)


def test_the_checks_execute_as_the_ranks_do() -> None:
    """The interpreter of the checks against generated source on simulated ranks: outputs of one step."""
    for model, plan in SOME[1:3]:
        inputs, found = stages(model, plan)
        p = found[-1].program
        parts = [[shard(inputs[i.name], i.type, p.mesh, p.mesh.coordinate(r)).clone() for i in p.inputs] for r in range(p.mesh.ranks)]
        results = simulate(p.mesh, [Executable(generate(each), p.name) for each in found[-1].ranks], parts)
        shown = [o for o in p.outputs if o.role not in ("param", "buffer", "state")]
        for n, o in enumerate(shown):
            for rank in range(p.mesh.ranks):
                torch.testing.assert_close(results[rank][n], found[-1].values[o.ref.name][rank], rtol=1e-10, atol=1e-12)

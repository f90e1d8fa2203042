"""From a captured step to what each hosted rank executes: passes on rank 0, one program text for all, source a rank."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

from torch import Tensor

from deepseed import pipeline, remembered
from deepseed.budget import run_shared
from deepseed.capture import Captured
from deepseed.codegen.python import generate
from deepseed.compiling import Compiling
from deepseed.graphs import Graphs
from deepseed.idle import idle_share
from deepseed.ir.amounts import format_bytes
from deepseed.ir.contract import Pass
from deepseed.ir.layout import Layout
from deepseed.ir.mesh import STAGES, Mesh
from deepseed.ir.program import OUTPUT_ROLES, Program
from deepseed.ir.text import parse
from deepseed.ir.widen import widen
from deepseed.kernels import PRODUCTS, PYTHON, Compiled, Kernels, made
from deepseed.local_norms import with_local_norms
from deepseed.logs import say
from deepseed.machines import measured
from deepseed.meshes import data_ranks, microbatches, program_mesh, row_ranks, rows_of, rows_of_a_rank
from deepseed.own_rows import with_own_rows
from deepseed.pipeline import Passed
from deepseed.plan import Plan
from deepseed.rules.lanes import STORED, home
from deepseed.runtime.executable import Executable
from deepseed.runtime.host import Host
from deepseed.solver.assignment import cut_short
from deepseed.speed import Machine

RETURNED = tuple(role for role in OUTPUT_ROLES if role not in STORED)


class CompileError(ValueError):
    """An argument of ``compile`` or a batch that cannot be served: says what, the numbers and the fix."""


@dataclass
class Built:
    """One compiled shape: the program that all ranks share, and this process's executables."""

    captured: Captured
    program: Program  # after the last pass that all ranks share
    passed: Sequence[Passed]  # what ran here: the last pass alone where rank 0 or the cache folder gave the program
    executables: Sequence[Executable]
    constants: Mapping[str, Tensor]
    digest: str
    seconds: float
    text: str  # of the captured program
    adopted: bool = False  # whether the state that it reads is stored
    looked: dict[bool, Sequence[Executable]] = field(default_factory=dict)  # the same, each value of which is looked at, without groups or with: once they are asked for
    kernels: Sequence[Mapping[str, str]] = ()  # of each executable, the function of each group, by its mark
    uncaptured: str | None = None  # why no graph is made of a step; None: it was not asked for
    took: Mapping[str, float] = field(default_factory=dict)  # seconds of each pass, when it ran
    again: Callable[[], Sequence[Passed]] | None = None  # runs the passes of a program that the cache folder gave

    @property
    def passes(self) -> Sequence[Passed]:
        """The program after each pass."""
        if self.again is not None:
            self.passed, self.again = [*self.again(), *self.passed[1:]], None
        return self.passed

    @property
    def instances(self) -> int:
        return max((p.instances for p in self.passed), default=0)

    @property
    def unproved(self) -> tuple[str, ...]:
        """Values that a pass wrote differently and that are too large to run: taken as equal."""
        return tuple(name for p in self.passed for name in p.unproved)

    def returned(self, host: Host, results: Sequence[Sequence[Tensor]], roles: Collection[str] = RETURNED, wanted: Collection[str] = RETURNED) -> dict[tuple[str, str], Tensor]:
        """What a step returns, all but what is stored: whole, by role and key. ``results``: of each executable; ``roles``: those of what is in them; ``wanted``: of these."""
        p, parts = self.program, self.parts(results, roles)
        return {
            (o.role, o.key): host.whole([r.get((o.role, o.key)) for r in parts], p.types[o.ref.name], home(p, o.ref.name)) for o in p.outputs if o.role in roles and o.role in wanted
        }

    def parts(self, results: Sequence[Sequence[Tensor]], roles: Collection[str]) -> list[dict[tuple[str, str], Tensor]]:
        """The same as each executable returned it."""
        shown = [[o for o in e.outputs if o.role in roles] for e in self.executables]
        return [{(o.role, o.key): t for o, t in zip(outputs, r, strict=True)} for outputs, r in zip(shown, results, strict=True)]


def looked(built: Built, host: Host, grouped: bool = False) -> Sequence[Executable]:
    """The executables of ``built`` as they show each value to ``rt.look``; ``grouped``: each that there is where kernels compute groups."""
    if grouped not in built.looked:
        local = [pipeline.run(built.program, {"localize": {"coordinate": c}}, pipeline.EACH_RANK, check=False)[-1].program for c in host.coordinates]
        found = [made(p, e.codegen, dict(e.kernels), bool(host.arenas), say) if grouped else Kernels() for p, e in zip(local, built.executables, strict=True)]
        built.looked[grouped] = [
            Executable(generate(p, c.get(STAGES, 0), True, k.functions), f"{p.name}-looked", p.inputs, p.outputs, k.calls, k.codegen) for p, c, k in zip(local, host.coordinates, found, strict=True)
        ]
    return built.looked[grouped]


def build(
    captured: Captured, plan: Plan, host: Host, *, stored: Mapping[tuple[str, str], Layout] | None = None,
    homes: Mapping[tuple[str, str], int] | None = None, hosted: Mapping[tuple[str, str], bool] | None = None, own: bool = False, wide: bool = False, quiet: bool = False, codegen: str = PYTHON, graphs: Graphs | None = None,
    at: Compiling | None = None,
) -> Built:
    """Run the pipeline. ``at`` hears how far it is. ``codegen``: what computes groups of ops (deepseed.kernels). ``graphs``: how steps are captured (deepseed.graphs). ``own``: each data-parallel rank has its own rows. ``stored``, ``homes`` and ``hosted`` pin the layouts, stages and memories of parameters and state that an earlier program fixed. Raises CheckError,
    PassError, and AgreementError where ranks captured different programs."""
    started, text_captured = perf_counter(), str(captured.program)
    if wide:
        captured = replace(captured, program=widen(captured.program))
    captured = replace(captured, program=prepared(captured.program, plan, host.mesh, own))
    host.agree([("plan", str(plan)), ("codegen", codegen), ("cuda_graphs", graphs is not None and graphs.insisted)])
    host.agree_on(str(captured.program), "captured program")
    at = at or Compiling(False)

    mesh = program_mesh(captured.program, plan, host.mesh)
    if host.first and not quiet:
        say_microbatches(captured.program, plan, host.mesh)

    def tell(line: str) -> None:
        if not quiet:
            say(line)

    asked = {"stored": dict(stored or {}), "homes": dict(homes or {}), "hosted": dict(hosted or {}), "kernels": codegen != PYTHON, "products": PRODUCTS.get(codegen, "")}
    solving = Solving(captured.program, plan, host.mesh, asked, tell, at, keep=not wide)
    text = host.decide(solving)
    done, took, again = list(solving.done), dict(solving.took), solving.again if solving.known else None
    if not done:
        program = parse(text)
        done.append(Passed(pipeline.SHARED[-1].name, program, 0.0, instances=pipeline.check_program(program, f"{pipeline.SHARED[-1].name}, as rank 0 sent it")))
    program = done[-1].program
    host.refine(program.mesh)
    executables, compiled, names, uncaptured = list[Executable](), dict[str, Compiled](), list[Mapping[str, str]](), None
    for coordinate in host.coordinates:
        args = pipeline.arguments(mesh, plan.stage, coordinate, stored, plan, homes, hosted)
        local = pipeline.run(program, args, pipeline.EACH_RANK)
        mine = local[-1].program
        kernels = made(mine, codegen, compiled, bool(host.arenas), tell, at)
        source = generate(mine, coordinate.get(STAGES, 0), kernels=kernels.functions, chaining=kernels.chaining)
        if graphs is None:
            executables.append(Executable(source, program.name, mine.inputs, mine.outputs, kernels.calls, kernels.codegen))
        else:
            made_of, uncaptured = graphs.executable(mine, source, program.name, kernels, tell)
            executables.append(made_of)
        names.append(kernels.names)
        if len(executables) == 1:
            done += local
            took |= {p.name: p.seconds for p in local}
    constants = {k: (v.double() if wide and v.is_floating_point() else v).to(host.device) for k, v in captured.constants.items()}
    return Built(captured, program, done, executables, constants, _digest(text), perf_counter() - started, text_captured, kernels=names, uncaptured=uncaptured, took=took, again=again)


class Solving:
    """Called on rank 0 for all: the program that all ranks share, as text. ``done``: the passes that ran for it, or, where the cache folder had it (``known``),
    the last one alone; ``took``: seconds of each, when it ran.

    ``asked``: what is pinned and which back end there is, as ``pipeline.arguments`` takes them. ``keep``: whether the cache folder is asked, and told."""

    def __init__(self, p: Program, plan: Plan, ranks: Mesh, asked: Mapping[str, Any], tell: Callable[[str], object], at: Compiling, keep: bool) -> None:
        self.p, self.plan, self.ranks, self.asked, self.tell, self.at, self.keep = p, plan, ranks, asked, tell, at, keep
        self.done: list[Passed] = []
        self.took: dict[str, float] = {}
        self.known = False
        self.machine: Machine | None = None

    def __call__(self) -> str:
        self.machine = measured(self.plan.mesh().ranks)  # on rank 0: programs are the same on every rank, whatever another host has measured
        mesh = program_mesh(self.p, self.plan, self.ranks)
        key = remembered.key_of(self.p, self.plan, pipeline.arguments(mesh, self.plan.stage, {}, plan=self.plan, **self.asked), pipeline.SHARED, self.machine) if self.keep else None
        entry = remembered.read(key) if key is not None else None
        if entry is not None and self._taken(entry):
            return entry.text
        said, passed, hasty = list[str](), list[str](), cut_short()

        def on_pass(p: Passed) -> None:
            passed.append(p.name)
            self.at("passes", len(passed), len(pipeline.SHARED), p.name)

        self.at("passes")
        self.done = self._run(said.append, on_pass)
        self.took = {p.name: p.seconds for p in self.done}
        for line in said:
            self.tell(line)
        text = str(self.done[-1].program)
        if key is not None and hasty == cut_short() and sum(p.seconds + p.check_seconds for p in self.done) >= remembered.WORTH:
            remembered.write(key, remembered.Entry(text, tuple(remembered.Took(p.name, p.seconds, p.instances, p.unproved) for p in self.done), tuple(said)))
        return text

    def _taken(self, entry: remembered.Entry) -> bool:
        """Whether the cache folder's program can be had: read, typed, and its instances executed where they never were."""
        self.at("known passes")
        last = pipeline.SHARED[-1].name
        try:
            program = parse(entry.text)
            instances = pipeline.check_program(program, f"{last}, as the cache folder had it")
        except ValueError as error:
            self.tell(f"the program that the cache folder had is not taken, all passes run: {str(error).splitlines()[0]}")
            return False
        self.done = [Passed(last, program, 0.0, instances=max(instances, *(p.instances for p in entry.passes)), unproved=tuple(name for p in entry.passes for name in p.unproved))]
        self.took, self.known = {p.name: p.seconds for p in entry.passes}, True
        for line in entry.said:
            self.tell(line)
        return True

    def again(self) -> list[Passed]:
        """What ``done`` would be if the cache folder had had nothing."""
        found = self._run(lambda line: None)
        if found[-1].program != self.done[-1].program:
            raise CompileError("the passes give another program than the cache folder had, which runs\n  fix: DEEPSEED_REMEMBER=0, and report it: what they give must not change from run to run")
        return found

    def _run(self, tell: Callable[[str], object], on_pass: Callable[[Passed], None] | None = None) -> list[Passed]:
        return run_passes(self.p, self.plan, self.ranks, {}, on_pass=on_pass, machine=self.machine, tell=tell, **self.asked)


def prepared(p: Program, plan: Plan, ranks: Mesh, own: bool = False) -> Program:
    """The captured program that a plan means: under ``bn(local)`` another one, and with ``own`` rows of each data-parallel rank."""
    p = with_own_rows(p, ranks) if own else p
    return with_local_norms(p, row_ranks(p, ranks), microbatches(p, plan, ranks)) if plan.bn == "local" else p


def run_passes(
    p: Program, plan: Plan, ranks: Mesh, at: Mapping[str, int], *, stored: Mapping[tuple[str, str], Layout] | None = None,
    homes: Mapping[tuple[str, str], int] | None = None, hosted: Mapping[tuple[str, str], bool] | None = None, check: bool = True,
    on_pass: Callable[[Passed], None] | None = None, passes: Sequence[Pass] | None = None, machine: Machine | None = None, tell: Callable[[str], object], kernels: bool = False, products: str = "",
) -> list[Passed]:  # fmt: skip
    """The passes that all ranks share (or ``passes``, with the rank ``at`` a coordinate) over a captured program; ``tell`` hears what a budget chose."""
    mesh = program_mesh(p, plan, ranks)

    def arguments(plan: Plan) -> dict[str, dict[str, Any]]:
        return pipeline.arguments(mesh, plan.stage, at, stored, plan, homes, hosted, kernels, products)

    done, choice = run_shared(p, plan, arguments, check=check, on_pass=on_pass, hosted=hosted, passes=passes, machine=machine)
    if choice is not None:
        tell(f"budget({format_bytes(plan.budget or 0)}): {choice}")
    return done


def say_microbatches(p: Program, plan: Plan, mesh: Mesh) -> None:
    """How many a pipeline takes whose plan does not say. ``mesh``: of the ranks."""
    if plan.mb is not None or plan.stages == 1 or not any(o.role == "loss" for o in p.outputs):
        return
    mine, m = rows_of_a_rank(p, mesh), microbatches(p, plan, mesh)
    rows, ranks = rows_of(p), data_ranks(mesh)
    what = f"{m} microbatches of {mine // m} of the {mine} rows that each data-parallel rank has" if rows % ranks == 0 else f"1 microbatch, since {rows} rows do not divide by {ranks} ranks"
    say(f"pp{plan.stages} without mb: {what}; {idle_share(plan.kind, plan.stages, m, plan.chunks):.0%} of the ranks' time is idle")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

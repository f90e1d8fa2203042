"""What kernels read and write against the least that they could, and how many a step launches: counted from the program, no tensor is made.

A kernel computes a group, or an optimizer's update of all parameters of one dtype. What a back end writes no kernel for runs op by op, and is counted so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

from deepseed.codegen.ahead_of_time import Compiled
from deepseed.codegen.expressions import CodegenError
from deepseed.codegen.kernels import Kernel, kernels
from deepseed.codegen.optim import FUSED, UPDATES, Call, calls_of
from deepseed.codegen.updates import Formula
from deepseed.counts import local_flops
from deepseed.explain_text import amount
from deepseed.ir.fragment import Group, groups
from deepseed.ir.program import ITEMSIZE, Op, Program
from deepseed.rules.strides import laid_out
from deepseed.speed import Machine
from deepseed.unroll import unroll

FREE = ("reshape", "permute", "expand", "slice", "cast", "sum", "amax")  # of these some make no copy
MOVES = ("wait", "shard", "summand", "share", "transfer", "accumulate", "collect")


@dataclass(frozen=True)
class KernelCount:
    """``calls`` and ``launches`` are of a step: a group that all layers or microbatches share is called once for each; all other numbers are of one call. ``bytes_read``: every operand once, or what the
    back end's kernels read, with what they read again; ``bytes_minimum``: every byte of memory that is read once, and what is written, or all that the kernels move where that is less (keys that no
    query sees); ``flops``: those of matrix products, and one an element and op of others that compute. ``runs_as``: "kernel", or "python" where the back end writes none, and ``why``; then every op that
    makes numbers is a launch, and bytes are what these ops read and write. ``seconds``: where it was measured (deepseed.timed), ``share``: of these, the part that the machine's memory and products
    need at least. ``compiled``: its Triton kernels, for each target that was asked for (deepseed.assembled)."""

    name: str
    ops: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    bytes_minimum: int
    calls: int
    launches: int
    flops: int
    runs_as: str = "kernel"
    why: str = ""
    seconds: float | None = None
    share: float | None = None
    compiled: tuple[Compiled, ...] = ()

    @property
    def intensity(self) -> float:
        """Flops a byte."""
        return self.flops / max(1, self.bytes_minimum)


@dataclass(frozen=True)
class Update(Call):
    """A call of updates; ``sizes``: elements of each run's tensors, of a rank."""

    sizes: tuple[tuple[int, ...], ...]

    @property
    def nbytes(self) -> tuple[int, int]:
        """What its kernel reads and writes: each tensor once."""
        read, written = 0, 0
        for f, sizes in zip(self.formulas, self.sizes, strict=True):
            each = {name: _bytes(f, name, sizes) for name in f.each} | {name: ITEMSIZE[f.program.types[name].dtype] for name in f.shared}
            read, written = read + sum(each.values()), written + sum(each[name] for name in f.updated)
        return read, written

    @property
    def without(self) -> tuple[int, int, int]:
        """Launches, and bytes read and written, where no kernel is written: torch's fused one of a formula that has one, else an op of each tensor after another."""
        launches, read, written = 0, 0, 0
        for f, sizes in zip(self.formulas, self.sizes, strict=True):
            if f"optim.{f.kind}" in FUSED:
                own = replace(self, formulas=(f,), sizes=(sizes,)).nbytes
                launches, read, written = launches + 1, read + own[0], written + own[1]
                continue
            launches += len(sizes) * len(f.program.ops)
            read += sum(_bytes(f, name, sizes) for op in f.program.ops for name in {r.name for r in op.refs})
            written += sum(_bytes(f, name, sizes) for op in f.program.ops for name in op.results)
        return launches, read, written


def _bytes(f: Formula, name: str, sizes: Sequence[int]) -> int:
    """Of a value of all tensors."""
    t = f.program.types[name]
    return (sum(sizes) if t.shape else len(sizes)) * ITEMSIZE[t.dtype]


@dataclass(frozen=True)
class KernelReport:
    """``launches``: kernels of a step, library calls included; ``alone``: those of them that are of none of ``kernels``, by op; ``launches_ungrouped``: of the same step with one an op. ``made`` and ``updates``: by name, what
    each kernel is written from. ``targets``: those that kernels were compiled for; ``machine``: what they were measured against."""

    kernels: tuple[KernelCount, ...]
    launches: int
    alone: Mapping[str, int]
    launches_ungrouped: int
    made: Mapping[str, Kernel] = field(default_factory=dict, repr=False)
    updates: Mapping[str, Update] = field(default_factory=dict, repr=False)
    targets: tuple[str, ...] = ()
    machine: Machine | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``machine``, ``seconds`` and ``share`` are None where nothing was measured."""
        each = [{**asdict(k), "compiled": [{**asdict(c), "assembly": str(c.assembly)} for c in k.compiled], "intensity": k.intensity} for k in self.kernels]
        machine = None if self.machine is None else asdict(self.machine)
        return {"launches": self.launches, "alone": dict(self.alone), "launches_ungrouped": self.launches_ungrouped, "machine": machine, "kernels": each}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


Traffic = Callable[[Kernel | Update], Sequence[tuple[int, int]] | None]  # what each kernel that is written for a group, or an update, reads and writes; None: nothing is known but operands and results. Raises CodegenError where none is written


def explain_kernels(p: Program, plain: Program, traffic: Traffic = lambda kernel: None) -> KernelReport:
    """Count a grouped program; ``plain``: the same step without groups. Of a pipeline the rank that launches most. ``traffic``: of the back end that writes the kernels."""
    ask = _Asked(traffic)
    full = max([_Step(each, ask) for each in _steps(p)], key=lambda step: step.launches)
    made, updates = {k.name: k for k in full.made.values()}, {name: alike[0] for name, alike in full.updates.items()}
    return KernelReport(full.counts, full.launches, dict(full.alone.most_common()), max(_ungrouped(each) for each in _steps(plain)), made, updates)


def _steps(p: Program) -> Sequence[Program]:
    return [unroll(p, lane).program for lane in range(len(p.schedule.lanes))] if p.schedule is not None else [p]


class _Asked:
    """What a back end says of each distinct kernel, asked once: what it moves, and why it writes none."""

    def __init__(self, traffic: Traffic) -> None:
        self.traffic, self.known = traffic, dict[str, tuple[Sequence[tuple[int, int]] | None, str]]()

    def __call__(self, k: Kernel | Update) -> tuple[Sequence[tuple[int, int]] | None, str]:
        if k.name not in self.known:
            try:
                self.known[k.name] = self.traffic(k), ""
            except CodegenError as error:
                self.known[k.name] = None, str(error).splitlines()[0]
        return self.known[k.name]


class _Step:
    """Of one rank: ``counts`` of its kernels, and ops that are ``alone``."""

    def __init__(self, p: Program, ask: _Asked) -> None:
        self.p, self.ask = p, ask
        self.strides, views = laid_out(p)
        self.launching = _launching(p, views)
        self.free = {op.name: op for op, view in zip(p.ops, views, strict=True) if view and op.target in FREE}
        self.made, self.updates = kernels(p, self.strides, views), _named(_updates(p))
        self.alone = Counter(op.target for op, launches in zip(p.ops, self.launching, strict=True) if launches and not op.kernel)
        self.counts = (*self._groups(), *self._of_updates())
        self.launches = sum(k.launches for k in self.counts) + sum(self.alone.values())

    def _groups(self) -> Iterator[KernelCount]:
        p, found = self.p, dict[str, list[Group]]()
        for g in groups(p):
            found.setdefault(self.made[g.kernel].name, []).append(g)
        for name, alike in found.items():
            g = alike[0]
            ops = p.ops[g.first : g.last]
            moved, why = self.ask(self.made[g.kernel])
            read, least = self._read(g.reads)
            written = self._written(g.makes)
            if why:
                each = [op for op, launches in zip(ops, self.launching[g.first : g.last], strict=True) if launches]
                moved = [(self._read(dict.fromkeys(r.name for r in op.refs))[0], self._written(op.results)) for op in each]
            reads, writes = (read, written) if moved is None else (sum(r for r, _ in moved), sum(w for _, w in moved))
            launches = len(alike) * (1 if moved is None else len(moved))
            yield KernelCount(name, tuple(op.target for op in ops), reads, writes, min(least + written, reads + writes), len(alike), launches, sum(_flops(op, p) for op in ops), "python" if why else "kernel", why)

    def _of_updates(self) -> Iterator[KernelCount]:
        for name, alike in self.updates.items():
            u = alike[0]
            (read, written), (_, why) = u.nbytes, self.ask(u)
            launches, reads, writes = u.without if why else (1, read, written)
            ops = [(op, sizes) for f, sizes in zip(u.formulas, u.sizes, strict=True) for op in f.program.ops]
            flops = sum((sum(sizes) if op.type.shape else len(sizes)) for op, sizes in ops if op.target != "cast")
            yield KernelCount(name, tuple([op.target for op, _ in ops]), reads, writes, read + written, len(alike), len(alike) * launches, flops, "python" if why else "kernel", why)

    def _read(self, names: Iterable[str]) -> tuple[int, int]:
        """Bytes of the operands, and of the memory behind them; what broadcasting repeats is there once."""
        p, each, behind = self.p, dict[str, int](), dict[str, int]()
        for name in names:
            t = p.types[name]
            each[name] = prod(size for size, stride in zip(t.local(p.mesh), self.strides[name], strict=True) if stride) * ITEMSIZE[t.dtype]
            root = name
            while root in self.free:
                root = self.free[root].refs[0].name
            behind[root] = min(behind.get(root, 0) + each[name], p.types[root].local_bytes(p.mesh))
        return sum(each.values()), sum(behind.values())

    def _written(self, names: Iterable[str]) -> int:
        return sum(self.p.types[name].local_bytes(self.p.mesh) for name in names)


def _updates(p: Program) -> list[Update]:
    return [Update(c.runs, c.formulas, c.on_host, tuple([tuple([prod(op.type.local(p.mesh)) for op in run]) for run in c.runs])) for c in calls_of(p)]


def _flops(op: Op, p: Program) -> int:
    if op.target in ("reshape", "permute", "expand", "slice", "unslice", "pad", "cat", "full", "iota", "cast"):
        return 0
    return local_flops(p, op) or max(prod(t.local(p.mesh)) for t in (op.type, *(p.types[r.name] for r in op.refs)))


def _named(updates: Iterable[Update]) -> dict[str, list[Update]]:
    """By name; where calls of one kernel are of other sizes, as of two stages on a rank, the second has ``#2`` behind it."""
    found, out = dict[tuple[object, ...], list[Update]](), dict[str, list[Update]]()
    for u in updates:
        found.setdefault((u.name, u.sizes), []).append(u)
    for alike in found.values():
        before = sum(each[0].name == alike[0].name for each in out.values())
        out[alike[0].name + (f"#{before + 1}" if before else "")] = alike
    return out


def _ungrouped(p: Program) -> int:
    """Launches of a step that has no groups."""
    return sum(_launching(p, laid_out(p)[1])) + sum(u.without[0] for u in _updates(p))


def _launching(p: Program, views: Sequence[bool]) -> list[bool]:
    """Of each op, whether it is a launch where no group has it: updates, views, waits and collectives aside."""
    return [not (views[n] or op.target in (*MOVES, *UPDATES) or op.target.endswith(".start")) for n, op in enumerate(p.ops)]


def _lines(r: KernelReport) -> Iterable[str]:
    yield f"{r.launches} launches a step, {r.launches_ungrouped} without groups ({r.launches / max(1, r.launches_ungrouped):.0%})".replace("%", " %")
    width = max([len(k.name) for k in r.kernels] + [6]) + 2
    yield ""
    yield f"  {'kernel':{width}}{'ops':>5}{'calls':>7}{'launches':>10}{'read':>12}{'written':>12}{'least':>12}{'flops/byte':>12}" + (f"{'a call':>12}{'of roofline':>13}" if r.machine is not None else "")
    ordered = sorted(r.kernels, key=lambda k: -k.calls * k.bytes_minimum)
    for k in ordered:
        yield f"  {k.name:{width}}{len(k.ops):>5}{k.calls:>7}{k.launches:>10}{amount(k.bytes_read):>12}{amount(k.bytes_written):>12}{amount(k.bytes_minimum):>12}{k.intensity:>12.2f}" + (_measured(k) if r.machine is not None else "") + ("  Python" if k.why else "")
    yield ""
    yield "  calls and launches are of a step, all else of one call"
    if refused := [k for k in ordered if k.why]:
        yield ""
        yield f"  {len(refused)} of them {'runs' if len(refused) == 1 else 'run'} as plain Python, a launch each op; no kernel is written:"
        yield from (f"    {k.name}: {k.why}" for k in refused)
    if r.alone:
        yield ""
        yield f"  {sum(r.alone.values())} launches are of no kernel above: {', '.join(f'{n} {target}' for target, n in r.alone.items())}"
    if r.machine is not None:
        yield ""
        rates = ", ".join(f"{dtype} {rate / 1e9:.1f}" for dtype, rate in r.machine.rates) or f"{r.machine.flops / 1e9:.1f}"
        yield f"  roofline: {r.machine.memory / 1e9:.2f} GB/s of memory, matrix products at {rates} GFLOP/s; operands that stay in a cache can come out above 100 %"
    if r.targets:
        yield from _assembled(ordered, width, r.targets)


def _measured(k: KernelCount) -> str:
    return f"{'not run':>12}{'':>13}" if k.seconds is None or k.share is None else f"{k.seconds * 1e6:>9.1f} us{k.share * 100:>11.1f} %"


def _assembled(counts: Sequence[KernelCount], width: int, targets: Sequence[str]) -> Iterator[str]:
    """A line a group and target; numbers of a group's kernels stand side by side."""
    yield ""
    yield f"  {'compiled ahead of time':{width}}{'target':>8}{'registers':>16}{'spilled bytes':>16}{'shared bytes':>20}"
    folders: dict[Path, None] = {}
    for k in counts:
        for target in targets if k.compiled else ():
            each = [c for c in k.compiled if c.target == target]
            folders.update(dict.fromkeys(c.assembly.parent for c in each))
            said = ["/".join(map(str, numbers)) for numbers in ([c.registers for c in each], [c.spilled for c in each], [c.shared for c in each])]
            yield f"  {k.name:{width}}{target:>8}{said[0]:>16}{said[1]:>16}{said[2]:>20}"
    if left := [k.name for k in counts if not k.compiled]:
        yield f"  run as Python, which Triton does not compile: {', '.join(left)}"
    yield f"  registers and spilled bytes of a thread, shared bytes of a program; assembly lies in {', '.join(map(str, folders)) or 'no folder'}"

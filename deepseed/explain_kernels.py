"""What kernels read and write against the least that they could, and how many a step launches: counted from the program, no tensor is made.

A kernel computes a group, or an optimizer's update of all parameters of one dtype.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from deepseed.codegen.ahead_of_time import Compiled
from deepseed.codegen.kernels import Kernel, kernels
from deepseed.codegen.optim import UPDATES, Call, calls_of
from deepseed.counts import local_flops
from deepseed.explain_text import amount
from deepseed.ir.fragment import Group, fragment, groups
from deepseed.ir.program import ITEMSIZE, Op, Program
from deepseed.rules.strides import laid_out
from deepseed.speed import Machine
from deepseed.unroll import unroll

FREE = ("reshape", "permute", "expand", "slice", "cast", "sum", "amax")  # of these some make no copy
MOVES = ("wait", "shard", "summand", "share", "transfer", "accumulate", "collect")


@dataclass(frozen=True)
class KernelCount:
    """Of one run of a group but for ``launches``, in a step. ``bytes_read``: every operand once, or what the back end's kernels read, with what they read again; ``bytes_minimum``: every
    byte of memory that is read once, and what is written, or all that the kernels move where that is less (keys that no query sees); ``flops``: those of matrix products, and one an element
    and op of others that compute. ``seconds``: of a call, where it was measured (deepseed.timed), ``share``: of these, the part that the machine's memory and products need at least.
    ``compiled``: its Triton kernels, for each target that was asked for (deepseed.assembled)."""

    name: str
    ops: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    bytes_minimum: int
    launches: int
    flops: int
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
        """What it reads and writes: each tensor once."""
        read, written = 0, 0
        for f, sizes in zip(self.formulas, self.sizes, strict=True):
            types = f.program.types
            elements = {name: sum(sizes) if types[name].shape else len(sizes) for name in f.each} | dict.fromkeys(f.shared, 1)
            each = {name: n * ITEMSIZE[types[name].dtype] for name, n in elements.items()}
            read, written = read + sum(each.values()), written + sum(each[name] for name in f.updated)
        return read, written


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


Traffic = Callable[[Program], "Sequence[tuple[int, int]] | None"]  # what each kernel of a fragment reads and writes; None: nothing is known but operands and results


def explain_kernels(p: Program, plain: Program, traffic: Traffic = lambda fragment: None) -> KernelReport:
    """Count a grouped program; ``plain``: the same step without groups. Of a pipeline the rank that launches most. ``traffic``: of the back end that writes the kernels."""
    steps, plains = _steps(p), _steps(plain)
    full = max(steps, key=lambda each: _launches(each, traffic))
    made, updates = kernels(full, *laid_out(full)), _updates(full)
    counts = (*_counted(full, traffic, made), *(_of_update(u, sum(other.name == name for other in updates)) for name, u in {u.name: u for u in updates}.items()))
    return KernelReport(counts, _launches(full, traffic), dict(_alone(full).most_common()), max(_launches(each, traffic) for each in plains), {k.name: k for k in made.values()}, {u.name: u for u in updates})


def _steps(p: Program) -> Sequence[Program]:
    return [unroll(p, lane).program for lane in range(len(p.schedule.lanes))] if p.schedule is not None else [p]


def _counted(p: Program, traffic: Traffic, made: Mapping[str, Kernel]) -> Iterator[KernelCount]:
    strides, views = laid_out(p)
    free = {op.name: op for op, view in zip(p.ops, views, strict=True) if view and op.target in FREE}
    found: dict[str, list[Group]] = {}
    for g in groups(p):
        found.setdefault(made[g.kernel].name, []).append(g)
    for name, alike in found.items():
        g = alike[0]
        ops = p.ops[g.first : g.last]
        read, least = _read(p, g, strides, free)
        written = sum(p.types[r].local_bytes(p.mesh) for r in g.makes)
        moved = traffic(fragment(p, g))
        reads, writes = (read, written) if moved is None else (sum(r for r, _ in moved), sum(w for _, w in moved))
        yield KernelCount(name, tuple(op.target for op in ops), reads, writes, min(least + written, reads + writes), len(alike) * (1 if moved is None else len(moved)), sum(_flops(op, p) for op in ops))


def _updates(p: Program) -> list[Update]:
    return [Update(c.runs, c.formulas, c.on_host, tuple([tuple([prod(op.type.local(p.mesh)) for op in run]) for run in c.runs])) for c in calls_of(p)]


def _of_update(u: Update, launches: int) -> KernelCount:
    read, written = u.nbytes
    ops = [(op, sizes) for f, sizes in zip(u.formulas, u.sizes, strict=True) for op in f.program.ops]
    return KernelCount(u.name, tuple([op.target for op, _ in ops]), read, written, read + written, launches, sum((sum(sizes) if op.type.shape else len(sizes)) for op, sizes in ops if op.target != "cast"))


def _read(p: Program, g: Group, strides: Mapping[str, tuple[int, ...]], free: Mapping[str, Op]) -> tuple[int, int]:
    """Bytes of the operands, and of the memory behind them; what broadcasting repeats is there once."""
    each: dict[str, int] = {}
    behind: dict[str, int] = {}
    for name in g.reads:
        t = p.types[name]
        each[name] = prod(size for size, stride in zip(t.local(p.mesh), strides[name], strict=True) if stride) * ITEMSIZE[t.dtype]
        root = name
        while root in free:
            root = free[root].refs[0].name
        behind[root] = min(behind.get(root, 0) + each[name], p.types[root].local_bytes(p.mesh))
    return sum(each.values()), sum(behind.values())


def _flops(op: Op, p: Program) -> int:
    if op.target in ("reshape", "permute", "expand", "slice", "unslice", "pad", "cat", "full", "iota", "cast"):
        return 0
    return local_flops(p, op) or max(prod(t.local(p.mesh)) for t in (op.type, *(p.types[r.name] for r in op.refs)))


def _launches(p: Program, traffic: Traffic) -> int:
    """Kernels of groups and updates, and ops that no group has."""
    each = [traffic(fragment(p, g)) for g in groups(p)]
    return sum(1 if moved is None else len(moved) for moved in each) + len(_updates(p)) + sum(_alone(p).values())


def _alone(p: Program) -> Counter[str]:
    """How many ops of each target no group has: updates, views, waits and collectives aside."""
    _, views = laid_out(p)
    return Counter(op.target for n, op in enumerate(p.ops) if not (op.kernel or views[n] or op.target in (*MOVES, *UPDATES) or op.target.endswith(".start")))


def _lines(r: KernelReport) -> Iterable[str]:
    yield f"{r.launches} launches a step, {r.launches_ungrouped} without groups ({r.launches / max(1, r.launches_ungrouped):.0%})".replace("%", " %")
    width = max([len(k.name) for k in r.kernels] + [6]) + 2
    yield ""
    yield f"  {'kernel':{width}}{'ops':>5}{'launches':>10}{'read':>12}{'written':>12}{'least':>12}{'flops/byte':>12}" + (f"{'a call':>12}{'of roofline':>13}" if r.machine is not None else "")
    ordered = sorted(r.kernels, key=lambda k: -k.launches * k.bytes_minimum)
    for k in ordered:
        yield f"  {k.name:{width}}{len(k.ops):>5}{k.launches:>10}{amount(k.bytes_read):>12}{amount(k.bytes_written):>12}{amount(k.bytes_minimum):>12}{k.intensity:>12.2f}" + (_measured(k) if r.machine is not None else "")
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

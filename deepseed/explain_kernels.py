"""What kernels read and write against the least that they could, and how many a step launches: counted from the program, no tensor is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from deepseed.codegen.kernels import kernels
from deepseed.codegen.optim import KERNELS, run_from
from deepseed.explain_text import amount
from deepseed.ir.fragment import Group, fragment, groups
from deepseed.ir.kernels import BIASED, PRODUCT
from deepseed.ir.program import ITEMSIZE, Op, Program
from deepseed.rules.strides import laid_out
from deepseed.unroll import unroll

FREE = ("reshape", "permute", "expand", "slice", "cast", "sum", "amax")  # of these some make no copy
MOVES = ("wait", "shard", "summand", "share", "transfer", "accumulate", "collect")


@dataclass(frozen=True)
class KernelCount:
    """Of one run of a group but for ``launches``, in a step. ``bytes_read``: every operand once, or what the back end's kernels read; ``bytes_minimum``: every byte of memory that is read once, and what is written; ``flops``:
    one an element and op that computes."""

    name: str
    ops: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    bytes_minimum: int
    launches: int
    flops: int

    @property
    def intensity(self) -> float:
        """Flops a byte."""
        return self.flops / max(1, self.bytes_minimum)


@dataclass(frozen=True)
class KernelReport:
    """``launches``: kernels of a step, library calls included; ``alone``: those of them that are of no group, by op; ``launches_ungrouped``: of the same step with one an op."""

    kernels: tuple[KernelCount, ...]
    launches: int
    alone: Mapping[str, int]
    launches_ungrouped: int

    def to_json(self) -> dict[str, Any]:
        return {"launches": self.launches, "alone": dict(self.alone), "launches_ungrouped": self.launches_ungrouped, "kernels": [{**asdict(k), "intensity": k.intensity} for k in self.kernels]}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


Traffic = Callable[[Program], "Sequence[tuple[int, int]] | None"]  # what each kernel of a fragment reads and writes; None: nothing is known but operands and results


def explain_kernels(p: Program, plain: Program, traffic: Traffic = lambda fragment: None) -> KernelReport:
    """Count a grouped program; ``plain``: the same step without groups. Of a pipeline the rank that launches most. ``traffic``: of the back end that writes the kernels."""
    steps, plains = _steps(p), _steps(plain)
    full = max(steps, key=lambda each: _launches(each, traffic))
    return KernelReport(tuple(_counted(full, traffic)), _launches(full, traffic), dict(_alone(full).most_common()), max(_launches(each, traffic) for each in plains))


def _steps(p: Program) -> Sequence[Program]:
    return [unroll(p, lane).program for lane in range(len(p.schedule.lanes))] if p.schedule is not None else [p]


def _counted(p: Program, traffic: Traffic) -> Iterator[KernelCount]:
    strides, views = laid_out(p)
    free = {op.name: op for op, view in zip(p.ops, views, strict=True) if view and op.target in FREE}
    names = kernels(p, strides, views)
    found: dict[str, list[Group]] = {}
    for g in groups(p):
        found.setdefault(names[g.kernel].name, []).append(g)
    for name, alike in found.items():
        g = alike[0]
        ops = p.ops[g.first : g.last]
        read, least = _read(p, g, strides, free)
        written = sum(p.types[r].local_bytes(p.mesh) for r in g.makes)
        moved = traffic(fragment(p, g))
        reads, writes = (read, written) if moved is None else (sum(r for r, _ in moved), sum(w for _, w in moved))
        yield KernelCount(name, tuple(op.target for op in ops), reads, writes, least + written, len(alike) * (1 if moved is None else len(moved)), sum(_flops(op, p) for op in ops))


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
    if op.target in (PRODUCT, BIASED, "sdpa", "sdpa_backward"):
        return _products(op, p)
    return max(prod(t.local(p.mesh)) for t in (op.type, *(p.types[r.name] for r in op.refs)))


def _products(op: Op, p: Program) -> int:
    """Of a matrix product, or of those in attention (two, and five on the way back)."""
    if op.target in (PRODUCT, BIASED):
        (m, k), (_, n) = (p.types[r.name].local(p.mesh) for r in op.refs[-2:])
        return 2 * m * k * n
    q, k_, v = (p.types[r.name].local(p.mesh) for r in op.refs[op.target != "sdpa" :][:3])
    features = q[3] + v[3] if op.target == "sdpa" else 3 * q[3] + 2 * v[3]
    return 2 * prod(q[:3]) * k_[2] * features


def _launches(p: Program, traffic: Traffic) -> int:
    """Kernels of groups, and ops that no group has."""
    each = [traffic(fragment(p, g)) for g in groups(p)]
    return sum(1 if moved is None else len(moved) for moved in each) + sum(_alone(p).values())


def _alone(p: Program) -> Counter[str]:
    """How many ops of each target no group has: views, waits and collectives aside; one fused update of many parameters is one."""
    _, views = laid_out(p)
    found, n = Counter[str](), 0
    while n < len(p.ops):
        op = p.ops[n]
        if op.target in KERNELS:
            n += len(run_from(n, p.ops)) - 1
        if not (op.kernel or views[n] or op.target in MOVES or op.target.endswith(".start")):
            found[op.target] += 1
        n += 1
    return found


def _lines(r: KernelReport) -> Iterable[str]:
    yield f"{r.launches} launches a step, {r.launches_ungrouped} without groups ({r.launches / max(1, r.launches_ungrouped):.0%})".replace("%", " %")
    width = max([len(k.name) for k in r.kernels] + [6]) + 2
    yield ""
    yield f"  {'kernel':{width}}{'ops':>5}{'launches':>10}{'read':>12}{'written':>12}{'least':>12}{'flops/byte':>12}"
    for k in sorted(r.kernels, key=lambda k: -k.launches * k.bytes_minimum):
        yield f"  {k.name:{width}}{len(k.ops):>5}{k.launches:>10}{amount(k.bytes_read):>12}{amount(k.bytes_written):>12}{amount(k.bytes_minimum):>12}{k.intensity:>12.2f}"
    if r.alone:
        yield ""
        yield f"  {sum(r.alone.values())} launches are of no kernel above: {', '.join(f'{n} {target}' for target, n in r.alone.items())}"

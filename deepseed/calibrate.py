"""``deepseed calibrate``: what this machine does in a second, measured in seconds, for the times that plans and schedules are chosen by.

Each rate is the median of some runs, all ranks at a time: they share memory and cores as they will in a step. The link is a line through the times of collectives of several sizes,
``latency + bytes sent / link`` (Hockney 1994), fitted to relative errors, so that a small message counts as much as a large one; what the line misses is said.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from deepseed.ir.mesh import Mesh
from deepseed.machines import device_kind
from deepseed.ops import mm
from deepseed.runtime.memories import Memories
from deepseed.speed import Machine

ENOUGH = 0.03  # seconds that one measured run takes at least
LONG = 0.5  # after which three runs are enough
RUNS = 5
SIZES = tuple(2**n for n in range(12, 25, 2))  # bytes of a collective's result
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}
LEAST_BUSY = 0.9  # below it other programs took the cores; idle: 0.96 and more
KINDS = ("all_gather", "all_reduce", "reduce_scatter")
Clock = Callable[[], float]


@dataclass(frozen=True)
class Line:
    """``latency`` in seconds, ``link`` in bytes a second; ``missed``: the median and the most of what the line misses, as a part of the time measured."""

    latency: float
    link: float
    missed: tuple[float, float]


@dataclass(frozen=True)
class Calibration:
    """``points``: (kind of collective, bytes that a rank sent, seconds)."""

    machine: Machine
    ranks: int
    backend: str
    seconds: float
    line: Line | None = None
    points: tuple[tuple[str, int, float], ...] = ()
    busy: float = 1.0  # the least part of its time alone that a rank had a core, at most 1

    @property
    def kind(self) -> str:
        """Of the device that was measured: ranks over gloo compute on the CPU, wherever they are."""
        return device_kind("cuda" if self.backend == "nccl" else "cpu")

    def about(self) -> dict[str, Any]:
        """What is written beside the machine."""
        return {
            "device": self.kind, "host": socket.gethostname(), "ranks": self.ranks, "backend": self.backend, "seconds": self.seconds, "busy": self.busy, "torch": torch.__version__,
            "line": None if self.line is None else asdict(self.line), "points": [list(p) for p in self.points],
        }  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        return {"machine": asdict(self.machine), **self.about()}

    def __str__(self) -> str:
        m, each = self.machine, " a rank" if self.ranks > 1 else ""
        lines = [f"{self.kind} on {socket.gethostname()}, {self.ranks} rank{'s' if self.ranks > 1 else ''}, measured in {self.seconds:.1f} s"]
        lines += [f"  matmul {dtype:5} {rate / 1e9:12.1f} GFLOP/s{each}" for dtype, rate in m.rates]
        lines += [f"  memory       {m.memory / 1e9:12.2f} GB/s", f"  host memory  {m.host_memory / 1e9:12.2f} GB/s", f"  host link    {m.host_link / 1e9:12.2f} GB/s", f"  an op        {m.launch * 1e6:12.2f} us to start"]
        if self.line is None:
            lines.append(f"  link: one rank has none; {m.link / 1e9:g} GB/s and {m.latency * 1e6:g} us are assumed")
        else:
            lines.append(f"  link         {m.link / 1e9:12.3f} GB/s sent, {m.latency * 1e6:.0f} us latency ({self.backend}; the line misses {self.line.missed[0]:.0%} in the median, {self.line.missed[1]:.0%} at most)")
        if self.busy < LEAST_BUSY:
            lines.append(f"  a rank had a core {self.busy:.0%} of the time, so the rates are those of a machine that others use\n  fix: measure again when it is idle")
        return "\n".join(lines)


def fit(points: Sequence[tuple[int, float]]) -> Line:
    """The line through (bytes, seconds) with the least squares of relative errors, neither number below zero."""
    w = [(1 / t, n / t) for n, t in points]
    aa, ab, bb = sum(a * a for a, _ in w), sum(a * b for a, b in w), sum(b * b for _, b in w)
    a, b = sum(a for a, _ in w), sum(b for _, b in w)
    d = aa * bb - ab * ab
    latency, slope = ((a * bb - b * ab) / d, (b * aa - a * ab) / d) if d > 1e-12 * aa * bb else (0.0, b / bb)
    if latency <= 0:
        latency, slope = 1e-9, b / bb
    if slope <= 0:
        latency, slope = a / aa, 1e-15
    missed = [abs(latency + slope * n - t) / t for n, t in points]
    return Line(latency, 1 / slope, (median(missed), max(missed)))


def per_call(run: Callable[[], object], settle: Callable[[], object] = lambda: None, clock: Clock = time.perf_counter, enough: float = ENOUGH, runs: int = RUNS) -> float:
    """Seconds of one call: the median of ``runs`` at most, each of as many calls as take ``enough`` seconds. ``settle`` waits for what the calls started."""

    def took(calls: int) -> float:
        settle()
        began = clock()
        for _ in range(calls):
            run()
        settle()
        return clock() - began

    took(1)
    calls, began = 1, clock()
    while (seconds := took(calls)) < enough and calls < 1 << 20:
        calls = min(1 << 20, max(2 * calls, int(calls * enough / max(seconds, 1e-9))))
    found = [seconds / calls]
    while len(found) < runs and (len(found) < 3 or clock() - began < LONG):
        found.append(took(calls) / calls)
    return median(found)


def alone(device: torch.device) -> tuple[Machine, float]:
    """What one rank does by itself, and the part of the time for which it had a core (on a GPU 1: it may wait for that)."""
    began, cpu = time.perf_counter(), time.process_time()
    machine = _rates(device)
    return machine, 1.0 if device.type == "cuda" else min(1.0, (time.process_time() - cpu) / (time.perf_counter() - began))


def _rates(device: torch.device) -> Machine:
    cuda = device.type == "cuda"

    def settle() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    def of(run: Callable[[], object]) -> float:
        return per_call(run, settle)

    n = 4096 if cuda else 256
    rates = []
    for name, dtype in DTYPES.items():
        a = torch.randn(n, n, device=device).to(dtype)
        rates.append((name, 2 * n**3 / of(partial(mm, a, a))))
    words = (1 << 28 if cuda else 1 << 24) // 4
    x, y = torch.zeros(words, device=device), torch.ones(words, device=device)
    memory = 2 * x.nbytes / of(lambda: y.copy_(x))
    one = torch.zeros(1, device=device)
    launch = of(lambda: one.neg())
    there = Memories()
    there.device = device

    def back_and_forth() -> None:
        there.to_device_start(there.to_host_start(x).complete()).complete()

    host_link = 2 * x.nbytes / of(back_and_forth)
    host_memory = memory
    if cuda:
        p, q = (torch.zeros(1 << 24) for _ in range(2))
        host_memory = 2 * p.nbytes / per_call(lambda: q.copy_(p))
    return Machine(flops=dict(rates)["f32"], memory=memory, host_memory=host_memory, host_link=host_link, launch=launch, rates=tuple(rates))


def linked(mesh: Mesh, device: torch.device) -> list[tuple[str, int, float]]:
    """Collectives over the one axis of ``mesh``: kind, bytes that a rank sends, seconds from the start to the end."""
    from deepseed.runtime.distributed import DistributedRuntime

    rt = DistributedRuntime(mesh, device)
    axis, n = mesh.names[0], mesh.ranks
    points = []
    for kind in KINDS:
        for size in SIZES:
            x = torch.zeros(size // 4, device=device) if kind == "all_reduce" else torch.zeros(size // 4 // n, device=device) if kind == "all_gather" else torch.zeros(n, size // 4 // n, device=device)
            sent = {"all_reduce": 2 * x.nbytes * (n - 1) // n, "all_gather": x.nbytes * (n - 1), "reduce_scatter": x.nbytes * (n - 1) // n}[kind]
            took = []
            for _ in range(RUNS + 1):  # as many on every rank; the first opens connections
                rt.exchange("all_reduce", torch.zeros(1, device=device), axis, "sum")()  # all ranks are here
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                began = time.perf_counter()
                rt.exchange(kind, x, axis, "sum")()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                took.append(time.perf_counter() - began)
            points.append((kind, sent, median(took[1:])))
    return points


def on_a_rank(ranks: int, backend: str) -> Calibration:
    """In each rank's process; the same on all."""
    import torch.distributed as dist

    from deepseed.runtime.distributed import start

    began = time.perf_counter()
    device = start(backend)
    dist.barrier()  # while one rank still starts, the others have no machine of their own
    mine = (alone(device), linked(Mesh((("dp", ranks),)), device))
    said: list[Any] = [None] * ranks
    dist.all_gather_object(said, mine)
    return combined([m for m, _ in said], [p for _, p in said], backend, time.perf_counter() - began)


def combined(each: Sequence[tuple[Machine, float]], points: Sequence[Sequence[tuple[str, int, float]]], backend: str, seconds: float) -> Calibration:
    """Of what each rank measured: the slowest rank's rates, since the others wait for it; of each collective the slowest rank's time."""
    machines, busy = [m for m, _ in each], min(part for _, part in each)
    slowest = {name: min(getattr(m, name) for m in machines) for name in ("flops", "memory", "host_memory", "host_link")}
    rates = tuple((dtype, min(dict(m.rates)[dtype] for m in machines)) for dtype, _ in machines[0].rates)
    launch = max(m.launch for m in machines)
    all_points = tuple((of[0][0], of[0][1], max(t for _, _, t in of)) for of in zip(*points, strict=True))
    if not all_points:
        return Calibration(Machine(**slowest, launch=launch, rates=rates), len(machines), backend, seconds, busy=busy)
    line = fit([(n, t) for _, n, t in all_points])
    return Calibration(Machine(**slowest, launch=launch, rates=rates, latency=line.latency, link=line.link), len(machines), backend, seconds, line, all_points, busy)


def calibrate(ranks: int, backend: str) -> Calibration:
    """Of so many ranks of this machine, each in a process of its own; one rank is measured in this one."""
    from deepseed.on_ranks import on_ranks

    if ranks == 1:
        began = time.perf_counter()
        machine = alone(torch.device("cuda", 0) if backend == "nccl" else torch.device("cpu"))
        return combined([machine], [[]], backend, time.perf_counter() - began)
    found: Calibration = on_ranks(on_a_rank, ranks, ranks, backend)[0]
    return found


def default_backend() -> str:
    return "nccl" if torch.cuda.is_available() else "gloo"


def unfit(ranks: int, backend: str) -> str | None:
    """Why so many ranks of this machine cannot be measured over ``backend``, with the fix; None where they can."""
    gpus = torch.cuda.device_count()
    if backend == "nccl" and gpus < ranks:
        fix = f"--world-size {gpus}, or --backend gloo" if gpus else "--backend gloo"
        return f"nccl needs a GPU a rank: {ranks} asked for, {gpus} there\n  fix: {fix}"
    return None

"""The kernels of a report run on this machine, each by itself, and how near they come to what its memory and its matrix products allow: the roofline (Williams et al. 2009).

    share = max(bytes_minimum / memory, flops of matrix products / rate of their dtype) / seconds

Operands are numbers of the right types that lie as in a step; one call follows another on them. What fits in a cache is not read from memory then, and a kernel of it can come out above 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor

from deepseed.calibrate import Clock, alone, per_call
from deepseed.codegen.autotune import operands
from deepseed.codegen.expressions import DTYPES
from deepseed.codegen.inductor import compiler
from deepseed.codegen.kernels import Kernel
from deepseed.compiling import Compiling
from deepseed.counts import local_flops
from deepseed.explain_kernels import KernelReport, Update
from deepseed.explain_text import amount
from deepseed.friendly import UsageError
from deepseed.ir.program import Op, Program, Type
from deepseed.kernels import called, update
from deepseed.machines import device_kind, measured
from deepseed.runtime.staged import available
from deepseed.speed import Machine

ROOM = 0.8  # of the memory that is free: more is not taken for one kernel's operands and results


def device_of(codegen: str) -> torch.device:
    """Where the kernels of a back end run. Raises UsageError, with the fix, where that is not here."""
    if codegen == "triton":
        if not torch.cuda.is_available():
            raise UsageError("--measure with --codegen triton: its kernels run on a CUDA device, and there is none here\n  fix: --codegen cpp or inductor; --gpu sm_90 says registers and spills without a device")
        return torch.device("cuda", torch.cuda.current_device())
    if not compiler():
        raise UsageError(f"--measure with --codegen {codegen}: no C++ compiler, so that its kernels would run as plain Python\n  fix: install g++ or clang++, or set CXX")
    return torch.device("cpu")


def machine_for(device: torch.device, tell: Callable[[str], object]) -> Machine:
    """What ``deepseed calibrate`` measured of one rank on ``device``; where it did not, what is measured now, in seconds, and kept nowhere: plans would be chosen by it."""
    found = measured(1, device_kind(device.type))
    if found is None:
        began = perf_counter()
        found, busy = alone(device)
        tell(f"no calibration of this machine: its memory and matrix products were measured in {perf_counter() - began:.1f} s, with a core for {busy:.0%} of the time\n  fix: deepseed calibrate --backend {'nccl' if device.type == 'cuda' else 'gloo'}, once, when the machine is idle; or --machine")
    return found


def timed(report: KernelReport, codegen: str, machine: Machine, device: torch.device, tell: Callable[[str], object], clock: Clock = perf_counter) -> KernelReport:
    """The report with ``seconds`` and ``share`` of each kernel, but for one whose operands the device has no room for, which ``tell`` hears."""
    made, found = list(report.made.values()), dict[str, float | None]()
    with Compiling(True) as at:
        calls = called(made, codegen, tell, at)
    with Compiling(True, ("measuring", "measured")) as at:
        for n, (k, call) in enumerate(zip(made, calls, strict=True)):
            at("kernels", n, len(made) + len(report.updates), k.name)
            found[k.name] = _seconds(k.name, _bytes(k), partial(operands, k, device), call, device, tell, clock)
        for n, (name, u) in enumerate(report.updates.items(), len(made)):
            at("kernels", n, len(made) + len(report.updates), name)
            where = torch.device("cpu") if u.on_host else device
            found[name] = _seconds(name, u.nbytes[0], partial(_tensors, u, where), update(u.formulas, codegen, u.on_host, tell), where, tell, clock)
    fragments = {k.name: k.fragment for k in made} | {name: u.formulas[0].program for name, u in report.updates.items()}
    kernels = [replace(k, seconds=t, share=None if t is None else least(fragments[k.name], k.bytes_minimum, machine) / t) for k in report.kernels for t in [found[k.name]]]
    return replace(report, kernels=tuple(kernels), machine=machine)


def least(fragment: Program, nbytes: int, machine: Machine) -> float:
    """Seconds that ``nbytes`` of memory or the fragment's matrix products take, whichever are more; of causal attention the products of what a query sees."""
    return max(nbytes / machine.memory, sum(flops * _seen(op, fragment) / machine.rate(op) for op in fragment.ops if (flops := local_flops(fragment, op))))


def _seen(op: Op, p: Program) -> float:
    """The part of all pairs of query and key that attention needs; 1 of any other op."""
    if op.target not in ("sdpa", "sdpa_backward") or not op.kw("causal", False):
        return 1.0
    queries, keys = (p.types[r.name].shape[2] for r in op.refs[op.target != "sdpa" :][:2])
    stairs = min(queries, keys)
    return (stairs * (stairs + 1) / 2 + (queries - stairs) * keys) / (queries * keys)


def _seconds(name: str, needed: int, given: Callable[[], Sequence[object]], call: Callable[..., object], device: torch.device, tell: Callable[[str], object], clock: Clock) -> float | None:
    room = _free(device)
    if room is not None and needed > ROOM * room:
        tell(f"{name} was not run: its operands and results are {amount(needed)}, and {amount(room)} are free\n  fix: fewer rows, or fields that make a smaller model of the same kind")
        return None
    with torch.no_grad():
        return per_call(partial(call, *given()), partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None, clock)


def _tensors(u: Update, device: torch.device) -> list[object]:
    """Ones, which stay numbers however often they are updated."""
    out = list[object]()
    for f, sizes in zip(u.formulas, u.sizes, strict=True):
        types = f.program.types

        def ones(name: str, *shape: int, types: Mapping[str, Type] = types) -> Tensor:
            return torch.ones(shape, dtype=getattr(torch, DTYPES[types[name].dtype].removeprefix("torch.")), device=device)

        out += [[ones(name, n) if types[name].shape else ones(name) for n in sizes] for name in f.each]
        out += [ones(name) for name in f.shared]
    return out


def _bytes(k: Kernel) -> int:
    types = k.fragment.types
    return sum(types[name].local_bytes(k.fragment.mesh) for name in (*(i.name for i in k.fragment.inputs), *(o.ref.name for o in k.fragment.outputs)))


def _free(device: torch.device) -> int | None:
    """Bytes; None where the system does not tell."""
    if device.type == "cuda":
        room: Sequence[int] = torch.cuda.mem_get_info(device)
        return room[0]
    return available()

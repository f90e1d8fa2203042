"""Which programs are captured as a CUDA graph, by ``cuda_graphs=`` of ``deepseed.compile``: False captures none, ``"auto"`` what can be, True that or an error.

A graph is what one rank's device does by itself, the same at each call. Where the host has a part in a running step there is none: messages between the
stages of a pipeline, moves to and from the host's memory, numbers that are read to decide what to launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from deepseed.ir.collective import COLLECTIVES, KEYED, MEMORIES
from deepseed.ir.messages import TRANSFER
from deepseed.ir.program import Op, Program, Ref
from deepseed.kernels import Kernels
from deepseed.ops.table import OWN, overload
from deepseed.runtime.executable import Executable
from deepseed.runtime.graphs import RECORDERS, WARM, GraphError, Recorder, Replayed
from deepseed.runtime.host import Host

READS = "numbers that are in its operands decide what is launched"
OWN_READS = ("routed_mm", "routed_outer", *(f"{kind}.start" for kind in KEYED))  # own ops that do so
MESSAGES = ("send", "receive.start", TRANSFER)
INDEXED = ("aten.index.Tensor", "aten.index_put", "aten._unsafe_index.Tensor", "aten._unsafe_index_put")  # with a list of indices
UNSAFE = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.cudagraph_unsafe})
PAGED = "paged_attention"
CALLED_APART = "forward and backward are called one by one, by autograd, and hold values in between"
PENDING = "its gradients are the user's loop's to give, in other memory each time"


@dataclass(frozen=True)
class Graphs:
    """What was chosen, and for which ranks."""

    recorder: Recorder
    insisted: bool
    simulated: bool  # several ranks in this process

    def executable(self, p: Program, source: str, name: str, kernels: Kernels, tell: Callable[[str], object]) -> tuple[Executable, str]:
        """That of a rank's program, and why it is none that is captured. Raises GraphError."""
        why = "the ranks of a simulation take turns" if self.simulated else refusal(p, self.insisted)
        if not why:
            return Replayed(source, name, p.inputs, p.outputs, kernels.calls, kernels.codegen, recorder=self.recorder, insisted=self.insisted, tell=tell), ""
        if self.insisted:
            raise GraphError(f'cuda_graphs=True: {p.name} cannot be captured as a graph: {why}\n  fix: cuda_graphs="auto", which captures what can be and runs the rest as it is')
        return Executable(source, name, p.inputs, p.outputs, kernels.calls, kernels.codegen), why


def resolve(cuda_graphs: bool | str, host: Host) -> Graphs | None:
    """What is meant; None: nothing is captured. Raises GraphError."""
    if cuda_graphs not in (True, False, "auto"):
        raise GraphError(f'cuda_graphs={cuda_graphs!r}\n  fix: True, False or "auto", which captures what can be')
    made = RECORDERS.get(host.device.type)
    if cuda_graphs is True and made is None:
        raise GraphError(f'cuda_graphs=True: the step runs on {host.device}, which has no graphs\n  fix: a model on a CUDA device; or cuda_graphs="auto", which captures none elsewhere')
    if not cuda_graphs or made is None:
        return None
    if host.arenas:
        if cuda_graphs is True:
            raise GraphError("cuda_graphs=True with device_memory=: memory is counted op by op, of which a graph has none\n  fix: leave one of them out")
        return None
    return Graphs(made(host.device), cuda_graphs is True, host.backend == "simulate" and host.mesh.ranks > 1)


def refusal(p: Program, collectives: bool = False) -> str:
    """Why no step of a rank of ``p`` is captured: the first reason; nothing where it can be. ``collectives``: whether a graph may have them in it."""
    if p.by_role("tangent"):
        return CALLED_APART
    if p.by_role("pending"):
        return PENDING
    for i in p.inputs:
        if i.type.host:
            return f"{i.role} {i.key!r} lies in the host's memory"
    return next((f"%{op.name} = {op.target}{f' at {op.path}' if op.path else ''}: {why}" for op in p.ops if (why := _of(op, p, collectives))), "")


def _of(op: Op, p: Program, collectives: bool) -> str:
    if op.target in MESSAGES:
        return "the host sends and receives what passes between the stages of a pipeline"
    if op.target in MEMORIES or any(t.host for t in op.types):
        return "the host waits for what is moved to and from its memory"
    if op.target == PAGED:
        return "which pages it reads is another thing at each step"
    if op.target in OWN_READS or _reads(op.target) or _masked(op, p):
        return READS
    if not collectives and op.target.removesuffix(".start") in COLLECTIVES and p.mesh.size(str(op.kw("axis"))) > 1:
        return "it is a collective, which only cuda_graphs=True captures"
    return ""


def _masked(op: Op, p: Program) -> bool:
    """Whether an index is a mask, whose elements are counted before it is used."""
    indices = op.args[1] if op.target in INDEXED and len(op.args) > 1 else ()
    return isinstance(indices, tuple) and any(isinstance(a, Ref) and p.types[a.name].dtype == "bool" for a in indices)


@lru_cache
def _reads(target: str) -> bool:
    """By torch's own tags."""
    if target in OWN or target in INDEXED or "." not in target or target.endswith(".start"):
        return False
    return not UNSAFE.isdisjoint(overload(target).tags)


def told(executables: Sequence[Executable], refused: str) -> str:
    """Whether a step is captured, for ``explain``."""
    why = refused or next((e.why for e in executables if isinstance(e, Replayed) and e.why), "")
    return f"not captured: {why}" if why else f"captured at the call after {WARM}, and replayed from then on"

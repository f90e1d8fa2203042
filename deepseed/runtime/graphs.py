"""A rank's step captured as one CUDA graph: what it launches is recorded once and replayed by one call.

The first calls run as they are, on a stream of their own: kernels are compiled and libraries set up there. The next one is captured, which
computes nothing, and from then on every call replays. A graph has addresses in it and no values, so batch, learning rate, step count and seed
are copied into buffers that stay, stored tensors are read and written where they lie, and what is returned is a copy. Where a stored tensor lies
elsewhere than it did, the step is captured anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseed.ir.program import Input, Output
from deepseed.ir.staged import STORED
from deepseed.runtime.collectives import Runtime
from deepseed.runtime.executable import Executable

WARM = 2  # calls before a capture
BRIEF = 4  # graphs in a row that were replayed once only, after which no more are captured
CHANGING = ("batch", "hyper", "rng")  # roles of inputs that are new at each call; constants never change

Run = Callable[[], tuple[Tensor, ...]]


class GraphError(ValueError):
    """A step that was to be captured as a graph and cannot be: names what forbids it, and the fix."""


class Recorder(Protocol):
    """What captures on a kind of device."""

    def warm(self, run: Run) -> tuple[Tensor, ...]:
        """Run where captures are made."""
        ...

    def capture(self, run: Run) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        """The results' memory, which each call of the second writes; nothing is computed before. Raises RuntimeError where the device cannot."""
        ...


class CudaRecorder:
    """Graphs share one pool of memory: what one returned is copied before the next one runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def warm(self, run: Run) -> tuple[Tensor, ...]:
        with torch.cuda.device(self.device):
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                out = run()
            here.wait_stream(self._stream)
        return out

    def capture(self, run: Run) -> tuple[tuple[Tensor, ...], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, self._pool, self._stream, "thread_local"):  # other threads may ask the device meanwhile: a loader's, a checkpoint's
            out = run()
        return out, graph.replay


RECORDERS: dict[str, Callable[[torch.device], Recorder]] = {"cuda": CudaRecorder}  # by kind of device


@dataclass
class Graph:
    """``at``: where the stored tensors lay; ``given``: the memory from which it reads what each call brings, by position."""

    at: Sequence[int]
    given: Sequence[tuple[int, Tensor]]
    held: Sequence[Tensor]  # constants
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    replays: int = 0


class Replayed(Executable):
    """An executable that is replayed once it has been captured.

    ``insisted``: raise GraphError where the device refuses; else ``tell`` says so, and it runs as it is: ``why`` has the reason."""

    def __init__(
        self, source: str, name: str, inputs: Sequence[Input], outputs: Sequence[Output], kernels: Mapping[str, Callable[..., Any]], codegen: str,
        *, recorder: Recorder, insisted: bool, tell: Callable[[str], object],
    ) -> None:  # fmt: skip
        super().__init__(source, name, inputs, outputs, kernels, codegen)
        self.recorder, self.insisted, self.tell = recorder, insisted, tell
        self.why, self.calls, self.captures = "", 0, 0
        self.graph: Graph | None = None
        self._brief = 0
        new = {(o.role, o.key) for o in outputs if o.role in STORED}
        self._stored = [n for n, i in enumerate(inputs) if i.role in STORED]
        self._written = [n for n in self._stored if (inputs[n].role, inputs[n].key) in new]
        self._changing = [n for n, i in enumerate(inputs) if i.role in CHANGING]

    def __call__(self, rt: Runtime, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        if self.why:
            return self._run(rt, inputs)
        self.calls += 1
        if self.calls <= WARM:
            return self.recorder.warm(lambda: self._run(rt, inputs))
        at = [inputs[n].data_ptr() for n in self._stored]
        if self.graph is None or self.graph.at != at:
            self.graph = self._captured(rt, inputs, at)
        graph = self.graph
        if graph is None:
            return self._run(rt, inputs)
        for n, buffer in graph.given:
            buffer.copy_(inputs[n])
        written = [inputs[n] for n in self._written]
        inputs.clear()
        graph.replay()
        graph.replays += 1
        torch.autograd.graph.increment_version(written)  # as an op in place does: autograd and others look
        return tuple([t.clone() for t in graph.outputs])

    def _run(self, rt: Runtime, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return super().__call__(rt, inputs)

    def _captured(self, rt: Runtime, inputs: Sequence[Tensor], at: Sequence[int]) -> Graph | None:
        """A graph of the step on stored tensors as they lie now; None where there is none."""
        former, self.graph = self.graph, None  # its memory first
        if former is not None:
            moved = next(self.inputs[n] for n, a, b in zip(self._stored, former.at, at, strict=True) if a != b)
            if rt.mesh.ranks > 1:
                raise GraphError(
                    f"{moved.role} {moved.key!r} lies in other memory than when the step was captured, and ranks would have to capture anew together\n"
                    "  fix: write into the tensors that are there (load, load_state_dict), or cuda_graphs=False"
                )
            self._brief = self._brief + 1 if former.replays == 1 else 0
            if self._brief == BRIEF:
                self._leave_off(f"{moved.role} {moved.key!r} lies in other memory at each call: {BRIEF} graphs were replayed once each")
                return None
            del former
        static = [x.detach().clone() if n in self._changing else x for n, x in enumerate(inputs)]
        held = [x for n, x in enumerate(static) if n not in self._stored and n not in self._changing]
        given = [(n, static[n]) for n in self._changing]
        try:
            outputs, replay = self.recorder.capture(lambda: self._run(rt, static))
        except RuntimeError as error:
            if self.insisted:
                raise GraphError(f"the step could not be captured as a graph: {_first_line(error)}\n  fix: cuda_graphs=\"auto\" runs such a step as it is, and says so; cuda_graphs=False captures none") from error
            self._leave_off(f"the device refused: {_first_line(error)}")
            return None
        self.captures += 1
        return Graph(at, given, held, outputs, replay)

    def _leave_off(self, why: str) -> None:
        self.why = why
        self.tell(f"the step is not captured as a graph any more, it runs as it is: {why}")


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"

"""The whole step as one flat, functional aten graph, by fake tensors: no parameter value is needed or touched.

Two stages. ``make_fx`` over the step as the user wrote it (in-place ops, views, hooks and all), with random draws and value
reads intercepted below autograd; then the flat graph is run again under functionalisation. Each node of the result has
``meta["where"]`` (module path, source line, forward or backward) and ``meta["val"]`` (a fake tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from deepseed.capture.errors import CaptureError
from deepseed.capture.guards import Reader, read_value
from deepseed.capture.metadata import Tracker, Where
from deepseed.capture.random import Draw, draw


@dataclass(frozen=True)
class Flat:
    """A functional graph: its placeholders are the given inputs, then ``constants``; its output is one flat tuple."""

    graph: fx.Graph
    constants: tuple[Tensor, ...]
    outputs: tuple[Any, ...]  # fx nodes, or Python values where an output is none


class _Intercept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Below autograd, above the proxies: draws, reads, and the user's place in errors."""

    def __init__(self, tracker: Tracker, draws: Draw, reader: Reader) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker, self.draws, self.reader = tracker, draws, reader

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        drawn = draw(func, self.draws, args, kwargs)
        if drawn is not NotImplemented:
            return drawn
        value = read_value(func, self.reader.read, args)
        if value is not NotImplemented:
            return value
        try:
            return func(*args, **kwargs)
        except DynamicOutputShapeException:
            where = self.tracker.here()
            raise CaptureError(
                f"the shape of the result of {func} depends on data", path=where.path, line=where.line,
                fix="keep the whole tensor and mask it: torch.where(mask, x, 0), or a loss with ignore_index, in place of x[mask], nonzero, unique",
            ) from None  # fmt: skip
        except DataDependentOutputException:
            where = self.tracker.here()
            raise CaptureError(f"{func} gives Python a value that depends on data", path=where.path, line=where.line, fix="use torch.where in place of the Python branch") from None


@contextmanager
def tagged(where: Callable[[], Where]) -> Iterator[None]:
    """Inside a trace: every new node gets ``meta["where"] = where()``."""
    mode = get_proxy_mode()
    assert mode is not None
    tracer: Any = mode.tracer
    plain = tracer.create_node

    def create_node(kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node: fx.Node = plain(kind, *args, **kwargs)
        if kind == "call_function":
            node.meta["where"] = where()
        return node

    tracer.create_node = create_node
    try:
        yield
    finally:
        tracer.create_node = plain


def record(
    step: Callable[..., Sequence[Any]], fakes: Sequence[Tensor], rng: int, tracker: Tracker, reader: Reader
) -> fx.GraphModule:
    """Stage one: ``step(*fakes)`` as it is written. ``rng``: the position of the generator's seed and step among ``fakes``."""

    def run(*flat: Tensor) -> Sequence[Any]:
        with tagged(tracker.here), tracker.on(), _Intercept(tracker, Draw(flat[rng], tracker), reader):
            try:
                return step(*flat)
            except CaptureError:
                raise
            except Exception as error:
                place = ", ".join(part for part in (tracker.last.path, tracker.last.line) if part)
                error.add_note(f"while DeepSeed traced the model with fake tensors on the CPU; last op at {place or 'the start'}")
                raise

    return make_fx(run, tracing_mode="fake")(*fakes)


class _Replay(fx.Interpreter):
    """Runs the graph of stage one, showing each node's place while its ops run."""

    def __init__(self, module: fx.GraphModule, constants: dict[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.constants = constants
        self.where = Where()

    def run_node(self, n: fx.Node) -> Any:
        self.where = n.meta.get("where", Where())
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self.constants[target]


def functional(module: fx.GraphModule, fakes: Sequence[Tensor], mode: FakeTensorMode) -> Flat:
    """Stage two: the same graph without in-place ops, tensor constants lifted to inputs behind ``fakes``."""
    attrs = list(dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr"))
    constants = tuple(_attribute(module, name) for name in attrs)

    def replay(*flat: Tensor) -> Any:
        def run(*given: Tensor) -> Any:
            interpreter.constants = dict(zip(attrs, given[len(fakes) :], strict=True))
            return interpreter.run(*given[: len(fakes)])

        interpreter = _Replay(module, {})
        with tagged(lambda: interpreter.where):
            return torch.func.functionalize(run, remove="mutations")(*flat)

    with torch.no_grad():
        lifted = [mode.from_tensor(c.detach()) for c in constants]
        out = make_fx(replay, tracing_mode="fake")(*[f.detach() for f in fakes], *lifted)
    result = next(n for n in out.graph.nodes if n.op == "output").args[0]
    return Flat(out.graph, constants, tuple(result) if isinstance(result, (tuple, list)) else (result,))


def _attribute(module: fx.GraphModule, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]

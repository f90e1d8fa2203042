"""The whole step as one flat aten graph, by fake tensors: no parameter value is needed or touched.

``make_fx`` over the step as the user wrote it (in-place ops, views, hooks and all), with random draws and value reads
intercepted below autograd. Each node has ``meta["where"]`` (module path, source line, forward or backward) and ``meta["val"]``
(a fake tensor). In-place ops go afterwards: ``deepseed.capture.functional``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from deepseed.capture.assign import Masked
from deepseed.capture.errors import CaptureError
from deepseed.capture.guards import Reader, read_value
from deepseed.capture.metadata import Tracker, Where
from deepseed.capture.random import Draw, draw

_aten = torch.ops.aten
_ONE_DTYPE = (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.convolution.default)

_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.float16: torch.float64, torch.complex64: torch.complex128}


class _Intercept(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Below autograd, above the proxies: draws, reads, and the user's place in errors."""

    def __init__(self, tracker: Tracker, draws: Draw, reader: Reader, wide: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tracker, self.draws, self.reader, self.wide = tracker, draws, reader, wide

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cuda") and func.namespace == "aten" and func is not _aten.detach.default:  # what torch asks by itself must not fail
            where = self.tracker.here()
            raise CaptureError('the model enters torch.autocast("cuda"), which does nothing where a step is captured: on the CPU, for any device',
                               path=where.path, line=where.line, fix="leave it out, and give the plan a word of precision: zero3+bf16")  # fmt: skip
        if self.wide:
            args, kwargs = widened(args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type not in ("cpu", "meta"):
            kwargs = {**kwargs, "device": torch.device("cpu")}  # no op names a device: fakes are the CPU's, the runtime binds its own
        drawn = draw(func, self.draws, args, kwargs)
        if drawn is not NotImplemented:
            return drawn
        value = read_value(func, self.reader.read, args)
        if value is not NotImplemented:
            return value
        if func is _aten.native_batch_norm.default:
            return _batch_norm(*args, **kwargs)
        if func._schema.name.startswith("aten::_foreach_"):
            return each(func, args, kwargs)
        if func in _ONE_DTYPE and len(dtypes := {a.dtype for a in args if isinstance(a, Tensor)}) > 1:
            raise RuntimeError(f"{func}: operands of {' and '.join(sorted(map(str, dtypes)))}, where one dtype is needed")  # fake tensors let it pass
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


def widened(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Narrower floats that an op is asked for become float64."""
    return tuple(_WIDER.get(a, a) if isinstance(a, torch.dtype) else a for a in args), {
        k: _WIDER.get(v, v) if isinstance(v, torch.dtype) else v for k, v in kwargs.items()
    }


@contextmanager
def wide_default(wide: bool) -> Iterator[None]:
    """``wide``: what is created without a dtype is float64, unless the user chose another default than torch's."""
    default = torch.get_default_dtype()
    if wide and default is torch.float32:
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


def each(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_foreach_add(xs, ys)`` as ``add(x, y)`` for each."""
    name = func._schema.name.removeprefix("aten::_foreach_")
    one = getattr(_aten, name)
    count = len(args[0])

    def of(value: Any, n: int) -> Any:
        return value[n] if isinstance(value, (list, tuple)) and len(value) == count else value

    out = [one(*(of(a, n) for a in args), **{k: of(v, n) for k, v in kwargs.items()}) for n in range(count)]
    return None if name.endswith("_") else out


def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, training: bool, momentum: float, eps: float
) -> Any:
    """``native_batch_norm`` writes running statistics without a word in its schema: the same op with the writes shown."""
    if mean is None or var is None:
        return _aten._native_batch_norm_legit.no_stats(x, weight, bias, training, momentum, eps)
    if not training:
        return _aten._native_batch_norm_legit_no_training.default(x, weight, bias, mean, var, momentum, eps)
    *results, new_mean, new_var = _aten._native_batch_norm_legit_functional.default(x, weight, bias, mean, var, training, momentum, eps)
    _aten.copy_.default(mean, new_mean)
    _aten.copy_.default(var, new_var)
    return tuple(results)


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
    step: Callable[..., Sequence[Any]], fakes: Sequence[Tensor], rng: int, tracker: Tracker, reader: Reader, wide: bool = False
) -> fx.GraphModule:
    """Stage one: ``step(*fakes)`` as it is written. ``rng``: the position of the generator's seed and step among ``fakes``;
    ``wide``: narrower floats that are asked for are float64."""

    def run(*flat: Tensor) -> Sequence[Any]:
        with tagged(tracker.here), tracker.on(), Masked(tracker.here), _Intercept(tracker, Draw(flat[rng], tracker), reader, wide), wide_default(wide):
            try:
                return step(*flat)
            except CaptureError:
                raise
            except Exception as error:
                place = ", ".join(part for part in (tracker.last.path, tracker.last.line) if part)
                error.add_note(f"while DeepSeed traced the model with fake tensors on the CPU; last op at {place or 'the start'}")
                raise

    with _silent("torch._subclasses.fake_tensor"):
        return make_fx(run, tracing_mode="fake")(*fakes)


@contextmanager
def _silent(logger: str) -> Iterator[None]:
    """Torch logs a stack of its own before an op of the user's raises; the error says it all."""
    log = logging.getLogger(logger)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before

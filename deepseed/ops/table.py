"""Which function an op's name means: DeepSeed's own ops, fast torch bindings, any aten overload.

``OWN`` maps the name of an own op to a function of (operands, keywords, result shapes, dtype of the first result). For aten ops
``function`` returns torch's C binding where its meaning and argument order are the overload's, which saves the overload's
slower call path, and the overload itself elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from deepseed.ir.program import Arg, Op, Ref
from deepseed.ops import attention, optim, own, rng, routed

Shape = tuple[int, ...]

_DTYPES = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64, "i32": torch.int32,
    "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool, "c64": torch.complex64, "c128": torch.complex128,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class OpError(ValueError):
    """An op that cannot run: unknown name, or results that disagree with their types."""


def torch_dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise OpError(f"unknown dtype {name!r}; known: {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise OpError(f"{dtype} has no counterpart; known: {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


# own ops ------------------------------------------------------------------------------------------------------------

Kwargs = Mapping[str, Any]

OWN: dict[str, Callable[[Sequence[Tensor], Kwargs, Sequence[Shape], torch.dtype], Any]] = {
    "reshape": lambda xs, kw, out, dtype: own.reshape(xs[0], out[0]),
    "permute": lambda xs, kw, out, dtype: own.permute(xs[0], kw["dims"]),
    "expand": lambda xs, kw, out, dtype: own.expand(xs[0], out[0]),
    "share": lambda xs, kw, out, dtype: xs[0],
    "add_into": lambda xs, kw, out, dtype: xs[0] + xs[1],
    "cast": lambda xs, kw, out, dtype: own.cast(xs[0], dtype),
    "full": lambda xs, kw, out, dtype: own.full(out[0], kw["value"], dtype),
    "iota": lambda xs, kw, out, dtype: own.iota(out[0][0], kw.get("start", 0), kw.get("step", 1), dtype, kw.get("index")),
    "slice": lambda xs, kw, out, dtype: own.slice(xs[0], out[0][kw["dim"]], kw["dim"], kw.get("start", 0), kw.get("step", 1)),
    "unslice": lambda xs, kw, out, dtype: own.unslice(xs[0], out[0], kw["dim"], kw.get("start", 0), kw.get("step", 1)),
    "pad": lambda xs, kw, out, dtype: own.pad(xs[0], kw["pads"], kw.get("value", 0)),
    "cat": lambda xs, kw, out, dtype: own.cat(xs, kw.get("dim", 0)),
    "sum": lambda xs, kw, out, dtype: own.sum(xs[0], kw["dims"], kw.get("keepdim", False), dtype),
    "sum_of_squares": lambda xs, kw, out, dtype: own.sum_of_squares(xs[0], dtype),
    "amax": lambda xs, kw, out, dtype: own.amax(xs[0], kw["dims"], kw.get("keepdim", False)),
    "embedding": lambda xs, kw, out, dtype: own.embedding(xs[0], xs[1], kw.get("start")),
    "embedding_backward": lambda xs, kw, out, dtype: own.embedding_backward(xs[0], xs[1], out[0][0], kw.get("start")),
    "gather": lambda xs, kw, out, dtype: own.gather(xs[0], xs[1], kw["dim"], kw.get("start")),
    "scatter_add": lambda xs, kw, out, dtype: own.scatter_add(xs[0], xs[1], xs[2], kw["dim"], kw.get("start")),
    "routed_mm": lambda xs, kw, out, dtype: routed.routed_mm(xs[0], xs[1], xs[2], kw.get("start")),
    "routed_outer": lambda xs, kw, out, dtype: routed.routed_outer(xs[0], xs[1], xs[2], out[0][0], kw.get("start")),
    "sdpa": lambda xs, kw, out, dtype: _sdpa(attention.sdpa, xs, 4, kw),
    "sdpa_backward": lambda xs, kw, out, dtype: _sdpa(attention.sdpa_backward, xs, 7, kw),
    "paged_attention": lambda xs, kw, out, dtype: attention.paged_attention(xs[0], xs[1], xs[2], xs[3] if len(xs) > 3 else None, kw["scale"], kw["window"], kw["softcap"]),
    "bernoulli": lambda xs, kw, out, dtype: rng.bernoulli(xs[0], out[0], kw["p"], kw["site"], dtype, kw.get("index")),
    "uniform": lambda xs, kw, out, dtype: rng.uniform(xs[0], out[0], kw["low"], kw["high"], kw["site"], dtype, kw.get("index")),
    "normal": lambda xs, kw, out, dtype: rng.normal(xs[0], out[0], kw["mean"], kw["std"], kw["site"], dtype, kw.get("index")),
    **{
        f"sized.{name}": lambda xs, kw, out, dtype, name=name: own.sized(name, xs, kw["given"], out[0])  # type: ignore[misc]
        for name in own.SIZED
    },
    **{
        f"optim.{kind}": lambda xs, kw, out, dtype, kind=kind: optim.update(kind, xs, kw)  # type: ignore[misc]
        for kind in ("adamw", "adam", "sgd")
    },
    "optim.pointwise": lambda xs, kw, out, dtype: optim.pointwise(xs, kw),
}


def _sdpa(function: Callable[..., Any], xs: Sequence[Tensor], whole: int, kw: Kwargs) -> Any:
    """``whole`` operands with the mask; it is at whole // 2 + 1 when present: sdpa 3 of 4, sdpa_backward 4 of 7."""
    at = whole // 2 + 1
    given = list(xs) if len(xs) == whole else [*xs[:at], None, *xs[at:]]
    return function(*given, kw.get("causal", False), kw["scale"])


# aten ---------------------------------------------------------------------------------------------------------------

_SAME = """
add.Tensor sub.Tensor mul.Tensor div.Tensor div.Tensor_mode mul.Scalar add.Scalar sub.Scalar div.Scalar
mm bmm addmm baddbmm neg rsqrt sqrt exp expm1 log log1p sin cos tanh sigmoid relu erf abs sign floor ceil round reciprocal square
pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar where.self maximum minimum
eq.Tensor ne.Tensor lt.Tensor le.Tensor gt.Tensor ge.Tensor eq.Scalar ne.Scalar lt.Scalar le.Scalar gt.Scalar ge.Scalar
logical_and logical_or logical_not bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor bitwise_not
masked_fill.Scalar masked_fill.Tensor addcmul addcdiv lerp.Scalar lerp.Tensor convolution clone
native_layer_norm cumsum topk index_select
"""
_FAST: dict[str, Callable[..., Any]] = {f"aten.{name}": getattr(torch, name.partition(".")[0]) for name in _SAME.split()}
# products too are torch's, whatever the machine: a reference for those of deepseed.ops.products
_FAST["aten.silu"] = torch._C._nn.silu
_FAST["aten.gelu"] = torch._C._nn.gelu
_FAST["aten._softmax"] = torch._softmax
_FAST["aten._log_softmax"] = torch._log_softmax


@lru_cache(maxsize=4096)
def function(target: str) -> Callable[..., Any]:
    """The callable that ``target`` (``aten.add.Tensor``, ``aten.mm``) names."""
    return _FAST[target] if target in _FAST else overload(target)


@lru_cache(maxsize=4096)
def overload(target: str) -> Any:
    """``torch.ops.aten.add.Tensor`` for ``aten.add.Tensor``; also other namespaces."""
    namespace, _, rest = target.partition(".")
    name, _, which = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), which or "default")
    except (AttributeError, RuntimeError):
        raise OpError(f"no op is called {target}: an own op of docs/ir.md or aten.name.overload (.default dropped) is needed") from None


def arguments(op: Op, operands: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments with tensors in place of references and torch dtypes in place of their names."""
    left = iter(operands)
    args = [_value(a, left) for a in op.args]
    return args, {key: _value(a, left) for key, a in op.kwargs}


def _value(arg: Arg, left: Iterator[Tensor]) -> Any:
    # not a closure in ``arguments``: one that calls itself is a cycle, and would keep the operands until the next collection
    if isinstance(arg, Ref):
        return next(left)
    if isinstance(arg, tuple):
        return [_value(a, left) for a in arg]
    return _DTYPES.get(arg, arg) if isinstance(arg, str) else arg

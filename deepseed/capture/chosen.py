"""``x[mask]`` while a model is traced: all rows are kept, and which of them count.

The size of ``x[mask]`` depends on data, so it has no place in a program. But most of what is done with it treats rows alike (a
sum, a mean, a loss, a layer of each row) and says the same with all rows kept and those that were not chosen left out at the
end. ``Chosen`` stands for it: functions of ROWWISE act on every row, sums and means and losses count the chosen ones,
``y[mask] = chosen`` puts them back; all else, such as its length, is refused. A row that was not chosen holds the values of the
first chosen one, so that what is defined for the chosen rows (a logarithm, a lookup) is for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.nn import functional as F
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from deepseed.capture.errors import CaptureError
from deepseed.capture.guards import storages
from deepseed.capture.metadata import Where

ROWWISE = frozenset("""add sub rsub mul div true_divide neg abs exp log log1p log2 sqrt rsqrt pow square reciprocal sigmoid tanh relu gelu silu softplus
    logsigmoid elu leaky_relu erf sin cos sign clamp clamp_min clamp_max maximum minimum where eq ne lt le gt ge logical_and logical_or logical_not
    float double half bfloat16 long int bool to type type_as detach clone contiguous masked_fill round floor isnan isfinite
    __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__ __div__ __rdiv__ __rpow__ __neg__ __pow__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__
    __invert__ bitwise_and bitwise_or bitwise_not""".split())  # noqa: SIM905  # fmt: skip
OF_THE_FIRST = frozenset("linear layer_norm embedding matmul __matmul__ mm one_hot".split())  # noqa: SIM905, rows are those of the first argument
PRODUCTS = ("matmul", "__matmul__", "mm")
ALONG = {"softmax": 1, "log_softmax": 1, "logsumexp": 1, "argmax": 1, "norm": 2, "normalize": 2, "cumsum": 1, "sum": 1, "mean": 1, "amax": 1, "amin": 1, "squeeze": 1, "unsqueeze": 1}  # name -> place of dim
LOSSES = frozenset("binary_cross_entropy binary_cross_entropy_with_logits mse_loss l1_loss smooth_l1_loss huber_loss kl_div".split())  # noqa: SIM905
OF_ALL = {getattr(Tensor, name).__get__ for name in ("dtype", "device", "layout", "requires_grad", "ndim", "is_meta", "is_sparse", "is_quantized", "is_cuda")} | {
    Tensor.dim, Tensor.is_floating_point, Tensor.is_complex,
}  # fmt: skip


class Chosen(Tensor):
    """``rows [n, ...]`` of which ``counts bool[n]`` says which are meant; ``mask`` is what the user chose with."""

    rows: Tensor
    counts: Tensor
    mask: Tensor
    here: Callable[[], Where]

    @staticmethod
    def of(rows: Tensor, counts: Tensor, mask: Tensor, here: Callable[[], Where]) -> Chosen:
        with _disable_current_modes():
            made = Tensor._make_subclass(Chosen, torch.empty(0))
        for name, value in (("rows", rows), ("counts", counts), ("mask", mask), ("here", here)):
            object.__setattr__(made, name, value)
        return made

    def like(self, rows: Tensor) -> Chosen:
        return Chosen.of(rows, self.counts, self.mask, self.here)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        first = next(a for a in tree_leaves((args, kwargs)) if isinstance(a, Chosen))
        with torch._C.DisableTorchFunctionSubclass():
            return _apply(func, first, args, dict(kwargs))

    def refuse(self, what: str) -> NoReturn:
        where = self.here()
        raise CaptureError(
            f"{what} of x[mask], whose size depends on data", path=where.path, line=where.line,
            fix="keep the whole tensor and mask it: torch.where(mask, x, 0), or a loss with ignore_index, in place of x[mask]",
        )  # fmt: skip


def choose(x: Tensor, mask: Tensor, here: Callable[[], Where]) -> Chosen:
    """``x[mask]``; the mask's shape is that of x's first dimensions."""
    rest = x.shape[mask.dim() :]
    rows, counts = x.reshape(-1, *rest), mask.reshape(-1).clone()
    first = counts.long().argmax(0, keepdim=True)
    kept = counts.reshape(-1, *(1 for _ in rest))
    return Chosen.of(torch.where(kept, rows, rows.detach().index_select(0, first)), counts, mask, here)


def put_back(x: Tensor, mask: Tensor, value: Chosen) -> None:
    """``x[mask] = value``, chosen by the same mask."""
    if not same(mask, value.mask) or value.rows.shape[1:] != x.shape[mask.dim() :]:
        value.refuse("an assignment by another mask, or of other rows,")
    x.copy_(torch.where(mask.reshape(mask.shape + (1,) * (x.dim() - mask.dim())), value.rows.reshape(x.shape).to(x.dtype), x))


def compact(values: Chosen) -> Tensor:
    """The chosen elements in order, zeros behind them: ``[n]``."""
    n = len(values.counts)
    at = torch.where(values.counts, values.counts.long().cumsum(0) - 1, n)
    return torch.zeros(n + 1, dtype=values.rows.dtype).scatter_add(0, at, torch.where(values.counts, values.rows, 0))[:n]


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two masks are one by how they are computed in the trace, so that they choose the same rows whatever the data."""
    mode = get_proxy_mode()
    if mode is None:
        return False
    nodes: list[Any] = [get_proxy_slot(t, mode.tracer, None) for t in (a, b)]
    if None in nodes:
        return a is b  # a constant
    one, other = (n.proxy.node for n in nodes)
    written = {s for n in one.graph.nodes if _writes(n) for s in storages(n.all_input_nodes[0])}

    def alike(a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if written.intersection((*storages(a), *storages(b))):
                return False
            pure = a.op == b.op == "call_function" and a.target is b.target and not _writes(a) and torch.Tag.nondeterministic_seeded not in getattr(a.target, "tags", ())
            return a is b or (pure and alike(a.args, b.args) and alike(a.kwargs, b.kwargs))
        if isinstance(a, list | tuple) and isinstance(b, list | tuple):
            return len(a) == len(b) and all(map(alike, a, b))
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
        return type(a) is type(b) and bool(a == b)

    return alike(one, other)


def _writes(n: fx.Node) -> bool:
    return isinstance(n.target, OpOverload) and n.target._schema.is_mutable and bool(n.all_input_nodes)


# what is done with it ------------------------------------------------------------------------------------------------


def _apply(func: Any, first: Chosen, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = getattr(func, "__name__", str(func))
    if func in OF_ALL:
        return func(first.rows)
    if name == "size" and len(args) == 2 and args[1] % first.rows.dim():
        return first.rows.size(args[1])
    for other in tree_leaves((args, kwargs)):
        if isinstance(other, Chosen) and not same(other.mask, first.mask):
            first.refuse(f"{name} with rows chosen by another mask, besides those,")
    if name in ("cross_entropy", "nll_loss"):
        return _classes(func, first, args, kwargs)
    if name in LOSSES:
        return _loss(func, first, args, kwargs)
    if name in ("sum", "mean") and _along(func, name, args, kwargs) in (None, 0) and args[0] is first:
        if set(kwargs) - {"dim", "dtype"}:
            first.refuse(f"{name} with {', '.join(sorted(kwargs))}")
        return _total(first, first.rows.to(kwargs["dtype"]) if kwargs.get("dtype") else first.rows, name, whole=_along(func, name, args, kwargs) is None)
    if name in ("view", "reshape", "flatten") and args[0] is first:
        return _viewed(first, name, args[1:], kwargs)
    if name in ALONG and args[0] is first:
        dim = _along(func, name, args, kwargs)
        if not isinstance(dim, int) or dim % (first.rows.dim() + (name == "unsqueeze")) == 0 or (kwargs.get("keepdim", False) and name == "argmax"):
            first.refuse(f"{name} along dimension {dim}")
    elif name in OF_THE_FIRST:
        normed = args[1] if len(args) > 1 else kwargs.get("normalized_shape", ())
        within = first.rows.dim() > (len(normed) if name == "layer_norm" else 1) or name in ("embedding", "one_hot")
        flat = name not in PRODUCTS or (first.rows.dim() == 2 and len(args) > 1 and args[1].dim() <= 2)
        if args[0] is not first or any(isinstance(a, Chosen) for a in tree_leaves((args[1:], kwargs))) or not within or not flat:
            first.refuse(name)
    elif name not in ROWWISE:
        first.refuse(name)
    elif any(isinstance(a, Tensor) and not isinstance(a, Chosen) and (a.dim() > first.rows.dim() or (a.dim() == first.rows.dim() and a.shape[0] != 1)) for a in tree_leaves((args, kwargs))):
        first.refuse(f"{name} with a tensor of as many dimensions, not chosen by the same mask,")
    result = func(*tree_map(_rows, args), **tree_map(_rows, kwargs))
    if not isinstance(result, Tensor) or result.dim() == 0 or result.shape[0] != len(first.counts):
        first.refuse(name)
    return first.like(result)


def _rows(value: Any) -> Any:
    return value.rows if isinstance(value, Chosen) else value


def _along(func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The dimension that a call names; None: it names none."""
    at = ALONG[name]
    dim = kwargs.get("dim", args[at] if len(args) > at else (1 if func is F.normalize else None))
    return dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim


def _viewed(first: Chosen, name: str, sizes: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A view that keeps each row together."""
    rest = tuple(first.rows.shape[1:])
    if name == "flatten":
        wanted: tuple[Any, ...] = (-1,) if not sizes and not kwargs else ()
    else:
        wanted = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes
    if not wanted or wanted[0] != -1 or -1 in wanted[1:] or prod(wanted[1:]) != prod(rest):
        first.refuse(f"{name} to {list(wanted)}")
    return first.like(first.rows.reshape(len(first.counts), *wanted[1:]))


def _total(first: Chosen, each: Tensor, name: str, whole: bool = True) -> Tensor:
    """Sum or mean of what each row came to, of the chosen ones: over all, or over rows only."""
    kept = first.counts.reshape(-1, *(1 for _ in each.shape[1:]))
    total = torch.where(kept, each, 0).sum() if whole else torch.where(kept, each, 0).sum(0)
    return total if name == "sum" else total / (first.counts.sum() * (prod(each.shape[1:]) if whole else 1)).to(each.dtype)


def _bound(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], first: Chosen) -> dict[str, Any]:
    import inspect

    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if given.get("size_average") is not None or given.get("reduce") is not None:
        first.refuse(f"{func.__name__} with size_average or reduce")
    if any(isinstance(given.get(n), Tensor) and not isinstance(given[n], Chosen) for n in ("input", "target")):
        first.refuse(f"{func.__name__} with a tensor that was not chosen, besides those")
    return given


def _classes(func: Any, first: Chosen, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Rows that were not chosen get the class that the loss ignores."""
    given = _bound(func, args, kwargs, first)
    target = given["target"].rows
    if target.is_floating_point():
        first.refuse(f"{func.__name__} with probabilities as targets")
    kept = first.counts.reshape(-1, *(1 for _ in target.shape[1:]))
    result = func(**{**given, "input": given["input"].rows, "target": torch.where(kept, target, given["ignore_index"])})
    return first.like(result) if given["reduction"] == "none" else result


def _loss(func: Any, first: Chosen, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    given = {key: _rows(value) for key, value in _bound(func, args, kwargs, first).items()}
    name = given["reduction"]
    if name not in ("none", "sum", "mean") or (given.get("weight") is not None and given["weight"].dim() >= first.rows.dim()):
        first.refuse(f"{func.__name__} with reduction {name!r} or a weight for each row")
    each = func(**{**given, "reduction": "none"})
    return first.like(each) if name == "none" else _total(first, each, name)

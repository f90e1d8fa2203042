"""Every random draw of a model becomes a counter-based one: ``deepseed::bernoulli``, ``uniform`` or ``normal`` with a site.

One table, aten overload -> function, serves the trace and the eager reference alike, so both draw the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

import deepseed.ops  # noqa: F401  (registers the operators)
from deepseed.capture.errors import CaptureError
from deepseed.capture.metadata import Tracker

_aten = torch.ops.aten
_own = torch.ops.deepseed


@dataclass
class Draw:
    """The generator of one step: ``rng`` i64[2] (seed, step); sites from the tracker."""

    rng: Tensor
    tracker: Tracker

    def bernoulli(self, like: Tensor, p: float) -> Tensor:
        return _own.bernoulli(self.rng, like.shape, float(p), self.tracker.site(), like.dtype)  # type: ignore[no-any-return]

    def uniform(self, size: Sequence[int], dtype: torch.dtype, low: float = 0.0, high: float = 1.0) -> Tensor:
        return _own.uniform(self.rng, size, float(low), float(high), self.tracker.site(), dtype)  # type: ignore[no-any-return]

    def normal(self, size: Sequence[int], dtype: torch.dtype, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return _own.normal(self.rng, size, float(mean), float(std), self.tracker.site(), dtype)  # type: ignore[no-any-return]

    def integers(self, size: Sequence[int], dtype: torch.dtype, low: int, high: int) -> Tensor:
        u = self.uniform(size, torch.float64, low, high)
        return _aten._to_copy.default(_aten.floor.default(u), dtype=dtype)  # type: ignore[no-any-return]


def _dtype(like: Tensor | None, dtype: torch.dtype | None) -> torch.dtype:
    return dtype or (like.dtype if like is not None else torch.get_default_dtype())


def _fill(x: Tensor, value: Tensor) -> Tensor:
    _aten.copy_.default(x, value)
    return x


def _by_tensor(d: Draw, like: Tensor, p: Tensor) -> Tensor:
    u = d.uniform(like.shape, p.dtype if p.dtype.is_floating_point else torch.float32)
    return _aten._to_copy.default(_aten.lt.Tensor(u, p), dtype=like.dtype)  # type: ignore[no-any-return]


def _exponential(d: Draw, x: Tensor, rate: float = 1.0) -> Tensor:
    u = d.uniform(x.shape, x.dtype)  # in [0, 1)
    return _fill(x, _aten.div.Scalar(_aten.neg.default(_aten.log1p.default(_aten.neg.default(u))), rate))


def _scaled(d: Draw, mean: Any, std: Any) -> Tensor:
    """Normal numbers of the mean and deviation of each element."""
    given = [v for v in (mean, std) if isinstance(v, Tensor)]
    shape = torch.broadcast_shapes(*(v.shape for v in given))  # type: ignore[no-untyped-call]
    drawn = _aten.mul.Tensor(d.normal(shape, given[0].dtype), std)
    return _aten.add.Tensor(drawn, mean)  # type: ignore[no-any-return]


def _cauchy(d: Draw, x: Tensor, median: float = 0.0, sigma: float = 1.0) -> Tensor:
    angle = _aten.mul.Scalar(d.uniform(x.shape, x.dtype, -0.5, 0.5), math.pi)
    return _fill(x, _aten.add.Scalar(_aten.mul.Scalar(_aten.tan.default(angle), sigma), median))


def _geometric(d: Draw, x: Tensor, p: float) -> Tensor:
    """1 + the whole part of log(1 - u) / log(1 - p), u in [0, 1)."""
    u = d.uniform(x.shape, torch.float64)
    if p >= 1:
        return _fill(x, _aten.ones_like.default(x))
    tries = _aten.div.Scalar(_aten.log1p.default(_aten.neg.default(u)), math.log1p(-p))
    return _fill(x, _aten.add.Scalar(_aten.floor.default(tries), 1))


def _permutation(d: Draw, n: int, dtype: torch.dtype | None) -> Tensor:
    """The order of n uniform numbers."""
    order = _aten.sort.stable(d.uniform((n,), torch.float64), stable=True)[1]
    return _aten._to_copy.default(order, dtype=dtype or torch.int64)  # type: ignore[no-any-return]


def _multinomial(d: Draw, p: Tensor, n: int, replacement: bool = False) -> Tensor:
    """With replacement, uniform numbers looked up in the running totals; else the n largest of p / exponential, as PyTorch does."""
    if replacement:
        total = _aten.cumsum.default(p, -1)
        last = _aten.slice.Tensor(total, -1, -1)
        u = _aten.mul.Tensor(d.uniform((*p.shape[:-1], n), p.dtype), last)
        found = _aten.searchsorted.Tensor(total, u, right=True)
        return _aten.clamp_max.default(found, p.shape[-1] - 1)  # type: ignore[no-any-return]
    exponential = _aten.neg.default(_aten.log1p.default(_aten.neg.default(d.uniform(p.shape, p.dtype))))
    return _aten.topk.default(_aten.div.Tensor(p, exponential), n)[1]  # type: ignore[no-any-return]


def _rrelu(d: Draw, x: Tensor, noise: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Tensor:
    """A slope drawn for each negative element; ``noise`` is filled with the slopes, which the backward reads."""
    if not training:
        return _aten.leaky_relu.default(x, (lower + upper) / 2)  # type: ignore[no-any-return]
    slope = d.uniform(x.shape, x.dtype, lower, upper)
    slope = _aten.where.self(_aten.le.Scalar(x, 0), slope, _aten.ones_like.default(x))
    _fill(noise, slope)
    return _aten.mul.Tensor(x, slope)  # type: ignore[no-any-return]


def _native_dropout(d: Draw, x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if not train or p == 0:
        return _aten.clone.default(x), _aten.ones_like.default(x, dtype=torch.bool)
    mask = _own.bernoulli(d.rng, x.shape, 1.0 - p, d.tracker.site(), x.dtype)
    scaled = _aten.mul.Tensor(x, _aten.div.Scalar(mask, 1.0 - p)) if p < 1 else _aten.zeros_like.default(x)
    return scaled, _aten._to_copy.default(mask, dtype=torch.bool)


DRAWS: dict[OpOverload, Callable[..., Any]] = {
    _aten.bernoulli_.float: lambda d, x, p=0.5, **_: _fill(x, d.bernoulli(x, p)),
    _aten.bernoulli_.Tensor: lambda d, x, p, **_: _fill(x, _by_tensor(d, x, p)),
    _aten.bernoulli.p: lambda d, x, p=0.5, **_: d.bernoulli(x, p),
    _aten.bernoulli.default: lambda d, x, **_: _by_tensor(d, x, x),
    _aten.native_dropout.default: _native_dropout,
    _aten.rand.default: lambda d, size, dtype=None, **_: d.uniform(size, _dtype(None, dtype)),
    _aten.rand.generator: lambda d, size, dtype=None, **_: d.uniform(size, _dtype(None, dtype)),
    _aten.rand_like.default: lambda d, x, dtype=None, **_: d.uniform(x.shape, _dtype(x, dtype)),
    _aten.uniform_.default: lambda d, x, low=0.0, high=1.0, **_: _fill(x, d.uniform(x.shape, x.dtype, low, high)),
    _aten.randn.default: lambda d, size, dtype=None, **_: d.normal(size, _dtype(None, dtype)),
    _aten.randn.generator: lambda d, size, dtype=None, **_: d.normal(size, _dtype(None, dtype)),
    _aten.randn_like.default: lambda d, x, dtype=None, **_: d.normal(x.shape, _dtype(x, dtype)),
    _aten.normal_.default: lambda d, x, mean=0.0, std=1.0, **_: _fill(x, d.normal(x.shape, x.dtype, mean, std)),
    _aten.normal.float_float: lambda d, mean, std, size, dtype=None, **_: d.normal(size, _dtype(None, dtype), mean, std),
    _aten.exponential_.default: lambda d, x, rate=1.0, **_: _exponential(d, x, rate),
    _aten.normal.Tensor_Tensor: lambda d, mean, std, **_: _scaled(d, mean, std),
    _aten.normal.Tensor_float: lambda d, mean, std=1.0, **_: _scaled(d, mean, std),
    _aten.normal.float_Tensor: lambda d, mean, std, **_: _scaled(d, mean, std),
    _aten.log_normal_.default: lambda d, x, mean=1.0, std=2.0, **_: _fill(x, _aten.exp.default(d.normal(x.shape, x.dtype, mean, std))),
    _aten.cauchy_.default: lambda d, x, median=0.0, sigma=1.0, **_: _cauchy(d, x, median, sigma),
    _aten.geometric_.default: lambda d, x, p, **_: _geometric(d, x, p),
    _aten.randperm.default: lambda d, n, dtype=None, **_: _permutation(d, n, dtype),
    _aten.randperm.generator: lambda d, n, dtype=None, **_: _permutation(d, n, dtype),
    _aten.multinomial.default: lambda d, p, n, replacement=False, **_: _multinomial(d, p, n, replacement),
    _aten.rrelu_with_noise.default: lambda d, x, noise, lower=1 / 8, upper=1 / 3, training=False, *_, **__: _rrelu(d, x, noise, lower, upper, training),
    _aten.randint.default: lambda d, high, size, dtype=torch.int64, **_: d.integers(size, dtype, 0, high),
    _aten.randint.low: lambda d, low, high, size, dtype=torch.int64, **_: d.integers(size, dtype, low, high),
    _aten.randint_like.default: lambda d, x, high, dtype=None, **_: d.integers(x.shape, _dtype(x, dtype), 0, high),
    _aten.randint_like.low_dtype: lambda d, x, low, high, dtype=None, **_: d.integers(x.shape, _dtype(x, dtype), low, high),
    _aten.random_.to: lambda d, x, high, **_: _fill(x, d.integers(x.shape, x.dtype, 0, high)),
    getattr(_aten.random_, "from"): lambda d, x, low, high=None, **_: _fill(x, d.integers(x.shape, x.dtype, low, high)),
}  # fmt: skip


def draw(func: OpOverload, draws: Draw, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The counter-based form of a random op, ``NotImplemented`` for any other. Raises CaptureError for one without such a form."""
    known = DRAWS.get(func)
    if known is not None:
        return known(draws, *args, **kwargs)
    if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func):
        where = draws.tracker.here()
        raise CaptureError(
            f"{func} draws random numbers, and DeepSeed has no counter-based form of it", path=where.path, line=where.line,
            fix="draw with torch.rand, torch.randn, torch.randint or dropout, from which most distributions can be made",
        )  # fmt: skip
    return NotImplemented

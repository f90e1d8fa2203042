"""Random numbers by counter: the bits of an element depend on (seed, step, site) and its global index only.

splitmix64 (Steele, Lea, Flood 2014) of counter c under key k is ``mix(k + (c + 1) * golden)``; the key is a hash of seed,
step and site. ``bernoulli`` and ``uniform`` give the element with row-major global index g the 32-bit lane g % 2 of word
g // 2, read as a signed number; ``normal`` takes both lanes of word g. A shard computes the words of its own elements, so
any sharding draws what one device draws, bit for bit.

``index`` says which elements a shard holds: for each dimension the factors of its size, major first (``deepseed.ir.layout.factors``),
as ``(size,)`` where the shard has all of it, else ``(size, first, number of indices)``. Without ``index`` the result is whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Index = Sequence[Sequence[Sequence[int]]]

GOLDEN = 0x9E3779B97F4A7C15
MIX1 = 0xBF58476D1CE4E5B9
MIX2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_BLOCK = 1 << 14  # words of one block: temporaries stay in the L2 cache


def bernoulli(rng: Tensor, shape: Sequence[int], p: float, site: str, dtype: torch.dtype, index: Index | None = None) -> Tensor:
    """1 with probability ``p`` (exact to 2**-32), else 0; ``rng`` is i64[2]: seed, step; ``shape`` is the local one."""
    out = torch.empty(tuple(shape), dtype=dtype, device=rng.device)
    threshold = round(p * 2**32) - 2**31
    if threshold >= 2**31 or threshold <= -(2**31):
        return out.fill_(1 if threshold > 0 else 0)
    _fill(out, rng, site, index, 2, lambda lanes, part: torch.lt(lanes, threshold, out=part))
    return out


def uniform(rng: Tensor, shape: Sequence[int], low: float, high: float, site: str, dtype: torch.dtype, index: Index | None = None) -> Tensor:
    """Uniform in [low, high): 24 random bits an element, 32 in float64."""
    out = torch.empty(tuple(shape), dtype=dtype, device=rng.device)
    last = _below(high, dtype)

    def draw(lanes: Tensor, part: Tensor) -> None:
        if dtype is torch.float64:
            u = lanes.to(torch.float64).add_(2.0**31).mul_((high - low) * 2.0**-32)
        else:
            u = (lanes >> 8).to(torch.float32).add_(2.0**23).mul_(2.0**-24).mul_(high - low)
        part.copy_(u.add_(low)).clamp_(max=last)

    _fill(out, rng, site, index, 2, draw)
    return out


def normal(rng: Tensor, shape: Sequence[int], mean: float, std: float, site: str, dtype: torch.dtype, index: Index | None = None) -> Tensor:
    """Normal by Box and Muller, computed in float64 from 64 random bits an element."""
    out = torch.empty(tuple(shape), dtype=dtype, device=rng.device)

    def draw(words: Tensor, part: Tensor) -> None:
        n = words.numel()
        u = torch.zeros(-(-n // 64) * 64, 2, dtype=torch.float64, device=words.device)  # whole vectors: every element takes the same code path
        u[:n] = words.view(torch.int32).view(n, 2)
        radius = u[:, 0].add(2.0**31 + 1).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
        angle = u[:, 1].mul(2.0 * math.pi * 2.0**-32).cos_()
        part.copy_(radius.mul_(angle).mul_(std).add_(mean)[:n])

    _fill(out, rng, site, index, 1, draw)
    return out


def indices(index: Index, device: torch.device | None = None) -> list[Tensor]:
    """For each dimension the global indices that the shard holds, in local order (i64)."""
    return [_enumerate(list(_ranges(dim)), 1, device) for dim in index]


# words --------------------------------------------------------------------------------------------------------------


def _fill(out: Tensor, rng: Tensor, site: str, index: Index | None, per_word: int, draw: Callable[[Tensor, Tensor], object]) -> None:
    """Calls ``draw(lanes or words, part of out)`` block by block; ``per_word``: elements that share one word."""
    if out.numel() == 0:
        return
    key, flat = _key(rng, site), out.view(-1)
    flat_index = [r for dim in index for r in _ranges(dim)] if index is not None else [(out.numel(), 0, out.numel())]
    run = 1
    while flat_index and flat_index[-1][0] == flat_index[-1][2]:
        run *= flat_index.pop()[0]  # the shard is rows of ``run`` consecutive elements
    words = -(-run // per_word)
    if math.prod(count for _, _, count in flat_index) == 1 or words >= _BLOCK:
        firsts = [0]  # in Python: nothing is read from a device, so that a step can be captured as a graph
        for n, first, count in flat_index:
            firsts = [at * n + i for at in firsts for i in range(first, first + count)]
        if not any(at * run % per_word for at in firsts):
            counters = _counters(min(_BLOCK, words), out.device)
            for row, start in zip(flat.view(-1, run), [at * run for at in firsts], strict=True):
                _fill_run(row, key, start // per_word, per_word, counters, draw)
            return
    starts = _enumerate(flat_index, run, out.device)
    if run % per_word == 0:
        rows = _BLOCK // words
        counters = _counters(words, out.device)
        offsets = starts.div(per_word, rounding_mode="floor").mul_(_signed(GOLDEN))
        for at in range(0, len(starts), rows):
            block = _mix((offsets[at : at + rows, None] + counters).view(-1).add_(key))
            draw(block.view(torch.int32) if per_word == 2 else block, flat[at * run : at * run + block.numel() * per_word])
            del block  # before the next one is made
    else:
        within = torch.arange(run, device=out.device)
        rows = max(1, _BLOCK // run)
        for at in range(0, len(starts), rows):
            g = (starts[at : at + rows, None] + within).view(-1)
            block = _mix((g >> 1).add_(1).mul_(_signed(GOLDEN)).add_(key))
            draw((block >> (g & 1).mul_(32)).to(torch.int32), flat[at * run : at * run + len(g)])
            del g, block


def _fill_run(flat: Tensor, key: int | Tensor, first: int, per_word: int, counters: Tensor, draw: Callable[[Tensor, Tensor], object]) -> None:
    """One row of consecutive elements that starts at word ``first``; ``counters``: of a block."""
    word, shifted = torch.empty(2, len(counters), dtype=torch.int64, device=flat.device)
    for at in range(0, len(flat), _BLOCK * per_word):
        part = flat[at : at + _BLOCK * per_word]
        n = -(-len(part) // per_word)
        step = _wrap((first + at // per_word) * GOLDEN)
        torch.add(counters[:n], _wrap(key + step) if isinstance(key, int) else key + step, out=word[:n])
        block = _mix(word[:n], shifted[:n])
        draw(block.view(torch.int32)[: len(part)] if per_word == 2 else block, part)


def _mix(z: Tensor, temporary: Tensor | None = None) -> Tensor:
    """splitmix64's finalizer, in place."""
    t = torch.empty_like(z) if temporary is None else temporary
    for shift, factor in ((30, MIX1), (27, MIX2), (31, None)):
        torch.bitwise_right_shift(z, shift, out=t)  # arithmetic: the copies of the sign are masked off
        z.bitwise_xor_(t.bitwise_and_((1 << (64 - shift)) - 1))
        if factor is not None:
            z.mul_(_signed(factor))
    return z


def _counters(n: int, device: torch.device) -> Tensor:
    """(c + 1) * golden for c < n. Made for each draw: kept ones would be memory that a step holds and no rank's plan shows."""
    return torch.arange(1, n + 1, device=device).mul_(_signed(GOLDEN))


def _key(rng: Tensor, site: str) -> int | Tensor:
    """mix(mix(hash(site) + seed * golden) + step * golden); a number on CPU, where reading ``rng`` is free."""
    start = site_hash(site)
    if rng.device.type != "cpu":
        return _key_on_device(rng, start)
    seed, step = rng.tolist()
    return _signed(_mix_int(_mix_int(start + seed * GOLDEN) + step * GOLDEN))


def _key_on_device(rng: Tensor, start: int) -> Tensor:
    """Computed there: what a graph that was captured replays has the numbers of the step that replays it."""
    seed_step = rng * _signed(GOLDEN)
    return _mix(_mix(seed_step[:1] + _signed(start)) + seed_step[1:])


@lru_cache(maxsize=4096)
def site_hash(site: str) -> int:
    """The site's stable 64-bit hash (blake2b), unsigned."""
    return int.from_bytes(hashlib.blake2b(site.encode(), digest_size=8).digest(), "little")


def _mix_int(z: int) -> int:
    z &= _MASK
    z = ((z ^ (z >> 30)) * MIX1) & _MASK
    z = ((z ^ (z >> 27)) * MIX2) & _MASK
    return z ^ (z >> 31)


def _signed(z: int) -> int:
    return z - (1 << 64) if z >= 1 << 63 else z


def _wrap(z: int) -> int:
    return _signed(z & _MASK)


def _ranges(dim: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    """(size, first, number) of each factor."""
    for n, *held in dim:
        yield (n, held[0], held[1]) if held else (n, 0, n)


def _enumerate(factors: Sequence[tuple[int, int, int]], unit: int, device: torch.device | None) -> Tensor:
    """Row-major indices of the product of the factors (size, first, number), times ``unit``."""
    out = torch.zeros(1, dtype=torch.int64, device=device)
    for n, first, count in factors:
        out = (out[:, None] * n + torch.arange(first, first + count, device=device)).view(-1)
    return out * unit


@lru_cache(maxsize=256)
def _below(high: float, dtype: torch.dtype) -> float:
    """The largest number of ``dtype`` below ``high``."""
    value = torch.tensor(high, dtype=dtype)
    if value.item() < high:
        return value.item()
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    if value.item() == 0:
        return -torch.finfo(dtype).smallest_normal
    return (value.view(bits) + (-1 if value.item() > 0 else 1)).view(dtype).item()

"""The counter-based generator: known bits, statistics, and any sharding draws what one device draws."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from deepseed.ir.layout import Layout, Split, chunk, factors, local_indices, local_shape, valid
from deepseed.ir.mesh import Mesh
from deepseed.ops import bernoulli, normal, uniform
from deepseed.ops.rng import GOLDEN, Index, _key, _mix_int, _signed, site_hash

RNG = torch.tensor([7, 3])
N = 1 << 20


def lanes(seed: int, step: int, site: str, n: int) -> Tensor:
    """The 32-bit lanes as numbers in [0, 2**32), one an element."""
    return uniform(torch.tensor([seed, step]), (n,), 0.0, 1.0, site, torch.float64).mul(2.0**32).to(torch.int64)


def test_bits_are_splitmix64() -> None:
    """splitmix64 of state 1234567 gives 6457827717110365317, 3203168211198807973 (its published test vector)."""
    assert [_mix_int(1234567 + (c + 1) * GOLDEN) for c in (0, 1)] == [6457827717110365317, 3203168211198807973]
    key = _mix_int(_mix_int(site_hash("a") + 7 * GOLDEN) + 3 * GOLDEN)
    assert _key(RNG, "a") == _signed(key)
    words = [_mix_int(key + (c + 1) * GOLDEN) for c in range(3)]
    halves = [w >> (32 * lane) & (2**32 - 1) for w in words for lane in (0, 1)]
    assert lanes(7, 3, "a", 6).tolist() == [h ^ (1 << 31) for h in halves]  # lanes are read as signed numbers


def test_key_on_a_device_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where reading seed and step would wait for the device, the key is computed there."""

    class Elsewhere:
        device = torch.device("meta")

        def __mul__(self, n: int) -> Tensor:
            return RNG * n

    key = _key(Elsewhere(), "a")  # type: ignore[arg-type]
    assert isinstance(key, Tensor) and key.item() == _key(RNG, "a")


@pytest.mark.parametrize("p", [0.5, 0.9, 0.1, 1e-4, 1 - 1e-4])
def test_bernoulli_mean(p: float) -> None:
    zs = []
    for seed in range(8):
        mean = bernoulli(torch.tensor([seed, 0]), (N,), p, "site", torch.float64).mean().item()
        zs.append((mean - p) / math.sqrt(p * (1 - p) / N))
    assert max(map(abs, zs)) < 3.5 and abs(sum(zs)) / math.sqrt(8) < 3


def test_bernoulli_of_certain_and_impossible() -> None:
    for p, value in ((0.0, 0.0), (1.0, 1.0)):
        assert bernoulli(RNG, (1001,), p, "s", torch.float32).unique().tolist() == [value]
    assert bernoulli(RNG, (0, 3), 0.5, "s", torch.float32).shape == (0, 3)
    tiny = bernoulli(RNG, (N,), 2.0**-32, "s", torch.float32)
    assert tiny.sum() <= 1


@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_bytes_of_the_lanes_are_uniform(shift: int) -> None:
    counts = torch.bincount(lanes(1, 2, "chi2", 4 * N) >> shift & 255, minlength=256).double()
    chi2 = ((counts - 4 * N / 256) ** 2 / (4 * N / 256)).sum().item()
    assert abs(chi2 - 255) < 4 * math.sqrt(2 * 255)


def test_no_correlation_between_neighbours_sites_seeds_and_steps() -> None:
    def correlation(a: Tensor, b: Tensor) -> float:
        return abs((a * b).mean().item()) * math.sqrt(a.numel()) * 12

    x = lanes(1, 2, "a", N).double() / 2**32 - 0.5
    found = {lag: correlation(x[lag:], x[:-lag]) for lag in (1, 2, 3, 7, 64, 1024, 4096)}
    for name, other in (("seed", lanes(2, 2, "a", N)), ("step", lanes(1, 3, "a", N)), ("site", lanes(1, 2, "b", N)), ("swap", lanes(2, 1, "a", N))):
        found[name] = correlation(x, other.double() / 2**32 - 0.5)  # type: ignore[index]
    assert max(found.values()) < 3.5, found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.0, 2.0), (-3.0, 0.0), (-0.1, 0.3)])
def test_uniform_is_below_high(dtype: torch.dtype, low: float, high: float) -> None:
    x = uniform(RNG, (N,), low, high, "u", dtype)
    assert x.dtype is dtype and x.double().max() < high and x.double().min() >= torch.tensor(low, dtype=dtype).double()
    z = (x.double().mean() - (low + high) / 2).item() / ((high - low) / math.sqrt(12 * N))
    rounding = torch.finfo(dtype).eps * max(abs(low), abs(high)) / ((high - low) / math.sqrt(12 * N))
    assert abs(z) < 4 + rounding


def test_normal_moments() -> None:
    x = normal(RNG, (N,), 0.0, 1.0, "n", torch.float64)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - moment) < 4 * math.sqrt(spread / N)
    assert (x.abs() > 3).double().mean().item() == pytest.approx(0.0027, rel=0.1)
    y = normal(RNG, (N,), 5.0, 0.5, "n", torch.float64)
    torch.testing.assert_close(y, x * 0.5 + 5, rtol=1e-14, atol=1e-14)


def shard_index(shape: tuple[int, ...], layout: Layout, mesh: Mesh, at: dict[str, int]) -> Index:
    def held(n: int, axis: str | None) -> tuple[int, ...]:
        return (n,) if axis is None else (n, (part := chunk(n, mesh.size(axis), at[axis])).start, len(part))

    return [[held(n, axis) for n, axis in factors(size, d, layout, mesh)] for d, size in enumerate(shape)]


@pytest.mark.parametrize("seed", range(60))
def test_a_shard_draws_its_part_of_the_whole(seed: int) -> None:
    """Random shapes, dimensions, outer factors and one to three axes."""
    draw = random.Random(seed)
    mesh = Mesh((("dp", draw.choice([2, 3])), ("tp", 2), ("pp", draw.choice([2, 4]))))
    shape = tuple(draw.choice([1, 3, 4, 5, 6, 8, 12, 15, 24, 48]) for _ in range(draw.randint(1, 4)))
    layout = Layout()
    for axis in draw.sample(mesh.names, draw.randint(1, 3)):
        wish = layout.with_(axis, Split(draw.randrange(len(shape)), draw.choice([1, 1, 2, 3, 4]), draw.choice([0, 0, 3, 5])))
        layout = wish if valid(shape, wish, mesh) else layout
    whole = {
        "bernoulli": bernoulli(RNG, shape, 0.4, "s", torch.float32),
        "uniform": uniform(RNG, shape, -1.0, 2.0, "s", torch.float32),
        "normal": normal(RNG, shape, 1.0, 2.0, "s", torch.float64),
    }
    for rank in range(mesh.ranks):
        at = mesh.coordinate(rank)
        index, local = shard_index(shape, layout, mesh, at), local_shape(shape, layout, mesh.seen_from(at))
        part = {
            "bernoulli": bernoulli(RNG, local, 0.4, "s", torch.float32, index),
            "uniform": uniform(RNG, local, -1.0, 2.0, "s", torch.float32, index),
            "normal": normal(RNG, local, 1.0, 2.0, "s", torch.float64, index),
        }
        taken = [torch.tensor(local_indices(n, d, layout, mesh, at)) for d, n in enumerate(shape)]
        for kind, x in whole.items():
            for d, i in enumerate(taken):
                x = x.index_select(d, i)
            assert torch.equal(part[kind], x), (kind, shape, layout)


def test_blocks_join_without_a_seam() -> None:
    """Sizes around the block, whole and by halves."""
    for n in (1, 2, 3, 32767, 32768, 32769, 65538, 99999):
        whole = uniform(RNG, (n,), 0.0, 1.0, "s", torch.float64)
        assert torch.equal(whole, uniform(RNG, (200_000,), 0.0, 1.0, "s", torch.float64)[:n])
        if n % 2 == 0:
            halves = [uniform(RNG, (n // 2,), 0.0, 1.0, "s", torch.float64, [[(2, c, 1), (n // 2,)]]) for c in (0, 1)]
            assert torch.equal(torch.cat(halves), whole)


def test_traced_as_one_node_each() -> None:
    def step(rng: Tensor, x: Tensor) -> Tensor:
        ops = torch.ops.deepseed
        return x * ops.bernoulli(rng, x.shape, 0.5, "a", x.dtype) + ops.uniform(rng, x.shape, 0.0, 1.0, "b", x.dtype) * ops.normal(rng, [3], 0.0, 1.0, "c", x.dtype)

    x = torch.randn(4, 3, requires_grad=True)
    graph = make_fx(step, tracing_mode="fake")(RNG, x)
    targets = [str(n.target) for n in graph.graph.nodes if "deepseed" in str(n.target)]
    assert targets == ["deepseed.bernoulli.default", "deepseed.uniform.default", "deepseed.normal.default"]
    assert torch.equal(graph(RNG, x), step(RNG, x))
    (grad,) = torch.autograd.grad(step(RNG, x).sum(), x)
    assert torch.equal(grad, bernoulli(RNG, (4, 3), 0.5, "a", torch.float32))


def test_all_pairs_of_keys_differ() -> None:
    keys = {_key(torch.tensor([seed, step]), site) for seed, step, site in itertools.product(range(20), range(20), "abc")}
    assert len(keys) == 20 * 20 * 3

"""What runs faster on a CPU than torch's own choice means the same: 16-bit attention of short rows, sums of squares, blocks that are added, gathers into memory that is there."""

from __future__ import annotations

import pytest
import torch

from deepseed import ops
from deepseed.ops import attention, own
from deepseed.runtime import collectives
from deepseed.runtime.distributed import _added


@pytest.mark.parametrize(("s", "wide"), [(attention.SHORT, True), (attention.SHORT + 8, False)])
@pytest.mark.parametrize("heads", [2, 4])
def test_short_rows_of_16_bits_go_through_float32(s: int, wide: bool, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, g = (torch.randn(1, 4, s, 16).bfloat16() for _ in range(2))
    k, v = (torch.randn(1, heads, s, 16).bfloat16() for _ in range(2))
    seen = []
    kernel = attention._kernel
    monkeypatch.setattr(attention, "_kernel", lambda *xs: (seen.append(xs[0].dtype), kernel(*xs))[1])
    out, lse = ops.sdpa(q, k, v, None, True, 0.25)
    seen.clear()
    got = ops.sdpa_backward(g, q, k, v, None, out, lse, True, 0.25)
    assert seen == [torch.float32 if wide else torch.bfloat16]
    exact = [x.double() for x in (g, q, k, v)]
    exact_out, exact_lse = ops.sdpa(*exact[1:], None, True, 0.25)
    want = ops.sdpa_backward(*exact, None, exact_out, exact_lse, True, 0.25)
    for a, b in zip(got, want, strict=True):
        assert a.dtype is torch.bfloat16 and a.shape == b.shape
        assert float((a.double() - b).norm() / b.norm()) < 8e-3  # two roundings of 2^-8: of the forward's result and of this one


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_squares_are_summed_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "BLOCK", 100)
    torch.manual_seed(0)
    x = torch.randn(37, 29).to(dtype)
    to = torch.float64 if dtype is torch.float64 else torch.float32
    for y in (x, x.t(), x[:, ::2], x[:0], x.flatten()[:90]):
        want = float((y.double() ** 2).sum())
        got = ops.sum_of_squares(y, to)
        assert got.dtype is to and got.shape == () and float(got) == pytest.approx(want, rel=1e-14 if dtype is torch.float64 else 2e-6, abs=0.0)


def test_two_blocks_are_added_as_they_are_reduced() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for n in (2, 3):
            x = torch.randn(n, 1001).to(dtype)
            assert torch.equal(_added(x), x.sum(0))


@pytest.mark.parametrize(("shape", "put"), [((4, 6), (0, 1)), ((4, 6), (1, 1)), ((4, 6), (1, 3)), ((6,), (0, 2)), ((4, 6), (0, 1, 7, 1)), ((0, 6), (1, 3))])
def test_blocks_are_joined_where_the_result_belongs(shape: tuple[int, ...], put: tuple[int, ...]) -> None:
    blocks = torch.arange(2.0 * torch.Size(shape).numel()).view(2, *shape)
    want = collectives.join(blocks, put)
    out = torch.full((*want.shape[:-1], want.shape[-1] + 1), -1.0)[..., :-1]  # does not lie side by side
    assert torch.equal(collectives.join_into(blocks, put, out), want) and torch.equal(out, want)

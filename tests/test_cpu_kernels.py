"""What runs faster on a CPU than torch's own choice means the same: blocks that are added, gathers into memory that is there."""

from __future__ import annotations

import pytest
import torch

from deepseed.runtime import collectives


def test_two_blocks_are_added_as_they_are_reduced() -> None:
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for n in (2, 3):
            x = torch.randn(n, 1001).to(dtype)
            assert torch.equal(collectives.added(x), x.sum(0))


@pytest.mark.parametrize(("shape", "put"), [((4, 6), (0, 1)), ((4, 6), (1, 1)), ((4, 6), (1, 3)), ((6,), (0, 2)), ((4, 6), (0, 1, 7, 1)), ((0, 6), (1, 3))])
def test_blocks_are_joined_where_the_result_belongs(shape: tuple[int, ...], put: tuple[int, ...]) -> None:
    blocks = torch.arange(2.0 * torch.Size(shape).numel()).view(2, *shape)
    want = collectives.join(blocks, put)
    out = torch.full((*want.shape[:-1], want.shape[-1] + 1), -1.0)[..., :-1]  # does not lie side by side
    assert torch.equal(collectives.join_into(blocks, put, out), want) and torch.equal(out, want)

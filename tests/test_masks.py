"""Constant attention masks: causal ones become ``causal=true``, others stay what they are."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseed.capture import capture
from deepseed.ir.program import Op
from deepseed.verify import verify


class Attention(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.qkv = kind, nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (t.reshape(b, s, 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        i = torch.arange(s)
        masks = {
            "causal": i[None, :] <= i[:, None],
            "float": torch.where(i[None, :] <= i[:, None], 0.0, float("-inf")),
            "all": i[None, :] >= 0,
            "window": (i[None, :] <= i[:, None]) & (i[None, :] > i[:, None] - 3),
            "bias": -(i[:, None] - i[None, :]).abs().float(),
        }
        mask = masks["all"].expand(s, s) if self.kind == "all" else masks[self.kind]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None, None].to(q.dtype) if mask.is_floating_point() else mask)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) ** 2).mean()


@pytest.mark.parametrize(("kind", "masked", "causal"), [("causal", False, True), ("float", False, True), ("all", False, False), ("window", True, False), ("bias", True, False)])
def test_only_a_causal_mask_is_causal(kind: str, masked: bool, causal: bool) -> None:
    torch.manual_seed(0)
    model, batch = Attention(kind), torch.randn(4, 6, 16)
    found: list[Op] = [op for op in capture(model, batch, loss_fn=loss).program.ops if op.target.startswith("sdpa")]
    assert [op.target for op in found] == ["sdpa", "sdpa_backward"]
    for op, at in zip(found, (3, 4), strict=True):
        assert (op.args[at] is not None) is masked
        assert op.kw("causal") is causal
    report = verify(model, batch, "dp2+zero3", loss_fn=loss)
    assert report.ok, str(report)

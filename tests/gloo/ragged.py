"""A model with a mask on ranks whose rows are of unequal length, beside the eager one on each rank's rows as they are."""

from __future__ import annotations

import copy
import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseed.ragged import CONVENTION
from deepseed.trained import Trained


class Masked(nn.Module):
    """Each token sees the mean of its row's tokens that count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up = nn.Embedding(12, 8), nn.Linear(8, 12)
        self.double()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> dict[str, Tensor]:
        h, mask = self.embed(input_ids), attention_mask[..., None].double()
        logits = self.up(torch.tanh(h + (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)))
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100), "logits": logits}


def on_ranks() -> dict[str, float]:
    torch.set_num_threads(1)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    model = Masked()
    theirs = copy.deepcopy(model)
    ours = Trained(model, "zero2", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), batch="local", buckets=CONVENTION, quiet=True)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    worst = dict.fromkeys(("loss", "logits", "param"), 0.0)
    g = torch.Generator().manual_seed(1)
    for lengths in ((3, 5), (6, 2), (4, 4)):
        optimizer.zero_grad()
        for r in range(world):
            ids = torch.randint(0, 12, (2, lengths[r]), generator=g)
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            want = theirs(**batch)
            (want["loss"] / world).backward()
            if r == rank:
                got = ours(**batch)
                got["loss"].backward()
                assert got["logits"].shape == (2, lengths[r], 12)
                for name in ("loss", "logits"):
                    worst[name] = max(worst[name], float((got[name] - want[name]).abs().max()))
        optimizer.step()
        ours.update()
        now = ours.state_dict()
        worst["param"] = max(worst["param"], *(float((now[name] - p).abs().max()) for name, p in theirs.named_parameters()))
    return worst

"""x[mask] without its size, and CTC: loss and all gradients beside eager PyTorch's own indexing and kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_capture import check_gradients
from torch import Tensor, nn

from deepseed.capture import CaptureError, capture
from deepseed.verify import verify


class Model(nn.Module):
    """A layer, then whatever is done with h [4, 6, 8], the labels [4, 6] (some -100) and the mask of those that are not."""

    def __init__(self, body: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.table, self.body = nn.Linear(8, 8), nn.Linear(8, 5), nn.Embedding(9, 8), body

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.body(self, self.first(x), labels, labels != -100)


def batches(least: int = 1) -> list[dict[str, Tensor]]:
    out = []
    for seed in range(2):
        g = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, 5, (4, 6), generator=g)
        labels[torch.rand(4, 6, generator=g) < 0.4] = -100
        labels[3], labels[0, :least] = -100, 2
        out.append({"x": torch.randn(4, 6, 8, dtype=torch.float64, generator=g), "labels": labels})
    assert (out[0]["labels"] != -100).sum() != (out[1]["labels"] != -100).sum()
    return out


def returned(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch)


def assigned(m: Any, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[k] = torch.tanh(m.first(h[k]))
    return (out + h).square().mean()


BODIES: dict[str, Callable[..., Tensor]] = {
    "mean": lambda m, h, y, k: h[k].mean() + h.square()[k].sum() * 0.1,
    "mean over rows": lambda m, h, y, k: h[k].mean(0).square().sum() + h[k].sum(dim=0).exp().mean(),
    "each row": lambda m, h, y, k: h[k].softmax(-1).log().sum(-1).mean() + h[k].square().mean(1).sqrt().sum() + h[k].amax(-1).mean(),
    "layers": lambda m, h, y, k: (F.gelu(m.second(F.layer_norm(h[k], (8,)))) * 0.5 + 1).square().mean(),
    "with other tensors": lambda m, h, y, k: (h[k] * m.second.weight[0] - m.first.bias + 2.0 / (h[k].abs() + 1)).sum(),
    "two choices": lambda m, h, y, k: (h[k] - h.square()[y != -100]).square().mean(),
    "cross entropy": lambda m, h, y, k: F.cross_entropy(m.second(h)[k], y[k]) + F.cross_entropy(m.second(h[k]), y[k], label_smoothing=0.1, reduction="sum"),
    "cross entropy weighted": lambda m, h, y, k: F.cross_entropy(m.second(h)[k], y[k], weight=torch.arange(1.0, 6.0, dtype=h.dtype)),
    "cross entropy of each": lambda m, h, y, k: F.cross_entropy(m.second(h)[k], y[k], reduction="none").square().mean(),
    "nll": lambda m, h, y, k: F.nll_loss(m.second(h)[k].log_softmax(-1), y[k]),
    "flat": lambda m, h, y, k: F.cross_entropy(m.second(h).view(-1, 5)[k.view(-1)], y.view(-1)[k.view(-1)]),
    "bce": lambda m, h, y, k: nn.BCEWithLogitsLoss()(h[..., 0][k], y[k].float().to(h.dtype) / 4) + F.binary_cross_entropy(h[k].sigmoid().mean(-1), (y[k] > 2).to(h.dtype)),
    "distances": lambda m, h, y, k: F.mse_loss(h[..., 0][k], y[k].to(h.dtype)) + F.l1_loss(h[..., 1][k], y[k].double()) + F.smooth_l1_loss(h[..., 2][k], y[k].double(), reduction="sum"),
    "masked_select": lambda m, h, y, k: torch.masked_select(h, k[..., None]).exp().mean() + h[..., 0].masked_select(k).sum(),
    "lookup of what is valid": lambda m, h, y, k: m.table(y[k]).square().mean() + h.mean(),
    "defined for the chosen": lambda m, h, y, k: h[h > 0].log().mean() + (1 / h[h.abs() > 0.1]).sum(),
    "view": lambda m, h, y, k: h[k].view(-1, 2, 4).sum(1).square().mean() + h[..., 0][k].view(-1).exp().sum() + h[k].reshape(-1, 8).mean(),
    "products": lambda m, h, y, k: (h[k] @ m.second.weight.T).square().mean() + torch.mm(h[k], m.second.weight.mT).exp().mean() + F.one_hot(y[k], 5).sum(),
    "assigned": assigned,
    "of a mask with a slice": lambda m, h, y, k: h[k, :].mean() + h[k, ...].square().sum(),
}


@pytest.mark.parametrize("name", BODIES)
def test_what_a_mask_chooses(name: str) -> None:
    check_gradients(Model(BODIES[name]).double(), batches(), returned)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda m, h, y, k: h.sum() / h[k].shape[0], "__get__ of x[mask]"),
        (lambda m, h, y, k: h.sum() / len(h[k]), "__len__ of x[mask]"),
        (lambda m, h, y, k: h.sum() / h[k].numel(), "numel of x[mask]"),
        (lambda m, h, y, k: (h[k] - h[y > 2]).sum(), "sub with rows chosen by another mask"),
        (lambda m, h, y, k: h[k].cumsum(0).sum(), "cumsum along dimension 0"),
        (lambda m, h, y, k: h[k].softmax(0)[0].sum(), "softmax along dimension 0"),
        (lambda m, h, y, k: (h[k] * torch.ones(15, 8, dtype=h.dtype)).sum(), "mul with a tensor of as many dimensions"),
        (lambda m, h, y, k: F.layer_norm(h[..., 0][k], (15,)).sum(), "layer_norm of x[mask]"),
        (lambda m, h, y, k: F.linear(h[..., 0][k], torch.ones(15, 15, dtype=h.dtype)).sum(), "linear of x[mask]"),
        (lambda m, h, y, k: (h[k] @ torch.ones(2, 8, 3, dtype=h.dtype)).sum(), "matmul of x[mask]"),
        (lambda m, h, y, k: (h[k] @ h[k].mT).sum(), "of x[mask]"),
        (lambda m, h, y, k: h[k][0].sum(), "__getitem__ of x[mask]"),
        (lambda m, h, y, k: h[k].view(5, -1).sum(), "view to [5, -1]"),
        (lambda m, h, y, k: F.dropout(h[k]).sum(), "dropout of x[mask]"),
        (lambda m, h, y, k: torch.cat([h[k], h[k]]).sum(), "cat of x[mask]"),
        (lambda m, h, y, k: h[k].std() + h.sum(), "std of x[mask]"),
        (lambda m, h, y, k: h[k], "of x[mask]"),
    ],
)  # fmt: skip
def test_what_needs_the_size_is_refused(body: Any, what: str) -> None:
    with pytest.raises(CaptureError) as error:
        capture(Model(body).double(), batches()[0], loss_fn=returned)
    assert what in str(error.value) and "fix:" in str(error.value)


def test_a_mask_that_was_written_is_another() -> None:
    def body(m: Any, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
        one = y > 1
        first = h[one]
        one.logical_and_(y < 4)
        return (first - h[one]).sum()

    with pytest.raises(CaptureError, match="another mask"):
        capture(Model(body).double(), batches()[0], loss_fn=returned)


@pytest.mark.parametrize("plan", ["zero2x3", "tp2", "zero3+tp2x4"])
def test_under_plans(plan: str) -> None:
    def body(m: Any, h: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return F.cross_entropy(m.second(h[k]), y[k]) + h[k].log_softmax(-1).mean()

    name, _, ranks = plan.partition("x")
    report = verify(Model(body), batches()[0], name, world_size=int(ranks) if ranks else None, loss_fn=returned, backend="simulate", steps=2)
    assert report.ok, str(report)


# packed sequences ----------------------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], sort: bool = False, how: str = "padded") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.sort, self.how = make(), sort, how

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=self.sort)
        out, last = self.rnn(packed)
        ends = last if isinstance(last, tuple) else (last,)
        extra = sum(((n + 1) * e * e.sin()).mean() for n, e in enumerate(ends))
        if self.how == "data":
            return (out.data * packed.data.sum(-1, keepdim=True)).square().mean() + extra
        padded, again = nn.utils.rnn.pad_packed_sequence(out, batch_first=True, padding_value=0.5, total_length=8 if self.how == "longer" else None)
        return (padded * torch.arange(padded.shape[1])[:, None]).square().mean() + extra * again.double().mean()


def ragged(seed: int, sort: bool = False) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([6, 5, 3, 1] if sort else [3, 6, 1, 5]).roll(0 if sort else seed)
    return {"x": torch.randn(4, 7, 3, dtype=torch.float64, generator=g), "lengths": lengths}


RECURRENT: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "gru": (lambda: nn.GRU(3, 4, batch_first=True), False, "padded"),
    "gru sorted longer": (lambda: nn.GRU(3, 4, batch_first=True), True, "longer"),
    "gru both ways": (lambda: nn.GRU(3, 4, 2, bidirectional=True, batch_first=True), False, "padded"),
    "lstm both ways": (lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True), False, "padded"),
    "lstm projected, no bias": (lambda: nn.LSTM(3, 4, proj_size=2, bias=False, batch_first=True), False, "padded"),
    "rnn": (lambda: nn.RNN(3, 4, bidirectional=True, batch_first=True), False, "data"),
    "rnn relu": (lambda: nn.RNN(3, 4, nonlinearity="relu", batch_first=True), False, "data"),
}


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.turn
def test_packed_sequences(name: str) -> None:
    make, sort, how = RECURRENT[name]
    check_gradients(Recurrent(make, sort, how).double(), [ragged(0, sort), ragged(1, sort)], returned)


def test_the_longest_length_is_a_guard() -> None:
    c = capture(Recurrent(lambda: nn.GRU(3, 4, batch_first=True)).double(), ragged(0), loss_fn=returned)
    assert 6 in {g.value for g in c.guards}


def test_dropout_between_packed_layers_is_refused() -> None:
    with pytest.raises(CaptureError, match="dropout between the layers of a gru"):
        capture(Recurrent(lambda: nn.GRU(3, 4, 2, dropout=0.1, batch_first=True)).double(), ragged(0), loss_fn=returned)


# CTC -----------------------------------------------------------------------------------------------------------------


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).log_softmax(-1).transpose(0, 1)


def speech(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(1, 5, (6, 4), generator=g)
    labels[0, :3] = torch.tensor([2, 2, 2])  # repeated: a blank must stand between
    return {"x": torch.randn(6, 9, 6, dtype=torch.float64, generator=g), "labels": labels, "counts": torch.tensor([3, 4, 0, 1, 2, 4]).roll(seed), "times": torch.tensor([9, 8, 9, 9, 6, 9])}


def flat(b: dict[str, Tensor]) -> Tensor:
    return b["labels"].masked_select(torch.arange(4) < b["counts"][:, None])


CTC: dict[str, Callable[[Any, dict[str, Tensor]], Tensor]] = {
    "mean": lambda m, b: F.ctc_loss(m(b["x"]), b["labels"], b["times"], b["counts"]),
    "sum of flat labels": lambda m, b: F.ctc_loss(m(b["x"]), flat(b), b["times"], b["counts"], reduction="sum"),
    "each": lambda m, b: F.ctc_loss(m(b["x"]), b["labels"], b["times"], b["counts"], reduction="none").square().mean(),
    "another blank": lambda m, b: nn.CTCLoss(blank=4)(m(b["x"]), b["labels"] - 1, b["times"], b["counts"]),
    "no way": lambda m, b: F.ctc_loss(m(b["x"]), b["labels"], (b["times"] - 6).clamp(min=1), b["counts"], zero_infinity=True),
    "lists": lambda m, b: F.ctc_loss(m(b["x"]), b["labels"], (9, 9, 9, 9, 9, 9), [4, 3, 2, 1, 4, 4]),
    "one row": lambda m, b: F.ctc_loss(m(b["x"])[:, 1], b["labels"][1], torch.tensor(9), torch.tensor(4)),
    "not normalised": lambda m, b: F.ctc_loss(m(b["x"]) * 0.7, b["labels"], b["times"], b["counts"]),
}


@pytest.mark.parametrize("name", CTC)
def test_ctc_is_the_kernels(name: str) -> None:
    check_gradients(Speech().double(), [speech(0), speech(1)], CTC[name])


def test_ctc_by_brute_force() -> None:
    """Minus the logarithm of the sum over all paths that spell the labels."""
    from deepseed.capture.ctc import ctc_loss

    log_probs = torch.randn(5, 1, 3, dtype=torch.float64).log_softmax(-1)
    for labels in ([1, 2], [1, 1], [2], []):
        total = 0.0
        for path in itertools.product(range(3), repeat=5):
            if [k for k, _ in itertools.groupby(path) if k] == labels:
                total += math.exp(sum(float(log_probs[t, 0, k]) for t, k in enumerate(path)))
        got = ctc_loss(log_probs, torch.tensor([labels], dtype=torch.int64).reshape(1, -1), [5], [len(labels)], reduction="none")
        assert abs(float(got) + math.log(total)) <= 1e-12

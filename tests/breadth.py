"""Small models around one torch operation each: what a model of any kind is likely to compute, forward and backward.

``CASES``: name -> (shape of the input without its batch, what is done to it). The input passes a linear layer first, so that
gradients flow through the operation and ``tp`` has a weight to split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BATCH = 4
Case = tuple[tuple[int, ...], Any]


class Around(nn.Module):
    """linear, the operation, a mean of squares"""

    def __init__(self, shape: tuple[int, ...], inner: Any) -> None:
        super().__init__()
        self.first = nn.Linear(shape[-1], shape[-1])
        self.inner = inner() if isinstance(inner, Made) else None
        self.function = inner

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        out = self.inner(h) if self.inner is not None else self.function(h)
        total = h.new_zeros(())
        for n, y in enumerate(out if isinstance(out, tuple | list) else [out]):
            if y.is_complex():
                y = torch.view_as_real(y)
            if y.is_floating_point():
                total = total + (y * y).mean() + (n + 1) * 0.1 * y.mean()
        return total


class Made:
    """A module that is made when the model is: each model has its own parameters."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def __call__(self) -> nn.Module:
        return self.make()


class Of(nn.Module):
    """A function of the input and one more parameter."""

    def __init__(self, shape: tuple[int, ...], function: Callable[..., Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) * 0.5)
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def of(shape: tuple[int, ...], function: Callable[..., Any]) -> Made:
    return Made(lambda: Of(shape, function))


def model(name: str) -> tuple[nn.Module, Any]:
    shape, inner = CASES[name]
    torch.manual_seed(0)
    made = Around(shape, inner)
    return made, (torch.randn(BATCH, *shape),)


class Several(nn.Module):
    """The sum of several cases, each with an input of its own."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.each = nn.ModuleList(Around(*CASES[name]) for name in names)

    def forward(self, *xs: Tensor) -> Tensor:
        total = self.each[0](xs[0])
        for each, x in zip(self.each[1:], xs[1:], strict=True):
            total = total + each(x)
        return total


def several(names: Sequence[str]) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return Several(names), tuple(torch.randn(BATCH, *CASES[name][0]) for name in names)


def ids(h: Tensor, n: int, *shape: int) -> Tensor:
    """Indices below n that depend on the batch (not on anything that carries a gradient)."""
    k = 1
    for size in shape:
        k *= size
    return ((h.detach().reshape(h.shape[0], -1)[:, :1] * 1000).long().abs() + 7 * torch.arange(k)).reshape(h.shape[0], *shape) % n


def sym(h: Tensor) -> Tensor:
    return h @ h.mT + 4 * torch.eye(h.shape[-2], dtype=h.dtype)


IMAGE, ROWS, VOLUME, PLANE = (4, 8, 8), (6, 8), (2, 4, 4, 4), (8,)

def created(h: Tensor) -> Tensor:
    """Floats of the default dtype and of a named one, multiplied."""
    onehot = F.one_hot(ids(h, 5, 6), 5).float()
    return (onehot @ torch.ones(5, 8)) * h.float() + torch.zeros(8, dtype=torch.float32)


def drawn(h: Tensor) -> list[Tensor]:
    """Distributions validate their arguments by default."""
    one = torch.distributions.Normal(h, F.softplus(h) + 0.1)
    which = torch.distributions.Categorical(logits=h)
    return [one.rsample(), torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0)), which.entropy(), which.log_prob(ids(h, 8, 6))]


CASES: dict[str, Case] = {
    "created floats": (ROWS, created),
    "distributions validated": (ROWS, drawn),
    # convolutions
    "conv1d": ((4, 10), Made(lambda: nn.Conv1d(4, 6, 3, padding=1))),
    "conv2d": (IMAGE, Made(lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1))),
    "conv3d": (VOLUME, Made(lambda: nn.Conv3d(2, 4, 3, padding=1))),
    "conv2d dilated grouped": (IMAGE, Made(lambda: nn.Conv2d(4, 8, 3, dilation=2, padding=2, groups=2))),
    "conv2d depthwise": (IMAGE, Made(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False))),
    "conv1d causal depthwise": ((4, 10), Made(lambda: nn.Conv1d(4, 4, 4, padding=3, groups=4))),
    "conv2d reflect": (IMAGE, Made(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"))),
    "conv2d circular": (IMAGE, Made(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))),
    "conv2d same": (IMAGE, Made(lambda: nn.Conv2d(4, 4, 3, padding="same"))),
    "conv_transpose1d": ((4, 10), Made(lambda: nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1))),
    "conv_transpose2d": (IMAGE, Made(lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1))),
    "conv_transpose3d": (VOLUME, Made(lambda: nn.ConvTranspose3d(2, 4, 2, stride=2))),
    "conv_transpose2d grouped": (IMAGE, Made(lambda: nn.ConvTranspose2d(4, 8, 3, groups=2))),
    "weight norm": ((4, 10), Made(lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)))),
    "weight norm linear": (ROWS, Made(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 4), dim=None))),
    "spectral norm": (ROWS, Made(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)))),
    # pools
    "max_pool1d": ((4, 10), lambda h: F.max_pool1d(h, 2)),
    "max_pool2d": (IMAGE, lambda h: F.max_pool2d(h, 3, 2, 1)),
    "max_pool3d": (VOLUME, lambda h: F.max_pool3d(h, 2)),
    "avg_pool1d": ((4, 10), lambda h: F.avg_pool1d(h, 2)),
    "avg_pool2d": (IMAGE, lambda h: F.avg_pool2d(h, 3, 2, 1, count_include_pad=False)),
    "avg_pool3d": (VOLUME, lambda h: F.avg_pool3d(h, 2)),
    "adaptive_avg_pool1d": ((4, 10), lambda h: F.adaptive_avg_pool1d(h, 3)),
    "adaptive_avg_pool2d": (IMAGE, lambda h: F.adaptive_avg_pool2d(h, (3, 5))),
    "adaptive_avg_pool2d one": (IMAGE, lambda h: F.adaptive_avg_pool2d(h, 1)),
    "adaptive_avg_pool3d": (VOLUME, lambda h: F.adaptive_avg_pool3d(h, 3)),
    "adaptive_max_pool1d": ((4, 10), lambda h: F.adaptive_max_pool1d(h, 3)),
    "adaptive_max_pool2d": (IMAGE, lambda h: F.adaptive_max_pool2d(h, 3)),
    "adaptive_max_pool3d": (VOLUME, lambda h: F.adaptive_max_pool3d(h, 3)),
    "lp_pool2d": (IMAGE, lambda h: F.lp_pool2d(h.abs() + 0.1, 2, 2)),
    "lp_pool1d": ((4, 10), lambda h: F.lp_pool1d(h.abs() + 0.1, 3, 2)),
    "max_unpool2d": (IMAGE, lambda h: F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2)),
    # norms
    "batch_norm1d": (PLANE, Made(lambda: nn.BatchNorm1d(8))),
    "batch_norm2d": (IMAGE, Made(lambda: nn.BatchNorm2d(4))),
    "batch_norm3d": (VOLUME, Made(lambda: nn.BatchNorm3d(2))),
    "batch_norm eval": (IMAGE, Made(lambda: nn.BatchNorm2d(4).eval())),
    "batch_norm no stats": (IMAGE, Made(lambda: nn.BatchNorm2d(4, track_running_stats=False))),
    "group_norm": (IMAGE, Made(lambda: nn.GroupNorm(2, 4))),
    "instance_norm2d": (IMAGE, Made(lambda: nn.InstanceNorm2d(4, affine=True))),
    "instance_norm stats": (IMAGE, Made(lambda: nn.InstanceNorm2d(4, track_running_stats=True))),
    "layer_norm": (ROWS, Made(lambda: nn.LayerNorm(8))),
    "layer_norm two": (ROWS, Made(lambda: nn.LayerNorm((6, 8), bias=False))),
    "rms_norm": (ROWS, Made(lambda: nn.RMSNorm(8))),
    "local_response_norm": (IMAGE, lambda h: F.local_response_norm(h, 3)),
    "normalize": (ROWS, lambda h: F.normalize(h, dim=-1)),
    # shapes and images
    "pixel_shuffle": (IMAGE, lambda h: F.pixel_shuffle(h, 2)),
    "pixel_unshuffle": (IMAGE, lambda h: F.pixel_unshuffle(h, 2)),
    "channel_shuffle": (IMAGE, lambda h: F.channel_shuffle(h, 2)),
    "unfold": (IMAGE, lambda h: F.unfold(h, 3, padding=1, stride=2)),
    "fold": ((8, 9), lambda h: F.fold(h, (6, 6), 2, stride=2)),
    "fold overlapping": ((8, 9), lambda h: F.fold(h, (4, 4), 2)),
    "tensor unfold": ((4, 10), lambda h: h.unfold(-1, 4, 2)),
    "tensor unfold overlapping": ((4, 10), lambda h: h.unfold(-1, 3, 1)),
    "interpolate nearest": (IMAGE, lambda h: F.interpolate(h, scale_factor=2)),
    "interpolate nearest1d": ((4, 10), lambda h: F.interpolate(h, 15)),
    "interpolate nearest3d": (VOLUME, lambda h: F.interpolate(h, scale_factor=2)),
    "interpolate nearest exact": (IMAGE, lambda h: F.interpolate(h, (5, 7), mode="nearest-exact")),
    "interpolate linear": ((4, 10), lambda h: F.interpolate(h, 15, mode="linear")),
    "interpolate bilinear": (IMAGE, lambda h: F.interpolate(h, (5, 11), mode="bilinear")),
    "interpolate bilinear aligned": (IMAGE, lambda h: F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=True)),
    "interpolate bicubic": (IMAGE, lambda h: F.interpolate(h, (5, 11), mode="bicubic")),
    "interpolate trilinear": (VOLUME, lambda h: F.interpolate(h, (5, 6, 7), mode="trilinear")),
    "interpolate antialias": (IMAGE, lambda h: F.interpolate(h, (5, 4), mode="bilinear", antialias=True)),
    "interpolate bicubic antialias": (IMAGE, lambda h: F.interpolate(h, (5, 4), mode="bicubic", antialias=True)),
    "interpolate area": (IMAGE, lambda h: F.interpolate(h, (5, 4), mode="area")),
    "grid_sample": (IMAGE, lambda h: F.grid_sample(h, torch.tanh(h[:, :2].permute(0, 2, 3, 1)), align_corners=False)),
    "grid_sample nearest border": (IMAGE, lambda h: F.grid_sample(h, torch.tanh(h[:, :2].permute(0, 2, 3, 1)), mode="nearest", padding_mode="border", align_corners=True)),
    "grid_sample 3d": (VOLUME, lambda h: F.grid_sample(h, torch.tanh(torch.stack([h[:, 0]] * 3, -1)), align_corners=False)),
    "affine_grid": (ROWS, lambda h: F.affine_grid(h[:, :2, :3], [4, 1, 3, 5], align_corners=False)),
    "reflection_pad1d": ((4, 10), lambda h: F.pad(h, (2, 1), mode="reflect")),
    "reflection_pad2d": (IMAGE, lambda h: F.pad(h, (2, 1, 1, 3), mode="reflect")),
    "reflection_pad3d": (VOLUME, lambda h: F.pad(h, (1, 1, 1, 1, 1, 1), mode="reflect")),
    "replication_pad1d": ((4, 10), lambda h: F.pad(h, (2, 1), mode="replicate")),
    "replication_pad2d": (IMAGE, lambda h: F.pad(h, (2, 1, 1, 3), mode="replicate")),
    "replication_pad3d": (VOLUME, lambda h: F.pad(h, (1, 1, 1, 1, 1, 1), mode="replicate")),
    "circular_pad": (IMAGE, lambda h: F.pad(h, (2, 1, 1, 3), mode="circular")),
    "constant_pad": (IMAGE, lambda h: F.pad(h, (2, -1, 1, 3), value=0.5)),
    "roll": (ROWS, lambda h: torch.roll(h, (1, -2), (1, 2)) + torch.roll(h, 3)),
    "flip rot90": (IMAGE, lambda h: torch.flip(h, [2]) + torch.rot90(h, 1, [2, 3])),
    "diag": (ROWS, lambda h: torch.diag_embed(h) * 2 + torch.diagonal(h, dim1=1, dim2=2).sum()),
    "diagonal offset": ((6, 6), lambda h: torch.diagonal(h, 1, dim1=1, dim2=2)),
    "diagonal scatter": ((6, 6), lambda h: torch.diagonal_scatter(h, h[:, 0] * 2, 0, 1, 2)),
    "trace": ((6, 6), lambda h: torch.stack([torch.trace(a) for a in h[:2]])),
    "tril triu": ((6, 6), lambda h: torch.tril(h) + torch.triu(h, 1) * 2),
    "kron": ((2, 3), lambda h: torch.kron(h[0], h[1])),
    "repeat_interleave": (ROWS, lambda h: torch.repeat_interleave(h, 2, 1) * 2),
    "repeat_interleave tensor": (ROWS, lambda h: torch.repeat_interleave(h, torch.tensor([1, 2, 1, 1, 2, 1]), 1, output_size=8)),
    "tile repeat": (ROWS, lambda h: h.repeat(1, 2, 1) + torch.tile(h, (1, 2, 1))),
    "unbind unflatten": (ROWS, lambda h: h.unflatten(-1, (2, 4)).unbind(2)),
    "chunk split": (ROWS, lambda h: [*h.chunk(3, 1), *h.split([1, 2, 5], -1)]),
    "tensor_split hsplit": (ROWS, lambda h: [*h.tensor_split(3, -1), *torch.hsplit(h, 2)]),
    "as_strided": (ROWS, lambda h: h.contiguous().as_strided((4, 5, 2, 8), (48, 8, 8, 1))),
    "movedim swapaxes": (IMAGE, lambda h: torch.movedim(h, 1, -1) + h.swapaxes(1, 3).permute(0, 3, 2, 1).movedim(1, -1)),
    "meshgrid": (PLANE, lambda h: torch.meshgrid(h[0], h[1], indexing="ij")),
    "cartesian_prod": (PLANE, lambda h: torch.cartesian_prod(h[0], h[1])),
    "block_diag": ((2, 3), lambda h: torch.block_diag(h[0], h[1])),
    "stack hstack": (ROWS, lambda h: torch.stack([h, h * 2], 1).sum(1) + torch.dstack([h[..., :4], h[..., 4:]])),
    "slice writes": (ROWS, lambda h: write_slices(h)),
    # lookups and indices
    "embedding": (PLANE, Made(lambda: Lookup(nn.Embedding(10, 6, padding_idx=0)))),
    "embedding max_norm": (PLANE, Made(lambda: Lookup(nn.Embedding(10, 6)))),
    "embedding_bag sum": (PLANE, Made(lambda: Bag("sum"))),
    "embedding_bag mean": (PLANE, Made(lambda: Bag("mean"))),
    "embedding_bag max": (PLANE, Made(lambda: Bag("max"))),
    "embedding_bag weights": (PLANE, Made(lambda: Bag("sum", weighted=True))),
    "embedding_bag padding": (PLANE, Made(lambda: Bag("mean", padding=0))),
    "embedding_bag offsets": (PLANE, Made(lambda: Bag("mean", offsets=True))),
    "embedding_bag last": (PLANE, Made(lambda: Bag("sum", offsets=True, last=True))),
    "index_add": (ROWS, lambda h: torch.zeros(4, 5, 8, dtype=h.dtype).index_add(1, ids(h, 5, 6)[0], h * 2)),
    "index_add alpha": (ROWS, lambda h: (h * 1).index_add(0, ids(h, 4, 3)[0], h[:3], alpha=2.0)),
    "index_select": (ROWS, lambda h: h.index_select(1, ids(h, 6, 4)[0])),
    "index_copy": (ROWS, lambda h: (h * 2).index_copy(1, torch.tensor([0, 3]), h[:, :2])),
    "index_fill": (ROWS, lambda h: (h * 2).index_fill(1, torch.tensor([0, 3]), 0.5)),
    "index_put": (ROWS, lambda h: (h * 2).index_put((torch.tensor([0, 3]),), h[:2])),
    "index_put accumulate": (ROWS, lambda h: (h * 2).index_put((ids(h, 4, 3)[0],), h[:3], accumulate=True)),
    "index two": (ROWS, lambda h: h[torch.arange(4), ids(h, 6, 1)[:, 0]]),
    "index apart": (ROWS, lambda h: h[torch.arange(4), :, ids(h, 8, 1)[:, 0]]),
    "index three": (IMAGE, lambda h: h[:, torch.tensor([0, 2]), torch.tensor([[1], [3]]), torch.tensor([0, 5])]),
    "index mask where": (ROWS, lambda h: torch.where(h > 0, h, h * 0.1)),
    "mask assignment": (ROWS, lambda h: assign_masked(h)),
    "gather": (ROWS, lambda h: h.gather(2, ids(h, 8, 6, 3))),
    "take_along_dim": (ROWS, lambda h: torch.take_along_dim(h, h.argsort(-1), -1)),
    "take": (ROWS, lambda h: torch.take(h, ids(h, 24, 3))),
    "put": (ROWS, lambda h: (h * 1).put(torch.tensor([3, 7]), h[0, 0, :2])),
    "scatter": (ROWS, lambda h: (h * 1).scatter(2, torch.arange(3).expand(4, 6, 3), h[..., :3] * 2)),
    "scatter value": (ROWS, lambda h: (h * 1).scatter(2, ids(h, 8, 6, 3), 0.5)),
    "scatter_add": (ROWS, lambda h: (h * 1).scatter_add(2, ids(h, 8, 6, 3), h[..., :3])),
    "scatter_reduce sum": (ROWS, lambda h: (h * 1).scatter_reduce(2, ids(h, 8, 6, 3), h[..., :3], "sum")),
    "scatter_reduce mean": (ROWS, lambda h: (h * 1).scatter_reduce(2, ids(h, 8, 6, 3), h[..., :3], "mean", include_self=False)),
    "scatter_reduce amax": (ROWS, lambda h: (h * 1).scatter_reduce(2, ids(h, 8, 6, 3), h[..., :3], "amax")),
    "scatter_reduce prod": (ROWS, lambda h: (h * 1).scatter_reduce(2, ids(h, 8, 6, 3), h[..., :3], "prod")),
    "index_reduce": (ROWS, lambda h: (h * 1).index_reduce(1, ids(h, 6, 3)[0], h[:, :3], "amax")),
    "masked_scatter": (ROWS, lambda h: (h * 1).masked_scatter(h > 0.2, h * 2)),
    "masked_fill": (ROWS, lambda h: h.masked_fill(h > 0.5, -1.0) + h.masked_fill(h < 0, torch.tensor(0.3, dtype=h.dtype))),
    "one_hot": (PLANE, lambda h: F.one_hot(ids(h, 5, 3), 5).to(h.dtype) @ h[:, :5, None].expand(-1, -1, 2)),
    "bucketize": (ROWS, lambda h: h * torch.bucketize(h.detach(), torch.linspace(-1, 1, 5, dtype=h.dtype))),
    "searchsorted": (ROWS, lambda h: h * torch.searchsorted(h.detach().sort(-1)[0], h.detach())),
    "histogram free bincount": (ROWS, lambda h: h * torch.zeros(5, dtype=h.dtype).scatter_add(0, ids(h, 5, 6)[0], torch.ones(6, dtype=h.dtype)).sum()),
    "isin": (ROWS, lambda h: h * torch.isin(ids(h, 9, 6, 1), torch.tensor([1, 3, 5]))),
    # order
    "topk": (ROWS, lambda h: h.topk(3, -1)),
    "topk values": (ROWS, lambda h: h.topk(2, 1, largest=False)[0]),
    "sort": (ROWS, lambda h: h.sort(-1, descending=True)[0] * torch.arange(8, dtype=h.dtype)),
    "sort stable": (ROWS, lambda h: torch.sort(h, dim=1, stable=True)[0] * torch.arange(8, dtype=h.dtype)),
    "argsort": (ROWS, lambda h: h * h.argsort(1)),
    "msort": (ROWS, lambda h: torch.msort(h) * torch.arange(8, dtype=h.dtype)),
    "kthvalue": (ROWS, lambda h: h.kthvalue(2, -1)[0]),
    "median": (ROWS, lambda h: h.median(1)[0] + h.median()),
    "nanmedian": (ROWS, lambda h: h.nanmedian(1)[0]),
    "mode": (ROWS, lambda h: h.mode(1)[0]),
    "quantile": (ROWS, lambda h: torch.quantile(h, 0.3, dim=1)),
    "unique free": (ROWS, lambda h: (h.sort(-1)[0].diff(dim=-1) > 0) * h[..., 1:]),
    # scans
    "cumsum": (ROWS, lambda h: h.cumsum(1)),
    "cumprod": (ROWS, lambda h: h.cumprod(1)),
    "logcumsumexp": (ROWS, lambda h: h.logcumsumexp(1)),
    "cummax cummin": (ROWS, lambda h: (h.cummax(1)[0], h.cummin(1)[0])),
    "trapezoid": (ROWS, lambda h: torch.trapezoid(h, dim=1) + torch.cumulative_trapezoid(h, dim=1).sum(1)),
    "diff": (ROWS, lambda h: torch.diff(h, dim=1, prepend=h[:, :1])),
    # statistics
    "var std": (ROWS, lambda h: h.var(1) + h.std(1, correction=0) + h.var()),
    "var_mean": (ROWS, lambda h: torch.var_mean(h, (1, 2))),
    "std_mean": (ROWS, lambda h: torch.std_mean(h, -1, keepdim=True)),
    "norms": (ROWS, lambda h: [h.norm(dim=-1), h.norm(), h.norm(1, -1), torch.linalg.vector_norm(h, 3, -1), torch.linalg.vector_norm(h, float("inf"), 1), h.norm("fro", (1, 2))]),
    "norm min": (ROWS, lambda h: torch.linalg.vector_norm(h + 3, float("-inf"), 1)),
    "matrix norm": ((6, 6), lambda h: torch.linalg.matrix_norm(h) + torch.linalg.matrix_norm(h, 1)),
    "nuclear norm": ((6, 6), lambda h: torch.linalg.matrix_norm(h, "nuc")),
    "cdist": (ROWS, lambda h: torch.cdist(h, h[:, :3] * 2 + 1)),
    "cdist 1": (ROWS, lambda h: torch.cdist(h, h[:, :3] * 2 + 1, p=1.0)),
    "cdist large": ((30, 8), lambda h: torch.cdist(h, h * 2 + 1)),
    "pdist": (ROWS, lambda h: F.pdist(h[0])),
    "pairwise_distance": (ROWS, lambda h: F.pairwise_distance(h, h * 2)),
    "cosine_similarity": (ROWS, lambda h: F.cosine_similarity(h, h.roll(1, 1), dim=-1)),
    "logsumexp": (ROWS, lambda h: h.logsumexp(-1) + torch.logsumexp(h, (1, 2))[:, None]),
    "logaddexp": (ROWS, lambda h: torch.logaddexp(h, h * 2)),
    "prod": (ROWS, lambda h: h.prod(-1) + h[0].prod()),
    "amin amax": (ROWS, lambda h: h.amin(1) + h.amax(1) + h.amax((1, 2))[:, None]),
    "aminmax": (ROWS, lambda h: torch.aminmax(h, dim=1)),
    "min max": (ROWS, lambda h: [h.min(1)[0], h.max(-1)[0], h.min(), h.max(), torch.maximum(h, h * 2), torch.minimum(h, h.flip(1))]),
    "argmax": (ROWS, lambda h: h * (h.argmax(-1) + h.argmin(1).sum())[..., None]),
    "any all": (ROWS, lambda h: h * ((h > 2).any(-1) | (h > -9).all(-1))[..., None] + (h > 3).any() * h + (h > -9).all() * h),
    "count_nonzero": (ROWS, lambda h: h * torch.count_nonzero(h > 0, dim=1)[:, None]),
    "nansum nanmean": (ROWS, lambda h: h.nansum(1) + h.nanmean(1)),
    "mean": (ROWS, lambda h: h.mean() + h.mean((0, 2))[None, :, None] * h),
    "corrcoef cov": (ROWS, lambda h: torch.cov(h[0]) + torch.corrcoef(h[1])),
    "softmax": (ROWS, lambda h: h.softmax(-1) + h.softmax(1) + F.log_softmax(h, 0)),
    "softmin": (ROWS, lambda h: F.softmin(h, -1)),
    "masked softmax": (ROWS, lambda h: torch.softmax(h.masked_fill(h > 1.5, float("-inf")), -1)),
    # products
    "einsum": (ROWS, of((8, 3, 4), lambda h, w: torch.einsum("bsd,dhk,bte->bhste", h, w, h[..., :2]))),
    "tensordot": (ROWS, of((8, 3, 4), lambda h, w: torch.tensordot(h, w, 1))),
    "outer": (PLANE, lambda h: torch.outer(h[0], h[1])),
    "matmul": (ROWS, of((8, 5), lambda h, w: h @ w)),
    "matmul 4d": ((2, 6, 8), lambda h: h @ h.mT),
    "matmul vector": (ROWS, of((8,), lambda h, w: h @ w)),
    "vector matmul": (PLANE, of((8, 5), lambda h, w: h[0] @ w)),
    "bmm baddbmm": (ROWS, lambda h: torch.baddbmm(h @ h.mT, h, h.mT, beta=0.5, alpha=2)),
    "addbmm": (ROWS, lambda h: torch.addbmm(h[0, :, :6], h, h.mT[..., :6])),
    "addmm addmv addr": ((6, 6), lambda h: torch.addmm(h[0], h[1], h[2], beta=0.5) + torch.addmv(h[0, 0], h[1], h[2, 0]) + torch.addr(h[0], h[1, 0], h[2, 0], alpha=2)),
    "dot vdot": (PLANE, lambda h: torch.dot(h[0], h[1]) + torch.vdot(h[1], h[2]) + torch.inner(h[0], h[3])),
    "chain_matmul": ((6, 6), lambda h: torch.linalg.multi_dot([h[0], h[1], h[2]])),
    "bilinear": (ROWS, Made(lambda: Twice(nn.Bilinear(8, 8, 5)))),
    "cross": ((6, 3), lambda h: torch.linalg.cross(h, h.roll(1, 1))),
    "linalg inv det": ((6, 6), lambda h: (torch.linalg.inv(sym(h)), torch.linalg.det(sym(h)), torch.linalg.slogdet(sym(h))[1], torch.logdet(sym(h)))),
    "linalg solve": ((6, 6), lambda h: torch.linalg.solve(sym(h), h)),
    "linalg cholesky": ((6, 6), lambda h: torch.linalg.cholesky(sym(h))),
    "cholesky solve": ((6, 6), lambda h: torch.cholesky_solve(h, torch.linalg.cholesky(sym(h))) + torch.cholesky_inverse(torch.linalg.cholesky(sym(h)))),
    "linalg qr": ((6, 6), lambda h: torch.linalg.qr(sym(h))),
    "linalg svd": ((6, 6), lambda h: torch.linalg.svdvals(h)),
    "linalg svd vectors": ((6, 4), lambda h: (lambda u, s, v: (u * s[:, None]) @ v)(*torch.linalg.svd(h, full_matrices=False))),
    "linalg eigh": ((6, 6), lambda h: torch.linalg.eigvalsh(sym(h)) + (lambda w, v: (v * w[:, None]) @ v.mT)(*torch.linalg.eigh(sym(h))).sum(-1)),
    "solve_triangular": ((6, 6), lambda h: torch.linalg.solve_triangular(torch.tril(h) + 3 * torch.eye(6, dtype=h.dtype), h, upper=False)),
    "triangular_solve": ((6, 6), lambda h: torch.triangular_solve(h, torch.triu(h) + 3 * torch.eye(6, dtype=h.dtype))[0]),
    "matrix_exp": ((6, 6), lambda h: torch.linalg.matrix_exp(h)),
    "matrix_power": ((6, 6), lambda h: torch.linalg.matrix_power(h, 3)),
    "pinv": ((6, 4), lambda h: torch.linalg.pinv(h)),
    "lu": ((6, 6), lambda h: torch.linalg.lu_factor(sym(h))[0]),
    # complex and Fourier
    "view_as_complex": (ROWS, lambda h: torch.view_as_complex(h.reshape(4, 6, 4, 2)) * 2j),
    "rope complex": (ROWS, lambda h: torch.view_as_real(torch.view_as_complex(h.reshape(4, 6, 4, 2)) * torch.polar(torch.ones(6, 4, dtype=h.dtype), torch.outer(torch.arange(6, dtype=h.dtype), torch.ones(4, dtype=h.dtype)))).flatten(2)),
    "complex parts": (ROWS, lambda h: (lambda z: [z.real, z.imag, z.abs(), z.angle(), z.conj() * z, z.conj().resolve_conj()])(torch.complex(h, h.roll(1, 1) + 3))),
    "polar": (ROWS, lambda h: torch.polar(h.abs() + 1, h)),
    "complex matmul": ((6, 6), lambda h: torch.complex(h, h * 2) @ torch.complex(h, h.mT)),
    "complex parameter": (ROWS, of((8, 2), lambda h, w: h * torch.exp(torch.view_as_complex(w)).real)),
    "rfft irfft": (ROWS, lambda h: torch.fft.irfft(torch.fft.rfft(h, dim=1) * (1 + 0.5j), n=6, dim=1)),
    "fft": (ROWS, lambda h: torch.fft.fft(h, dim=1).real + torch.fft.ifft(h, dim=2).abs()),
    "fft2": (ROWS, lambda h: torch.fft.fft2(h).real),
    "fnet": (ROWS, lambda h: torch.fft.fft(torch.fft.fft(h, dim=-1), dim=-2).real),
    "rfft2": (ROWS, lambda h: torch.fft.irfft2(torch.fft.rfft2(h, norm="ortho") * 2, s=(6, 8), norm="ortho")),
    "rfft long conv": (ROWS, of((12,), lambda h, w: torch.fft.irfft(torch.fft.rfft(h, n=12, dim=1) * torch.fft.rfft(w)[:, None], n=12, dim=1)[:, :6])),
    "hfft": (ROWS, lambda h: torch.fft.hfft(torch.complex(h, h), n=8)),
    "fftshift": (ROWS, lambda h: torch.fft.fftshift(h, dim=1) + torch.fft.fftfreq(8, dtype=h.dtype)),
    "stft": ((32,), lambda h: torch.stft(h, 8, 4, window=torch.hann_window(8, dtype=h.dtype), return_complex=True).abs()),
    "istft": ((32,), lambda h: torch.istft(torch.stft(h, 8, 4, window=torch.hann_window(8, dtype=h.dtype), return_complex=True), 8, 4, window=torch.hann_window(8, dtype=h.dtype))),
    # creations
    "floor_divide remainder": (ROWS, lambda h: h * (torch.arange(8) // 3 % 2) + h % 0.7 + torch.floor_divide(h, 0.3).detach() + torch.fmod(h, 0.6)),
    "eye linspace": ((6, 6), lambda h: h * torch.eye(6, dtype=h.dtype) + torch.linspace(0, 1, 6, dtype=h.dtype) + torch.logspace(0, 1, 6, dtype=h.dtype)),
    "eye rectangle": (ROWS, lambda h: h * torch.eye(6, 8, dtype=h.dtype)),
    "tril_indices": ((6, 6), lambda h: h[:, torch.tril_indices(6, 6)[0], torch.tril_indices(6, 6)[1]] + h[:, torch.triu_indices(6, 6)[0], torch.triu_indices(6, 6)[1]]),
    "windows": (ROWS, lambda h: h * torch.hann_window(8, dtype=h.dtype) + torch.hamming_window(8, dtype=h.dtype) + torch.blackman_window(8, dtype=h.dtype) + torch.kaiser_window(8, dtype=h.dtype) + torch.bartlett_window(8, dtype=h.dtype)),
    "arange float": (ROWS, lambda h: h * torch.arange(0, 4, 0.5, dtype=h.dtype)),
    # pointwise
    "activations": (ROWS, lambda h: F.elu(h) + F.celu(h) + F.selu(h) + F.gelu(h) + F.gelu(h, approximate="tanh") + F.silu(h) + F.mish(h) + F.hardtanh(h) + F.relu6(h) + F.hardswish(h) + F.hardsigmoid(h) + F.softplus(h) + F.softshrink(h) + F.hardshrink(h) + F.tanhshrink(h) + F.softsign(h) + F.logsigmoid(h) + F.leaky_relu(h) + F.threshold(h, 0.1, 0.2)),
    "glu": (ROWS, lambda h: F.glu(h, -1) + F.glu(h, 1).sum(1, keepdim=True)[..., :4]),
    "prelu": (IMAGE, Made(lambda: nn.PReLU(4))),
    "prelu one": (IMAGE, Made(lambda: nn.PReLU())),
    "rrelu": (ROWS, Made(lambda: nn.RReLU())),
    "rrelu eval": (ROWS, Made(lambda: nn.RReLU().eval())),
    "special": (ROWS, lambda h: torch.erf(h) + torch.lgamma(h.abs() + 1) + torch.special.entr(h.abs() + 0.1) + torch.xlogy(h, h.abs() + 1) + torch.special.xlog1py(h, h.abs() + 1) + torch.i0(h) + torch.special.i0e(h) + torch.digamma(h.abs() + 1) + torch.erfinv(h.tanh() * 0.9) + torch.special.log_ndtr(h) + torch.special.ndtr(h) + torch.special.erfcx(h) + torch.sinc(h)),
    "special functions": (ROWS, lambda h: torch.special.i1(h) + torch.special.bessel_j0(h.detach()) + torch.special.ndtri(h.sigmoid()) + torch.polygamma(1, h.abs() + 1) + torch.special.zeta(h.detach().abs() + 2, 1.0) + torch.special.expit(h) + torch.special.softmax(h, -1)),
    "math": (ROWS, lambda h: torch.atan2(h, h + 3) + torch.hypot(h, h + 3) + torch.copysign(h, h.flip(1)) + torch.frac(h) + torch.trunc(h).detach() + torch.nan_to_num(h) + torch.clamp(h, -1, 1) + torch.lerp(h, h * 2, 0.3) + torch.addcmul(h, h, h, value=0.5) + torch.addcdiv(h, h, h.abs() + 1) + torch.square(h) + torch.exp2(h) + torch.float_power(h.abs() + 1, 0.5) + torch.heaviside(h, h * 0).detach()),
    "angles": (ROWS, lambda h: torch.deg2rad(h) + torch.rad2deg(h) + torch.sinh(h) + torch.cosh(h) + torch.asinh(h) + torch.atanh(h.tanh() * 0.9) + torch.acosh(h.abs() + 1.5) + torch.asin(h.tanh() * 0.9) + torch.acos(h.tanh() * 0.9) + torch.atan(h) + torch.tan(h.tanh()) + torch.logit(h.sigmoid()) + torch.log2(h.abs() + 1) + torch.log10(h.abs() + 1)),
    "renorm": (ROWS, lambda h: torch.renorm(h, 2, 1, 0.5)),
    "clamp tensors": (ROWS, lambda h: torch.clamp(h, h.detach() * 0 - 0.5, h.detach() * 0 + 0.5)),
    "where scalars": (ROWS, lambda h: h * torch.where(h > 0, 1.0, 0.5) + torch.where(h > 0, h, 0.0)),
    "isclose": (ROWS, lambda h: h * torch.isclose(h, h.round()) + h * torch.isfinite(h) + h.masked_fill(torch.isnan(h), 0)),
    "bits": (ROWS, lambda h: h * (ids(h, 9, 6, 1) & 3) + h * (ids(h, 9, 6, 1) >> 1) + h * (ids(h, 9, 6, 1) ^ 5)),
    # losses
    "mse l1 smooth huber": (ROWS, lambda h: F.mse_loss(h, h.roll(1, 1)) + F.l1_loss(h, h.roll(1, 1)) + F.smooth_l1_loss(h, h.roll(1, 1), beta=0.5) + F.huber_loss(h, h.roll(1, 1), delta=0.7)),
    "losses none": (ROWS, lambda h: F.mse_loss(h, h.roll(1, 1), reduction="none") + F.smooth_l1_loss(h, h.roll(1, 1), reduction="none")),
    "bce": (ROWS, lambda h: F.binary_cross_entropy(h.sigmoid(), (h.detach() > 0).to(h.dtype), weight=h.detach().abs())),
    "bce_with_logits": (ROWS, lambda h: F.binary_cross_entropy_with_logits(h, (h.detach() > 0).to(h.dtype), pos_weight=torch.arange(1, 9, dtype=h.dtype))),
    "kl_div": (ROWS, lambda h: F.kl_div(h.log_softmax(-1), h.detach().softmax(1), reduction="batchmean") + F.kl_div(h.log_softmax(-1), h.detach().log_softmax(1), log_target=True)),
    "cross_entropy": (PLANE, lambda h: F.cross_entropy(h, ids(h, 8, 1)[:, 0])),
    "cross_entropy weights": (PLANE, lambda h: F.cross_entropy(h, ids(h, 8, 1)[:, 0], weight=torch.arange(1, 9, dtype=h.dtype), ignore_index=3, label_smoothing=0.1)),
    "cross_entropy probabilities": (PLANE, lambda h: F.cross_entropy(h, h.detach().softmax(-1), label_smoothing=0.2)),
    "cross_entropy 2d": (IMAGE, lambda h: F.cross_entropy(h, ids(h, 4, 8, 8), ignore_index=1)),
    "cross_entropy sequence": (ROWS, lambda h: F.cross_entropy(h.transpose(1, 2), ids(h, 8, 6))),
    "nll none": (PLANE, lambda h: F.nll_loss(h.log_softmax(-1), ids(h, 8, 1)[:, 0], reduction="none")),
    "ctc": ((4, 12, 5), lambda h: F.ctc_loss(h[0].transpose(0, 1).log_softmax(-1), torch.tensor([[1, 2], [2, 3], [1, 1], [4, 2]]), (12, 12, 12, 12), (2, 2, 2, 2))),
    "cosine_embedding": (ROWS, lambda h: F.cosine_embedding_loss(h[:, 0], h[:, 1], torch.tensor([1, -1, 1, -1]), margin=0.2)),
    "margin_ranking triplet": (ROWS, lambda h: F.margin_ranking_loss(h[:, 0], h[:, 1], torch.ones(4, 8, dtype=h.dtype), margin=0.1) + F.triplet_margin_loss(h[:, 0], h[:, 1], h[:, 2])),
    "multi margin": (PLANE, lambda h: F.multi_margin_loss(h, ids(h, 8, 1)[:, 0])),
    "multilabel": (PLANE, lambda h: F.multilabel_margin_loss(h, torch.tensor([[3, 0, -1, 1, 1, 1, 1, 1]] * 4)) + F.multilabel_soft_margin_loss(h, (h.detach() > 0).to(h.dtype)) + F.soft_margin_loss(h, (h.detach() > 0).to(h.dtype) * 2 - 1) + F.hinge_embedding_loss(h, (h.detach() > 0).to(h.dtype) * 2 - 1)),
    "focal dice": (ROWS, lambda h: ((1 - h.sigmoid()) ** 2 * F.logsigmoid(h)).mean() + 1 - 2 * (h.sigmoid() * (h.detach() > 0)).sum() / (h.sigmoid().sum() + 1)),
    "contrastive": (PLANE, lambda h: F.cross_entropy(F.normalize(h, dim=-1) @ F.normalize(h, dim=-1).T / 0.07, torch.arange(4))),
    # layers
    "rnn": (ROWS, Made(lambda: First(nn.RNN(8, 5, batch_first=True)))),
    "lstm": (ROWS, Made(lambda: First(nn.LSTM(8, 5, num_layers=2, batch_first=True, bidirectional=True)))),
    "gru": (ROWS, Made(lambda: First(nn.GRU(8, 5, batch_first=True)))),
    "lstm cell": (PLANE, Made(lambda: nn.LSTMCell(8, 6))),
    "gru cell": (PLANE, Made(lambda: nn.GRUCell(8, 6))),
    "rnn cell": (PLANE, Made(lambda: nn.RNNCell(8, 6))),
    "attention": (ROWS, Made(lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True)))),
    "attention weights": (ROWS, Made(lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.1), need_weights=True))),
    "attention masked": (ROWS, Made(lambda: Attention(nn.MultiheadAttention(8, 2, batch_first=True), causal=True))),
    "encoder layer": (ROWS, Made(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))),
    "encoder layer pre": (ROWS, Made(lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True, norm_first=True))),
    "decoder layer": (ROWS, Made(lambda: Twice(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)))),
    "transformer": (ROWS, Made(lambda: Twice(nn.Transformer(8, 2, 1, 1, 16, batch_first=True)))),
    "dropouts": (IMAGE, Made(lambda: nn.Sequential(nn.Dropout(0.2), nn.Dropout2d(0.2), nn.AlphaDropout(0.2), nn.FeatureAlphaDropout(0.2)))),
    "dropout1d": ((4, 10), Made(lambda: nn.Dropout1d(0.3))),
    "gumbel softmax": (ROWS, lambda h: F.gumbel_softmax(h, hard=True) * h),
    "noise": (ROWS, lambda h: h + torch.randn_like(h) * 0.1 + torch.rand(4, 1, 1, dtype=h.dtype) + torch.normal(0.0, 1.0, (8,), dtype=h.dtype)),
    "gaussian_nll": (ROWS, lambda h: 0.5 * (torch.log(h.abs() + 1) + (h - h.roll(1, 1).detach()) ** 2 / (h.abs() + 1))),
    "normal of tensors": (ROWS, lambda h: torch.normal(h.detach(), h.detach().abs()) * h),
    "exponential cauchy": (ROWS, lambda h: h * torch.empty_like(h).exponential_() + torch.empty_like(h).log_normal_() * h + torch.empty_like(h).cauchy_().tanh() * h + torch.empty_like(h).geometric_(0.3) * h),
    "distributions": (ROWS, lambda h: torch.distributions.Normal(h, h.abs() + 0.1, validate_args=False).rsample() + torch.distributions.Laplace(h, h.abs() + 0.1, validate_args=False).rsample()),
    "kl of normals": (ROWS, lambda h: torch.distributions.kl_divergence(torch.distributions.Normal(h, h.abs() + 0.1, validate_args=False), torch.distributions.Normal(torch.zeros_like(h), torch.ones_like(h), validate_args=False))),
    "randperm": (ROWS, lambda h: h[:, torch.randperm(6)] * torch.arange(6, dtype=h.dtype)[:, None]),
    "multinomial": (PLANE, lambda h: h.gather(1, torch.multinomial(h.detach().softmax(-1), 2))),
    "multinomial with replacement": (PLANE, lambda h: h.gather(1, torch.multinomial(h.detach().softmax(-1), 3, replacement=True))),
    "fractional pool": (IMAGE, lambda h: F.fractional_max_pool2d(h, 2, output_size=3)),
    "drop path": (ROWS, lambda h: h * h.new_empty(4, 1, 1).bernoulli_(0.7).div_(0.7)),
    "checkpoint": (ROWS, Made(lambda: Checkpointed())),
    "selective scan": ((4, 10), lambda h: scan(h)),
    "mixture": (ROWS, Made(lambda: Mixture())),
    "straight through": (ROWS, Made(lambda: Codebook())),
    "ema write": (ROWS, Made(lambda: Averaged())),
    "autograd function": (ROWS, lambda h: Double.apply(h)),
    "foreach": (ROWS, lambda h: torch._foreach_add(torch._foreach_mul([h, h * 2], 0.5), 1.0)),
    "out variants": (ROWS, lambda h: h * torch.mul(h.detach(), 2, out=torch.empty(4, 6, 8, dtype=h.dtype))),
    "in place": (ROWS, lambda h: (h * 2).add_(1).mul_(3).relu_()),
    "functional grad": (ROWS, lambda h: torch.func.vmap(lambda a: a.sin().sum(0))(h)),
    "jvp free grad": (ROWS, lambda h: torch.autograd.grad((h.sin() * h).sum(), h, create_graph=True)[0]),
}


REFUSED: dict[str, Case] = {  # what depends on data, or is drawn in a way that has no counter-based form
    "lstsq": ((6, 4), lambda h: torch.linalg.lstsq(h, h[..., :2] * 2 + 1)[0]),
    "poisson gaussian": (ROWS, lambda h: F.poisson_nll_loss(h, h.detach().abs()) + F.gaussian_nll_loss(h, h.roll(1, 1).detach(), h.abs() + 1)),
    "poisson": (ROWS, lambda h: h * torch.poisson(h.detach().abs())),
}


def write_slices(h: Tensor) -> Tensor:
    out = torch.zeros(4, 6, 10, dtype=h.dtype)
    out[:, 1:4, 2:] = h[:, :3]
    out[:, 0] += 1
    out[..., ::2] *= 2
    return out


def assign_masked(h: Tensor) -> Tensor:
    out = h * 2
    out[out > 1] = 0.5
    return out


def scan(h: Tensor) -> Tensor:
    state = torch.zeros(4, 4, dtype=h.dtype)
    out = []
    for t in range(h.shape[-1]):
        state = state * torch.sigmoid(h[..., t]) + h[..., t]
        out.append(state)
    return torch.stack(out, -1)


class First(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x)[0]


class Twice(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x * 2)


class Attention(nn.Module):
    def __init__(self, inner: nn.Module, need_weights: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.inner, self.need_weights, self.causal = inner, need_weights, causal

    def forward(self, x: Tensor) -> Any:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        return tuple(y for y in self.inner(x, x, x, need_weights=self.need_weights, attn_mask=mask) if y is not None)


class Lookup(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        return self.inner(ids(x, 10, 5)) + x.sum()


class Bag(nn.Module):
    def __init__(self, mode: str, weighted: bool = False, padding: int | None = None, offsets: bool = False, last: bool = False) -> None:
        super().__init__()
        self.inner = nn.EmbeddingBag(10, 6, mode=mode, padding_idx=padding, include_last_offset=last)
        self.weighted, self.offsets, self.last = weighted, offsets, last

    def forward(self, x: Tensor) -> Any:
        given = ids(x, 10, 5)
        weights = x[:, :5].exp() if self.weighted else None
        if self.offsets:
            at = torch.tensor([0, 3, 3, 12, *([20] if self.last else [])])
            return self.inner(given.flatten(), at) + x.sum()
        return self.inner(given, per_sample_weights=weights) + x.sum()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.1), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.inner, x, use_reentrant=False)


class Mixture(nn.Module):
    """Two of four experts a token, every expert computed"""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4)
        self.up = nn.Parameter(torch.randn(4, 8, 12) * 0.3)
        self.down = nn.Parameter(torch.randn(4, 12, 8) * 0.3)

    def forward(self, x: Tensor) -> Any:
        flat = x.reshape(-1, 8)
        weights, chosen = self.router(flat).softmax(-1).topk(2, -1)
        mask = torch.zeros(flat.shape[0], 4, dtype=x.dtype).scatter(1, chosen, weights)
        every = torch.einsum("td,edf->etf", flat, self.up).relu()
        return torch.einsum("etf,efd,te->td", every, self.down, mask)


class Codebook(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(5, 8))

    def forward(self, x: Tensor) -> Any:
        nearest = torch.cdist(x.reshape(-1, 8), self.codes).argmin(-1)
        found = F.embedding(nearest, self.codes).reshape(x.shape)
        return x + (found - x).detach(), (found - x.detach()).square().mean()


class Averaged(nn.Module):
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Any:
        self.mean.lerp_(x.detach().mean((0, 1)), 0.1)
        return x - self.mean


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return g * 2 + x * 0.1

"""Does what models of any kind compute capture, split and come out equal? Models around one operation each, and several together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from breadth import CASES, REFUSED, Around, model, several
from torch import Tensor, nn
from torch.nn import functional as F

import deepseed
from deepseed.capture import CaptureError, capture
from deepseed.ops import evaluate
from deepseed.passes.canonicalize import canonicalize
from deepseed.rules import signature
from deepseed.verify import verify

torch.set_num_threads(1)
UNRULED = {"aten.multilabel_margin_loss_forward", "aten.multilabel_margin_loss_backward"}  # replicated
ODD = ("fold", "fold overlapping", "cross", "kron", "block_diag")  # a weight that two ranks cannot split: tp2 is refused

FAMILIES = {
    "images": ("conv2d depthwise", "batch_norm2d", "max_pool2d", "adaptive_avg_pool2d", "interpolate bilinear", "reflection_pad2d", "pixel_shuffle", "unfold"),
    "signals": ("conv1d", "weight norm", "conv_transpose1d", "rfft irfft", "stft", "tensor unfold overlapping", "interpolate linear"),
    "lookups": ("embedding_bag mean", "index_add", "index apart", "mask assignment", "masked_scatter", "scatter_reduce amax", "searchsorted", "topk"),
    "matrices": ("linalg solve", "linalg cholesky", "cdist", "bilinear", "einsum", "rope complex", "diag", "matrix_exp"),
    "losses": ("bce_with_logits", "cross_entropy weights", "multi margin", "kl_div", "cosine_embedding", "norms", "any all", "prod"),
}


def unruled(m: nn.Module, batch: Any) -> set[str]:
    p = canonicalize(capture(m, batch).program)
    return {op.target for op in p.ops if signature(op, [p.types[r.name] for r in op.refs]) is None}


QUICK = {("images", "zero1"), ("images", "tp2"), ("signals", "tp2"), ("lookups", "zero1"), ("matrices", "zero1"), ("losses", "tp2")}


@pytest.mark.parametrize("family", FAMILIES)
def test_several_have_rules(family: str) -> None:
    assert unruled(*several(FAMILIES[family])) == set()


@pytest.mark.parametrize(
    ("family", "plan"), [pytest.param(f, plan, marks=() if (f, plan) in QUICK else pytest.mark.wide) for f in FAMILIES for plan in ("zero1", "tp2")]
)
def test_several_together(family: str, plan: str) -> None:
    report = verify(*several(FAMILIES[family]), plan, world_size=2, steps=1)
    assert report.ok, report


@pytest.mark.wide
@pytest.mark.parametrize("plan", ["zero1", "tp2"])
@pytest.mark.parametrize("name", CASES)
def test_each(name: str, plan: str) -> None:
    if plan == "zero1":
        assert unruled(*model(name)) <= UNRULED
    if name in ODD and plan == "tp2":
        pytest.skip("no weight of this model divides by 2")
    report = verify(*model(name), plan, world_size=2, steps=1)
    assert report.ok, report


@pytest.mark.parametrize("name", REFUSED)
def test_what_depends_on_data_is_refused_with_its_line(name: str) -> None:
    shape, inner = REFUSED[name]
    with pytest.raises(CaptureError, match=r"breadth\.py:\d+\n.*fix: "):
        capture(Around(shape, inner), (torch.randn(4, *shape),))


# ops that no table knows ----------------------------------------------------------------------------------------------


@torch.library.custom_op("breadth::softcap", mutates_args=())
def softcap(x: Tensor, limit: float) -> Tensor:
    return limit * torch.tanh(x / limit)


@torch.library.custom_op("breadth::softcap_backward", mutates_args=())
def softcap_backward(grad: Tensor, y: Tensor, limit: float) -> Tensor:
    return grad * (1 - (y / limit) ** 2)


softcap.register_fake(lambda x, limit: torch.empty_like(x))
softcap_backward.register_fake(lambda grad, y, limit: torch.empty_like(grad))


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.limit = inputs[1]
    ctx.save_for_backward(output)


softcap.register_autograd(lambda ctx, grad: (softcap_backward(grad, ctx.saved_tensors[0], ctx.limit), None), setup_context=_setup)


class Capped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(softcap(self.up(x), 2.0)).square().mean()


@pytest.mark.parametrize("plan", ["zero1", "tp2"])
def test_a_user_s_own_op_is_replicated_equal_and_named(plan: str) -> None:
    torch.manual_seed(0)
    m, batch = Capped(), (torch.randn(8, 16),)
    report = verify(m, batch, plan, world_size=2, steps=2)
    assert report.ok, report
    step = deepseed.compile(m, plan, optimizer=torch.optim.AdamW(m.parameters()), world_size=2, example_batch=batch)
    found = {u.target: u.bytes for u in step.explain().unruled_ops}
    assert set(found) == {"breadth.softcap", "breadth.softcap_backward"}
    if plan == "tp2":
        assert found["breadth.softcap"] > 0  # the hidden layer is gathered for it
    assert "no rule, so replicated: 2" in str(step.explain())


class Wrapped(nn.Module):
    """A submodule and a method under torch.compile"""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(nn.Sequential(nn.Linear(16, 32), nn.Dropout(0.1), nn.Linear(32, 16)))
        self.out = nn.Linear(16, 16)

    @torch.compile
    def body(self, x: Tensor) -> Tensor:
        return torch.relu(x) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.inner(x))).square().mean()


@pytest.mark.parametrize("plan", ["zero1", "tp2"])
def test_what_torch_compile_wraps_is_captured(plan: str) -> None:
    torch.manual_seed(0)
    report = verify(Wrapped(), (torch.randn(8, 16),), plan, world_size=2, steps=2)
    assert report.ok, report


def test_an_encoder_layer_in_evaluation_is_taken_apart() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    p = capture(layer, (torch.randn(4, 6, 8),), want="forward").program
    assert not [op.target for op in p.ops if "encoder_layer" in op.target]
    assert torch.backends.mha.get_fastpath_enabled()


FIRST = {
    "batch_norm1d": lambda: nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)),
    "group_norm": lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(8, 2)),
    "grid_sample": lambda: Sampled(),
}  # fmt: skip


class Sampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.grid = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.grid_sample(x.reshape(-1, 1, 2, 4), torch.tanh(self.grid(x)).reshape(-1, 2, 2, 2), align_corners=False)


@pytest.mark.parametrize("name", FIRST)
def test_what_comes_first_has_no_gradient_of_its_input(name: str) -> None:
    torch.manual_seed(0)
    report = verify(FIRST[name](), {"x": torch.randn(6, 8)}, "zero3", world_size=2, loss_fn=lambda m, b: m(b["x"]).square().mean(), steps=2)
    assert report.ok, report


class Shared(nn.Module):
    """Both biases have the very same gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.binary_cross_entropy((self.one(x) + self.other(x)).sigmoid(), x[:, :1].sigmoid(), reduction="sum")


@pytest.mark.parametrize("plan", ["zero0", "zero1"])
def test_parameters_that_share_a_gradient(plan: str) -> None:
    torch.manual_seed(0)
    report = verify(Shared(), {"x": torch.randn(6, 8)}, plan, world_size=2, steps=2)
    assert report.ok, report


CREATED = {
    "linspace logspace": lambda h: h * torch.linspace(0.5, 1.5, 6) + torch.linspace(torch.tensor(0.5), torch.tensor(1.5), 6) + torch.logspace(0.1, 0.7, 6),
    "windows": lambda h: h * torch.hann_window(6) + torch.hamming_window(6) * torch.kaiser_window(6) + torch.blackman_window(6) - torch.bartlett_window(6),
    "frequencies": lambda h: h * torch.fft.fftfreq(6) + torch.fft.rfftfreq(11),
    "filled": lambda h: h * torch.full((6,), 0.3) + torch.ones(6) * torch.arange(0.0, 3.0, 0.5) + torch.eye(6)[0] + torch.tensor([0.5]) + torch.scalar_tensor(0.3),
    "drawn": lambda h: h * torch.rand(6) + torch.randn(6) + torch.normal(0.0, 1.0, (6,)),
    "of integers": lambda h: h * torch.logsumexp(torch.arange(6), 0) + torch.arange(6).sigmoid() + torch.arange(6) / 7,
}  # fmt: skip


class Created(nn.Module):
    def __init__(self, created: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.created = nn.Linear(6, 6), created

    def forward(self, x: Tensor) -> Tensor:
        return self.created(self.up(x)).square().mean()


@pytest.mark.parametrize("name", CREATED)
def test_what_is_created_without_a_dtype_has_the_one_of_its_trace(name: str) -> None:
    """Whatever torch's default is when it runs: float64, as verify has it, or the one that was there when it was captured."""
    torch.manual_seed(0)
    model, x = Created(CREATED[name]), torch.randn(4, 6)
    report = verify(model, (x,), "zero3", world_size=2, steps=1)
    assert report.ok, report
    p = capture(model, (x,), want="forward").program
    given = {"param": dict(model.named_parameters()), "batch": {i.key: x for i in p.by_role("batch")}, "rng": {"rng": torch.tensor([0, 0])}}
    torch.set_default_dtype(torch.float64)
    try:
        evaluate(canonicalize(p), {i.name: given[i.role][i.key].detach() for i in p.inputs})  # which compares dtypes
    finally:
        torch.set_default_dtype(torch.float32)

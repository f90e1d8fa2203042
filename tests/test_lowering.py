"""Ops that become other ops while they are captured: value and gradient against PyTorch in float64, to the last bit where no sum is regrouped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseed.capture import capture
from deepseed.ir.widen import widen
from deepseed.ops import evaluate

aten = torch.ops.aten
I = torch.tensor  # noqa: E741
MASK = torch.tensor([[True, False, True, False], [False, True, False, False]])

CASES: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Any]]] = {
    "pixel_shuffle": ((2, 12, 3, 4), lambda x: torch.pixel_shuffle(x, 2)),
    "pixel_shuffle of one": ((8, 3, 4), lambda x: torch.pixel_shuffle(x, 2)),
    "pixel_unshuffle": ((2, 3, 4, 6), lambda x: torch.pixel_unshuffle(x, 2)),
    "channel_shuffle": ((2, 6, 3, 4), lambda x: torch.channel_shuffle(x, 3)),
    **{f"rot90 {k}": ((2, 3, 4), lambda x, k=k: torch.rot90(x, k, (2, 0))) for k in range(-1, 4)},
    "block_diag": ((2, 3), lambda x: torch.block_diag(x, x[0], x.T * 2, x[0, 0])),
    **{f"diagonal {o} {dims}": ((2, 4, 3), lambda x, o=o, dims=dims: torch.diagonal(x, o, *dims)) for o in (-2, 0, 1) for dims in ((0, 1), (2, 1), (-1, 0))},
    **{f"diag_embed {o} {dims}": ((2, 3), lambda x, o=o, dims=dims: torch.diag_embed(x, o, *dims)) for o in (-2, 0, 1) for dims in ((0, 1), (2, 1), (-1, 0))},
    "diag": ((4,), lambda x: torch.diag(x, 1) + torch.diag(torch.diag(x)).sum()),
    **{f"diagonal_scatter {o} {dims}": ((4, 3, 2), lambda x, o=o, dims=dims: torch.diagonal_scatter(x, torch.diagonal(x, o, *dims) * 3 + 1, o, *dims)) for o in (-1, 0, 1) for dims in ((0, 1), (1, 0), (2, 0))},
    "trace": ((3, 4), lambda x: torch.trace(x)),
    "eye": ((3, 4), lambda x: x * torch.eye(3, 4, dtype=x.dtype) + torch.eye(4, dtype=x.dtype).sum()),
    **{f"unfold {size} {step}": ((2, 7, 3), lambda x, size=size, step=step: x.unfold(1, size, step)) for size, step in ((2, 2), (3, 1), (3, 2), (2, 3), (7, 1), (1, 1))},
    "unfold of a number": ((), lambda x: x.unfold(0, 1, 1)),
    "unfold the last": ((2, 7), lambda x: x.unfold(-1, 3, 3)),
    "floor_divide": ((2, 5), lambda x: x * torch.floor_divide(torch.arange(-3, 2), 2) + torch.floor_divide(x.detach(), 0.3)),
    "index_add": ((3, 4), lambda x: (x * 1).index_add(1, I([3, 0, 3]), x[:, :3] * 2, alpha=3)),
    "index_add of a vector": ((4,), lambda x: (x * 1).index_add(0, I([2, 2]), x[:2])),
    "index_add of a number": ((), lambda x: (x * 1).index_add(0, I(0), x * 2)),
    "index_copy": ((3, 4), lambda x: (x * 1).index_copy(-1, I([3, 0]), x[:, :2] * 2)),
    "index_copy by a number": ((3, 4), lambda x: (x * 1).index_copy(0, I(1), x[:1] * 2)),
    "index_fill": ((3, 4), lambda x: (x * 2).index_fill(1, I([0, 3]), 0.5) + (x * 2).index_fill(0, I([1]), x[0, 0].detach())),
    **{f"index_reduce {r} {s}": ((3, 4), lambda x, r=r, s=s: (x * 1).index_reduce(1, I([3, 0, 3]), x[:, 1:] * 2, r, include_self=s)) for r in ("amax", "amin", "mean") for s in (True, False)},
    **{f"scatter_reduce {r} {s}": ((3, 4), lambda x, r=r, s=s: (x * 1).scatter_reduce(1, I([[3, 0, 3]] * 3), x[:, 1:] * 2, r, include_self=s)) for r in ("sum", "amax", "mean") for s in (True, False)},
    "take": ((3, 4), lambda x: torch.take(x, I([[0, -1], [7, 7]]))),
    "put": ((3, 4), lambda x: (x * 1).put(I([0, -1]), x[0, :2] * 2) + (x * 1).put(I([5, 5]), x[0, :2], accumulate=True)),
    "index beside": ((2, 3, 4), lambda x: x[:, I([2, 0]), I([[1], [3]])]),
    "index apart": ((2, 3, 4), lambda x: x[I([1, 0, 1]), :, I([2, 0, -1])]),
    "index apart, spread": ((2, 3, 4, 2), lambda x: x[:, I([[1], [0]]), :, I([1, 0, 1])]),
    "index of a part": ((2, 3, 4), lambda x: x[0, :, I([2, 0])]),
    "index_put": ((2, 3, 4), lambda x: (x * 1).index_put((I([1, 0]), I([2, 0])), x[0, :2] * 2)),
    "index_put of one value": ((2, 3, 4), lambda x: (x * 1).index_put((I([1, 0]), I([[2], [0]])), x[0, 0, 0])),
    "index_put apart": ((2, 3, 4), lambda x: aten.index_put(x * 1, [I([1, 0]), None, I([2, 0])], x[0, :2, :3] * 2)),
    "index_put apart, added": ((2, 3, 4), lambda x: aten.index_put(x * 1, [I([1, 1]), None, I([2, 2])], x[0, :2, :3] * 2, True)),
    "index_put in the middle": ((2, 3, 4), lambda x: aten.index_put(x * 1, [None, I([2, 2])], x[0, 0], True)),
    "index_put by mask": ((2, 4, 3), lambda x: aten.index_put(x * 1, [MASK], x[0, 0, 0].detach())),
    "index_put by mask of rows": ((2, 4, 3), lambda x: aten.index_put(x * 1, [MASK], x[0, 0].detach())),
    "index_put by mask of one row": ((2, 4, 3), lambda x: aten.index_put(x * 1, [MASK], x[0, :1].detach())),
    "index_put by mask, inner": ((3, 2, 4), lambda x: aten.index_put(x * 1, [None, MASK], x[:, :1, 0].detach(), True)),
    "assignment by mask": ((2, 4, 3), lambda x: _assigned(x)),
    "assignment of a learned row by mask": ((2, 4, 3), lambda x: _row_assigned(x)),
    "masked_fill by a tensor": ((2, 4), lambda x: x.masked_fill(MASK, torch.tensor(2.0))),
    "masked_scatter": ((2, 4), lambda x: (x * 1).masked_scatter(MASK, x * 2)),
    "masked_scatter of rows": ((2, 4, 3), lambda x: (x * 1).masked_scatter(MASK[..., None], x[0] * 2)),
    "masked_scatter of expanded rows": ((2, 4, 3), lambda x: (x * 1).masked_scatter(MASK[..., None].expand(2, 4, 3), x[0, :3] * 2)),
    "masked_scatter of one": ((2, 4), lambda x: (x * 1).masked_scatter(MASK[:1], x[0] * 2)),
    "repeat_interleave": ((2, 4), lambda x: torch.repeat_interleave(x, I([1, 0, 3, 2]), 1, output_size=6)),
    "complex": ((2, 3, 2), lambda x: torch.view_as_real(torch.view_as_complex(x) * (1 + 2j) + torch.view_as_complex(x).conj() / 2j)),
    "complex parts": ((2, 3), lambda x: (lambda z: z.real + z.imag * 2 + z.abs() + z.angle())(torch.complex(x, x.flip(1)))),
    "affine_grid": ((2, 2, 3), lambda x: torch.nn.functional.affine_grid(x, [2, 1, 4, 5], align_corners=False)),
    "affine_grid, corners": ((2, 2, 3), lambda x: torch.nn.functional.affine_grid(x, [2, 1, 4, 5], align_corners=True)),
    "affine_grid of volumes": ((2, 3, 4), lambda x: torch.nn.functional.affine_grid(x, [2, 1, 3, 4, 5], align_corners=False)),
    "foreach": ((2, 3), lambda x: torch.cat(torch._foreach_add(torch._foreach_mul([x, x * 2], [0.5, 2.0]), [x, x], alpha=2))),
    "foreach in place": ((2, 3), lambda x: _foreach_written(x)),
}


def _assigned(x: Tensor) -> Tensor:
    out = x * 2
    out[out > 0.5] = 0.25
    return out


def _row_assigned(x: Tensor) -> Tensor:
    out = x * 2
    out[MASK] = x[0, 0]
    out[:, 1:][MASK[:, 1:]] = x[1, :1] * 3
    return out


def _foreach_written(x: Tensor) -> Tensor:
    a, b = x * 1, x * 2
    torch._foreach_mul_([a, b], 3.0)
    torch._foreach_add_([a, b], [b * 1, a * 1])
    return a * b


class Held(nn.Module):
    """A function of one parameter; the loss weighs each element of the result differently."""

    def __init__(self, x: Tensor, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.x, self.function = nn.Parameter(x), function

    def forward(self) -> Tensor:
        y = self.function(self.x)
        return (y * torch.linspace(0.5, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum()


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient(name: str) -> None:
    shape, function = CASES[name]
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    model = Held(x.clone(), function)
    captured = capture(model, (), loss_fn=lambda m, batch: m())
    p = widen(captured.program)
    values = {i.name: x if i.role == "param" else captured.constants[i.key] for i in p.inputs if i.role != "rng"}
    values = {k: v.double() if v.dtype is torch.float32 else v for k, v in values.items()}
    got = evaluate(p, values)
    loss = model()
    (grad,) = torch.autograd.grad(loss, (model.x,))
    by = {o.role: got[o.ref.name] for o in p.outputs}
    torch.testing.assert_close(by["loss"], loss.detach(), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(by["grad"], grad, rtol=1e-12, atol=1e-12)


def test_a_mask_put_and_a_bag_of_rows_need_no_index() -> None:
    """What only some elements of a mask choose stays elementwise: no index, no scatter."""
    p = capture(Held(torch.randn(2, 4, 3), _assigned), (), loss_fn=lambda m, batch: m()).program
    assert not [op.target for op in p.ops if "index" in op.target or "scatter" in op.target]
    p = capture(Held(torch.randn(2, 4, 3), CASES["masked_scatter of expanded rows"][1]), (), loss_fn=lambda m, batch: m()).program
    assert [op.type.shape for op in p.ops if op.target == "embedding"] == [(8, 3)]  # whole rows of 3

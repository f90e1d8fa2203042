"""Calls of aten ops in float64 that canonicalize takes apart: products, counts, margins and bags."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseed.ops import overload

F64 = torch.float64


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(sum(shape)))


def product_cases() -> list[tuple[Any, ...]]:
    x, y = rand(4, 6), rand(4, 6) + 0.3
    g = torch.tensor(0.7, dtype=F64)
    cases: list[tuple[Any, ...]] = [
        ("aten.addmv", [rand(4), x, rand(6)], {"beta": 0.5, "alpha": -2}),
        ("aten.addmv", [rand(4) * torch.nan, x, rand(6)], {"beta": 0}),
        ("aten.addr", [x, rand(4), rand(6)], {"alpha": 2}),
        ("aten.addr", [x * torch.nan, rand(4), rand(6)], {"beta": 0}),
        ("aten.addbmm", [x, rand(3, 4, 5), rand(3, 5, 6)], {"beta": 0.5, "alpha": 2}),
        ("aten.vdot", [rand(6), rand(6) * 2]),
        ("aten.prod", [x]),
        ("aten.prod", [torch.tensor(3.0, dtype=F64)]),
        ("aten.count_nonzero", [(x > 0) * x]),
        ("aten.count_nonzero.dim_IntList", [(x > 0) * x, [1]]),
        ("aten.nansum", [torch.where(x > 1, torch.nan, x)]),
        ("aten.nansum", [torch.where(x > 1, torch.nan, x), [0], True]),
        ("aten.aminmax", [x]),
        ("aten.aminmax", [x], {"dim": 1, "keepdim": True}),
        ("aten.log_sigmoid_forward", [x * 30]),
        ("aten.linalg_vector_norm", [x, -float("inf"), [1], True]),
    ]
    for name, hit in (("any", x > 2.2), ("all", x > -2.2)):
        for value in (hit, hit.long(), hit.double()):
            cases += [(f"aten.{name}", [value]), (f"aten.{name}.dim", [value, 1]), (f"aten.{name}.dims", [value, [0, 1], True])]
        cases += [(f"aten.{name}.dim", [torch.tensor(True), 0]), (f"aten.{name}.dim", [hit.to(torch.uint8), -1, True])]
    for expand, sumdim in (
        (([1, 3], [0], [1, 2]), [2, 3]),  # bilinear's forward: n o i j
        (([3], [0], [1]), [1]),
        (([1], [0], [1]), [2]),
        (([2], [1], [0]), [0, 1]),
    ):
        sizes = (2, 3, 4, 5)[: 4 if len(expand[0]) == 2 else 3]
        shapes = [[n for d, n in enumerate(sizes) if d not in e] for e in expand]
        if all(len(s) + len(e) == len(sizes) for s, e in zip(shapes, expand, strict=True)):
            cases.append(("aten._trilinear", [*(rand(*s) for s in shapes), *expand, sumdim]))
    v = rand(3, 4, 5)
    for dim, shape in ((0, (3, 1, 1)), (2, (1, 1, 5))):
        scale = rand(*shape)
        cases.append(("aten._weight_norm_interface", [v, scale, dim]))
        _, norms = overload("aten._weight_norm_interface")(v, scale, dim)
        cases.append(("aten._weight_norm_interface_backward", [rand(3, 4, 5) * 2, v, scale, norms, dim]))
    cases += [("aten.renorm", [x, p, dim, 1.5]) for p in (1, 2, 2.5) for dim in (0, -1)]
    cases += [("aten._euclidean_dist", [rand(7, 3), rand(5, 3) * 2]), ("aten._euclidean_dist", [rand(2, 7, 3), rand(2, 5, 3) * 2])]
    for r in (0, 1, 2):
        grad = rand(4, 6) if r == 0 else g
        for weight in (None, y.abs()):
            for positive in (None, rand(6).abs()):
                cases.append(("aten.binary_cross_entropy_with_logits", [x * 20, y.sigmoid(), weight, positive, r]))
        cases += [("aten.soft_margin_loss", [x, y.sign(), r]), ("aten.soft_margin_loss_backward", [grad, x, y.sign(), r])]
        target = torch.tensor([0, 5, 2, 2])
        for p, weight in ((1, None), (2, rand(6).abs())):
            rows = rand(4) if r == 0 else g
            cases.append(("aten.multi_margin_loss", [x, target, p, 0.8, weight, r]))
            cases.append(("aten.multi_margin_loss_backward", [rows, x, target, p, 0.8, weight, r]))
    return cases


def bag_cases() -> list[tuple[Any, ...]]:
    """Bags of different lengths (one of them empty); of one length only a program shows that they are (tests/breadth.py)."""
    cases: list[tuple[Any, ...]] = []
    weight, indices = rand(7, 3), torch.tensor([1, 0, 4, 6, 2, 2, 0, 5])
    for last, offsets in ((False, torch.tensor([0, 3, 3, 7])), (True, torch.tensor([0, 3, 3, 8]))):
        for mode, scaled in ((0, None), (0, rand(8)), (1, None)):
            for padding in (-1, 0):
                cases.append(("aten._embedding_bag", [weight, indices, offsets, False, mode, False, scaled, last, padding]))
                out, bags, sizes, largest = overload("aten._embedding_bag")(weight, indices, offsets, False, mode, False, scaled, last, padding)
                grad = torch.randn_like(out)
                saved = [indices, offsets, bags, sizes, largest]
                if not last:
                    cases.append(("aten._embedding_bag_backward", [grad, *saved, 7, False, mode, False, scaled, padding]))
                if scaled is not None and not last:
                    cases.append(("aten._embedding_bag_per_sample_weights_backward", [grad, weight, indices, offsets, bags, mode, padding]))
    cases.append(("aten._embedding_bag_forward_only", [weight, indices, torch.tensor([0, 2]), False, 1, False, None, False, -1]))
    return cases

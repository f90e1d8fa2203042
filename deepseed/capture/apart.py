"""The optimizer as it is, all its groups with small stand-ins for their parameters: a step must do to each what it does to it alone.

Two parameters (deepseed.capture.state) do not show what begins with the third, nor what is done to those that have no gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseed.capture.errors import CaptureError
from deepseed.capture.optimizer import form_of
from deepseed.capture.state import ROUNDED, shadow, steps_with_noise

VARIANTS = 7  # stand-ins of one shape in one group with numbers of their own; further ones are like one of these
MOST_PASSED = 64  # optimizers of torch's own that are kept
Sample = tuple[Tensor, Tensor]  # value and gradient
_passed: dict[Hashable, None] = {}  # the one that was asked for longest ago first


def check_apart(optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], graded: Collection[str]) -> None:
    """Whether two steps do to each parameter in ``graded`` what they do to it alone, and nothing to the others, which have no gradient. Raises CaptureError."""
    names = {id(p): name for name, p in parameters.items()}
    owned = [(g, names[id(p)]) for g, group in enumerate(optimizer.param_groups) for p in group["params"]]
    forms = [form_of(optimizer, group) for group in optimizer.param_groups]
    key = (*forms, *((g, tuple(parameters[name].shape), name in graded) for g, name in owned))
    if _passed.pop(key, key) is None:
        _passed[key] = None
        return
    counts: Counter[Hashable] = Counter()
    drawn: dict[Hashable, Sample] = {}
    kinds: dict[str, tuple[Any, ...]] = {}  # group, shape, number of each
    for g, name in owned:
        shape = tuple(n if n <= 1 else 3 + i for i, n in enumerate(parameters[name].shape))
        variant = counts[g, shape] % VARIANTS
        counts[g, shape] += 1
        kinds[name] = (g, shape, variant)
        if (shape, variant) not in drawn:
            generator = torch.Generator().manual_seed(variant)
            drawn[shape, variant] = (torch.randn(shape, generator=generator, dtype=torch.float64), (1 + variant) * torch.randn(shape, generator=generator, dtype=torch.float64))

    def stepped(some: Sequence[tuple[int, str]]) -> tuple[dict[str, Tensor], bool]:
        params = {name: drawn[kinds[name][1:]][0].clone().requires_grad_(parameters[name].requires_grad) for _, name in some}
        other = shadow(optimizer, optimizer.param_groups[some[0][0]], params[some[0][1]], {})
        other.param_groups = [_options(optimizer, group, [params[name] for h, name in some if h == g]) for g, group in enumerate(optimizer.param_groups) if len(some) > 1 or g == some[0][0]]

        def give() -> None:
            for name, p in params.items():
                p.grad = drawn[kinds[name][1:]][1].clone() if name in graded else None

        noisy = steps_with_noise(other, give)
        return {name: p.detach() for name, p in params.items()}, noisy

    said = f"the step of optimizer {type(optimizer).__name__}"
    try:
        together, noisy = stepped(owned)
    except Exception as error:
        raise CaptureError(f"{said} fails on its {len(owned)} parameters, of which {sum(name in graded for _, name in owned)} have a gradient: {error}", fix="skip parameters whose grad is None, as torch's optimizers do") from error
    alone: dict[Hashable, Tensor] = {}
    first = [name for _, name in owned if name in graded][: 1 if noisy else None]  # numbers that are drawn are the same for the first only
    for g, name in owned:
        there, kind = together[name], kinds[name]
        if name not in graded:
            _same(there, drawn[kind[1:]][0], f"{said} changes parameter {name!r}, which has no gradient", "after two steps", "before", "skip parameters whose grad is None, as torch's optimizers do")
        elif name in first:
            if kind not in alone:
                alone[kind] = stepped([(g, name)])[0][name]
            _same(there, alone[kind], f"{said} does something else to parameter {name!r} where its other {len(owned) - 1} are", "there after two steps", "alone",
                  "make its update of each parameter from that one's value, gradient and state alone; a norm over all gradients is clip_grad_norm of deepseed.compile")  # fmt: skip
    if None not in forms:
        _passed[key] = None
        if len(_passed) > MOST_PASSED:
            del _passed[next(iter(_passed))]


def _options(optimizer: Optimizer, group: Mapping[str, Any], params: list[Tensor]) -> dict[str, Any]:
    (options,) = shadow(optimizer, group, params[0] if params else torch.zeros(1), {}).param_groups
    return {**options, **({"lr": options["lr"] or 0.1} if "lr" in options else {}), "params": params}  # a schedule may begin with 0


def _same(one: Tensor, other: Tensor, what: str, when: str, beside: str, fix: str) -> None:
    a, b = one.nan_to_num(), other.nan_to_num()
    if a.numel() and float((a - b).abs().max()) > ROUNDED * float(b.abs().max()):
        at = int((a - b).abs().argmax())
        raise CaptureError(f"{what}: element {at} of a small one, {list(a.shape)}, is {float(a.flatten()[at])} {when} and {float(b.flatten()[at])} {beside}", fix=fix)

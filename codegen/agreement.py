"""The numbers of a kernel that a device's compiler made, held against PyTorch's own on that device, before the kernel runs in a step: Triton and the device are the parts of a step that no check of a program sees.

    exact   the kernel's ops in float64, by PyTorch
    plain   the ops as they are, by PyTorch: what the kernel stands for
    kernel  no farther from exact than plain is, times 16 (in 16 bits, which kernels round later than PyTorch: 4), or a few roundings of the dtype, of the largest number
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from deepseed import ops
from deepseed.codegen.inductor import python
from deepseed.codegen.kernels import Kernel, function
from deepseed.ir.program import Ref
from deepseed.ir.widen import widen

FARTHER = {torch.float64: 16.0, torch.float32: 16.0, torch.float16: 4.0, torch.bfloat16: 4.0}  # than PyTorch's ops: sums in another order
ROUNDED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2.0**-8, torch.bfloat16: 2.0**-5}  # of the largest number: eight units of it
FLIPPED = 0.01  # of the results that are no floats: a comparison can fall on the other side where its operands are rounded otherwise


def difference(k: Kernel, launch: Callable[..., Sequence[Tensor]], given: Sequence[Tensor]) -> str:
    """What is wrong with the results of ``launch`` on operands of the kernel, in words; nothing where they are right."""
    given = _attended(k, given)
    plain = python(k)(*given)
    exact = _exact(k)(*[x.double() if x.is_floating_point() else x for x in given])
    for n, (mine, near, true) in enumerate(zip(launch(*given), plain, exact, strict=True)):
        if mine.shape != near.shape or mine.dtype != near.dtype:
            return f"result {n} is {_type(mine)}, and {_type(near)} by PyTorch"
        if not near.is_floating_point():
            if (other := float((mine != near).double().mean()) if near.numel() else 0.0) > FLIPPED:
                return f"{other:.0%} of result {n}, {_type(near)}, is not what PyTorch says"
            continue
        counted = near.isfinite() & true.isfinite()  # float16 ends at 65504, for PyTorch too
        if not counted.any():
            continue
        largest = float(true[counted].abs().max())
        off, usual = (float((x.double() - true)[counted].abs().max()) for x in (mine, near))
        if not off <= FARTHER[near.dtype] * usual + ROUNDED[near.dtype] * largest:
            return f"result {n}, {_type(near)}, is {off / max(largest, 1e-300):.1e} of its largest number from float64, and {usual / max(largest, 1e-300):.1e} by PyTorch"
    return ""


def _exact(k: Kernel) -> Callable[..., Sequence[Tensor]]:
    name = f"{k.name}_exact"
    wide = widen(k.fragment)
    return python(replace(k, name=name, fragment=wide, source=function(wide, name)))


def _attended(k: Kernel, given: Sequence[Tensor]) -> list[Tensor]:
    """The operands, of attention's backward with what its forward made of them: probabilities are made again from it."""
    (op, *others), out = k.fragment.ops, list(given)
    if others or op.target != "sdpa_backward":
        return out
    at = {i.name: n for n, i in enumerate(k.fragment.inputs)}
    _, q, key, v, *rest = [out[at[a.name]] if isinstance(a, Ref) else None for a in op.args]
    mask = rest[0] if len(rest) == 3 else None
    assert q is not None and key is not None and v is not None
    scale = op.kw("scale")
    assert isinstance(scale, int | float)
    made = ops.sdpa(q, key, v, mask, bool(op.kw("causal", False)), float(scale))
    for ref, value in zip(op.args[-2:], made, strict=True):
        assert isinstance(ref, Ref)
        place = out[at[ref.name]]
        out[at[ref.name]] = torch.empty_strided(place.shape, place.stride(), dtype=place.dtype, device=place.device).copy_(value)
    return out


def _type(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"

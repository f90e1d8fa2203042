"""Rules of convolutions, pooling and resizing: batch and channels are free, the spatial dimensions are whole (no halo)."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from deepseed.rules.signature import Call, Rule


def _words(call: Call, transposed: bool, groups: int, c: str, k: str) -> tuple[str, str, str]:
    """Input, weight and output: ``b (g c) s``, ``(g k) c w``, ``b (g k) t``."""
    n = len(call.shape(0)) - 2
    s, w, t = (" ".join(f"{x}{i}!^" for i in range(n)) for x in "swt")
    g = f"g={groups}^"
    return f"b ({g} {c}) {s}", (f"({g} {c}) {k} {w}" if transposed else f"({g} {k}) {c} {w}"), f"b ({g} {k}) {t}"


def convolution(call: Call) -> str | None:
    """`b (g c) s!, (g k) c w!, (g k) -> b (g k) t!`; with several groups, c is whole; transposed, the weight is `(g c) k w!`"""
    transposed, groups = call.arg(6, "transposed", False), call.arg(8, "groups", 1)
    if not isinstance(groups, int):
        return None
    x, w, y = _words(call, bool(transposed), groups, "c!" if groups > 1 else "c+", "k+")
    return f"{x}, {w}" + (", (g k)" if len(call.operands) == 3 else "") + f" -> {y}"


def convolution_backward(call: Call) -> str | None:
    """The gradient of the input (k contracted) or of the weight (b contracted), one at a time"""
    transposed, groups, mask = call.arg(7, "transposed", False), call.arg(9, "groups", 1), call.arg(10, "output_mask")
    if not isinstance(groups, int) or mask not in ((True, False, False), (False, True, False)) or len(call.results) != 1:
        return None
    x, w, y = _words(call, bool(transposed), groups, "c!" if groups > 1 else "c+", "k+")
    return f"{y}, {x}, {w} -> {x if mask == (True, False, False) else w}"


def _linear(call: Call) -> str:
    """0 \\| 1, with a bias 0+2 \\| 1+2"""
    return "0|1" if len(call.operands) == 2 else "0+2|1+2"


def _linear_backward(call: Call) -> str:
    """0, and the other factor of the product"""
    return "0|2" if call.arg(10, "output_mask") == (True, False, False) else "0|1"


def planes(rank: int) -> Callable[[Call], str | None]:
    """Batch and channels are free, the last ``rank`` dimensions of every tensor are whole."""

    def form(call: Call) -> str | None:
        tensors = (*call.operands, *call.results)
        lead = len(call.out) - rank
        if lead < 1 or any(len(t.shape) != lead + rank for t in tensors):
            return None
        words = [" ".join([*(f"b{i}" for i in range(lead)), *(f"p{slot}d{i}!^" for i in range(rank))]) for slot in range(len(tensors))]
        return ", ".join(words[: len(call.operands)]) + " -> " + ", ".join(words[len(call.operands) :])

    form.__doc__ = f"Batch and channels are free, the last {rank} dimension{'s are' if rank > 1 else ' is'} whole"
    return form


def _window(call: Call, columns: int) -> tuple[str, str, str]:
    """Batch words, the channels of an image and the (channel, place in the window) of its columns."""
    kernel = call.arg(columns, "kernel_size")
    places = prod(n for n in kernel if isinstance(n, int)) if isinstance(kernel, tuple) else 0
    return ("b " if len(call.shape(0)) - len(call.out) in (1, -1) and max(len(call.shape(0)), len(call.out)) == 4 else ""), "c", f"(c k={places}!^)"


def im2col(call: Call) -> str:
    """b c h! w! -> b (c k!) l!"""
    b, c, columns = _window(call, 1)
    return f"{b}{c} h!^ w!^ -> {b}{columns} l!^"


def col2im(call: Call) -> str:
    """b (c k!) l! -> b c h! w!"""
    b, c, columns = _window(call, 2)
    return f"{b}{columns} l!^ -> {b}{c} h!^ w!^"


def grid_sampler(rank: int) -> Callable[[Call], str]:
    """b c h! w!, b y! x! 2! -> b c y! x!; the gradient of the grid is partial over c"""

    def form(call: Call) -> str:
        image, grid, out = (" ".join(f"{x}{i}!^" for i in range(rank)) for x in "sgo")
        if len(call.operands) == 2:
            return f"b c {image}, b {grid} r!^ -> b c {out}"
        mask = call.arg(6, "output_mask")
        wanted = mask if isinstance(mask, tuple) else (True, True)
        return f"b c {out}, b c {image}, b {grid} r!^ -> " + ", ".join(w for w, on in zip((f"b c {image}", f"b {grid} r!^"), wanted, strict=True) if on)

    form.__doc__ = f"batch is free, {rank} dimensions of each plane are whole"
    return form


LINEAR = """
avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d avg_pool2d_backward avg_pool3d_backward
_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward max_pool2d_with_indices_backward max_pool3d_with_indices_backward
adaptive_max_pool2d_backward adaptive_max_pool3d_backward max_unpool2d max_unpool3d
upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
_upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d
_upsample_bilinear2d_aa _upsample_bicubic2d_aa reflection_pad1d reflection_pad2d reflection_pad3d reflection_pad1d_backward
reflection_pad2d_backward reflection_pad3d_backward replication_pad1d replication_pad2d replication_pad3d
replication_pad1d_backward replication_pad2d_backward replication_pad3d_backward
"""
PICKING = "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d"  # values and where they stood


def _rank(name: str) -> int:
    return next(n for n in (1, 2, 3) if f"{n}d" in name)


RULES: dict[str, Rule] = {
    "aten.convolution": Rule(convolution, _linear, adds=2),
    "aten.convolution_backward": Rule(convolution_backward, _linear_backward),
    **{f"aten.{name}": Rule(planes(_rank(name)), "0") for name in LINEAR.split()},
    **{f"aten.{name}": Rule(planes(_rank(name))) for name in PICKING.split()},
    **{f"sized.{name}_backward": Rule(planes(_rank(name)), "0") for name in LINEAR.split() if "upsample" in name},
    "aten.fractional_max_pool2d": Rule("b c h!^ w!^, b c r!^ -> b c y!^ x!^, b c y!^ x!^"),
    "aten.im2col": Rule(im2col, "0"),
    "aten.col2im": Rule(col2im, "0"),
    "aten.grid_sampler_2d": Rule(grid_sampler(2), "0"),
    "aten.grid_sampler_3d": Rule(grid_sampler(3), "0"),
    "aten.grid_sampler_2d_backward": Rule(grid_sampler(2), "0"),
    "aten.grid_sampler_3d_backward": Rule(grid_sampler(3), "0"),
}

"""Rules of convolutions, pooling and resizing: batch and channels are free, the spatial dimensions are whole (no halo)."""

from __future__ import annotations

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


def planes(call: Call) -> str | None:
    """Batch and channels are free, each plane is whole"""
    n = len(call.out)
    if n not in (3, 4) or any(len(t.shape) != n for t in (*call.operands, *call.results)):
        return None
    lead = ["b", "c"][4 - n :]

    def tensor(slot: int) -> str:
        return " ".join([*lead, *(f"p{slot}d{i}!^" for i in range(2))])

    slots = [tensor(i) for i in range(len(call.operands) + len(call.results))]
    return ", ".join(slots[: len(call.operands)]) + " -> " + ", ".join(slots[len(call.operands) :])


RULES: dict[str, Rule] = {
    "aten.convolution": Rule(convolution, _linear, adds=2),
    "aten.convolution_backward": Rule(convolution_backward, _linear_backward),
    "aten.max_pool2d_with_indices": Rule(planes),
    "aten.max_pool2d_with_indices_backward": Rule(planes, "0"),
    "aten.avg_pool2d": Rule(planes, "0"),
    "aten.avg_pool2d_backward": Rule(planes, "0"),
    "aten._adaptive_avg_pool2d": Rule(planes, "0"),
    "aten._adaptive_avg_pool2d_backward": Rule(planes, "0"),
    "aten.upsample_nearest2d": Rule(planes, "0"),
    "aten.upsample_bilinear2d": Rule(planes, "0"),
}

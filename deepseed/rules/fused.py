"""Rules of the whole ops that group_kernels emits again: norms, losses, addmm, optimizers. Each row is a row of the table."""

from __future__ import annotations

from deepseed.rules.signature import Call, Rule


def _normed(call: Call, position: int) -> tuple[str, str, str] | None:
    """Rows before the normalised dimensions, those dimensions (whole), and the shape of a statistic."""
    given = call.arg(position, "normalized_shape")
    if not isinstance(given, tuple) or not given:
        return None
    rows = [f"b{i}" for i in range(len(call.shape(0)) - len(given))]
    inner = [f"n{i}!^" for i in range(len(given))]
    return " ".join([*rows, *inner]), " ".join(inner), " ".join([*rows, *("1" for _ in inner)])


def layer_norm(call: Call) -> str | None:
    """b n!, n!, n! -> b n!, b 1, b 1"""
    names = _normed(call, 1)
    if names is None:
        return None
    x, n, stat = names
    results = [x, stat, stat][: len(call.results)]
    return ", ".join([x, *[n] * (len(call.operands) - 1)]) + " -> " + ", ".join(results)


def layer_norm_backward(call: Call) -> str | None:
    """b n!, b n!, b 1, b 1, n!, n! -> b n!, n!, n!: split rows leave partial gradients of weight and bias"""
    names = _normed(call, 2)
    if names is None or any(t.shape == (0,) for t in call.results):
        return None
    x, n, stat = names
    rows = x if len(call.operands) < 4 else ", ".join([x, x, stat, stat, *[n] * (len(call.operands) - 4)])
    mask = call.arg(7, "output_mask")
    wanted = mask if isinstance(mask, tuple) else (True,) * len(call.results)
    return rows + " -> " + ", ".join(word for word, on in zip((x, n, n), wanted, strict=False) if on)


def addmm(call: Call) -> str | None:
    """n, m k!, k! n -> m n"""
    m, n = call.out
    bias = call.shape(0)
    if len(bias) > 2:
        return None
    words = [("1" if size == 1 and whole != 1 else name) for size, name, whole in zip(bias[::-1], ("n", "m"), (n, m), strict=False)]
    return f"{' '.join(words[::-1]) or '.'}, m k!, k! n -> m n"


def nll_loss_forward(call: Call) -> str | None:
    """b c!, b -> ., . where the reduction is a sum"""
    if call.arg(3, "reduction") != 2 or len(call.shape(0)) != 2 or len(call.operands) != 2:
        return None
    return "b c!, b -> " + ", ".join(["."] * len(call.results))


def nll_loss_backward(call: Call) -> str | None:
    """., b c!, b, . -> b c!"""
    if call.arg(4, "reduction") == 0 or len(call.shape(1)) != 2 or len(call.operands) != 4:
        return None
    return "., b c!, b, . -> b c!"


def safe_softmax(call: Call) -> str:
    """The dimension in the arguments is whole."""
    dim = call.dim(1)
    one = " ".join(f"d{i}!" if i == dim else f"d{i}" for i in range(len(call.out))) or "."
    return f"{one} -> {one}"


def mean(call: Call) -> str:
    """The dimensions of the mean are whole."""
    given = call.arg(1, "dim")
    rank = len(call.shape(0))
    listed = given if isinstance(given, tuple) else () if given is None else (given,)
    dims = {d % rank for d in listed if isinstance(d, int)} if rank and listed else set(range(rank))
    kept = [f"d{i}" if i not in dims else "1" for i in range(rank) if i not in dims or call.arg(2, "keepdim", False)]
    return (" ".join(f"d{i}!" if i in dims else f"d{i}" for i in range(rank)) or ".") + " -> " + (" ".join(kept) or ".")


def optimizer(call: Call) -> str:
    """Parameter, gradient and each state alike, element by element; step count and learning rate whole"""
    param = " ".join(f"d{i}" for i in range(len(call.out))) or "."
    operands = [param if t.shape == call.out else " ".join(f"s{n}d{i}!" for i in range(len(t.shape))) or "." for n, t in enumerate(call.operands)]
    return ", ".join(operands) + " -> " + ", ".join([param] * len(call.results))


FUSED: dict[str, Rule] = {
    "aten.addmm": Rule(addmm),
    "aten.mean.dim": Rule(mean, "0"),
    "aten._safe_softmax": Rule(safe_softmax),
    "aten.native_layer_norm": Rule(layer_norm),
    "aten.native_layer_norm_backward": Rule(layer_norm_backward, "0"),
    "aten.nll_loss_forward": Rule(nll_loss_forward),
    "aten.nll_loss_backward": Rule(nll_loss_backward, "0"),
    "optim.adamw": Rule(optimizer),
    "optim.adam": Rule(optimizer),
    "optim.sgd": Rule(optimizer),
    "optim.pointwise": Rule(optimizer),
}

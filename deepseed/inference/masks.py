"""Which tokens a layer sees, read from the mask that the model asks for, not from a name in its configuration.

transformers describes a mask as a function of (batch, head, query, key). Paged attention knows two: all that came before, and the last
``window`` of these. ``window_of`` finds the window by asking where a far query stops to see, then compares the answer at some thousand pairs of
positions: what is neither (chunks, prefixes that see both ways, documents) is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from deepseed.inference.errors import InferenceError

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_OWN = (
    "the model attends by itself: it {what} instead of handing it to transformers' AttentionInterface\n"
    "  such a layer would see only the tokens of its own step, and the text would be wrong without a word\n"
    "  fix: serve a model whose attention calls ALL_ATTENTION_FUNCTIONS, or use its generate()"
)
FAR = 1 << 22  # a position behind any prompt
PAIRS = 4096


class Wanted:
    """What stands for a mask while a model is captured: the window that its attention is to have, 0 for none. A model that computes with it attends
    by itself."""

    def __init__(self, window: int) -> None:
        self.window = window

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: Any, **__: Any) -> Any:
        raise InferenceError(_OWN.format(what=f"computes {getattr(function, '__name__', function)} of its mask"))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise InferenceError(_OWN.format(what=f"reads .{name} of its mask"))

    def __getitem__(self, _: Any) -> Any:
        raise InferenceError(_OWN.format(what="reads a part of its mask"))


def wanted(**asked: Any) -> Wanted:
    """The entry of ``AttentionMaskInterface``."""
    with _disable_current_modes():
        return Wanted(window_of(asked["mask_function"]))


def window_of(sees: MaskFunction) -> int:
    """The window of a causal mask, 0 where it sees all that came before."""

    def at(queries: list[int], keys: list[int]) -> list[bool]:
        zero = torch.zeros((), dtype=torch.long)
        seen = torch.vmap(lambda q, k: sees(zero, zero, q, k))(torch.tensor(queries), torch.tensor(keys))
        return [bool(x) for x in torch.as_tensor(seen).broadcast_to(len(queries))]

    try:
        low, high = -1, FAR  # the last position that FAR does not see, the first that it does
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if at([FAR], [middle])[0] else (middle, high)
        window = 0 if low < 0 else FAR - low
        draw = random.Random(0)
        spans = [1 << draw.randrange(2, max(4 * window, 1 << 16).bit_length()) for _ in range(PAIRS)]  # of all sizes: what is special may be the first few
        queries = [draw.randrange(span) for span in spans]
        keys = [draw.randrange(span) if n % 2 else max(0, q + draw.randrange(-2, 3) - draw.choice((0, window))) for n, (q, span) in enumerate(zip(queries, spans, strict=True))]
        found = at(queries, keys)
    except Exception as error:
        raise InferenceError(f"the model's attention mask cannot be read: {type(error).__name__}: {error}\n  fix: only causal masks and sliding windows are served") from error
    for q, k, seen in zip(queries, keys, found, strict=True):
        if seen != (k <= q and (not window or k > q - window)):
            kind = f"a window of {window}" if window else "a causal mask"
            raise InferenceError(
                f"the model's attention mask is not {kind}: the token at {q} {'sees' if seen else 'does not see'} the one at {k}\n"
                "  fix: only causal masks and sliding windows are served"
            )
    return window

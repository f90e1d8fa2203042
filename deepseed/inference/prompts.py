"""What a caller gives as prompts: texts, lists of token ids, or arrays of ids with one prompt or a row each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import index
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from deepseed.inference.errors import InferenceError

Ids = Sequence[int] | Tensor | NDArray[Any]
Prompt = str | Ids
_FIX = "\n  fix: a text, whole numbers from 0, or an array of integers with one prompt or a row for each"


def several(given: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """The prompts, of which one alone needs no list around it."""
    if isinstance(given, str):
        return [given]
    listed: Any = _listed(given)
    try:
        listed = list(listed)
    except TypeError:
        raise InferenceError(f"prompts: {str(given)[:40]!r}, of type {type(given).__name__}{_FIX}") from None
    return [listed] if listed and not isinstance(listed[0], Iterable) else listed


def ids_of(prompt: Ids, vocabulary: int) -> list[int]:
    """Token ids, each within the vocabulary (0: of a size that nobody knows)."""
    listed = _listed(prompt)
    try:
        ids = [index(t) for t in listed]
    except TypeError:
        wrong = next((t for t in listed if not hasattr(t, "__index__") or isinstance(t, list | tuple)), listed) if isinstance(listed, list | tuple) else prompt
        raise InferenceError(f"a prompt has {str(wrong)[:40]!r}, a {type(wrong).__name__}, where token ids are wanted{_FIX}") from None
    outside = [t for t in ids if t < 0 or t >= (vocabulary or t + 1)]
    if outside:
        raise InferenceError(f"token {outside[0]} is outside the vocabulary of {vocabulary}\n  fix: ids from 0 to {vocabulary - 1}, of this model's tokenizer")
    return ids


def _listed(given: Any) -> Any:
    """An array as lists, anything else as it is."""
    if not isinstance(given, Tensor | np.ndarray):
        return given
    whole = not (given.is_floating_point() or given.is_complex()) if isinstance(given, Tensor) else given.dtype.kind in "iu"
    if not whole or str(given.dtype).endswith("bool") or given.ndim not in (1, 2):
        raise InferenceError(f"prompts are an array {given.dtype}{list(given.shape)}{_FIX}")
    return given.tolist()

"""Text as tokens arrive: whole characters only, and nothing that may turn out to be a stop string.

A token's text depends on its neighbours (bytes of one character, a space before a word), so each new piece is what a short window of tokens says more than
it said without the new ones. A window that ends inside a character waits for the next token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_BROKEN = "\ufffd"


class TextOf:
    """The growing text of one sequence's output. ``text`` is what is sure; ``stopped`` once a stop string has come, which it leaves out."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = (), special: bool = False) -> None:
        self._tokenizer, self._stops, self._special = tokenizer, tuple(stops), special
        self._tokens = list(prompt[-8:])
        self._begin, self._read = 0, len(self._tokens)  # the window: its first token, its first one that is not in the text
        self._said = self._decode(self._tokens)
        self._pending = ""  # may be the beginning of a stop string
        self.text = ""
        self.stopped = False

    def add(self, token: int, stops: bool = True) -> str:
        """The new piece of text, often empty. ``stops``: whether a stop string that it completes counts."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        window = self._decode(self._tokens[self._begin :])
        if window.endswith(_BROKEN) and len(self._tokens) - self._read < 8:
            return ""
        new = window[len(self._said) :]
        self._begin, self._read = self._read, len(self._tokens)
        self._said = self._decode(self._tokens[self._begin : self._read])
        return self._release(new, stops)

    def end(self) -> str:
        """What was held back, at the end."""
        if self.stopped:
            return ""
        window = self._decode(self._tokens[self._begin :])
        piece = self._release(window[len(self._said) :] if len(self._tokens) > self._read else "")
        rest, self._pending = self._pending, ""
        self._read = len(self._tokens)
        if not self.stopped:
            self.text += rest
            piece += rest
        return piece

    def _release(self, new: str, stops: bool = True) -> str:
        pending = self._pending + new
        found = [(at, s) for s in self._stops if (at := pending.find(s)) >= 0] if stops else []
        if found:
            piece, self._pending, self.stopped = pending[: min(found)[0]], "", True
        else:
            held = max((n for s in self._stops for n in range(1, min(len(s), len(pending) + 1)) if pending.endswith(s[:n])), default=0)
            piece, self._pending = pending[: len(pending) - held], pending[len(pending) - held :]
        self.text += piece
        return piece

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=not self._special, clean_up_tokenization_spaces=False)
        return text

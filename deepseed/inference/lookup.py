"""Drafts by prompt lookup: where the last tokens of a sequence stood before, what followed them then may follow now.

No second model: text that quotes its prompt, code that is edited, lists and tables repeat themselves. A draft costs the rows of a step that it fills, and changes no token.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # of the last tokens, how many must have stood there


class Lookup:
    """One sequence's n-grams. ``read`` tokens are known; each n-gram by the place after its latest occurrence, and the one before for those that end the sequence."""

    def __init__(self) -> None:
        self.read = 0
        self._after: dict[tuple[int, ...], tuple[int, int]] = {}

    def draft(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        """What followed the longest end of ``tokens`` that stood before, the last time it did; often nothing."""
        for end in range(self.read + 1, len(tokens) + 1):
            for n in range(SHORTEST, min(LONGEST, end) + 1):
                gram = tuple(tokens[end - n : end])
                self._after[gram] = (self._after.get(gram, (0, 0))[1], end)
        self.read = len(tokens)
        for n in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            before = self._after[tuple(tokens[-n:])][0]
            if before:
                said = list(tokens[before : before + most])
                while len(said) < most:  # it runs into the present: what repeats goes on repeating
                    said.append(said[len(said) - (len(tokens) - before)])
                return said
        return ()

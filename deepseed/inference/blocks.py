"""The blocks of the cache: who holds which, which hold a prefix that another request may share, and which is freed first. No tensors.

A block has ``size`` tokens of one sequence in all layers. A full block whose numbers are computed is known by the digest of its tokens and of
all before it (a chain), so an equal prefix finds it. A block that nobody holds keeps its content and its digest until the room is needed:
the one that is free for longest goes first. One that several hold is never written: ``own`` gives a copy to write into.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

Digest = bytes


class BlockPool:
    """``count`` blocks of ``size`` tokens; of each block the number of holders."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self.holders = [0] * count
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(count))
        self._known: dict[Digest, int] = {}
        self._digest: dict[int, Digest] = {}
        self._root = blake2b(os.urandom(16), digest_size=16).digest()  # nobody outside can make two prefixes meet

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A block with one holder and no content that counts; None where all are held."""
        if not self._free:
            return None
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self.holders[block] = 1
        return block

    def hold(self, block: int) -> None:
        if not self.holders[block]:
            del self._free[block]
        self.holders[block] += 1

    def drop(self, blocks: Sequence[int]) -> None:
        """One holder less of each; the last block of a sequence is the first to be used again, since others need its prefix too."""
        for block in reversed(blocks):
            if not self.holders[block]:
                raise RuntimeError(f"block {block} is free already")
            self.holders[block] -= 1
            if not self.holders[block]:
                self._free[block] = None
                if block not in self._digest:
                    self._free.move_to_end(block, last=False)

    def chain(self, tokens: Sequence[int], before: Digest | None = None) -> Digest:
        """The digest of a full block that follows the one with digest ``before``."""
        return blake2b(array("q", tokens).tobytes(), key=before or self._root, digest_size=16).digest()

    def learn(self, block: int, digest: Digest) -> None:
        """A held block is full, computed and known from now on; where another one with the same content is known, that stays."""
        if digest not in self._known and block not in self._digest:
            self._known[digest], self._digest[block] = block, digest

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Known blocks of the longest prefix of ``tokens``, never all of them: the last token is computed for its logits."""
        out: list[int] = []
        digest: Digest | None = None
        for begin in range(0, len(tokens) - self.size, self.size):
            digest = self.chain(tokens[begin : begin + self.size], digest)
            block = self._known.get(digest)
            if block is None:
                break
            out.append(block)
        return out

    def forget_all(self) -> None:
        """No prefix is known any more (the weights have changed)."""
        self._known.clear()
        self._digest.clear()

    def _forget(self, block: int) -> None:
        digest = self._digest.pop(block, None)
        if digest is not None:
            del self._known[digest]

    def check(self) -> None:
        """RuntimeError unless every block is either free or held, and what is known is known once."""
        for block, n in enumerate(self.holders):
            if (n == 0) != (block in self._free):
                raise RuntimeError(f"block {block} has {n} holders and is {'' if block in self._free else 'not '}free")
        if {b: d for d, b in self._known.items()} != self._digest:
            raise RuntimeError("the digests of blocks and the blocks of digests differ")

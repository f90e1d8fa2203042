"""Which tokens of which sequences the next step computes. No tensors, no clock, no model.

A step takes at most ``budget`` tokens of at most ``sequences`` sequences. Those that decode come first, one token each; what is left of the budget
goes to prompts in the order of arrival, in chunks. Where blocks run out the youngest sequence gives its up and waits, to be computed again from its
tokens; the oldest never does, so it ends and the next is the oldest. ``schedule`` plans a step, ``computed`` says that it has run, ``append`` adds what was sampled; a sequence
that is cancelled leaves at once, and a step under way no longer counts for it.

What is left of the budget after that may go to drafts: tokens that a sequence will perhaps say next, computed behind its last one. They take a room that nobody else wants, and
``accept`` keeps those that were right; the others were never there.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from deepseed.inference.blocks import BlockPool, Digest
from deepseed.inference.errors import InferenceError


@dataclass(eq=False)
class Running:
    """One sequence: its tokens, how many of them the cache has, and where."""

    number: int  # order of arrival; a younger one has a greater number
    tokens: list[int]
    prompt: int  # of them, how many the user gave
    most: int  # length at which it ends
    forks: int = 0  # sequences that begin as copies of it once its prompt is computed
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    digests: list[Digest] = field(default_factory=list)
    ended: bool = False
    reused: int = 0  # tokens of the prompt that the cache had already
    preempted: int = 0
    scored: int | None = None  # positions of the prompt whose logits were given; None: nobody wants them


Draft = Callable[[Running, int], Sequence[int]]  # at most so many tokens that may come next


@dataclass(frozen=True)
class Piece:
    """``count`` tokens of a sequence from ``begin`` on, the last of them from ``draft``; the logits of the last ``wanted`` are. ``draws``: how many of those give a token of the output."""

    sequence: Running
    begin: int
    count: int
    wanted: int
    draws: int = 0
    draft: tuple[int, ...] = ()

    @property
    def tokens(self) -> list[int]:
        return self.sequence.tokens[self.begin : self.begin + self.count - len(self.draft)] + list(self.draft)


@dataclass(frozen=True)
class Step:
    """Pieces in the order in which they are packed, and blocks to copy before, (from, to)."""

    pieces: tuple[Piece, ...]
    copies: tuple[tuple[int, int], ...]

    @property
    def tokens(self) -> int:
        return sum(p.count for p in self.pieces)


class Scheduler:
    def __init__(self, pool: BlockPool, budget: int, sequences: int, chunk: int | None = None, prefix: bool = True) -> None:
        if budget < 1 or sequences < 1:
            raise InferenceError(f"a step of {budget} tokens and {sequences} sequences computes nothing\n  fix: at least 1 of each")
        self.pool, self.budget, self.sequences, self.prefix = pool, budget, min(sequences, budget), prefix  # else decodes could fill every step
        self.chunk = min(chunk or budget, budget)  # of one prompt in one step
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.preemptions = 0
        self._numbers = count()
        self._copies: dict[int, int] = {}  # to: from

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running

    def check(self, tokens: Sequence[int], most: int) -> None:
        """InferenceError where such a sequence can never be computed."""
        if not tokens:
            raise InferenceError("an empty prompt has no last token to continue\n  fix: begin with the tokenizer's bos token")
        room = self.pool.count * self.pool.size
        if most > room:
            raise InferenceError(f"a sequence of {most} tokens does not fit into a cache of {room} ({self.pool.count} blocks of {self.pool.size})\n  fix: fewer max_tokens, or a larger cache")

    def add(self, tokens: Sequence[int], most: int, forks: int = 0, scored: bool = False) -> Running:
        """A sequence that ends at ``most`` tokens at the latest, with ``forks`` copies that continue on their own. ``scored``: the logits of its prompt are wanted too."""
        self.check(tokens, most)
        made = Running(next(self._numbers), list(tokens), len(tokens), most, forks, scored=0 if scored else None)
        for _ in range(forks):
            next(self._numbers)  # theirs
        self.waiting.append(made)
        return made

    def schedule(self, draft: Draft | None = None) -> Step:
        """The next step; without pieces where nothing waits."""
        left, pieces = self.budget, list[Piece]()
        chosen: set[Running] = set()
        self._copies = {}
        order = sorted(self.running, key=lambda r: (len(r.tokens) - r.computed > 1, r.number))  # decodes first
        short = False
        for sequence in order:
            if left == 0 or len(pieces) == self.sequences:
                break
            if sequence not in self.running:
                continue  # preempted for an older one
            n = min(len(sequence.tokens) - sequence.computed, left, self.chunk)
            while not self._provide(sequence, n):
                short = True
                victim = max(self.running, key=lambda r: r.number)
                if victim in chosen:
                    kept = [p for p in pieces if p.sequence is not victim]
                    left += sum(p.count for p in pieces if p.sequence is victim)
                    pieces = kept
                    chosen.discard(victim)
                self._preempt(victim)
                if victim is sequence:
                    break
            if sequence in self.running:
                pieces.append(self._piece(sequence, n))
                chosen.add(sequence)
                left -= n
        while self.waiting and left and not short and len(self.running) < self.sequences:
            sequence = self.waiting[0]
            spare = len(self.running)  # those that run may all want a block soon
            if spare and self.pool.free <= spare:
                break
            self._reuse(sequence)
            n = min(len(sequence.tokens) - sequence.computed, left, self.chunk)
            if not self._provide(sequence, n, spare):
                self._release(sequence)
                break
            del self.waiting[0]
            self.running.append(sequence)
            pieces.append(self._piece(sequence, n))
            left -= n
        if draft is not None and left and not short:
            pieces = self._drafted(pieces, draft, left)
        return Step(tuple(pieces), tuple((old, new) for new, old in self._copies.items()))

    def computed(self, step: Step) -> None:
        """The step has run: what it computed is in the cache, and full blocks are known."""
        for piece in step.pieces:
            sequence = piece.sequence
            if sequence.ended or sequence not in self.running:
                continue
            sequence.computed = piece.begin + piece.count - len(piece.draft)
            if sequence.scored is not None:
                sequence.scored = max(sequence.scored, min(sequence.computed, sequence.prompt))
            if self.prefix:
                self._learn(sequence)

    def accept(self, sequence: Running, right: int) -> None:
        """Of the draft behind its last piece the first ``right`` tokens are its own now, by ``append``; the room of the others goes back."""
        if sequence.ended or sequence not in self.running:
            return
        sequence.computed += right
        need = -(-sequence.computed // self.pool.size)
        self.pool.drop(sequence.blocks[need:])
        del sequence.blocks[need:]
        if self.prefix:
            self._learn(sequence)

    def append(self, sequence: Running, token: int) -> bool:
        """A token that was sampled; False where the sequence has its length now, and ends."""
        sequence.tokens.append(token)
        if len(sequence.tokens) >= sequence.most:
            self.finish(sequence)
            return False
        return True

    def fork(self, sequence: Running) -> Running:
        """A copy of a running sequence: same tokens, same blocks, until one of the two writes."""
        if sequence.forks < 1:
            raise RuntimeError(f"sequence {sequence.number} has no forks left")
        made = Running(sequence.number + sequence.forks, list(sequence.tokens), sequence.prompt, sequence.most, 0, sequence.computed, list(sequence.blocks), list(sequence.digests), reused=sequence.reused)
        sequence.forks -= 1
        for block in made.blocks:
            self.pool.hold(block)
        self.running.append(made)
        return made

    def finish(self, sequence: Running) -> None:
        """It ended or was cancelled: its blocks go back. Idempotent."""
        if not sequence.ended:
            sequence.ended = True
            self._release(sequence)
            (self.running if sequence in self.running else self.waiting).remove(sequence)

    def usage(self) -> Mapping[str, float]:
        return {"running": len(self.running), "waiting": len(self.waiting), "cache": 1 - self.pool.free / self.pool.count, "preemptions": self.preemptions}

    def _piece(self, sequence: Running, n: int) -> Piece:
        begin, end = sequence.computed, sequence.computed + n
        draws = int(end == len(sequence.tokens))
        wanted = end - max(begin, sequence.scored) if sequence.scored is not None and sequence.scored < min(end, sequence.prompt - 1) else draws
        return Piece(sequence, begin, n, wanted, draws)

    def _drafted(self, pieces: list[Piece], draft: Draft, left: int) -> list[Piece]:
        """Decodes with what may follow them, one after another as long as there is room; nobody gives anything up for it."""
        out: list[Piece] = []
        for piece in pieces:
            sequence = piece.sequence
            most = min(left, self.chunk - 1, sequence.most - len(sequence.tokens) - 1) if piece.draws and piece.count == 1 and not sequence.forks else 0
            said = tuple(draft(sequence, most)) if most > 0 else ()
            while said and not self._provide(sequence, 1 + len(said)):
                said = said[: len(said) // 2]
            left -= len(said)
            n = 1 + len(said)
            out.append(Piece(sequence, piece.begin, n, n, n, said) if said else piece)
        return out

    def _provide(self, sequence: Running, n: int, spare: int = 0) -> bool:
        """Blocks for ``n`` more tokens, its own where it will write; all or nothing, and nothing where fewer than ``spare`` would be left."""
        pool, size = self.pool, self.pool.size
        first, need = sequence.computed // size, -(-(sequence.computed + n) // size)
        shared = [i for i in range(first, min(need, len(sequence.blocks))) if pool.holders[sequence.blocks[i]] > 1]
        if (taken := len(shared) + max(0, need - len(sequence.blocks))) and taken + spare > pool.free:
            return False
        for i in shared:
            old, new = sequence.blocks[i], pool.take()
            assert new is not None
            if sequence.computed > i * size:
                self._copies[new] = old  # the last wins: a block that was given up in the same step is another's now
            pool.drop([old])
            sequence.blocks[i] = new
        while len(sequence.blocks) < need:
            block = pool.take()
            assert block is not None
            sequence.blocks.append(block)
        return True

    def _reuse(self, sequence: Running) -> None:
        """Blocks of its prefix that are known."""
        unscored = sequence.scored is not None and sequence.scored < sequence.prompt - 1
        found = self.pool.find(sequence.tokens) if self.prefix and not unscored else []
        for block in found:
            self.pool.hold(block)
        sequence.blocks, sequence.digests = found, []
        sequence.computed = len(found) * self.pool.size
        if not sequence.preempted:
            sequence.reused = sequence.computed
        if self.prefix:
            self._learn(sequence)

    def _learn(self, sequence: Running) -> None:
        size = self.pool.size
        while (len(sequence.digests) + 1) * size <= sequence.computed:
            n = len(sequence.digests)
            digest = self.pool.chain(sequence.tokens[n * size : (n + 1) * size], sequence.digests[-1] if n else None)
            sequence.digests.append(digest)
            self.pool.learn(sequence.blocks[n], digest)

    def _preempt(self, sequence: Running) -> None:
        self._release(sequence)
        sequence.preempted += 1
        self.preemptions += 1
        self.running.remove(sequence)
        insort(self.waiting, sequence, key=lambda r: r.number)

    def _release(self, sequence: Running) -> None:
        self.pool.drop(sequence.blocks)
        sequence.blocks, sequence.digests, sequence.computed = [], [], 0

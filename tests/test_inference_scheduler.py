"""The engine's bookkeeping without a model: a made-up one whose next token is a function of what it finds in its sequence's blocks, against the plain loop.

A wrong block, a copy that was not made, a prefix that is not the same, a token computed twice or not at all: each changes what is found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseed.inference.blocks import BlockPool
from deepseed.inference.errors import InferenceError
from deepseed.inference.lookup import Lookup
from deepseed.inference.scheduler import Draft, Piece, Running, Scheduler, Step


def following(tokens: list[int], branch: int) -> int:
    """The made-up model: depends on every token and its place, and on the branch, as a seed would."""
    return hash((tuple(tokens), branch)) % 5


@dataclass(frozen=True)
class Asked:
    prompt: tuple[int, ...]
    new: int
    n: int
    arrives: int  # step
    leaves: int | None  # step at which it is cancelled


def expected(asked: Asked) -> list[list[int]]:
    out = []
    for branch in range(asked.n):
        tokens = list(asked.prompt)
        for _ in range(asked.new):
            tokens.append(following(tokens, branch))
        out.append(tokens[len(asked.prompt) :])
    return out


class Caches:
    """What the tensors would hold: the token and position of each slot."""

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.slots: list[tuple[int, int] | None] = [None] * (blocks * size)

    def run(self, step: Step) -> list[tuple[Piece, list[int]]]:
        old = [self.slots[source * self.size : (source + 1) * self.size] for source, _ in step.copies]
        for (_, target), held in zip(step.copies, old, strict=True):
            self.slots[target * self.size : (target + 1) * self.size] = held
        written: set[int] = set()
        for piece in step.pieces:
            for at in range(piece.begin, piece.begin + piece.count):
                slot = self._slot(piece.sequence, at)
                assert slot not in written, "two tokens of a step in one slot"
                written.add(slot)
                self.slots[slot] = (piece.tokens[at - piece.begin], at)
        found = []
        for piece in step.pieces:
            held = [self.slots[self._slot(piece.sequence, at)] for at in range(piece.begin + piece.count)]
            assert [h[1] if h else None for h in held] == list(range(len(held))), "a slot of another position"
            if piece.wanted:
                found.append((piece, [h[0] for h in held if h]))
        return found

    def _slot(self, sequence: Running, at: int) -> int:
        return sequence.blocks[at // self.size] * self.size + at % self.size


def serve(scheduler: Scheduler, requests: list[Asked], luck: Callable[[int], list[bool]] | None = None) -> list[list[list[int]]]:
    """Run all to the end; the tokens of each branch of each request. Invariants are asserted on the way. ``luck``: for a draft of so many tokens, which are right."""
    pool = scheduler.pool
    caches = Caches(pool.count, pool.size)
    out: list[list[list[int]]] = [[[] for _ in range(r.n)] for r in requests]
    of: dict[Running, tuple[int, int]] = {}
    started: dict[int, list[Running]] = {}
    now = 0

    def draft(sequence: Running, most: int) -> list[int]:
        assert luck is not None
        tokens = list(sequence.tokens)
        for right in luck(most):
            tokens.append((following(tokens, of[sequence][1]) + (not right)) % 5)
        return tokens[len(sequence.tokens) :]

    limit = 50 + sum(r.arrives for r in requests) + 4 * sum((len(r.prompt) + r.new) * r.n for r in requests) ** 2
    while not scheduler.idle or any(r.arrives >= now for r in requests):
        for i, r in enumerate(requests):
            if r.arrives == now:
                first = scheduler.add(r.prompt, len(r.prompt) + r.new, r.n - 1)
                of[first], started[i] = (i, 0), [first]
            if r.leaves is not None and r.leaves == now and i in started:
                for sequence in started[i]:
                    scheduler.finish(sequence)
        before = list(scheduler.running)
        decodes = [s for s in before if len(s.tokens) - s.computed == 1]
        step = scheduler.schedule(draft if luck else None)
        pool.check()
        served = {p.sequence for p in step.pieces}
        assert step.tokens <= scheduler.budget and len(step.pieces) <= scheduler.sequences
        assert all(0 < p.count <= scheduler.chunk for p in step.pieces)
        assert step.pieces or scheduler.idle, "someone waits and nothing runs"
        if len(decodes) <= scheduler.sequences:
            assert all(s in served or s.preempted for s in decodes), "a decode was left out of a step"
        if before:
            assert min(before, key=lambda s: s.number) in scheduler.running, "the oldest was preempted"
        found = caches.run(step)
        scheduler.computed(step)
        for piece, tokens in found:
            sequence = piece.sequence
            if not piece.draws:
                continue
            assert tokens == [*sequence.tokens, *piece.draft]
            branches = [sequence]
            while sequence.forks:
                made = scheduler.fork(sequence)
                i, _ = of[sequence]
                of[made] = (i, len(started[i]))
                started[i].append(made)
                branches.append(made)
            for each in branches:
                i, branch = of[each]
                right = 0
                for said in (*piece.draft, None):
                    token = following(each.tokens, branch)
                    out[i][branch].append(token)
                    if not scheduler.append(each, token) or token != said:
                        break
                    right += 1
                if piece.draft:
                    scheduler.accept(each, right)
        pool.check()
        now += 1
        assert now < limit, "no end in sight"
    assert pool.free == pool.count, "blocks were lost"
    return out


prompts = st.builds(lambda base, cut, own: tuple(base[:cut]) + tuple(own), st.sampled_from([(0,) * 14, (1, 2, 3) * 5]), st.integers(0, 14), st.lists(st.integers(0, 4), min_size=1, max_size=6))
asked = st.builds(Asked, prompts, st.integers(1, 8), st.sampled_from([1, 1, 1, 2, 3]), st.integers(0, 12), st.one_of(st.none(), st.none(), st.integers(0, 20)))


@settings(max_examples=600, deadline=None)
@given(
    st.lists(asked, min_size=1, max_size=7), st.integers(1, 5), st.integers(0, 24), st.integers(1, 20), st.integers(1, 6), st.one_of(st.none(), st.integers(1, 9)), st.booleans()
)  # fmt: skip
def test_any_schedule_gives_the_tokens_of_the_plain_loop(requests: list[Asked], size: int, spare: int, budget: int, sequences: int, chunk: int | None, prefix: bool) -> None:
    longest = max(len(r.prompt) + r.new for r in requests)
    pool = BlockPool(-(-longest // size) + spare, size)
    got = serve(Scheduler(pool, budget, sequences, chunk, prefix), requests)
    for r, tokens in zip(requests, got, strict=True):
        whole = expected(r)
        if r.leaves is None:
            assert tokens == whole
        else:
            assert all(t == w[: len(t)] for t, w in zip(tokens, whole, strict=True))


@settings(max_examples=400, deadline=None)
@given(
    st.lists(asked, min_size=1, max_size=6), st.integers(1, 5), st.integers(0, 24), st.integers(2, 24), st.integers(1, 6), st.one_of(st.none(), st.integers(2, 9)), st.booleans(), st.randoms(use_true_random=False)
)  # fmt: skip
def test_drafts_change_no_token(requests: list[Asked], size: int, spare: int, budget: int, sequences: int, chunk: int | None, prefix: bool, draw: Random) -> None:
    """With forks, prefixes, preemptions and cancellations; drafts are right, wrong and half right."""
    longest = max(len(r.prompt) + r.new for r in requests)
    pool = BlockPool(-(-longest // size) + spare, size)
    got = serve(Scheduler(pool, budget, sequences, chunk, prefix), requests, lambda most: [draw.random() < 0.7 for _ in range(draw.randint(0, most))])
    for r, tokens in zip(requests, got, strict=True):
        assert all(t == w[: len(t)] and (r.leaves is not None or len(t) == r.new) for t, w in zip(tokens, expected(r), strict=True))


def test_right_drafts_save_steps_and_wrong_ones_cost_none() -> None:
    def steps(luck: Callable[[int], list[bool]] | None) -> int:
        scheduler, n = Scheduler(BlockPool(32, 4), budget=32, sequences=4), 0
        planned = scheduler.schedule

        def counted(draft: Draft | None = None) -> Step:
            nonlocal n
            step = planned(draft)
            n += bool(step.pieces)
            return step

        scheduler.schedule = counted  # type: ignore[method-assign]
        serve(scheduler, [Asked((1, 2, 3), 41, 1, 0, None)], luck)
        return n

    assert steps(None) == 41
    assert steps(lambda most: [False] * min(most, 4)) == 41
    assert steps(lambda most: [True] * min(most, 4)) == 9  # one for the prompt and its token, then five tokens each


def test_lookup_says_what_followed() -> None:
    lookup = Lookup()
    assert list(lookup.draft([1, 2, 3, 4], 3)) == []
    assert list(lookup.draft([1, 2, 3, 4, 1, 2], 3)) == [3, 4, 1]
    assert list(lookup.draft([1, 2, 3, 4, 1, 2, 9, 1, 2], 2)) == [9, 1], "the latest place"
    assert list(lookup.draft([1, 2, 3, 4, 1, 2, 9, 1, 2, 3, 4, 1, 2], 1)) == [9], "the longest end that stood before"
    assert list(Lookup().draft([7, 7, 7], 4)) == [7, 7, 7, 7]
    assert list(Lookup().draft([5, 6, 5, 6, 5], 4)) == [6, 5, 6, 5], "what repeats goes on"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 6))
def test_lookup_reads_on_where_it_was(tokens: list[int], most: int) -> None:
    grows = Lookup()
    for n in range(1, len(tokens) + 1):
        got = list(grows.draft(tokens[:n], most))
        assert got == list(Lookup().draft(tokens[:n], most)) and len(got) in (0, most)


def test_an_equal_prompt_computes_only_its_end() -> None:
    scheduler = Scheduler(BlockPool(16, 4), budget=64, sequences=4)
    prompt = tuple(range(19))
    serve(scheduler, [Asked(prompt, 1, 1, 0, None)])
    scheduler.add(prompt, 20)
    (piece,) = scheduler.schedule().pieces
    assert (piece.begin, piece.count) == (16, 3)
    assert piece.sequence.reused == 16


def test_a_prompt_of_whole_blocks_still_computes_its_last_token() -> None:
    scheduler = Scheduler(BlockPool(16, 4), budget=64, sequences=4)
    prompt = tuple(range(16))
    serve(scheduler, [Asked(prompt, 1, 1, 0, None)])
    scheduler.add(prompt, 17)
    assert [(p.begin, p.count) for p in scheduler.schedule().pieces] == [(12, 4)]


def test_what_is_free_longest_is_forgotten_first() -> None:
    pool = BlockPool(3, 1)
    blocks = [pool.take() for _ in range(3)]
    digests = [pool.chain([n]) for n in range(3)]
    for block, digest in zip(blocks, digests, strict=True):
        assert block is not None
        pool.learn(block, digest)
    for n in (1, 0, 2):
        pool.drop([blocks[n]])  # type: ignore[list-item]
    pool.take()
    assert pool.find([1, 9]) == []
    assert [len(pool.find([n, 9])) for n in (0, 2)] == [1, 1]


def test_forks_copy_a_block_only_when_they_write() -> None:
    scheduler = Scheduler(BlockPool(8, 4), budget=64, sequences=8)
    first = scheduler.add((1, 2, 3, 4, 5), 9, forks=1)
    scheduler.computed(scheduler.schedule())
    second = scheduler.fork(first)
    assert scheduler.pool.free == 6, "two sequences, two blocks"
    for each in (first, second):
        scheduler.append(each, 0)
    step = scheduler.schedule()
    assert len(step.copies) == 1 and first.blocks[0] == second.blocks[0] and first.blocks[1] != second.blocks[1]


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    with pytest.raises(InferenceError, match=r"17 tokens does not fit into a cache of 16 \(4 blocks of 4\)"):
        Scheduler(BlockPool(4, 4), budget=8, sequences=2).add((1, 2), 17)
    with pytest.raises(InferenceError, match="empty prompt"):
        Scheduler(BlockPool(4, 4), budget=8, sequences=2).add((), 7)


def test_a_block_that_is_free_cannot_be_dropped() -> None:
    with pytest.raises(RuntimeError, match="free already"):
        BlockPool(2, 4).drop([0])


def test_ten_thousand_requests_leave_nothing_behind() -> None:
    import random
    import tracemalloc

    draw = random.Random(0)
    scheduler = Scheduler(BlockPool(48, 4), budget=64, sequences=8)
    live: list[Running] = []
    seen: list[int] = []
    tracemalloc.start()
    for n in range(10_000):
        live.append(scheduler.add([draw.randrange(50) for _ in range(draw.randrange(1, 24))], draw.randrange(24, 40)))
        if draw.random() < 0.3:
            scheduler.finish(live.pop(draw.randrange(len(live))))
        while len(live) > 12:
            step = scheduler.schedule()
            scheduler.computed(step)
            for piece in step.pieces:
                if piece.wanted:
                    scheduler.append(piece.sequence, draw.randrange(50))
            live = [s for s in live if not s.ended]
        if n in (2_000, 9_999):
            seen.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    for sequence in live:
        scheduler.finish(sequence)
    scheduler.pool.check()
    assert scheduler.pool.free == 48
    assert seen[1] < seen[0] + 40_000, f"{seen} bytes held after 2,000 and 10,000 requests"

"""Several engines behind one server, each in processes of its own: plan ``dp2``, or ``dp2+tp2`` where each lies on two ranks.

``Replicas`` looks like one engine to the worker. A request goes to the replica that has most of its beginning in its cache, as far as is known here of what was sent there, unless that
one is full and another is not; else to the one with the fewest outputs under way. A replica that ends takes its requests along, each told which replica and why; the others go on, and
new requests go to them. It is started again, up to ``MOST_STARTS`` times, and gets requests once it has said that it is ready. When none is left the server fails as with one engine.

The leading rank of a replica connects to a socket of this process, says what it is, and then ``answer``s: requests and cancellations come, updates go. It ends when its connection does,
so that no process outlives the server.
"""

from __future__ import annotations

import os
import socket
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import count
from multiprocessing.connection import Client, Connection
from typing import Any

from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.outputs import Completion, Counts, Output, Update
from deepseed.inference.sampling import Drawn, SamplingParams
from deepseed.logs import warn
from deepseed.runtime.distributed import TIMEOUT
from deepseed.serve.errors import Lost, cause

BEAT = TIMEOUT / 4
MOST_STARTS = 3  # of a replica that has ended, again: one that ends so often has a reason
Found = tuple[Connection, "Card"]  # a leading rank that has said what it is
SOON = 0.005  # seconds until it is looked whether a form is compiled


@dataclass(frozen=True)
class Card:
    """What a replica says of itself when it is ready."""

    number: int
    blocks: int
    block: int  # tokens
    sequences: int
    max_length: int
    vocabulary: int
    ends: frozenset[int]

    @classmethod
    def of(cls, engine: Engine, number: int) -> Card:
        pool = engine.scheduler.pool
        return cls(number, pool.count, pool.size, engine.scheduler.sequences, engine.max_length, engine.vocabulary, engine.ends)


@dataclass(frozen=True)
class News:
    """What a step of a replica gave. ``firsts``: of requests whose first token came, how many tokens the cache had, the log-probabilities of the prompt, and when they
    were scheduled, by the clock that the processes of a machine share."""

    updates: Sequence[Update]
    firsts: Mapping[str, tuple[int, list[Drawn], float | None]]
    usage: Mapping[str, float]
    counts: Counts


def answer(engine: Engine, address: str, key: bytes, number: int) -> None:
    """The leading rank's part, until the other side is gone."""
    with Client(address, "AF_UNIX", authkey=key) as other:
        other.send(Card.of(engine, number))

        def begin(name: str, prompt: list[int], params: SamplingParams) -> None:
            try:
                there[name] = engine.request(prompt, params, name)
            except InferenceError as error:
                other.send(News([Update(name, 0, (), "", "error", error=str(error), refused=True)], {}, engine.usage(), engine.counts))

        there: dict[str, Completion] = {}
        compiling: dict[str, tuple[Future[Any], list[int], SamplingParams]] = {}
        beside = ThreadPoolExecutor(1, "deepseed-form")
        try:
            while True:
                if engine.idle and not other.poll(SOON if compiling else BEAT) and not compiling:
                    engine.beat()
                    continue
                while other.poll():
                    name, asked = other.recv()
                    if asked is None:
                        compiling.pop(name, None)
                        there.pop(name, None)
                        engine.cancel(name)
                        continue
                    prompt, params = asked
                    if params.form is None:
                        begin(name, prompt, params)
                    else:
                        compiling[name] = beside.submit(params.form.follow, engine.tokenizer, engine.ends, engine.vocabulary), prompt, params
                for name in [n for n, (done, *_) in compiling.items() if done.done()]:
                    _, prompt, params = compiling.pop(name)
                    begin(name, prompt, params)
                updates = engine.step()
                firsts = {u.request: (c.cached_tokens, c.prompt_logprobs, c.scheduled) for u in updates if u.index == 0 and len((c := there[u.request]).outputs[0].token_ids) == len(u.token_ids)}
                other.send(News(updates, firsts, engine.usage(), engine.counts))
                ended = set[str]()
                for u in updates:
                    if u.finish_reason is not None and there[u.request].finished:
                        ended.add(u.request)
                for name in ended:
                    del there[name]
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
        except BaseException as error:
            other.send(Lost(cause(error)))
            raise


class Prefixes:
    """Which blocks of tokens a replica has computed, as far as its requests tell; as many as it has room for, the oldest forgotten first."""

    def __init__(self, card: Card) -> None:
        self.size, self.most = card.block, card.blocks
        self._known: OrderedDict[int, None] = OrderedDict()

    def known(self, tokens: Sequence[int]) -> int:
        """Blocks of the beginning of ``tokens``."""
        n = 0
        for key in self._keys(tokens):
            if key not in self._known:
                break
            n += 1
        return n

    def learn(self, tokens: Sequence[int]) -> None:
        for key in self._keys(tokens):
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self.most:
            self._known.popitem(last=False)

    def _keys(self, tokens: Sequence[int]) -> Iterator[int]:
        key = 0
        for begin in range(0, len(tokens) - self.size + 1, self.size):
            key = hash((key, *tokens[begin : begin + self.size]))
            yield key


@dataclass(eq=False)
class Replica:
    card: Card
    connection: Connection
    prefixes: Prefixes
    load: int = 0  # outputs under way
    sent: int = 0  # requests so far
    lost: str = ""  # why it has ended
    starts: int = 0  # after the first
    usage: Mapping[str, float] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)


class Replicas:
    """``found``: leading ranks that have said their Card. ``again`` starts the replica of a number once more, waits until it is ready, and raises where it does not become so; None: nothing does."""

    def __init__(self, found: Sequence[Found], tokenizer: Any, again: Callable[[int], Found] | None = None) -> None:
        self.tokenizer = tokenizer
        self.all = [Replica(card, connection, Prefixes(card)) for connection, card in sorted(found, key=lambda f: f[1].number)]
        cards = [r.card for r in self.all]
        self.vocabulary, self.ends = cards[0].vocabulary, cards[0].ends
        self.longest = min(min(c.max_length, c.blocks * c.block) for c in cards)
        self.notify: Callable[[], None] = lambda: None
        self._where: dict[str, tuple[Replica, Completion]] = {}
        self._names = count(1)
        self._news: deque[tuple[Replica, News | Found | BaseException]] = deque()
        self._again, self._closed = again, False
        self.starts = 0  # of replicas that had ended
        self._before = Counts()  # of those
        for replica in self.all:
            self._thread(self._listen, replica)

    @property
    def living(self) -> list[Replica]:
        return [r for r in self.all if not r.lost]

    @property
    def sequences(self) -> int:
        return sum(r.card.sequences for r in self.living)

    @property
    def room(self) -> str:
        return f"{len(self.all)} replicas, each of {self.all[0].card.blocks} blocks of {self.all[0].card.block} tokens"

    @property
    def idle(self) -> bool:
        """Nothing has come; what the replicas compute is theirs."""
        return not self._news and bool(self.living)

    def beat(self) -> None:
        """They have beats of their own."""

    def request(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
        while True:
            replica = self._route(prompt)
            made = Completion(f"request-{next(self._names)}", None, list(prompt), [Output(i) for i in range(params.n)])
            self._where[made.request] = (replica, made)
            replica.load += params.n
            replica.sent += 1
            replica.prefixes.learn(prompt)
            try:
                replica.connection.send((made.request, (made.prompt_token_ids, params)))
                return made
            except OSError:  # it has just ended, and its thread says so
                self._forget(made.request)
                replica.lost = replica.lost or "its connection is closed"

    def cancel(self, request: str) -> None:
        found = self._where.get(request)
        if found is not None:
            self._forget(request)
            for output in found[1].outputs:
                output.finish_reason = output.finish_reason or "cancelled"
            with suppress(OSError):  # else it holds nothing any more
                found[0].connection.send((request, None))

    def step(self) -> list[Update]:
        """What has come by now. Raises Lost where no replica is left."""
        out: list[Update] = []
        while self._news:
            replica, news = self._news.popleft()
            if isinstance(news, BaseException):
                out += self._lose(replica, news)
                continue
            if isinstance(news, tuple):
                self._replace(replica, news)
                continue
            replica.usage, replica.counts = news.usage, news.counts
            for name, (cached, logprobs, scheduled) in news.firsts.items():
                if name in self._where:
                    made = self._where[name][1]
                    made.cached_tokens, made.prompt_logprobs, made.scheduled = cached, logprobs, scheduled
            out += [u for u in news.updates if u.request in self._where and self._grow(u)]
        if not self.living and not out:
            raise Lost(self._nobody())
        return out

    def usage(self) -> Mapping[str, float]:
        said = [r.usage for r in self.living if r.usage]
        total = {key: sum(u[key] for u in said) for key in ("running", "waiting", "cache", "preemptions")}
        return total | {"cache": total["cache"] / max(1, len(said))}

    @property
    def counts(self) -> Counts:
        return _sum([self._before, *(r.counts for r in self.all)])

    def _route(self, prompt: Sequence[int]) -> Replica:
        living = self.living
        if not living:
            raise Lost(self._nobody())
        least = min(living, key=lambda r: (r.load, r.sent))
        known = [(r.prefixes.known(prompt), r) for r in living]
        most, best = max(known, key=lambda k: (k[0], -k[1].load))
        return best if most and (best.load < best.card.sequences or least.load >= least.card.sequences) else least

    def _grow(self, update: Update) -> bool:
        replica, made = self._where[update.request]
        output = made.outputs[update.index]
        output.token_ids += update.token_ids
        output.text += update.text
        output.logprobs += update.logprobs
        output.finish_reason = update.finish_reason
        if update.error or made.finished:
            self._forget(update.request)
            for each in made.outputs:
                replica.prefixes.learn([*made.prompt_token_ids, *each.token_ids])
        return True

    def _lose(self, replica: Replica, why: BaseException) -> list[Update]:
        replica.lost = str(why) or "its process has ended"
        message = f"replica {replica.card.number} of {len(self.all)} has ended ({replica.lost}), and this request with it; ask again"
        mine = [name for name, (where, _) in self._where.items() if where is replica]
        for name in mine:
            self._forget(name)
        if self._again is not None and replica.starts < MOST_STARTS and self.living and not self._closed:
            self._thread(self._start, replica)
        return [Update(name, 0, (), "", "error", error=message) for name in mine]

    def _start(self, replica: Replica) -> None:
        """In a thread: the replica once more."""
        assert self._again is not None
        warn(f"replica {replica.card.number} of {len(self.all)} has ended ({replica.lost}); it is started again")
        try:
            news: Found | BaseException = self._again(replica.card.number)
        except (InferenceError, OSError) as error:
            warn(f"replica {replica.card.number} of {len(self.all)} is not started again: {error}")
            return
        self._news.append((replica, news))
        self.notify()

    def _replace(self, old: Replica, found: Found) -> None:
        connection, card = found
        if self._closed:
            connection.close()
            return
        self._before, self.starts = _sum([self._before, old.counts]), self.starts + 1
        new = Replica(card, connection, Prefixes(card), sent=old.sent, starts=old.starts + 1)
        self.all[self.all.index(old)] = new
        self._thread(self._listen, new)

    def _thread(self, run: Callable[[Replica], None], replica: Replica) -> None:
        threading.Thread(target=run, args=(replica,), name=f"deepseed-replica-{replica.card.number}", daemon=True).start()

    def _forget(self, request: str) -> None:
        replica, made = self._where.pop(request)
        replica.load -= len(made.outputs)

    def _nobody(self) -> str:
        return "no replica is left; " + ", ".join(f"replica {r.card.number}: {r.lost}" for r in self.all)

    def _listen(self, replica: Replica) -> None:
        while True:
            try:
                news = replica.connection.recv()
            except (EOFError, OSError):
                news = Lost()
            self._news.append((replica, news))
            self.notify()
            if isinstance(news, BaseException):
                return

    def close(self) -> None:
        """They see that nobody is there any more, and end."""
        self._closed = True
        for replica in self.all:
            if not replica.lost:
                with socket.socket(fileno=os.dup(replica.connection.fileno())) as made:
                    made.shutdown(socket.SHUT_RDWR)  # closing alone would wait for the thread that reads


def _sum(counts: Sequence[Counts]) -> Counts:
    return Counts(*(sum(getattr(c, f.name) for c in counts) for f in fields(Counts)))

"""The one thread that runs the engine, and the way there and back for the event loop, which takes no lock and waits for no step.

    worker = Worker(engine, metrics)
    with worker.open(prompts, params) as tickets:           # leaving frees the blocks, whatever has been read
        async for n, update in tickets: ...                 # n: which prompt

Requests and cancellations lie in an inbox that the thread empties between two steps; what a step gave goes back in one call an event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from time import monotonic
from types import TracebackType

from deepseed.inference.errors import InferenceError
from deepseed.inference.outputs import Completion, Update
from deepseed.inference.sampling import SamplingParams
from deepseed.runtime.distributed import TIMEOUT
from deepseed.serve.errors import ServeError, cause
from deepseed.serve.metrics import Metrics
from deepseed.serve.served import Served

BEAT = TIMEOUT / 4


class Tickets:
    """The prompts of one HTTP request, on their way. Made and read in the event loop."""

    def __init__(self, worker: Worker, prompts: Sequence[list[int]], params: Sequence[SamplingParams], lies: Callable[[int], None], done: Callable[[], None]) -> None:
        """``lies`` is told of bytes that come here, or go from here, and ``done`` once when nothing more is computed; both in the event loop."""
        self.worker, self.prompts, self.params, self.lies, self.done = worker, prompts, params, lies, done
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[list[tuple[int, Update]] | BaseException] = asyncio.Queue()
        self.accepted: asyncio.Future[None] = self.loop.create_future()
        self.arrived = monotonic()
        self.coming = sum(p.n for p in params)  # outputs that have not ended
        # the thread's own
        self.completions: list[Completion] = []
        self.left = sum(p.n for p in params)
        self.gone = False
        self.last: dict[tuple[int, int], float] = {}
        self.first: dict[tuple[int, int], float] = {}

    def __enter__(self) -> Tickets:
        self.worker.send(self.worker.begin, self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.worker.send(self.worker.end, self)
        if not self.accepted.done():
            self.accepted.cancel()
        elif not self.accepted.cancelled():
            self.accepted.exception()  # seen

    @property
    def cached(self) -> int:
        """Tokens of the prompts that the cache had."""
        return sum(c.cached_tokens for c in self.completions)

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Update]]]:
        left = self.left
        while left:
            item = await self.queue.get()
            if isinstance(item, BaseException):
                raise item
            self.lies(-_size(item))
            left -= sum(u.finish_reason is not None for _, u in item)
            yield item


class Worker:
    """``died`` is called in the thread when the engine has failed, with every request told."""

    def __init__(self, engine: Served, metrics: Metrics, died: Callable[[BaseException], None] | None = None) -> None:
        self.engine, self.metrics, self._died = engine, metrics, died
        self.error: BaseException | None = None
        self._inbox: deque[tuple[Callable[[Tickets], None], Tickets]] = deque()
        self._wake = threading.Event()
        self._closed = False
        engine.notify = self._wake.set
        self._of: dict[str, tuple[Tickets, int]] = {}
        self._there: set[Tickets] = set()
        self._thread = threading.Thread(target=self._run, name="deepseed-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self.error is None and self._thread.is_alive()

    def open(self, prompts: Sequence[list[int]], params: Sequence[SamplingParams], lies: Callable[[int], None] = lambda _: None, done: Callable[[], None] = lambda: None) -> Tickets:
        return Tickets(self, prompts, params, lies, done)

    def send(self, what: Callable[[Tickets], None], tickets: Tickets) -> None:
        self._inbox.append((what, tickets))
        self._wake.set()
        if self.error is not None:
            _refuse(tickets, _stopped(self.error))

    def close(self) -> None:
        """End the thread after the step under way."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    # in the thread ----------------------------------------------------------------------------------------------------

    def begin(self, tickets: Tickets) -> None:
        self._there.add(tickets)
        try:
            for n, (prompt, params) in enumerate(zip(tickets.prompts, tickets.params, strict=True)):
                made = self.engine.request(prompt, params)
                self._of[made.request] = (tickets, n)
                tickets.completions.append(made)
        except InferenceError as error:
            self.end(tickets)
            _call(tickets, _refuse, tickets, ServeError(400, str(error)))
            return
        for prompt in tickets.prompts:
            self.metrics.prompt_tokens += len(prompt)
            self.metrics.prefix_queries += len(prompt)
            self.metrics.prompt_lengths.add(len(prompt))
        _call(tickets, _accept, tickets)

    def end(self, tickets: Tickets) -> None:
        """It has all, or nobody wants it any more."""
        self._there.discard(tickets)
        tickets.gone = True
        for completion in tickets.completions:
            if self._of.pop(completion.request, None) is not None and not completion.finished:
                self.metrics.aborted += sum(o.finish_reason is None for o in completion.outputs)
                self.engine.cancel(completion.request)

    def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                while self._inbox:
                    what, tickets = self._inbox.popleft()
                    what(tickets)
                if self._closed:
                    raise RuntimeError("the server has ended")
                if self.engine.idle:
                    self._look()
                    if not self._wake.wait(BEAT):
                        self.engine.beat()
                    continue
                updates = self.engine.step()
                self._look()
                self._hand(updates)
        except BaseException as error:
            self.error = error
            while self._inbox:
                what, tickets = self._inbox.popleft()
                if what == self.begin:
                    self._there.add(tickets)
            for tickets in self._there:
                _call(tickets, _refuse, tickets, _stopped(error))
            if not self._closed and self._died is not None:
                self._died(error)

    def _look(self) -> None:
        m, usage, counts = self.metrics, self.engine.usage(), self.engine.counts
        m.running, m.waiting, m.cache, m.preemptions = int(usage["running"]), int(usage["waiting"]), usage["cache"], int(usage["preemptions"])
        for n in range(steps := counts.steps - m.steps):
            m.of_a_step.add((counts.computed_tokens - m.computed + n) // steps)  # of several replicas: their mean
        m.computed = counts.computed_tokens
        m.steps, m.drafts, m.drafted, m.accepted = counts.steps, counts.drafts, counts.drafted_tokens, counts.accepted_tokens

    def _hand(self, updates: Sequence[Update]) -> None:
        now = monotonic()
        ready: dict[Tickets, list[tuple[int, Update]]] = {}
        for update in updates:
            found = self._of.get(update.request)
            if found is None:
                continue
            tickets, n = found
            if update.error:
                _call(tickets, _refuse, tickets, ServeError(400, update.error) if update.refused else ServeError(500, update.error, kind="server_error"))
                self.metrics.aborted += sum(o.finish_reason is None for o in tickets.completions[n].outputs)
                del self._of[update.request]
                self.end(tickets)
                continue
            ready.setdefault(tickets, []).append((n, update))
            self._count(tickets, n, update, now)
        for update in updates:  # all that it has said is handed on, read or not
            if (found := self._of.get(update.request)) is not None and found[0].completions[found[1]].finished:
                del self._of[update.request]
        loops: dict[asyncio.AbstractEventLoop, list[tuple[Tickets, list[tuple[int, Update]]]]] = {}
        for tickets, items in ready.items():
            loops.setdefault(tickets.loop, []).append((tickets, items))
        for loop, many in loops.items():
            try:
                loop.call_soon_threadsafe(_deliver, many)
            except RuntimeError:  # it is closed
                for tickets, _ in many:
                    self.end(tickets)

    def _count(self, tickets: Tickets, n: int, update: Update, now: float) -> None:
        m, key = self.metrics, (n, update.index)
        m.generation_tokens += len(update.token_ids)
        before = tickets.last.get(key)
        if before is None:
            tickets.first[key] = now
            m.first.add(now - tickets.arrived)
            if update.index == 0:
                m.prefix_hits += tickets.completions[n].cached_tokens
        else:
            m.between.add(now - before)
        tickets.last[key] = now
        if update.finish_reason is not None:
            m.success[update.finish_reason] += 1
            made, first = tickets.completions[n], tickets.first[key]
            length, scheduled = len(made.outputs[update.index].token_ids), made.scheduled or tickets.arrived
            m.whole.add(now - tickets.arrived)
            m.queue.add(scheduled - tickets.arrived)
            m.prefill.add(first - scheduled)
            m.decode.add(now - first)
            m.inference.add(now - scheduled)
            m.output_lengths.add(length)
            if length > 1:
                m.a_token.add((now - first) / (length - 1))
            if made.finished and tickets.last.keys() >= {(n, o.index) for o in made.outputs}:
                m.longest.add(max(len(o.token_ids) for o in made.outputs))


def _stopped(error: BaseException) -> ServeError:
    return ServeError(500, f"the engine has stopped: {cause(error)}"[:500], kind="server_error")


def _deliver(many: list[tuple[Tickets, list[tuple[int, Update]]]]) -> None:
    for tickets, items in many:
        tickets.queue.put_nowait(items)
        tickets.lies(_size(items))
        tickets.coming -= sum(u.finish_reason is not None for _, u in items)
        if not tickets.coming:
            tickets.done()


def _size(items: Sequence[tuple[int, Update]]) -> int:
    """Bytes, about: of tokens, and of their log-probabilities."""
    return sum(400 + len(u.text) + 40 * len(u.token_ids) + sum(200 + 160 * len(d.top) for d in u.logprobs) for _, u in items)


def _accept(tickets: Tickets) -> None:
    if not tickets.accepted.done():
        tickets.accepted.set_result(None)


def _refuse(tickets: Tickets, error: BaseException) -> None:
    if not tickets.accepted.done():
        tickets.accepted.set_exception(error)
    tickets.queue.put_nowait(error)
    tickets.done()


def _call(tickets: Tickets, what: Callable[..., None], *args: object) -> None:
    try:
        tickets.loop.call_soon_threadsafe(what, *args)
    except RuntimeError:  # its loop is closed: nobody is there to be told
        tickets.gone = True

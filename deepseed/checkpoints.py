"""``checkpoints = deepseed.Checkpoints(step, dir, every=100, keep=3)``: a series of checkpoints in a folder, the way back, and what is kept.

    extra = checkpoints.load()          # before the first batch: the latest one that is whole, None where there is none
    for batch in loader:
        step(batch)
        checkpoints.after_step()        # saves where it is time

Each is a folder of its own, as ``step.save`` writes it. ``dir/latest`` names one and moves when that one is in its place; then old ones go. A job that saves has the
folder for itself, from its first save on, or its first load where ``every`` says that it will.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepseed import checkpoint
from deepseed.background import Writing, join
from deepseed.explain_text import amount
from deepseed.logs import warn
from deepseed.objects import COUNT, GENERATORS, check, gathered, given, set_generators
from deepseed.runtime import preempt
from deepseed.runtime.board import Board
from deepseed.runtime.folder import CheckpointError, DamagedError, discard
from deepseed.runtime.hold import hold
from deepseed.runtime.host import Host, agreed, everywhere
from deepseed.runtime.series import AUTOMATIC, LATEST, check_tag, latest, point, prune, series
from deepseed.runtime.staged import Staged, available

if TYPE_CHECKING:
    from deepseed.compiled import Compiled

OBJECTS = "objects"  # the text of a checkpoint that has their states


class Checkpoints:
    """A series of checkpoints of a compiled train step, module, or engine's ``compiled``, in ``dir``. Every rank must make it, and make every call.

    every: ``after_step`` saves each time the number of steps is a multiple of it. keep: how many checkpoints stay, of those with no tag of the user's own;
    the one that ``latest`` names always does. objects: by name whatever has ``state_dict`` and ``load_state_dict`` (scheduler, stateful data loader):
    saved and restored too, for each process its own where they differ. strict: False leaves one as it is whose state a checkpoint has not. ``path``: the checkpoint that was loaded or saved last."""

    def __init__(
        self, step: Compiled, dir: str | os.PathLike[str], every: int | None = None, keep: int | None = None, asynchronous: bool = False, *, objects: Mapping[str, Any] | None = None,
        strict: bool = True,
    ) -> None:  # fmt: skip
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise CheckpointError(f"Checkpoints({name}={value!r})\n  fix: a number of {'steps' if name == 'every' else 'checkpoints'}, 1 or more, or None")
        self.step, self.dir = step, Path(os.path.realpath(dir))
        self.every, self.keep, self.asynchronous = every, keep, asynchronous
        self.objects = dict(objects or {})
        self.strict = strict
        self.path: Path | None = None
        self._count = 0  # calls of after_step
        self._staged = Staged()
        self._board: Board | None = None
        self._writing: Writing | None = None
        check(self.objects)

    @property
    def host(self) -> Host:
        return self.step.host

    @property
    def steps(self) -> int:
        """Steps so far; of a module, whose steps are the user's, calls of ``after_step``."""
        return self.step.steps if self.step.whole else self._count

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory in which this process keeps copies of what is written while training goes on."""
        return self._staged.nbytes

    # saving ---------------------------------------------------------------------------------------------------------

    def after_step(self, extra: Any = None) -> Path | None:
        """Save where ``every`` says so, or where a SIGTERM has asked some rank to stop: then all ranks save after the same step, and end with exit code
        143. Its folder, where it has. ``extra``: plain data of the user's own, or a function that gives it. Raises CheckpointError where a save that was
        under way has failed."""
        self._count += 1
        asked = preempt.asked(self.steps, str(self.dir))
        if self._writing is not None:
            done = self._writing.done  # asked once: it may become true between two questions, on this rank alone
            if self.host.same(f"written: {done}") and done:
                self.wait()
        if (self.every is None or self.steps % self.every) and not asked:
            return None
        path = self.save(extra() if callable(extra) else extra)
        if asked:
            self.wait()
            preempt.leave()
        return path

    def save(self, extra: Any = None, tag: str | None = None, *, frozen: bool = True, move_latest: bool = True) -> Path:
        """Write a checkpoint into ``dir/tag`` (``step100``), then let ``latest`` name it, then delete old ones; its folder. Raises CheckpointError
        on every rank where one fails: ``latest`` is as it was, and training can go on. ``frozen``: as of ``step.save``.

        ``asynchronous``: returns when there is a copy of this process's part in host memory, which a thread writes. The next call of ``save``, ``load`` or
        ``wait`` waits for it, and raises what went wrong; so does ``after_step``, which does not wait."""
        self.wait()
        tag = check_tag(tag if tag is not None else f"step{self.steps}")
        with self.host.together():
            self.step._written()
            everywhere(self.host, f"saving to {self.dir / tag}", lambda: hold(self.dir) if self.host.first else None)
            texts = {OBJECTS: gathered(self.host, self.objects, self._count, f"saving to {self.dir / tag}")}
            saving = checkpoint.begin(self.step, self.dir / tag, extra, frozen, texts)
            if self.asynchronous and self._room(saving):
                self._begin(saving, lambda: self._placed(tag, move_latest))
            else:
                checkpoint.finish(self.host, saving, lambda: self._placed(tag, move_latest))
            self.path = saving.target
        return saving.target

    def wait(self) -> None:
        """Until what is being written is in its place. Raises CheckpointError, on every rank, where it could not be written."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            with self.host.together():
                agreed(self.host.everyone(writing.settle()))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()

    def _room(self, saving: checkpoint.Saving) -> bool:
        """Whether the hosts' memory has room for the copies."""
        said = self.host.everyone((self._staged.lacking(saving.held), available(), self._staged.nbytes == 0))
        each, here = max(lacking for lacking, _, _ in said), int(os.environ.get("LOCAL_WORLD_SIZE", len(said)))
        free = min((n for _, n, _ in said if n is not None), default=None)
        room = free is None or each * here <= free
        if self.host.first and (not room or said[0][2]):
            text = f"{amount(each)} of host memory in each of {here} processes hold a copy of what is saved while training goes on"
            warn(f"{text}" if room else f"{text}: {amount(free or 0)} are free, so training waits for {saving.target}")
        return room

    def _begin(self, saving: checkpoint.Saving, then: Callable[[], None]) -> None:
        """Copy, and leave the rest to a thread."""
        if self._board is None:
            self._board = self.host.board()
            self._board.before_leaving(join)

        def copy() -> None:
            saving.held = self._staged.copy(saving.held)

        try:
            everywhere(self.host, saving.what, copy)
        except Exception:
            if self.host.first:
                discard(saving.folder)
            raise
        saving.entries = {name: replace(e, parts=()) for name, e in saving.entries.items()}
        for n, arena in enumerate(self.host.arenas):
            arena.kept = self._staged.of(n)
        self._writing = Writing(saving, self._board, self.host.first, self.host.mesh.ranks // len(self.host.coordinates), then)

    def _placed(self, tag: str, move_latest: bool) -> None:
        """On rank 0, when a checkpoint is in its place."""
        if move_latest:
            point(self.dir, tag)
        try:
            prune(self.dir, self.keep)
        except OSError as error:
            warn(f"an old checkpoint in {self.dir} could not be deleted: {error}")

    # loading --------------------------------------------------------------------------------------------------------

    def load(self, tag: str | None = None, *, optimizer: bool = True, cast: bool = False, objects: bool = True) -> Any:
        """Go on from the checkpoint that ``latest`` names, or where that is not whole from the newest one that is, which is said on stderr; its ``extra``.
        None where there is none. ``tag``: from this one. ``objects``: False leaves them and the generators as they are; else as ``step.load``.

        Raises CheckpointError where none of those that are there can be read, or the one that can does not fit."""
        self.wait()
        with self.host.together():
            self.path = None
            self.host.agree([("the folder of checkpoints to load from", str(self.dir)), ("tag=", tag), ("objects=", sorted(self.objects) if objects else None)])
            what = f"loading from {self.dir}"
            if self.every is not None:
                everywhere(self.host, what, lambda: hold(self.dir) if self.host.first else None)
            tags, wrong, damaged = everywhere(self.host, what, lambda: self._candidates(tag) if self.host.first else ([], [], False))[0]
            for name in tags:
                try:
                    extra = self._load(name, optimizer, cast, objects)
                except DamagedError as error:
                    if tag is not None:
                        raise
                    wrong.append(str(error).replace("\n  nothing was loaded", "").split("\n  fix:")[0])
                    continue
                self.path = self.dir / name
                self._say(f"{self.path} is loaded, the newest checkpoint that is whole", wrong)
                return extra
            if tags or damaged:
                raise DamagedError("\n  ".join([f"no checkpoint in {self.dir} is whole", *wrong]) + "\n  fix: load from another folder, or begin anew in an empty one")
            self._say(f"there is no checkpoint in {self.dir} to load", wrong)
            return None

    def _candidates(self, tag: str | None) -> tuple[list[str], list[str], bool]:
        """The tags to try, what is wrong with others, and whether one of these was whole once."""
        if tag is not None:
            return [check_tag(tag)], [], False
        found, wrong, damaged = series(self.dir), [], False
        try:
            pointed = latest(self.dir)
        except DamagedError as error:
            pointed, damaged = None, True
            wrong.append(str(error))
        whole = [f for f in found if not f.fault]
        wrong += [f.fault for f in found if f.fault and f.tag != pointed]
        damaged |= any(not f.partial for f in found if f.fault)
        at = next((f.saved for f in whole if f.tag == pointed), float("inf"))
        wrong += [f"{f.folder} is whole too and newer, but {LATEST} does not name it: its save was cut off before that" for f in whole if f.saved > at and AUTOMATIC.fullmatch(f.tag)]
        return [*([pointed] if pointed is not None else []), *(f.tag for f in whole if f.tag != pointed)], wrong, damaged

    def _say(self, text: str, wrong: list[str]) -> None:
        if wrong and self.host.first:
            warn("\n  ".join([text, *wrong]))

    def _load(self, tag: str, optimizer: bool, cast: bool, objects: bool) -> Any:
        states: dict[str, Any] = {}

        def fits(texts: Mapping[str, bytes]) -> None:
            states.update(given(self.host, texts.get(OBJECTS), self.objects, self.strict) if objects else {})

        texts = self.step._restore(self.dir / tag, optimizer, cast, fits)
        for name, state in states.items():
            if name == GENERATORS:
                set_generators(state)
            elif name == COUNT:
                self._count = state
            else:
                self.objects[name].load_state_dict(state)
        return checkpoint.extra_of(texts)

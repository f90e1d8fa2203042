"""The compiled programs of one model: one a batch shape, a value that the model reads, a mode and a set of options.

``find`` gives the program that serves a batch and compiles where there is none. At most ``most`` are kept: the one that was used
longest ago goes first, and its memory with it. Parameters and state belong to no program: they outlive each.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any, Literal

from torch import Tensor, nn

from deepseed import ops
from deepseed.batches import check_mix_up, joined, said, times, unfit
from deepseed.bucket import Bucket, checkable, compare, padded
from deepseed.build import Built, CompileError, build
from deepseed.capture import BatchSpec, Captured, CaptureError, capture, capture_update
from deepseed.capture.attributes import Change
from deepseed.capture.batch import tensors
from deepseed.capture.guards import Guard
from deepseed.capture.options import Optimizers, changed_options, fixed_options, ownerless, stated_options
from deepseed.capture.step import FORWARD, Want
from deepseed.capture.structure import Structure
from deepseed.causes import OFTEN, Cause, Streak, causes
from deepseed.compiling import Compiling
from deepseed.graphs import Graphs
from deepseed.ir.layout import Layout
from deepseed.ir.program import Type
from deepseed.ir.widen import widen
from deepseed.logs import say, warn
from deepseed.ops import torch_dtype
from deepseed.plan import Plan
from deepseed.precision import Precision
from deepseed.ragged import agreed
from deepseed.rules.lanes import home
from deepseed.runtime.host import Host
from deepseed.runtime.state import State

Wanted = Want | Literal["update"]  # update: the optimizer, over gradients that stand ready
LossFn = Callable[[nn.Module, Any], Tensor]


MODULE = ("forward", "module", "update")  # what a module runs: the loss, and the mean over ranks, are the user's own
UPDATES = ("step", "update")  # what has the optimizer in it


@dataclass(frozen=True)
class Subject:
    """What is compiled, and for which ranks; ``grads``: training steps return their gradients too; ``wide``: all in float64."""

    model: nn.Module
    optimizer: Optimizers
    loss_fn: LossFn | None
    clip_grad_norm: float | None
    precision: Precision
    seed: int
    plan: Plan
    host: Host
    local: bool
    wide: bool = False
    grads: bool = False
    quiet: bool = False
    buckets: Sequence[Bucket] = ()
    codegen: str = "python"
    graphs: Graphs | None = None  # of steps, on a device that has them

    def own(self, want: Wanted) -> bool:
        """Whether each data-parallel rank has its own rows, and its own loss, in such a program."""
        return self.local and want in MODULE and self.host.mesh.sizes.get("dp", 1) > 1


class Cache:
    """At most ``most`` programs by key, several under one where guards tell them apart; least recently used first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: dict[int, tuple[str, Built]] = {}  # by the identity of the program

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Built]:
        return iter([built for _, built in self._held.values()])

    def under(self, key: str) -> list[Built]:
        """The programs of a key, the most recently used one first."""
        return [built for own, built in reversed(self._held.values()) if own == key]

    def use(self, built: Built) -> Built:
        self._held[id(built)] = self._held.pop(id(built))
        return built

    def add(self, key: str, built: Built) -> list[Built]:
        """Keep a program; those that had to go for it."""
        self._held[id(built)] = (key, built)
        gone = []
        while len(self._held) > self.most:
            gone.append(self._held.pop(next(iter(self._held)))[1])
        return gone


@dataclass(frozen=True)
class Found:
    """The program that serves a batch; the batch by key; whether that is this rank's part only; as it was before padding that no
    check has seen yet."""

    built: Built
    batch: dict[str, Tensor]
    local: bool
    unchecked: Any = None
    became: Mapping[int, int] = field(default_factory=dict)  # lengths of this rank's own rows that were padded: new -> old


class Programs:
    """Finds or compiles. Every rank must ask alike: ranks that differ are told so before anything is compiled."""

    def __init__(self, subject: Subject, most: int) -> None:
        self.subject, self.cache = subject, Cache(most)
        self.latest: Built | None = None
        self.stored: dict[tuple[str, str], Layout] = {}  # where parameters and state lie: as the first program with them had it
        self.homes: dict[tuple[str, str], int] = {}  # and on which stage
        self.hosted: dict[tuple[str, str], bool] = {}  # and whether on the host
        self.structure = Structure(subject.model)  # as the latest batch found it
        self.pending: dict[str, Type] = {}  # gradients that a module leaves for an update, as they lie
        self.compiled = 0
        self.seconds = 0.0  # of compiling
        self.updates = 0  # of these, those with an optimizer
        self._seen = 0
        self._made_for = ""  # the settings of the latest program
        self._streak = Streak()
        self._checked: set[str] = set()  # kinds of batches whose padding was compared
        self.moving: set[str] = set()  # optimizer options that have changed once: inputs of the programs compiled since

    def find(self, batch: Any, want: Wanted, towards: Collection[str] = ()) -> Found:
        """``towards``: batch entries whose gradients a module is asked for; of an update, the parameters that have a gradient."""
        s = self.subject
        if not self._seen and want != "update":
            check_mix_up(s.host, batch, s.local, s.own(want))
        self._seen += 1
        given = batch
        if s.buckets and want not in MODULE:
            batch = padded(batch, s.buckets)
        filled = batch is not given
        became: Mapping[int, int] = {}
        if s.buckets and s.own(want) and want != "update":
            batch, became = agreed(s.host, batch, s.buckets[0])
        spec, settings = BatchSpec.of(batch), self._settings(want, towards)
        stated = stated_options(s.optimizer) if want in UPDATES else []  # lr too: agreed by the collective that agrees the batch
        parts = s.host.mesh.sizes.get("dp", 1)
        if s.local and parts > 1 and not s.own(want):
            known = self.cache.under(_key(times(spec, parts), settings))
            changed = _changed(known[0]) if known else []
            if s.host.same(f"{spec} {settings} {stated} {changed}") and known and not known[0].captured.guards and not changed and self._fits(known[0]):
                self.latest, self._made_for = self.cache.use(known[0]), settings
                return Found(known[0], spec.flatten(batch), True)
            batch = joined(s.host, batch)
            spec = BatchSpec.of(batch)
        key = _key(spec, settings)
        built: Built | None = None
        read: list[tuple[str, object]] = []
        for each in self.cache.under(key):
            if self._fits(each):
                changed = _changed(each)
                read += [(f"the Python value {c.path}" + (f", {c.line}" if c.line else ""), c.now) for c in changed]
                if changed:
                    continue
                values = self._read(each, batch)
                read += [(f"the value that the model reads from the batch at {g.path or 'its top'}, {g.line}", v) for g, v in values]
                if all(v == g.value for g, v in values):
                    built = self.cache.use(each)
                    break
        modes = settings.partition(" optimizer=")[0]
        s.host.agree([("batch", said(spec)), ("modes and trained parameters of the model", modes), *stated, *read])
        if built is None:
            built = self._compile(batch, want, self._causes(spec, settings, batch) if want != "update" else [], towards)
            self._drop(self.cache.add(key, built))
        if want != "update":
            self.latest, self._made_for = built, settings
        return Found(built, spec.flatten(batch), s.own(want), given if filled and self._kind(given, settings) not in self._checked else None, became)

    def check_padding(self, found: Found, states: Sequence[State]) -> None:
        """Compare loss and gradients of a padded batch with those of the batch itself. Raises CompileError where they differ."""
        s = self.subject
        started = perf_counter()
        pair: list[tuple[Built, Mapping[str, Tensor]]] = []
        for batch in (found.unchecked, padded(found.unchecked, s.buckets)):
            captured = self._capture(batch, "loss_and_grads")
            captured = replace(captured, program=checkable(captured.program))
            pair.append((build(captured, s.plan, s.host, stored=self.stored, homes=self.homes, hosted=self.hosted, wide=True, quiet=True), captured.batch.flatten(batch)))
        compare(s.host, states, pair[0], pair[1])
        self._checked.add(self._kind(found.unchecked, self._made_for))
        self._say(f"padding is exact: loss and gradients of {said(pair[0][0].captured.batch)} are those of the padded batch ({perf_counter() - started:.1f} s)")

    def _kind(self, batch: Any, settings: str) -> str:
        """What one check of padding speaks for: entries and their dimensions, modes and what is trained, which buckets pad."""
        given = tensors(batch)
        now = {k: (t.dtype, t.dim()) for k, t in given.items()}
        return f"{now} {[any(a is not b for a, b in zip(given.values(), each.pad(given).values(), strict=True)) for each in self.subject.buckets]} {settings.partition(' modes=')[2]}"

    def current(self) -> Built:
        """The program of the latest batch."""
        if self.latest is None:
            raise CompileError("nothing is compiled yet\n  fix: call it with a batch first, or pass example_batch=")
        return self.latest

    def _settings(self, want: Wanted, towards: Collection[str]) -> str:
        """What beside the batch a program is made for: modes, what is trained, the optimizer's options."""
        if self.structure.changed():
            self.structure = Structure(self.subject.model)
        modes = [m.training for m in self.structure.modules]
        trained = [p.requires_grad for p in self.structure.parameters()] if want not in FORWARD else []
        return want + (f" towards {sorted(towards)}" if towards else "") + f" modes={_flags(modes)} trained={_flags(trained)}" + (f" optimizer={self._options(())}" if want in UPDATES else "")

    def _options(self, moved: Collection[str]) -> dict[str, Any]:
        return fixed_options(self.subject.optimizer, moved) if self.subject.optimizer is not None else {}

    def _fits(self, built: Built) -> bool:
        """Whether the optimizer's options are still those of the program."""
        return not built.captured.options or built.captured.options == self._options(built.captured.moved)

    def _read(self, built: Built, batch: Any) -> list[tuple[Guard, object]]:
        """What the program's guards give on this batch."""
        out: list[tuple[Guard, object]] = []
        given = {("batch", key): t for key, t in tensors(batch).items()} | {("constant", key): t for key, t in built.constants.items()}
        for guard in built.captured.guards:
            program = widen(guard.program) if self.subject.wide else guard.program
            (value,) = ops.evaluate(program, {i.name: given[i.role, i.key].cpu() for i in program.inputs}).values()
            out.append((guard, value.item()))
        return out

    def _causes(self, spec: BatchSpec, settings: str, batch: Any) -> list[Cause]:
        """What differs from the latest program."""
        if self.latest is None:
            return []
        before = self.latest.captured
        same = causes(before.batch, spec, (), (), ()) == []
        read = [(f"the value that is read at {g.path or 'the top'}, {g.line},", g.value, v) for g, v in self._read(self.latest, batch)] if same else []
        options = [(f"option {k} of the optimizer", before.options.get(k), v) for k, v in self._options(before.moved).items()] if before.options else []
        then, now = (re.split(" modes=| trained=", text.partition(" optimizer=")[0]) for text in (self._made_for, settings))
        named = [("function", then[0], now[0]), ("modules in training mode,", then[1], now[1])]
        named += [("trained parameters,", then[2], now[2])] if then[2] and now[2] else []  # a forward has none
        return causes(before.batch, spec, [*named, *options], _changed(self.latest), read)

    def _compile(self, batch: Any, want: Wanted, why: list[Cause], towards: Collection[str]) -> Built:
        s = self.subject
        started, number = perf_counter(), self.compiled + 1
        if want in UPDATES and s.optimizer is not None and (before := self._with_options()) is not None:
            self.moving |= changed_options(s.optimizer, before.captured.options)
        if not self.updates and want in UPDATES and (left := ownerless(s.optimizer, dict(s.model.named_parameters()))):
            self._say(left)
        if self.compiled and want != "update":
            self._say(f"compiling program {number}" + (f": {'; '.join(map(str, why[:4]))}" if why else ", dropped before"))
            for cause in self._streak.often(why):
                self._say(f"warning: {cause.what} is the cause of {OFTEN} compilations in a row, now {cause.change}\n  fix: {cause.cure}")
        quiet = s.quiet or not s.host.first
        with Compiling(not quiet and want != "update") as at:
            at("capture")
            captured = self._capture(batch, want, towards)
            self.updates += want in UPDATES
            text = str(captured.program)
            s.host.agree_on(text, "captured program")  # so that all ranks find the same one
            twin = next((b for b in self.cache if b.text == text), None)
            if twin is not None:  # what changed is read, and does not matter
                built = replace(twin, captured=captured, adopted=False)
            else:
                built = build(captured, s.plan, s.host, stored=self.stored, homes=self.homes, hosted=self.hosted, own=s.own(want), wide=s.wide, quiet=quiet, codegen=s.codegen, graphs=s.graphs, at=at)
        for o in built.program.outputs:
            if o.role == "pending":  # as the update finds it
                self.pending[o.key] = built.program.types[o.ref.name]
                self.stored.setdefault((o.role, o.key), built.program.types[o.ref.name].layout)
                self.homes.setdefault((o.role, o.key), home(built.program, o.ref.name))
        for i in built.program.inputs:
            if i.role in ("param", "buffer", "state"):
                self.stored.setdefault((i.role, i.key), i.type.layout)
                self.homes.setdefault((i.role, i.key), i.stage)
                self.hosted.setdefault((i.role, i.key), i.type.host)
        self.compiled += 1
        self.seconds += perf_counter() - started
        if number > 1 and twin is not None and want != "update":
            self._say(f"program {number} took {perf_counter() - started:.1f} s: it is the same as an earlier one")
        return built

    def _with_options(self) -> Built | None:
        """The latest program that the optimizer's options are in."""
        return next((b for b in reversed(list(self.cache)) if b.captured.options), None)

    def _capture(self, batch: Any, want: Wanted, towards: Collection[str] = ()) -> Captured:
        s = self.subject
        if want == "update":
            pending = {name: torch_dtype(self.pending[name].dtype) for name in towards}
            return capture_update(s.model, s.optimizer, pending, clip_grad_norm=s.clip_grad_norm, loss_scale=s.precision["loss_scale"], moving=self.moving, wide=s.wide, seed=s.seed)
        try:
            return capture(
                s.model, batch, loss_fn=s.loss_fn, optimizer=s.optimizer if want == "step" else None, clip_grad_norm=s.clip_grad_norm if want == "step" else None,
                want=want, pending=s.optimizer is not None and want == "module", grads=s.grads, seed=s.seed, moving=self.moving, wide=s.wide, towards=towards, **s.precision,
            )  # fmt: skip
        except CaptureError:
            raise
        except Exception as error:  # the user's model or loss raised
            raise CompileError(unfit(type(s.model).__name__, batch, list(self.cache), error, want in ("forward", "module") and s.loss_fn is not None)) from error

    def _drop(self, gone: list[Built]) -> None:
        for each in gone:
            self._say(f"dropping the program of batch {said(each.captured.batch)}: {self.cache.most} are kept (max_programs), and it was used longest ago")

    def _say(self, line: str) -> None:
        if not self.subject.quiet and self.subject.host.first:
            (warn if line.startswith("warning: ") else say)(line)


def _flags(which: Sequence[bool]) -> str:
    """How many of how many, and which; nothing for none."""
    return f"{sum(which)} of {len(which)} ({hashlib.sha256(bytes(which)).hexdigest()[:16]})" if which else ""


def _changed(built: Built) -> list[Change]:
    """What differs of the modules, hooks and Python values that the program was made for."""
    return built.captured.structure.changed() or built.captured.reads.changed()


def _key(spec: BatchSpec, settings: str) -> str:
    return f"{spec} {settings.partition(' optimizer=')[0]}"

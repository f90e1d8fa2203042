"""``step.save(dir)`` and ``step.load(dir)``: global tensors in files that any plan, and plain PyTorch, can read.

Saved: parameters and buffers (``model.NAME``), optimizer state (``optimizer.SLOT/NAME``), and in ``manifest.json`` the step count, the
seed of random ops, the optimizer's options by group (lr among them), the plan and mesh that wrote it. ``extra`` is the user's.

All or nothing, on both ways. A save writes beside the folder and renames at the end. A load checks the manifest, every file's
checksum, and that the checkpoint fits; only when every rank has found all of it so is anything of the running step overwritten, in
a second pass that reads the values into their places. Where one rank fails all of them raise the same CheckpointError, and training can go
on; only a file that fails in the second pass, a moment after it was whole, leaves the step half loaded: it refuses to run and to save.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import deepseed
from deepseed.capture.options import listed
from deepseed.fits import Saved, check_model, check_optimizers, missing_slots, options, restore_options, tensors_of, tied_names
from deepseed.ir.layout import REPLICATED
from deepseed.ir.mesh import Mesh
from deepseed.logs import say, warn
from deepseed.ops import torch_dtype
from deepseed.runtime.boxfile import Sums
from deepseed.runtime.folder import CheckpointError, HalfLoadedError, aside, checksum, digest, discard, find, publish
from deepseed.runtime.host import Host, check_files, check_rest, everywhere
from deepseed.runtime.saved import Entry, Reading, Share, Want, read, shares, write, write_metadata

if TYPE_CHECKING:
    from deepseed.compiled import Compiled

FORMAT = 1
WEIGHTS = "safetensors"  # the format of what save_pretrained writes
EXTRA = "extra"
Written = tuple[list[Any], dict[str, Any]]  # what a process has written: boxes, and its files' checksums


@dataclass
class Saving:
    """One checkpoint that is being written: each process writes ``held``, its ranks' shares, and rank 0 closes the folder. Nothing of the running
    step is read any more once ``held`` are copies."""

    target: Path
    folder: Path  # beside the target
    entries: Mapping[str, Entry]
    texts: Mapping[str, bytes]
    tied: Mapping[str, str]
    mesh: Mesh
    hosted: Sequence[int]
    held: list[list[Share]]
    manifest: dict[str, Any]

    @property
    def what(self) -> str:
        return f"saving to {self.target}"

    def write(self) -> Written:
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder}, which rank 0 has made, is not there\n  fix: save to a file system that all ranks share")
        return write(self.folder, self.entries, self.texts, self.hosted, self.held)

    def close(self, written: Sequence[Written], then: Callable[[], None]) -> None:
        """On rank 0, with what all processes have written. ``then``: once the checkpoint is in its place."""
        paths = {name: tuple(name.split(".", 1)) for name in [*self.entries, *self.tied, *self.texts]}
        write_metadata(self.folder, self.entries, self.texts, self.mesh, [r for results, _ in written for r in results], self.tied, paths)
        files = {name: d for _, digests in written for name, d in digests.items()}
        publish(self.folder, self.target, {**self.manifest, "saved": time.time(), "files": {**files, ".metadata": digest(self.folder / ".metadata")}})
        then()


def save(step: Compiled, dir: str | os.PathLike[str], extra: Any = None, frozen: bool = True) -> None:
    finish(step.host, begin(step, dir, extra, frozen))


def begin(step: Compiled, dir: str | os.PathLike[str], extra: Any = None, frozen: bool = True, more: Mapping[str, bytes] = MappingProxyType({})) -> Saving:
    """All but the writing. ``more``: further texts, by name."""
    host, target = step.host, Path(os.path.realpath(dir))
    host.agree([("the folder to save to", str(target)), ("frozen=", frozen)])
    if step._resume:
        raise CheckpointError(
            f"{'parameters and' if step._resume[0].model else 'the'} optimizer state of {step._resume[0].folder} {'are' if step._resume[0].model else 'is'} read with the first batch; until then there is nothing more to save than that checkpoint has\n"
            "  fix: run a batch, or step.compile(example_batch), before step.save"
        )
    texts: dict[str, bytes] = {}
    everywhere(host, f"saving to {target}", lambda: texts.update({**({EXTRA: packed(extra)} if extra is not None else {}), **more}))
    if step.states:
        host.begin(step.model, step.states)  # what the user wrote into the module
    left = [] if frozen else [name for name, p in step.model.named_parameters() if not p.requires_grad]
    entries = {name: e for name, e in _entries(step).items() if name.removeprefix("model.") not in left}
    tied = {f"model.{alias}": f"model.{name}" for alias, name in tied_names(step.model).items() if name not in left}
    hosted = [step.mesh.rank(c) for c in host.coordinates]
    manifest = {**_manifest(step, entries, tied, texts), **({"frozen": left} if left else {})}
    held = shares(entries, step.mesh, hosted)
    folder = Path(everywhere(host, f"saving to {target}", lambda: str(aside(target)) if host.first else "")[0])
    return Saving(target, folder, entries, texts, tied, step.mesh, hosted, held, manifest)


def finish(host: Host, saving: Saving, then: Callable[[], None] = lambda: None) -> None:
    """Write, on all ranks together."""
    try:
        written = everywhere(host, saving.what, saving.write)
        everywhere(host, saving.what, lambda: saving.close(written, then) if host.first else None)
    except Exception:
        if host.first:
            discard(saving.folder)
        raise


def entry(step: Compiled, role: str, key: str, t: Tensor) -> Entry:
    """A tensor as the ranks store it, else ``t``, as the module or the optimizer holds it."""
    type_ = step.states[0].types.get((role, key)) if step.states else None
    if type_ is None:
        return Entry.whole(t, len(step.host.coordinates))
    parts = [s.tensors.get((role, key)) for s in step.states]
    return Entry(type_.shape, torch_dtype(type_.dtype), type_.layout, parts, home=step.states[0].homes[role, key])


def model_entries(step: Compiled, written: Collection[str] = ()) -> dict[str, Entry]:
    """What ``state_dict()`` has, and the buffers in ``written``, by first name. Raises CheckpointError where one has no values."""
    out = {name: entry(step, role, name, t) for (role, name), t in tensors_of(step.model, written).items()}
    if meta := [name for name, e in out.items() if any(part is not None and part.is_meta for part in e.parts)]:
        raise CheckpointError(f"{meta[0]} is on the meta device: it has no values to save\n  fix: load or initialise the model's values first; with weights=, run a batch")
    return out


def _entries(step: Compiled) -> dict[str, Entry]:
    """Everything that is saved, by name in the files."""
    written = {o.key for o in step.program.outputs if o.role == "buffer"} if step.states else set()
    out = {f"model.{name}": e for name, e in model_entries(step, written).items()}
    names = {id(p): name for name, p in step.model.named_parameters()}
    for optimizer in listed(step.optimizer):
        for p, slots in optimizer.state.items():
            held = {k: v if isinstance(v, Tensor) else torch.tensor(float(v), dtype=torch.float64) for k, v in slots.items() if isinstance(v, Tensor | int | float)}
            out |= {f"optimizer.{slot}/{names[id(p)]}": Entry.whole(t, len(step.host.coordinates)) for slot, t in held.items() if id(p) in names}
    stored = step.states[0].types if step.states else {}
    return out | {f"optimizer.{key}": entry(step, role, key, torch.empty(0)) for role, key in stored if role == "state"}


def _manifest(step: Compiled, entries: Mapping[str, Entry], tied: Mapping[str, str], texts: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "format": FORMAT, "deepseed": deepseed.__version__, "torch": torch.__version__,
        "model": type(step.model).__name__, "plan": str(step.plan), "mesh": dict(step.mesh.axes), "step": step.steps, "seed": step.seed,
        "moving": sorted(step.programs.moving),
        "optimizers": [options(optimizer, step.model) for optimizer in listed(step.optimizer)],
        "tensors": {name: f"{str(e.dtype).removeprefix('torch.')}{list(e.shape)}" for name, e in entries.items()},
        "tied": dict(tied), "texts": sorted(texts),
    }  # fmt: skip


def packed(extra: Any, what: str = "extra=") -> bytes:
    """The user's own state as bytes. Raises CheckpointError where it could not be read back without running code from the file."""
    file = io.BytesIO()
    try:
        torch.save(extra, file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{what}{type(extra).__name__} cannot be saved and read back: {type(error).__name__}: {first}\n"
            "  fix: put numbers, strings, tensors, and lists and dicts of them there, such as scheduler.state_dict()"
        ) from error
    return file.getvalue()


def unpacked(text: bytes) -> Any:
    return torch.load(io.BytesIO(text), weights_only=True)


def extra_of(texts: Mapping[str, bytes]) -> Any:
    return unpacked(texts[EXTRA]) if EXTRA in texts else None


# loading ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Resume:
    """What waits in a checkpoint until the first program says which part each rank holds: optimizer state (``slots``), and the ``model``'s tensors by
    role and name where it is on the meta device (else empty)."""

    folder: Path
    checksum: str
    saved: Saved
    cast: bool
    slots: bool
    model: Mapping[tuple[str, str], Tensor]


def load(step: Compiled, dir: str | os.PathLike[str], optimizer: bool, cast: bool, check: Callable[[Mapping[str, bytes]], None]) -> dict[str, bytes]:
    """The checkpoint's texts, by name. ``check``: raises CheckpointError where these do not fit either."""
    host, target = step.host, Path(os.path.realpath(dir))
    what = f"loading {target}"
    host.agree([("the folder to load", str(target)), ("optimizer=", optimizer), ("cast=", cast)])
    folder, manifest = everywhere(host, what, lambda: _opened(target))[0]
    if host.first and folder != target:
        warn(f"{target} is not there: a save was cut off while it was renamed; {folder.name} is whole and is loaded")
    saved = Saved.of(folder, manifest)
    everywhere(host, what, lambda: check_files(host, folder, manifest["files"]))
    compare = optimizer and step.optimizer is not None
    waits: dict[tuple[str, str], Tensor] = {}
    optimizers = listed(step.optimizer)

    sums = Sums(manifest["files"])

    def stage() -> tuple[_Reads, Reading, dict[str, bytes]]:
        reads = _Reads(step, saved, cast)
        tensors = check_model(step.model, saved)
        if not step.states and any(t.is_meta for t in tensors.values()):
            waits.update(tensors)
            for (_, name), t in tensors.items():
                saved.check(f"model.{name}", tuple(t.shape), t.dtype, cast)
        else:
            reads.model(tensors)
        if compare:
            check_optimizers(optimizers, step.model, saved)
            if step.states and not step.waits_for_state():
                reads.slots()
            else:
                reads.own()
        reading = Reading(folder, reads.wants, step.mesh, sums)
        reading.check()
        texts = reading.texts(manifest["texts"])
        check(texts)
        return reads, reading, texts

    staged: list[tuple[_Reads, Reading, dict[str, bytes]]] = []
    checked = everywhere(host, what, lambda: staged.append(stage()) or sums.checked)  # type: ignore[func-returns-value]
    everywhere(host, what, lambda: check_rest(host, folder, sums, reduce(or_, checked)))
    reads, reading, texts = staged[0]  # it is whole and fits on every rank: from here on values are overwritten
    before, step._half = step._half, Half(folder, compare or (step._half is not None and step._half.slots))
    everywhere(host, what, lambda: _filled(reading))
    step._half = before if before is not None and before.slots and not compare else None  # state that an earlier load has left half loaded still is
    if compare:
        for each, was in zip(optimizers, saved.optimizers, strict=True):
            dict.clear(each.state)  # what is left there; a step's own is overwritten already
            restore_options(each, was)
        step.steps, step.seed = manifest["step"], manifest["seed"]
        step.programs.moving |= set(manifest["moving"])
        for state in step.states:
            for role, key in state.tensors:
                if role == "state" and key not in saved.slots:  # not trained yet when it was saved
                    state.tensors[role, key].fill_(step._fills[key])
    now = [] if step.states and not step.waits_for_state() else [Resume(folder, checksum(manifest), saved, cast, compare and bool(saved.slots), waits)]
    earlier = [replace(r, slots=r.slots and not compare, model={}) for r in step._resume]
    step._resume = [r for r in (*earlier, *now) if r.slots or r.model]
    reads.commit()
    step._shown = {("norm", key): t for key, t in reads.shown.items()}
    if step.states:
        host.settle(step.model, step.states)
    if host.first and (restart := os.environ.get("DEEPSEED_RESTART", "0")) != "0":
        say(f"restart {restart} goes on from {folder}, step {manifest['step']}")
    return texts


@dataclass(frozen=True)
class Half:
    """From where a step is half loaded; whether its optimizer's state is too."""

    folder: Path
    slots: bool


def check_whole(step: Compiled) -> None:
    """Raises HalfLoadedError where a load has failed while it overwrote values."""
    if step._half is not None:
        raise HalfLoadedError(
            f"the step is half loaded from {step._half.folder}, which failed while its values were read: some tensors are overwritten, others are not\n"
            f"  fix: load again, this checkpoint or another one{', with its optimizer state' if step._half.slots else ''}"
        )


def _filled(reading: Reading) -> None:
    try:
        reading.fill()
    except Exception as error:
        said = str(error).split("\n", 1)[0] if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise HalfLoadedError(
            f"{said}\n  it was whole a moment before, when it was checked: the step is half loaded, and neither runs nor saves\n  fix: load again, this checkpoint or another one"
        ) from error


def resume(step: Compiled) -> None:
    """Read what waits, now that a program says which part of it each rank holds."""
    while step._resume:
        waiting = step._resume[0]
        later = waiting.slots and step.waits_for_state()  # an update that is compiled when the first gradients are there
        if later and not waiting.model:
            return
        waiting, what = replace(waiting, slots=waiting.slots and not later), f"resuming from {waiting.folder}"
        staged: list[_Reads] = []
        everywhere(step.host, what, lambda: _unchanged(step, waiting))  # noqa: B023
        everywhere(step.host, what, lambda: staged.append(_resumed(step, waiting)))  # noqa: B023
        staged[0].commit()
        step._resume = [*([replace(step._resume[0], model={})] if later else []), *step._resume[1:]]
        if waiting.model:
            step.host.settle(step.model, step.states)


def _unchanged(step: Compiled, waiting: Resume) -> None:
    """Whether the folder is as ``load`` has seen it. Raises CheckpointError, and DamagedError where a file that has no checksums of boxes is another by now."""
    manifest = _opened(waiting.folder)[1]
    if checksum(manifest) != waiting.checksum:
        raise CheckpointError(f"{waiting.folder} is another checkpoint than step.load was given: it was saved over since\n  fix: call step.load again")
    check_files(step.host, waiting.folder, manifest["files"])


def _resumed(step: Compiled, waiting: Resume) -> _Reads:
    manifest = _opened(waiting.folder)[1]
    reads = _Reads(step, waiting.saved, waiting.cast)
    reads.model(waiting.model)
    if waiting.slots:
        reads.slots()
    read(waiting.folder, reads.wants, step.mesh, sums=Sums(manifest["files"]))
    return reads


class _Reads:
    """What this process reads of a checkpoint, and into which tensors. Raises CheckpointError where a shape or dtype differs."""

    def __init__(self, step: Compiled, saved: Saved, cast: bool) -> None:
        self.step, self.saved, self.cast = step, saved, cast
        self.rest: dict[str, Tensor] = {}  # optimizer state that no rank stores, whole
        self.wants: list[Want] = []
        self.shown: dict[str, Tensor] = {}  # of no parameter, and asked for before any rank stores it: the loss scale

    def model(self, tensors: Mapping[tuple[str, str], Tensor]) -> None:
        """Parameters and buffers: the ranks' parts, or the module's own where no program has them yet."""
        for role, key in tensors:
            if not self._parts((role, key), f"model.{key}"):
                t = tensors[role, key].detach()
                self.saved.check(f"model.{key}", tuple(t.shape), t.dtype, self.cast)
                self.wants.append(Want(f"model.{key}", tuple(t.shape), REPLICATED, {}, t))

    def slots(self) -> None:
        """Optimizer state: the ranks' parts; the rest (of parameters that are frozen now) goes to ``optimizer.state``."""
        stored = [key for role, key in self.step.states[0].types if role == "state"]
        if lacking := missing_slots(stored, self.saved):
            raise CheckpointError(
                f"{self.saved.folder} lacks {len(lacking)} of the {len(stored)} tensors of optimizer state that this step has, such as {lacking[0]}\n"
                "  fix: load(dir, optimizer=False) takes parameters and buffers only"
            )
        for key, (shape, dtype) in self.saved.slots.items():
            if not self._parts(("state", key), f"optimizer.{key}"):
                self.rest[key] = torch.empty(shape, dtype=dtype)
                self.wants.append(Want(f"optimizer.{key}", shape, REPLICATED, {}, self.rest[key]))

    def own(self) -> None:
        """State of no parameter, whole, while there is no program yet that has it."""
        for key, (shape, dtype) in self.saved.slots.items():
            if "/" not in key:
                self.shown[key] = torch.empty(shape, dtype=dtype)
                self.wants.append(Want(f"optimizer.{key}", shape, REPLICATED, {}, self.shown[key]))

    def commit(self) -> None:
        """Once all is read: the state that no rank stores."""
        owners = {id(p): optimizer for optimizer in listed(self.step.optimizer) for group in optimizer.param_groups for p in group["params"]}
        parameters = dict(self.step.model.named_parameters())
        for key, value in self.rest.items():
            slot, _, name = key.partition("/")
            if name in parameters and id(parameters[name]) in owners:
                owners[id(parameters[name])].state[parameters[name]][slot] = value

    def _parts(self, key: tuple[str, str], name: str) -> bool:
        states = self.step.states
        if not states or key not in states[0].types:
            return False
        type_ = states[0].types[key]
        self.saved.check(name, type_.shape, torch_dtype(type_.dtype), self.cast)  # on every rank, whether it reads a part or not
        for state in (s for s in states if key in s.tensors):
            self.wants.append(Want(name, type_.shape, type_.layout, state.coordinate, state.tensors[key].detach()))
        return True


def _opened(target: Path) -> tuple[Path, dict[str, Any]]:
    folder, manifest = find(target)
    if manifest.get("format") == WEIGHTS:
        raise CheckpointError(f"{folder} was written by step.save_pretrained: it holds weights, no state to go on from\n  fix: deepseed.compile(..., weights={str(folder)!r})")
    if manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} has format {manifest.get('format')}, this version reads {FORMAT}\n  fix: load it with the version that wrote it, {manifest.get('deepseed')}")
    return folder, manifest

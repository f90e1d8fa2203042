"""``deepseed.compile(model, weights=PATH)``: parameters and buffers from safetensors files, each rank its own parts of them.

Names are the model's own (``state_dict()``), with or without its ``base_model_prefix``, as ``from_pretrained`` takes them; a tied tensor may
stand under any of its names. A model on the meta device needs a value for all that has none; what has values keeps them where the files say
nothing. All that is known from headers is checked when ``compile`` is called; values are read when the first program says who holds what.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from deepseed.build import CompileError
from deepseed.fits import SHOWN, tensors_of, tied_names
from deepseed.hf_names import conversions
from deepseed.logs import say
from deepseed.pieces import Source
from deepseed.runtime.folder import MANIFEST, CheckpointError, find, manifest_of
from deepseed.runtime.host import Host, check_files, everywhere
from deepseed.runtime.safetensors import Stored, mapped, stored
from deepseed.runtime.saved import boxes, cut
from deepseed.runtime.state import Key, State

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Weights:
    """The tensors of a model in files. ``found``: by role and first name, where the files have it, once for each of its names, the best first;
    ``kept``: what is not there and keeps the values that the model has; ``unused``: what is there for nothing."""

    path: Path
    found: Mapping[Key, Sequence[Source]]
    kept: Sequence[str]
    unused: Sequence[str]

    def read(self, host: Host, states: Sequence[State], keys: Sequence[Key]) -> None:
        """Fill the parts that ``states`` have of ``keys``. Raises CheckpointError on every rank, where the files have a tied tensor twice, with different
        values, or have changed."""

        def fill() -> None:
            maps: dict[Path, Tensor] = {}
            for key in keys:
                here = [state for state in states if key in state.tensors]
                for piece in (p for source in self.found[key] for p in source.pieces if here):
                    path = piece.stored.path
                    if path not in maps:
                        maps[path], laid[path] = mapped(path), set(stored(path).values())
                    if piece.stored not in laid[path]:
                        raise CheckpointError(f"{path} is another file than compile(weights=) has seen: it was written anew since\n  fix: compile anew")
                for state in here:
                    self._fill(state, key, maps)

        laid: dict[Path, set[Stored]] = {}
        everywhere(host, f"reading {self.path}", fill)

    def _fill(self, state: State, key: Key, maps: Mapping[Path, Tensor]) -> None:
        type_, into = state.types[key], state.tensors[key]
        held = boxes(type_.shape, type_.layout, state.mesh, state.coordinate)
        for box in chain.from_iterable(cut(each, into.element_size()) for each in held):
            for n, source in enumerate(self.found[key]):
                for piece, met in [(p, met) for p in source.pieces if (met := p.meets(box)) is not None]:
                    target, values = met.of(into), piece.part(maps[piece.stored.path], met)
                    if n == 0:
                        target.copy_(values)
                    elif not torch.equal(target, values.to(target)):
                        raise CheckpointError(
                            f"{self.path}: {self.found[key][0].names[0]} and {source.names[0]} are one tensor in the model, and differ in the files\n"
                            "  fix: build the model without tying them (HF: tie_word_embeddings=False in its config)"
                        )


def open_weights(path: str | os.PathLike[str], model: nn.Module, host: Host, quiet: bool) -> Weights:
    """The weights at ``path``, a file or a folder, for this model. Raises CheckpointError on every rank, where a file is missing or damaged, or something
    of the model has no value, another shape or another kind of dtype. Checksums, where the folder has them, are shared out among the ranks."""
    found: list[Weights] = []

    def look() -> None:
        where = Path(os.path.realpath(path))
        where = where if where.exists() else _cut_off(where)
        if where.is_dir() and (where / MANIFEST).exists():
            check_files(host, where, manifest_of(where)["files"])
        found.append(fitted(where, tensors_in(where), model))

    everywhere(host, f"opening weights={path}", look)
    here = found[0]
    if host.first and not quiet:
        for names, what in ((here.kept, "of the model are not there and keep their values"), (here.unused, "there are not in the model")):
            if names:
                say(f"{path}: {len(names)} tensors {what}, such as {names[0]}")
    return here


def check_values(model: nn.Module, tensors: Mapping[Key, Tensor]) -> None:
    """Raises CompileError for a tensor on the meta device."""
    for (role, key), t in tensors.items():
        if t.is_meta:
            raise CompileError(
                f"{ {'param': 'parameter', 'state': 'optimizer state'}.get(role, role)} {key!r} of {type(model).__name__} is on the meta device: "
                "it has a shape and no values, so that nothing can be run\n"
                "  fix: compile(..., weights=PATH) reads them from safetensors files, each rank its part, into a model that was built in `with deepseed.meta():`; "
                "or model.to_empty(device=...) and load or initialise its values, before the optimizer is made; explain() needs no values"
            )


def _cut_off(where: Path) -> Path:
    try:
        return find(where)[0]  # a save ended between its two renames
    except CheckpointError:
        raise CheckpointError(
            f"weights={where}: no such file or folder\n  fix: a .safetensors file, or a folder with {SINGLE} or {INDEX} "
            "(of a model on the hub: huggingface_hub.snapshot_download(name))"
        ) from None


def tensors_in(where: Path) -> dict[str, Stored]:
    """The tensors of a file, or of the files of a folder, by name."""
    if where.is_file():
        return stored(where)
    if (where / SINGLE).exists():
        return stored(where / SINGLE)
    if not (where / INDEX).exists():
        holds = sorted(p.name for p in where.iterdir())
        raise CheckpointError(
            f"{where} has neither {SINGLE} nor {INDEX}: it holds {', '.join(holds[:5]) or 'nothing'}\n"
            "  fix: model.save_pretrained(dir) of transformers writes such files; a folder that step.save has written is for step.load"
        )
    try:
        placed: dict[str, str] = json.loads((where / INDEX).read_bytes())["weight_map"]
        shards = {name: where / name for name in sorted(set(placed.values()))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{where / INDEX} is damaged: {type(error).__name__}: {error}") from error
    if gone := [name for name, path in shards.items() if not path.is_file()]:
        raise CheckpointError(f"{where / gone[0]} is missing: {INDEX} names {len(shards)} files, {len(gone)} of them are not there")
    has = {name: stored(path) for name, path in shards.items()}
    if lost := [(t, name) for t, name in placed.items() if t not in has[name]]:
        raise CheckpointError(f"{where / INDEX} says that {lost[0][0]} lies in {lost[0][1]}, which has {len(has[lost[0][1]])} tensors and not that one")
    return {t: has[name][t] for t, name in placed.items()}


def fitted(where: Path, files: Mapping[str, Stored], model: nn.Module) -> Weights:
    """Which tensors of the files are which of the model's."""
    own = tensors_of(model)
    mine = own | {("buffer", n): b for n, b in model.named_buffers() if b.is_meta}
    names: dict[str, list[str]] = {}
    for alias, first in tied_names(model).items():
        names.setdefault(first, [first]).append(alias)
    found = {(role, n): [Source.whole(f, files[f]) for f in _written(names.get(n, [n]), model) if f in files] for role, n in mine}
    used = {name for each in found.values() for source in each for name in source.names}
    if used != set(files) and not all(found.values()):
        made = conversions(model, [name for name in files if name not in used])
        for role, n in (key for key, each in found.items() if not each):
            found[role, n] = [Source.made(n, made[one], files) for one in names.get(n, [n]) if one in made]
            used |= {name for source in found[role, n] for name in source.names}
    unused = [name for name in files if name not in used]
    lacking = [key for key, t in mine.items() if not found[key] and t.is_meta]
    unfit = [(key[1], mine[key], source) for key, each in found.items() for source in each if not _casts(source, mine[key])]
    if lacking or unfit or not used:
        _refuse(where, model, own, lacking, unfit, unused)
    kept = [n for (role, n), t in mine.items() if not found[role, n] and not t.is_meta]
    return Weights(where, {key: each for key, each in found.items() if each}, kept, unused)


def _written(names: Sequence[str], model: nn.Module) -> list[str]:
    """The names under which a file may have a tensor of these names: themselves, else without or with the prefix of the base model."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    if prefix == ".":
        return list(names)
    return [*names, *(n.removeprefix(prefix) if n.startswith(prefix) else prefix + n for n in names)]


def _casts(t: Source, mine: Tensor) -> bool:
    kinds = [(d.is_floating_point, d.is_complex, d if not d.is_floating_point and not d.is_complex else None) for d in (t.dtype, mine.dtype)]
    return t.shape == tuple(mine.shape) and kinds[0] == kinds[1]


def _refuse(
    where: Path, model: nn.Module, own: Mapping[Key, Tensor], lacking: Sequence[Key], unfit: Sequence[tuple[str, Tensor, Source]], unused: Sequence[str]
) -> None:  # fmt: skip
    """Say what is missing, under which names it may be, and what has another shape or dtype."""
    missing = [name for role, name in lacking if (role, name) in own]
    computed = [name for role, name in lacking if (role, name) not in own]
    lines = [f"{where} does not fit {type(model).__name__}: {len(lacking)} tensors have no values, {len(unfit)} another shape or dtype, {len(unused)} in the files are not in the model"]
    for name in missing[:SHOWN]:
        near = get_close_matches(name, unused, n=1, cutoff=0.6)
        lines.append(f"  no values: {name}" + (f"; the files have {near[0]}" if near else ""))
    lines += [f"  no values: {name}, a buffer that no file holds: the model's constructor computes it" for name in computed[:SHOWN]]
    lines += [f"  {name}: {_said(t.dtype, t.shape)} in the files, {_said(tensor.dtype, tensor.shape)} in the model" for name, tensor, t in unfit[:SHOWN]]
    lines += [f"  not in the model: {name}" for name in unused[:SHOWN]]
    fixes = ["build the model with the configuration that these files were made with"] if missing or not computed else []
    fixes += ["build it in `with deepseed.meta():`, where buffers have values"] if computed else []
    raise CheckpointError("\n".join([*lines, f"  fix: {'; '.join(fixes)}"]))


def _said(dtype: torch.dtype, shape: Sequence[int]) -> str:
    return f"{str(dtype).removeprefix('torch.')}{list(shape)}"

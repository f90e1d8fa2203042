"""Weights of a Hugging Face directory: safetensors with or without an index, or ``pytorch_model.bin`` and its shards, read by ``weights_only``.

With a ``config.json`` that transformers knows, names are the model's own: prefixes, experts and ties as ``from_pretrained`` has them. Else as in the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseed.fits import tied_names
from deepseed.importing.found import Found, Lazy
from deepseed.importing.records import mapping
from deepseed.on_meta import meta
from deepseed.pieces import Source
from deepseed.runtime.folder import MANIFEST, CheckpointError, faults, manifest_of
from deepseed.runtime.safetensors import Stored, mapped
from deepseed.runtime.saved import Box
from deepseed.weights import INDEX, SINGLE, fitted, tensors_in

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def read(folder: Path, optimizer: str | None = None) -> Found:
    """Raises CheckpointError."""
    if folder.is_file():
        found = Found("safetensors", folder, _safetensors(folder, None)[0]) if folder.suffix == ".safetensors" else Found("torch", folder, _bin([folder]))
        return found
    model = built(folder)
    if (folder / SINGLE).exists() or (folder / INDEX).exists():
        if (folder / MANIFEST).exists():
            files = manifest_of(folder)["files"]
            if wrong := faults(folder, files, sorted(files)):
                raise CheckpointError("\n  ".join(wrong) + "\n  fix: import another checkpoint")
        tensors, tied = _safetensors(folder, model)
    elif (folder / BIN).exists() or (folder / BIN_INDEX).exists():
        tensors, tied = _bin(_shards(folder)), {} if model is None else tied_names(model)
        if model is not None:
            tensors, tied = _renamed(tensors, model, tied)
    else:
        raise CheckpointError(f"{folder} has none of {SINGLE}, {INDEX}, {BIN}, {BIN_INDEX}\n  fix: model.save_pretrained(dir) of transformers writes such files")
    return Found("hf", folder, tensors, tied=tied)


def built(folder: Path) -> nn.Module | None:
    """The model of a config, without memory; None where there is none, or transformers is not there or does not know it."""
    if not (folder / "config.json").exists():
        return None
    try:
        said = json.loads((folder / "config.json").read_text())
        import transformers

        config = transformers.AutoConfig.from_pretrained(folder)
        made: Any = getattr(transformers, (said.get("architectures") or [""])[0])
        with meta():
            return made(config)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, ValueError, OSError, KeyError, TypeError, RuntimeError):
        return None


def _safetensors(where: Path, model: nn.Module | None) -> tuple[dict[str, Lazy], dict[str, str]]:
    files = tensors_in(where)
    pages: dict[Path, Tensor] = {}

    def page(path: Path) -> Tensor:
        if path not in pages:
            pages[path] = mapped(path)
        return pages[path]

    def whole(t: Stored) -> Lazy:
        return Lazy(t.shape, t.dtype, lambda box: t.part(page(t.path), box))

    if model is None:
        return {name: whole(t) for name, t in files.items()}, {}
    weights = fitted(where, files, model)

    def reader(source: Source) -> Lazy:
        def read(box: Box) -> Tensor:
            out = torch.empty(box.sizes, dtype=source.dtype)
            local = Box(box.at, (0,) * len(box.at), box.sizes)
            for piece in source.pieces:
                if (met := piece.meets(local)) is not None:
                    met.of(out).copy_(piece.part(page(piece.stored.path), met))
            return out

        return Lazy(source.shape, source.dtype, read)

    mine = {name: reader(sources[0]) for (_, name), sources in weights.found.items()}
    order = [name for name in model.state_dict() if name in mine]
    return {name: mine[name] for name in order}, {alias: name for alias, name in tied_names(model).items() if name in mine}


def _shards(folder: Path) -> list[Path]:
    if (folder / BIN).exists():
        return [folder / BIN]
    try:
        names = sorted(set(json.loads((folder / BIN_INDEX).read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / BIN_INDEX} is damaged: {type(error).__name__}: {error}") from error
    if gone := [n for n in names if not (folder / n).is_file()]:
        raise CheckpointError(f"{folder / gone[0]} is missing: {BIN_INDEX} names {len(names)} files\n  fix: copy the whole folder")
    return [folder / n for n in names]


def _bin(paths: list[Path]) -> dict[str, Lazy]:
    tensors: dict[str, Lazy] = {}
    for path in paths:
        found = mapping(path)
        inner = next((found[k] for k in ("state_dict", "model") if isinstance(found.get(k), Mapping)), found)
        tensors |= {str(n): Lazy.of(t) for n, t in inner.items() if isinstance(t, Tensor)}
        if not any(isinstance(t, Tensor) for t in inner.values()):
            raise CheckpointError(f"{path} holds no tensors by name: {', '.join(sorted(map(str, inner))[:3])}\n  fix: torch.save(model.state_dict(), path) writes such a file")
    return tensors


def _renamed(tensors: dict[str, Lazy], model: nn.Module, tied: dict[str, str]) -> tuple[dict[str, Lazy], dict[str, str]]:
    """With or without the prefix of the base model, as the model has it; a tied tensor under its first name."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    own = set(model.state_dict())
    named = {next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in own), name): t for name, t in tensors.items()}
    first = {tied.get(name, name): t for name, t in reversed(named.items())} | {name: t for name, t in named.items() if name not in tied}
    return {name: first[name] for name in [*dict.fromkeys(tied.get(n, n) for n in named)]}, {alias: name for alias, name in tied.items() if name in first}

"""What the engine needs of a model: the module, its tokenizer, how long it may grow."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deepseed.inference.errors import InferenceError
from deepseed.on_meta import meta

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64}
DEFAULT_CACHE = 4 << 30  # bytes, where nothing is said; a page takes memory when it is first written
UNKNOWN_LENGTH = 2048


@dataclass(frozen=True)
class Loaded:
    model: nn.Module
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    longest: int
    own: bool = False  # whether it was loaded here
    weights: Path | None = None  # safetensors files with the values that ``model``, on the meta device, lacks
    checkpoint: Path | None = None  # a training's, with the same


def loaded(
    model: nn.Module | str | os.PathLike[str], dtype: str | torch.dtype | None, tokenizer: Any, device: str | torch.device | None, split: bool = False, weights: str | os.PathLike[str] | None = None
) -> Loaded:
    """``split``: each rank reads its part later. ``weights``: a checkpoint of a training, which has the values."""
    kind, files, trained = _dtype(dtype), None, None if weights is None else _checkpoint(Path(weights))
    if isinstance(model, nn.Module):
        module = moved(model, kind, device, values=trained is None)
    else:
        path, gguf = _folder(Path(model))
        later = split and not gguf
        module = _shape_of_folder(path, kind) if later or trained else _from_folder(path, kind, gguf)
        files = path if later and trained is None else None
        if tokenizer is None:
            tokenizer = tokenizer_of(path, gguf)
    if trained is not None and not split:
        module, trained = _with_values(module, trained), None
    if getattr(module, "config", None) is None:
        raise InferenceError(f"{type(module).__name__} has no config: it is no model of transformers\n  fix: a causal language model, such as AutoModelForCausalLM gives")
    if getattr(module.config, "is_encoder_decoder", False):
        raise InferenceError(f"{type(module).__name__} is an encoder and a decoder; only decoders are served\n  fix: a causal language model")
    module = module.to(torch.device(device)) if device is not None and module is not model else module
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    if first is None:
        raise InferenceError(f"{type(module).__name__} has no parameters")
    text: Any = module.config
    config = text.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or UNKNOWN_LENGTH)
    return Loaded(module, tokenizer, first.dtype, torch.device("cpu") if first.is_meta else first.device, longest, module is not model, files, trained)


def moved(model: nn.Module, dtype: torch.dtype | None, device: str | torch.device | None = None, values: bool = True) -> nn.Module:
    """The model with parameters and stored buffers in ``dtype``, as ``from_pretrained(dtype=)`` has them: buffers that no checkpoint holds, such as rotary frequencies, stay as they are, and so does what the
    model says must stay float32. A copy where anything changes: the caller's model stays untouched. Without ``values`` a copy whose parameters get theirs later."""
    stays = [*(getattr(model, "_keep_in_fp32_modules_strict", None) or ()), *((getattr(model, "_keep_in_fp32_modules", None) or ()) if dtype is torch.float16 else ())]
    state = {**dict(model.named_parameters()), **{n: b for n, b in model.named_buffers() if n in model.state_dict(keep_vars=True)}}
    cast = {n: dtype for n, x in state.items() if dtype is not None and x.is_floating_point() and x.dtype is not dtype and not set(stays) & set(n.split("."))}
    place = None if device is None else torch.device(device)
    if values and not cast and all(place in (None, x.device) for x in (*model.parameters(), *model.buffers())):
        return model
    known: dict[int, Any] = {}
    for name, x in state.items():
        kind, there = cast.get(name, x.dtype), x.device if place is None else place
        new = x.detach().to(device=there, dtype=kind) if values or not isinstance(x, nn.Parameter) else torch.empty_like(x, dtype=kind, device=there, requires_grad=False)
        known[id(x)] = nn.Parameter(new, x.requires_grad) if isinstance(x, nn.Parameter) else new
    copied = deepcopy(model, known)
    return copied if place is None else copied.to(place)


def room(asked: int | None, a_block: int, useful: int) -> int:
    """Blocks: what was asked for, else as many as could be used, within DEFAULT_CACHE."""
    return asked // a_block if asked is not None else max(1, min(useful, DEFAULT_CACHE // a_block))


def _dtype(said: str | torch.dtype | None) -> torch.dtype | None:
    if said is None or said in DTYPES.values():
        return said if isinstance(said, torch.dtype) else None
    if said not in DTYPES:
        eight = ", or quantize='int8' for weights in eight bits" if said in (torch.int8, "int8") else ""
        raise InferenceError(f"dtype {said!r} is unknown\n  fix: one of {', '.join(DTYPES)}{eight}")
    return DTYPES[str(said)]


def _folder(path: Path) -> tuple[Path, str]:
    """Where the model is, and the name of its GGUF file, if it is one."""
    if path.suffix == ".gguf" and path.is_file():
        return path.parent, path.name
    if (path / "config.json").exists():
        return path, ""
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        what = f"{len(found)} GGUF files" if found else "no folder with a config.json or a GGUF file"
        raise InferenceError(f"{path} is {what}\n  fix: the folder that save_pretrained wrote, or one .gguf file" if not found else f"{path} has {what}\n  fix: the path of one of them")
    return path, found[0].name


def _checkpoint(path: Path) -> Path:
    if not (path / "manifest.json").exists() or not (path / ".metadata").exists():
        raise InferenceError(f"weights={path} is no checkpoint of a training\n  fix: the folder that step.save wrote; of safetensors files the folder is the model: Engine({str(path)!r})")
    return path


def _with_values(model: nn.Module, checkpoint: Path) -> nn.Module:
    """The model with a checkpoint's values, whatever plan wrote it."""
    from deepseed.api import Module

    if any(p.is_meta for p in model.parameters()):
        model = _filled(model)
    Module(model, "tp1", backend="simulate", quiet=True).load(checkpoint, optimizer=False, cast=True)
    return model


def _filled(model: nn.Module) -> nn.Module:
    """Room for parameters; buffers have their values."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay one
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                module._parameters[name] = made.setdefault(p, nn.Parameter(torch.empty(p.shape, dtype=p.dtype), p.requires_grad))
    return model


def _from_folder(path: Path, dtype: torch.dtype | None, gguf: str = "") -> nn.Module:
    """transformers maps the files and reads them tensor by tensor; what a GGUF file packs becomes float."""
    from transformers import AutoModelForCausalLM

    made: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or (torch.float32 if gguf else "auto"), local_files_only=True, **_gguf(gguf))
    return made


def _gguf(name: str) -> dict[str, str]:
    if name and find_spec("gguf") is None:
        raise InferenceError(f"{name} is read by the package gguf, which is not installed\n  fix: pip install gguf")
    return {"gguf_file": name} if name else {}


def _shape_of_folder(path: Path, dtype: torch.dtype | None) -> nn.Module:
    """Parameters on the meta device, buffers with their values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    made: Any = AutoModelForCausalLM
    with meta():
        made = made.from_config(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)
    shape: nn.Module = made
    return shape


def tokenizer_of(path: Path, gguf: str = "") -> Any:
    """None where the folder has none."""
    if not gguf and not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True, **_gguf(gguf))

"""What the engine needs of a model: the module, its values by name, its tokenizer, how long it may grow."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepseed.inference.errors import InferenceError
from deepseed.on_meta import meta

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16, "fp16": torch.float16, "float64": torch.float64}
DEFAULT_CACHE = 4 << 30  # bytes, where nothing is said; a page takes memory when it is first written
UNKNOWN_LENGTH = 2048


@dataclass(frozen=True)
class Loaded:
    model: nn.Module
    tokenizer: Any
    state: dict[str, Tensor]
    dtype: torch.dtype
    device: torch.device
    longest: int
    own: bool = False  # whether it was loaded here
    weights: Path | None = None  # where the values are that ``model``, on the meta device, lacks


def loaded(model: nn.Module | str | os.PathLike[str], dtype: str | torch.dtype | None, tokenizer: Any, device: str | torch.device | None, split: bool = False) -> Loaded:
    """``split``: of a folder each rank reads its part later, from ``weights``."""
    kind, weights = _dtype(dtype), None
    if isinstance(model, nn.Module):
        module = model if kind is None else model.to(kind)
    else:
        path = Path(model)
        if not (path / "config.json").exists():
            raise InferenceError(f"{path} is no folder with a config.json\n  fix: the folder that save_pretrained wrote")
        module = _shape_of_folder(path, kind) if split else _from_folder(path, kind)
        weights = path if split else None
        if tokenizer is None:
            tokenizer = tokenizer_of(path)
    if getattr(module, "config", None) is None:
        raise InferenceError(f"{type(module).__name__} has no config: it is no model of transformers\n  fix: a causal language model, such as AutoModelForCausalLM gives")
    if getattr(module.config, "is_encoder_decoder", False):
        raise InferenceError(f"{type(module).__name__} is an encoder and a decoder; only decoders are served\n  fix: a causal language model")
    module = module.to(torch.device(device)) if device is not None else module
    module.eval()
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    if first is None:
        raise InferenceError(f"{type(module).__name__} has no parameters")
    state = {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers(remove_duplicate=False))}
    text: Any = module.config
    config = text.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or UNKNOWN_LENGTH)
    return Loaded(module, tokenizer, state, first.dtype, torch.device("cpu") if first.is_meta else first.device, longest, not isinstance(model, nn.Module), weights)


def room(asked: int | None, a_block: int, useful: int) -> int:
    """Blocks: what was asked for, else as many as could be used, within DEFAULT_CACHE."""
    return asked // a_block if asked is not None else max(1, min(useful, DEFAULT_CACHE // a_block))


def _dtype(said: str | torch.dtype | None) -> torch.dtype | None:
    if said is None or isinstance(said, torch.dtype):
        return said
    if said not in DTYPES:
        raise InferenceError(f"dtype {said!r} is unknown\n  fix: one of {', '.join(DTYPES)}")
    return DTYPES[said]


def _from_folder(path: Path, dtype: torch.dtype | None) -> nn.Module:
    """transformers maps the files and reads them tensor by tensor."""
    from transformers import AutoModelForCausalLM

    made: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=dtype or "auto", local_files_only=True)
    return made


def _shape_of_folder(path: Path, dtype: torch.dtype | None) -> nn.Module:
    """Parameters on the meta device, buffers with their values."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    made: Any = AutoModelForCausalLM
    with meta():
        made = made.from_config(config, dtype=dtype or getattr(config, "dtype", None) or torch.float32)
    shape: nn.Module = made
    return shape


def tokenizer_of(path: Path) -> Any:
    """None where the folder has none."""
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True)

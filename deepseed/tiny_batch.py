"""A batch for any model of transformers that has a loss: what its ``forward`` takes, in the sizes of its configuration.

Rows differ on purpose: text is padded by another number of tokens in each row, and of each row another number of labels is
ignored, so that a mean over a data-parallel rank's own rows is not the global mean.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from deepseed.target import TargetError

SEED = 0
ROWS, TOKENS = 8, 16
IGNORED = -100
SIDE = 64  # of an image, where the configuration does not say
TASKS = (
    "CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "CTC", "SPEECH_SEQ_2_SEQ", "SEMANTIC_SEGMENTATION",
    "DEPTH_ESTIMATION", "MASKED_IMAGE_MODELING", "VISUAL_QUESTION_ANSWERING", "IMAGE_TEXT_TO_TEXT", "PRETRAINING",
)  # fmt: skip
ONE_LABEL_A_ROW = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION")


class TinyError(TargetError):
    """A class or field that does not exist, or a class for which no batch can be made: says the nearest one and the fix.

    final: no other sizes would help."""

    def __init__(self, message: str, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def task_of(name: str) -> str:
    """What a class is for, by the library's own tables: ``"CAUSAL_LM"``, ``"MASKED_LM"``, ``"SEQUENCE_CLASSIFICATION"`` …; "" if in none."""
    from transformers.models.auto import modeling_auto

    for task in TASKS:
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        if any(name == value or (isinstance(value, tuple | list) and name in value) for value in table.values()):
            return task
    return ""


def tiny_batch(model: nn.Module, rows: int = ROWS, tokens: int = TOKENS) -> dict[str, Any]:
    """Inputs and labels by the names of ``forward``'s arguments. The same batch every time. Raises TinyError."""
    name = type(model).__name__
    config: Any = model.config
    takes = set(inspect.signature(model.forward).parameters)
    random = torch.Generator().manual_seed(SEED)
    task = task_of(name)
    both = bool(getattr(config, "is_encoder_decoder", False))
    if both and task in ("MASKED_LM", "PRETRAINING"):
        task = "SEQ_TO_SEQ_CAUSAL_LM"
    inputs = {
        key: make(config, rows, random)
        for key, make in (("pixel_values", _video if task == "VIDEO_CLASSIFICATION" else _image), ("input_features", _spectrogram), ("input_values", _sound), ("past_values", _series))
        if key in takes
    }
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if "input_ids" not in takes and not inputs:
        raise TinyError(f"no batch can be made for {name}, which takes {', '.join(sorted(takes))}\n  fix: write a file target that returns model and batch, path/to/file.py:name", final=True)
    vocab = _size(text, "vocab_size", _size(text, "num_hash_buckets", 128))
    ids, real = _text(rows, tokens, vocab, getattr(text, "pad_token_id", None) or 0, random)
    end = getattr(text, "eos_token_id", None)
    if both and task == "SEQUENCE_CLASSIFICATION" and isinstance(end, int):  # a row is judged by its one end token
        last = real.sum(1, keepdim=True) - 1
        ids = torch.where(ids == end, vocab - 1, ids).scatter(1, last, end)
    if "input_ids" in takes:
        if inputs:
            ids, inputs = _with_images(model, ids, inputs)
            real = torch.cat([torch.ones(rows, ids.shape[1] - tokens, dtype=torch.bool), real], dim=1)
        inputs = {"input_ids": ids, **({"attention_mask": real.long()} if "attention_mask" in takes else {})} | inputs
    if "return_loss" in takes:
        return inputs | {"return_loss": True}
    if task == "MULTIPLE_CHOICE":
        inputs = {key: value[:, None].expand(rows, 2, *value.shape[1:]).contiguous() for key, value in inputs.items()}
    if "future_values" in takes:
        return inputs | _series_more(config, inputs["past_values"], takes, random)
    if not takes & {"labels", "start_positions"}:
        return inputs
    if "input_ids" not in takes and not both and task not in (*ONE_LABEL_A_ROW, "CTC"):
        return inputs | {"labels": _dense(task, inputs, config, random)}
    return inputs | _labels(task, ids, real, vocab, int(getattr(config, "num_labels", 2)), takes, random)


# inputs --------------------------------------------------------------------------------------------------------------


def _text(rows: int, tokens: int, vocab: int, pad: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ids with padding at the right, and which of them are real."""
    lengths = torch.tensor([max(2, tokens - r * tokens // (2 * rows)) for r in range(rows)])
    real = torch.arange(tokens)[None] < lengths[:, None]
    return torch.where(real, torch.randint(min(3, vocab - 1), vocab, (rows, tokens), generator=random), pad), real


def _size(config: Any, name: str, otherwise: int) -> int:
    value: Any = getattr(config, name, None)
    return int(value) if isinstance(value, int) and value else otherwise


def _image(config: Any, rows: int, random: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", None) or config
    side: Any = getattr(vision, "image_size", None) or SIDE
    height, width = (side, side) if isinstance(side, int) else side
    return torch.randn(rows, _size(vision, "num_channels", _size(vision, "in_channels", 3)), height, width, generator=random)


def _video(config: Any, rows: int, random: torch.Generator) -> Tensor:
    return torch.stack([_image(config, rows, random) for _ in range(config.num_frames)], dim=1)


def _spectrogram(config: Any, rows: int, random: torch.Generator) -> Tensor:
    """Whisper's convolutions halve the time, of which there must be exactly ``max_source_positions``; others take frames x bins."""
    sound = getattr(config, "audio_config", None) or config
    if hasattr(sound, "input_feat_per_channel"):
        return torch.randn(rows, 2 * TOKENS, sound.input_feat_per_channel, generator=random)
    if hasattr(sound, "max_source_positions"):
        return torch.randn(rows, sound.num_mel_bins, 2 * sound.max_source_positions, generator=random)
    return torch.randn(rows, 1, 4 * SIDE, getattr(sound, "num_mel_bins", SIDE), generator=random)


def _sound(config: Any, rows: int, random: torch.Generator) -> Tensor:
    """Frames x bins where the configuration has bins, else a wave long enough for a few frames after all strides."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        return torch.randn(rows, config.max_length, config.num_mel_bins, generator=random)
    frames = TOKENS
    for kernel, stride in reversed(list(zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=False))):
        frames = (frames - 1) * stride + kernel
    return torch.randn(rows, max(frames, 1024), generator=random)


def _series(config: Any, rows: int, random: torch.Generator) -> Tensor:
    """Past values: a context, and before it as many as the farthest lag looks back; ``[rows, time]`` or, of several channels, one more dimension."""
    past = config.context_length + max(getattr(config, "lags_sequence", None) or [0])
    channels = getattr(config, "num_input_channels", None) or getattr(config, "input_size", 1)
    return torch.randn(*((rows, past) if channels == 1 and hasattr(config, "lags_sequence") else (rows, past, channels)), generator=random)


def _series_more(config: Any, past: Tensor, takes: set[str], random: torch.Generator) -> dict[str, Tensor]:
    """What is to be foretold, what is known of each time, and which past values were seen (the last one of every fifth row was not)."""
    rows, ahead = len(past), config.prediction_length
    out = {"future_values": torch.randn(rows, ahead, *past.shape[2:], generator=random)}
    if "past_observed_mask" in takes:
        out["past_observed_mask"] = torch.ones(past.shape)
        out["past_observed_mask"][::5, -1] = 0
    if "past_time_features" in takes:
        features = config.num_time_features
        out["past_time_features"] = torch.randn(*past.shape[:2], features, generator=random)
        out["future_time_features"] = torch.randn(rows, ahead, features, generator=random)
    return out


def _with_images(model: nn.Module, ids: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Where a model puts features of an image in place of tokens, each row begins with as many of those as an image has
    features; a model that cannot say how many is given text alone."""
    config: Any = model.config
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if token is None:
        return ids, inputs
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            found: Any = model.get_image_features(pixel_values=inputs["pixel_values"].to(next(model.parameters()).device))  # type: ignore[operator]
    except Exception:  # it wants sizes of grids, crops or the like
        return ids, {}
    found = getattr(found, "pooler_output", found)
    features = sum(each.numel() // each.shape[-1] for each in (found if isinstance(found, tuple | list) else [found])) // len(ids)
    return torch.cat([torch.full((len(ids), features), token), ids], dim=1), inputs


# labels --------------------------------------------------------------------------------------------------------------


def _dense(task: str, inputs: dict[str, Any], config: Any, random: torch.Generator) -> Tensor:
    """A label for each pixel."""
    rows, _, height, width = next(iter(inputs.values())).shape
    if task == "DEPTH_ESTIMATION":
        return torch.rand(rows, height, width, generator=random)
    return torch.randint(0, config.num_labels, (rows, height, width), generator=random)


def _labels(task: str, ids: Tensor, real: Tensor, vocab: int, classes: int, takes: set[str], random: torch.Generator) -> dict[str, Tensor]:
    rows, tokens = ids.shape
    if task in ONE_LABEL_A_ROW:
        return {"labels": torch.randint(0, 2 if task in ("MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION") else classes, (rows,), generator=random)}
    if task == "VISUAL_QUESTION_ANSWERING":
        return {"labels": torch.rand(rows, classes, generator=random)}
    if task == "CTC":
        return {"labels": torch.randint(1, vocab, (rows, 4), generator=random)}
    if task == "QUESTION_ANSWERING":
        start = torch.randint(0, max(1, tokens // 4), (rows,), generator=random)
        return {"start_positions": start, "end_positions": start + 1}
    position = torch.arange(tokens)[None]
    prompt = torch.arange(rows)[:, None] % 3 + 1  # so many at the front of a row are ignored, besides the padding
    if task == "TOKEN_CLASSIFICATION":
        return {"labels": torch.where(real & (position >= prompt), ids % classes, IGNORED)}
    if task in ("MASKED_LM", "PRETRAINING"):
        asked = real & (position % (prompt + 2) == 1)
        extra = {"next_sentence_label": torch.arange(rows) % 2} if "next_sentence_label" in takes else {}
        masked = torch.where(asked, vocab - 1, ids)
        return {"input_ids": masked, "labels": torch.where(asked, ids, IGNORED), **extra}
    return {"labels": torch.where(real & (position >= prompt), ids, IGNORED)}

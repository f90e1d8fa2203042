"""Any Hugging Face class with a loss, small, with random weights, and a batch made to fit it.

Nothing here knows a model: a configuration is shrunk by what its fields mean, by the field names that configurations share
(``hidden_size``, ``d_model`` and ``n_embd`` are all the width), and the batch follows from the class's task, read from the
library's own tables, and from the arguments that its ``forward`` takes. What the user says wins; what is left out follows
from it (a width of 128 with 4 heads makes heads of 32).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

SEED = 0
ROWS, TOKENS = 8, 16
IGNORED = -100
BATCH_WORDS = {"batch_size": ROWS, "sequence_length": TOKENS}  # said like fields, but of the batch


class TinyError(ValueError):
    """A class or field that does not exist, or a class for which no batch can be made: says the nearest one and the fix."""


# fields by meaning ---------------------------------------------------------------------------------------------------

LAYERS = ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth"]
WIDTH = ["hidden_size", "d_model", "n_embd", "n_embed", "dim", "embed_dim", "d_embed", "word_embed_proj_dim", "projection_dim", "embedding_size"]
HEADS = ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads"]
KV_HEADS = ["num_key_value_heads", "num_kv_heads", "n_head_kv"]
HEAD_WIDTH = ["head_dim", "d_kv", "attention_head_dim", "v_head_dim", "kv_channels"]
INNER = ["intermediate_size", "ffn_hidden_size", "d_ff", "d_inner", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "moe_intermediate_size", "shared_expert_intermediate_size"]
POSITIONS = ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_target_positions", "max_source_positions"]
FIXED = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "sliding_window": 8, "image_size": 32, "patch_size": 8,
}  # fmt: skip


def shrink(defaults: Mapping[str, Any], said: Mapping[str, Any], tokens: int = TOKENS) -> dict[str, Any]:
    """The fields of a tiny configuration: those of ``defaults`` that set a size, and all of ``said``."""

    def told(names: list[str], otherwise: int) -> int:
        return next((said[n] for n in names if isinstance(said.get(n), int)), otherwise)

    heads = told(HEADS, 4)
    width, vocab = told(WIDTH, heads * 16), told(["vocab_size"], 128)
    kv = 2 if heads % 2 == 0 and heads > 2 else 1  # fewer than heads
    latent = "kv_lora_rank" in defaults  # keys and values come from one latent vector: a head of each for every query head
    meaning = (
        (LAYERS, 2), (WIDTH, width), (HEADS, heads), (KV_HEADS, heads if latent else kv), (HEAD_WIDTH, max(1, width // heads)),
        (INNER, 2 * width), (POSITIONS, max(64, tokens)), (["vocab_size"], vocab),
    )  # fmt: skip
    small = FIXED | {name: size for names, size in meaning for name in names}
    out = {name: small[name] for name, value in defaults.items() if name in small and isinstance(value, int) and not isinstance(value, bool)}
    for name, value in defaults.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= vocab:
            out[name] = 2
    if latent and "head_dim" in out:
        out["head_dim"] = FIXED["qk_rope_head_dim"]
    return out | dict(said)


def tiny_config(config_class: Any, said: Mapping[str, Any], tokens: int = TOKENS) -> Any:
    """An instance of ``config_class``; nested configurations are shrunk in the same way. Raises TinyError on an unknown field."""
    default = config_class()
    fields = default.to_dict()
    nested = {name: getattr(default, name) for name in getattr(config_class, "sub_configs", {}) or {}}
    known = {*fields, *getattr(config_class, "attribute_map", {})}
    for name in said:
        if name not in known:
            raise TinyError(f"{config_class.__name__} has no field {name!r}{_nearest(name, known)}")
    own = {getattr(config_class, "attribute_map", {}).get(name, name): value for name, value in said.items()}
    out = shrink({k: v for k, v in fields.items() if k not in nested}, own, tokens)
    for name, config in nested.items():
        given = own.get(name)
        if config is not None and (given is None or isinstance(given, Mapping)):
            out[name] = tiny_config(type(config), given or {}, tokens).to_dict()
    config = config_class(**out)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    return config


def tiny_model(name: str, said: Mapping[str, Any], *, meta: bool = False) -> tuple[nn.Module, dict[str, Tensor]]:
    """The class ``name`` of transformers, in training mode, and a batch of ``batch_size`` rows x ``sequence_length`` tokens.

    ``meta``: parameters on the meta device, which have a shape and no memory; the batch is real.
    """
    cls = _class(name)
    rows, tokens = (int(said.get(word, default)) for word, default in BATCH_WORDS.items())
    config = tiny_config(cls.config_class, {k: v for k, v in said.items() if k not in BATCH_WORDS}, tokens)
    state = torch.random.get_rng_state()
    torch.manual_seed(SEED)
    try:
        with torch.device("meta" if meta else "cpu"):
            model: nn.Module = cls(config)
    except Exception as error:
        raise TinyError(f"{name} cannot be built from this tiny {cls.config_class.__name__}: {type(error).__name__}: {error}\n  fix: give the fields that disagree, as in hf:{name}(num_hidden_layers=4), or write a file target, path/to/file.py:name") from error
    finally:
        torch.random.set_rng_state(state)
    return model.train(), tiny_batch(model, rows, tokens)


# batches -------------------------------------------------------------------------------------------------------------


def task_of(name: str) -> str:
    """What a class is for, by the library's own tables: ``"CAUSAL_LM"``, ``"MASKED_LM"``, ``"SEQUENCE_CLASSIFICATION"`` …; "" if in none."""
    from transformers.models.auto import modeling_auto

    first = ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING",
             "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION", "IMAGE_CLASSIFICATION", "PRETRAINING")  # fmt: skip
    for task in first:
        table = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES", {})
        if any(name == value or name in value for value in table.values()):
            return task
    return ""


def tiny_batch(model: nn.Module, rows: int = ROWS, tokens: int = TOKENS) -> dict[str, Tensor]:
    """A batch for a model of transformers: ids with padding at the right, an attention mask, and labels for its task of
    which each row ignores another number. The same batch every time."""
    name = type(model).__name__
    config: Any = model.config
    takes = set(inspect.signature(model.forward).parameters)
    task = "SEQ_TO_SEQ_CAUSAL_LM" if getattr(config, "is_encoder_decoder", False) and task_of(name) in ("MASKED_LM", "PRETRAINING") else task_of(name)
    if not takes & {"labels", "start_positions"}:
        raise TinyError(f"{name} has no loss: its forward takes no labels\n  fix: use a class with a head, such as one that ends in ForCausalLM, or write a file target with a loss_fn, path/to/file.py:name")
    random = torch.Generator().manual_seed(SEED)
    if "pixel_values" in takes and "input_ids" not in takes:
        side, channels = config.image_size, getattr(config, "num_channels", 3)
        height, width = (side, side) if isinstance(side, int) else side
        return {"pixel_values": torch.randn(rows, channels, height, width, generator=random), "labels": torch.randint(0, config.num_labels, (rows,), generator=random)}
    if "input_ids" not in takes:
        raise TinyError(f"no batch can be made for {name}, which takes {', '.join(sorted(takes))}\n  fix: write a file target that returns model and batch, path/to/file.py:name")
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocab = int(text.vocab_size)
    pad = getattr(text, "pad_token_id", None) or 0
    lengths = torch.tensor([max(2, tokens - r * tokens // (2 * rows)) for r in range(rows)])
    real = torch.arange(tokens)[None] < lengths[:, None]
    ids = torch.where(real, torch.randint(min(3, vocab - 1), vocab, (rows, tokens), generator=random), pad)
    batch = {"input_ids": ids}
    if "attention_mask" in takes:
        batch["attention_mask"] = real.long()
    if task == "MULTIPLE_CHOICE":
        batch = {key: value[:, None].expand(rows, 2, tokens).contiguous() for key, value in batch.items()}
    return batch | _labels(task, ids, real, vocab, getattr(config, "num_labels", 2), takes, random)


def _labels(task: str, ids: Tensor, real: Tensor, vocab: int, classes: int, takes: set[str], random: torch.Generator) -> dict[str, Tensor]:
    rows, tokens = ids.shape
    if task in ("SEQUENCE_CLASSIFICATION", "MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION"):
        return {"labels": torch.randint(0, 2 if task != "SEQUENCE_CLASSIFICATION" else classes, (rows,), generator=random)}
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


def _class(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TinyError(f"hf:{name} needs transformers ({error})\n  fix: pip install 'deepseed[hf]'") from None
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type):
        raise TinyError(f"transformers has no class {name!r}{_nearest(name, dir(transformers))}")
    if getattr(cls, "config_class", None) is None:
        raise TinyError(f"{name} of transformers is no model: it has no configuration class\n  fix: name a model class, as in hf:LlamaForCausalLM")
    return cls


def _nearest(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"\n  fix: did you mean {near[0]}?" if near else ""

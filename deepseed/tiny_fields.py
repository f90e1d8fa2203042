"""What the fields of a configuration mean, and how small each becomes.

Configurations share their words: ``hidden_size``, ``d_model`` and ``n_embd`` are all the width. Three ways, each less thorough:

* ``"meaning"``: every field whose meaning is known gets a size, and these agree by construction (heads x head width = width).
  A model in stages (lists of widths or depths) keeps its proportions instead: all widths are divided by one number.
* ``"proportion"``: every width is divided by one number, whatever the names, so that what agreed still does; four layers, of each stage.
* ``"depth"``: four layers and a small vocabulary; widths stay.

Of layers that differ, one of each kind is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import gcd
from typing import Any

TOKENS = 16
WAYS = ("meaning", "proportion", "depth")

LAYERS = ["num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers", "depth",
          "encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_block_layers"]  # fmt: skip
WIDTH = ["hidden_size", "d_model", "n_embd", "n_embed", "dim", "embed_dim", "d_embed", "word_embed_proj_dim", "projection_dim", "embedding_size", "lru_width"]
HEADS = ["num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads"]
KV_HEADS = ["num_key_value_heads", "num_kv_heads", "n_head_kv", "encoder_num_key_value_heads", "decoder_num_key_value_heads"]
HEAD_WIDTH = ["head_dim", "d_kv", "attention_head_dim", "v_head_dim", "kv_channels"]
INNER = ["intermediate_size", "ffn_hidden_size", "d_ff", "d_inner", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "moe_intermediate_size",
         "shared_expert_intermediate_size", "shared_intermediate_size"]  # fmt: skip
POSITIONS = ["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "max_target_positions", "max_source_positions"]
STATE_HEADS = ["mamba_n_heads", "n_mamba_heads", "mamba_num_heads"]  # of a state space, which is ``expand`` times as wide as the model
STATE_HEAD_WIDTH = ["mamba_d_head", "mamba_headdim", "mamba_head_dim"]
FIXED = {
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2,
    "moe_k": 2, "n_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "sliding_window": 8, "attention_window_size": 8, "window_size": 8, "attention_chunk_size": 8, "chunk_size": 8,
    "mamba_chunk_size": 8, "state_size": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "n_groups": 2, "time_step_rank": 8, "mamba_dt_rank": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "adapter_rank": 8, "image_size": 32, "patch_size": 8, "num_mel_bins": 16,
    "max_source_positions": 32, "mask_token_id": 1, "num_conv_pos_embeddings": 16,
}  # fmt: skip
ABSENT = {*KV_HEADS, "head_dim", "num_experts", "n_routed_experts", "num_experts_per_tok", "n_shared_experts", "vocab_size", "mask_token_id"}  # given a size where the default is None
OFF: dict[str, Any] = {  # coins that Python or NumPy throws: another program each step
    "layerdrop": 0.0, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0, "apply_spec_augment": False,
}  # fmt: skip
DEPTHS = ("depths", "depth", "num_block_repeats", "layer_depths")
STAGE_WIDTHS = ("hidden_sizes", "encoder_hidden_sizes", "embed_dims", "embed_dim", "dims", "neck_hidden_sizes", "decoder_hidden_sizes")
STAGE_SIDE, STAGE_WIDTH = 64, 16  # of an image; of the narrowest stage
Follows = Callable[[Mapping[str, Any]], Mapping[str, Any]]


def shrink(defaults: Mapping[str, Any], said: Mapping[str, Any], tokens: int = TOKENS, way: str = WAYS[0], follows: Follows = lambda _: {}) -> dict[str, Any]:
    """The fields of a tiny configuration: those of ``defaults`` that set a size, and all of ``said``.

    ``follows(fields)``: which other fields the configuration derives from these; they are left to it."""
    staged = any(_ints(defaults.get(name)) for name in (*DEPTHS, *STAGE_WIDTHS))
    if way == "meaning" and not staged:
        out = _by_meaning(defaults, said, tokens)
        derived = follows({name: value for name, value in out.items() if name in (*WIDTH, *HEADS)} | dict(said))
        out = {name: value for name, value in out.items() if name not in derived or name in KV_HEADS}
    else:
        out = _by_proportion(defaults, said, *((2, 1) if way == "meaning" else (4, 4)), by=1 if way == "depth" else None)
        out |= {name: value for name, value in _by_meaning(defaults, said, tokens).items() if name in ("vocab_size", *POSITIONS, "num_mel_bins")}
        derived = follows(out | dict(said))
        out = {name: value for name, value in out.items() if name not in derived or name in DEPTHS}
    vocab = out.get("vocab_size", said.get("vocab_size", 128))
    for name, value in defaults.items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= vocab:
            out[name] = 2
    return out | _kinds(defaults, said, out) | {name: value for name, value in OFF.items() if name in defaults} | dict(said)


def _by_meaning(defaults: Mapping[str, Any], said: Mapping[str, Any], tokens: int) -> dict[str, Any]:
    def told(names: list[str], otherwise: int) -> int:
        return next((said[n] for n in names if isinstance(said.get(n), int)), otherwise)

    heads = told(HEADS, 4)
    width, vocab = told(WIDTH, heads * 16), told(["vocab_size"], 128)
    kv = 2 if heads % 2 == 0 and heads > 2 else 1  # fewer than heads
    latent = isinstance(defaults.get("kv_lora_rank"), int)  # keys and values come from one latent vector: a head of each for every query head
    head = max(1, width // heads)
    expand = defaults.get("mamba_expand", defaults.get("expand", 1)) or 1
    state_heads = told(STATE_HEADS, 4)
    meaning = (
        (LAYERS, told(LAYERS, 2)), (WIDTH, width), (HEADS, heads), (KV_HEADS, heads if latent else kv), (HEAD_WIDTH, head), (INNER, 2 * width),
        (POSITIONS, max(64, tokens)), (["vocab_size"], vocab), (["rotary_dim"], max(2, head // 2)), (["attention_hidden_size"], 2 * width),
        (STATE_HEADS, state_heads), (STATE_HEAD_WIDTH, max(1, expand * width // state_heads)),
    )  # fmt: skip
    small = {name: size for names, size in meaning for name in names} | FIXED
    if "attention_hidden_size" in defaults:
        small["attention_head_dim"] = 2 * width // heads
    if "state_size" in defaults and "head_dim" in defaults:  # the heads are those of a state space
        small["head_dim"] = expand * width // heads
    out = {name: small[name] for name, value in defaults.items() if name in small and (_is_int(value) or (value is None and name in ABSENT))}
    if channels := _ints(defaults.get("conv_dim")):  # of the convolutions over a wave
        out["conv_dim"] = type(defaults["conv_dim"])(width // 2 for _ in channels)
    if latent and "head_dim" in out:
        out["head_dim"] = FIXED["qk_rope_head_dim"]
    return out


def _by_proportion(defaults: Mapping[str, Any], said: Mapping[str, Any], first: int, others: int, by: int | None) -> dict[str, Any]:
    """All widths divided by one number (``by``; None: the largest that works); heads stay as they are. ``first``, ``others``: layers of the first stage and of the rest, at most."""
    widths = {name: value for name, value in defaults.items() if name not in said and (_ints(value) if name in STAGE_WIDTHS else False)}
    single = {name: value for name, value in defaults.items() if name not in said and name in (*WIDTH, *INNER, *HEAD_WIDTH, "conv_dim") and _is_int(value)}
    heads = [n for name in HEADS for n in (_ints(defaults.get(name)) or ([defaults[name]] if _is_int(defaults.get(name)) else []))]
    lists = [_ints(value) for value in widths.values()]
    sizes = [size for each in lists for size in each] + [size for size in single.values() if size >= STAGE_WIDTH]
    by = by or _divisor(sizes, lists, heads)
    out: dict[str, Any] = {name: type(value)(size // by for size in value) for name, value in widths.items()}
    out |= {name: value // by for name, value in single.items() if value % by == 0}
    for name, value in defaults.items():
        if name in DEPTHS and (stages := _ints(value)):
            out[name] = type(value)(min(depth, others if n else first) for n, depth in enumerate(stages))
        elif name in LAYERS and _is_int(value) and not any(_ints(defaults.get(d)) for d in DEPTHS):
            out[name] = min(value, first)
    if "image_size" in defaults:
        out["image_size"] = STAGE_SIDE if _is_int(defaults["image_size"]) else type(defaults["image_size"])((STAGE_SIDE, STAGE_SIDE))
    if _is_int(defaults.get("window_size")):
        out["window_size"] = 2  # what is left of the image's side after five halvings
    return out


def _divisor(sizes: list[int], lists: list[list[int]], heads: list[int]) -> int:
    """The largest power of two that divides every width, leaves the narrowest at least STAGE_WIDTH, and each stage a whole number of widths a head."""
    whole = gcd(*sizes) if sizes else 1
    by = 1
    while whole % (2 * by) == 0 and min(sizes) // (2 * by) >= STAGE_WIDTH and all((size // (2 * by)) % h == 0 for each in lists for size, h in zip(each, heads, strict=False)):
        by *= 2
    return by


def _kinds(defaults: Mapping[str, Any], said: Mapping[str, Any], out: Mapping[str, Any]) -> dict[str, Any]:
    """One layer of each kind, in order, where a list has a word or a yes or no for each layer; periods of two."""
    name = next((n for n in LAYERS if _is_int(defaults.get(n))), None)
    layers = said.get(name, out.get(name, 2)) if name else 2
    new: dict[str, Any] = {}
    if name is not None:
        lists: dict[str, Any] = {key: value for key, value in defaults.items() if key not in DEPTHS and isinstance(value, list | tuple) and len(value) == defaults[name] > 4
                 and (all(isinstance(each, str) for each in value) or all(isinstance(each, int) and each in (0, 1) for each in value))}  # fmt: skip
        kinds = list(dict.fromkeys(zip(*lists.values(), strict=True)))
        if set(kinds) == {("linear_attention",)} and any(_is_int(defaults.get(each)) for each in HEADS):
            kinds.append(("full_attention",))  # a mixed model whose default forgot the other kind
        layers = layers if name in said else max(layers, len(kinds))
        new = {key: [kinds[n % len(kinds)][place] for n in range(layers)] for place, key in enumerate(lists)}
        if kinds and name not in said:
            new[name] = layers
    for key, value in defaults.items():
        if key.endswith(("_period", "_interval", "_frequency")) and _is_int(value) and value > 2:
            new[key] = 2
        if key.endswith("_offset") and _is_int(value) and _is_int(defaults.get(key.removesuffix("_offset") + "_period")):
            new[key] = value % 2
        if key == "attn_layer_indices" and value is None:
            new[key] = [layers - 1]
        if key == "block_types" and isinstance(value, list | tuple):
            new[key] = list(dict.fromkeys(value))
        if key == "attention_types" and isinstance(value, list) and value and isinstance(value[0], list):
            new[key] = [[value[0][0], layers // len(value[0][0])]]
    return new


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ints(value: Any) -> list[int]:
    """The numbers of a list of more than one; empty for anything else."""
    return list(value) if isinstance(value, list | tuple) and len(value) > 1 and all(_is_int(each) for each in value) else []

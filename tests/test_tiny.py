"""Small configurations: sizes agree, one layer of each kind is kept, stages keep their proportions; batches of every sort of input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseed.target import load
from deepseed.tiny import TinyError, shrink
from deepseed.tiny_batch import task_of

transformers = pytest.importorskip("transformers")

# of each sort: image in stages, sound, pairs, state spaces, layers that differ, experts
CLASSES = """WhisperForConditionalGeneration GPTJForCausalLM SwinForImageClassification ConvNextForImageClassification ResNetForImageClassification
CLIPModel GPTNeoForCausalLM Mamba2ForCausalLM Zamba2ForCausalLM Qwen3NextForCausalLM BambaForCausalLM DeepseekV2ForCausalLM EsmForMaskedLM
LlavaForConditionalGeneration SegformerForSemanticSegmentation ASTForAudioClassification MoonshineForConditionalGeneration LlamaForSequenceClassification
BartForSequenceClassification T5ForSequenceClassification"""


@pytest.mark.parametrize("name", CLASSES.split())
def test_a_class_is_built_small_and_has_a_loss(name: str) -> None:
    found = load(f"hf:{name}")
    loss = found.model(**found.batch).loss
    loss.backward()
    assert torch.isfinite(loss) and found.model.training
    assert sum(p.numel() for p in found.model.parameters()) < 1_000_000
    assert all(t.shape[0] == 8 for t in found.batch.values() if isinstance(t, torch.Tensor))


def test_nobody_else_sees_the_random_numbers() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first, second = load("hf:SwinForImageClassification"), load("hf:SwinForImageClassification")
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True))
    assert torch.equal(first.batch["pixel_values"], second.batch["pixel_values"])


def test_the_trial_leaves_no_trace_in_running_statistics() -> None:
    model = load("hf:ResNetForImageClassification").model
    assert all(not b.any() for name, b in model.named_buffers() if name.endswith(("running_mean", "num_batches_tracked")))


def test_stages_keep_their_proportions() -> None:
    swin = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7, "image_size": 224, "hidden_size": 768, "num_layers": 4}
    small = shrink(swin, {}, follows=lambda fields: {"hidden_size": fields["embed_dim"] * 8})
    assert small == {"embed_dim": 24, "depths": [2, 1, 1, 1], "window_size": 2, "image_size": 64}  # 3 heads of 8; hidden_size follows
    small = shrink({"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "num_attention_heads": [1, 2, 5, 8]}, {})
    assert small["hidden_sizes"] == [16, 32, 80, 128]


def test_one_layer_of_each_kind() -> None:
    default = {"num_hidden_layers": 6, "layer_types": ["sliding"] * 5 + ["full"], "rope": [1, 1, 1, 1, 1, 0], "hidden_size": 512}
    assert shrink(default, {})["layer_types"] == ["sliding", "full"]
    longer = shrink(default, {"num_hidden_layers": 5})
    assert longer["layer_types"] == ["sliding", "full", "sliding", "full", "sliding"] and longer["rope"] == [1, 0, 1, 0, 1]
    three = shrink({"num_hidden_layers": 6, "layer_types": ["a", "b", "c"] * 2}, {})
    assert three["num_hidden_layers"] == 3 and three["layer_types"] == ["a", "b", "c"]
    assert "moe_layers" not in shrink({"num_hidden_layers": 6, "moe_layers": [0, 1, 2, 3, 4, 5]}, {})  # which layers, not of which kind
    jamba = shrink({"attn_layer_period": 8, "attn_layer_offset": 4, "expert_layer_period": 2, "expert_layer_offset": 1}, {})
    assert jamba == {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_offset": 1}


def test_kinds_in_real_classes() -> None:
    assert load("hf:Gemma3ForCausalLM").model.config.layer_types == ["sliding_attention", "full_attention"]
    jamba: Any = load("hf:JambaForCausalLM").model
    assert {type(layer).__name__ for layer in jamba.model.layers} == {"JambaAttentionDecoderLayer", "JambaMambaDecoderLayer"}


def test_a_state_space_is_as_wide_as_its_heads() -> None:
    c = load("hf:Mamba2ForCausalLM(hidden_size=96, num_heads=6)").model.config
    assert c.num_heads * c.head_dim == c.expand * c.hidden_size == 192


def test_a_row_begins_with_the_tokens_of_its_image() -> None:
    found = load("hf:LlavaForConditionalGeneration")
    images = (found.batch["input_ids"] == found.model.config.image_token_id).sum(1)
    assert images.tolist() == [16] * 8 and found.batch["labels"].shape == found.batch["input_ids"].shape == (8, 32)
    loss = found.model(**found.batch).loss
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for name, p in found.model.named_parameters() if "vision" in name)


def test_tasks() -> None:
    tasks = {"LlamaForCausalLM": "CAUSAL_LM", "SwinForImageClassification": "IMAGE_CLASSIFICATION", "WhisperForAudioClassification": "AUDIO_CLASSIFICATION", "LlamaModel": ""}
    assert {name: task_of(name) for name in tasks} == tasks


@pytest.mark.parametrize(
    ("name", "says"), [("LlamaModel", "has no loss"), ("Pix2StructForConditionalGeneration", "no batch can be made"), ("EncodecModel", "cannot be made small|no batch can be made")]
)
def test_what_cannot_be_made(name: str, says: str) -> None:
    with pytest.raises(TinyError, match=says) as refused:
        load(f"hf:{name}")
    assert "fix: " in str(refused.value)


def test_a_length_that_the_model_has_no_positions_for() -> None:
    with pytest.raises(TinyError, match=r"hf:RobertaForSequenceClassification\(sequence_length=64\) cannot be built: .*64.*\n  fix: give sequence_length another value"):
        load("hf:RobertaForSequenceClassification(sequence_length=64)")

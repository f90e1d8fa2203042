"""Targets: files and Hugging Face classes, the batches made for them, optimizers by name, and what each refusal says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from deepseed.target import TargetError, like, load, optimizer_factory, parse_call
from deepseed.tiny import TinyError, shrink, tiny_config
from deepseed.tiny_batch import IGNORED

transformers = pytest.importorskip("transformers")

FILE = """
import torch
from helper import WIDTH

def build():
    return torch.nn.Linear(WIDTH, 2), torch.ones(4, WIDTH)

def build_all():
    model, batch = build()
    return model, batch, dict(loss_fn=lambda m, b: m(b).sum(), optimizer=torch.optim.SGD(model.parameters(), lr=0.1), clip_grad_norm=2.0)

ready = build()
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text("WIDTH = 3\n")
    path = tmp_path / "train.py"
    path.write_text(FILE)
    return path


def test_a_name_in_a_file_is_called_or_taken_as_it_is(file: Path) -> None:
    for name in ("build", "ready"):
        found = load(f"{file}:{name}")
        assert isinstance(found.model, nn.Linear) and found.batch.shape == (4, 3)
        assert found.loss_fn is found.optimizer is found.clip_grad_norm is None
    found = load(f"{file}:build_all")
    assert found.loss_fn is not None and isinstance(found.optimizer, torch.optim.SGD) and found.clip_grad_norm == 2.0


@pytest.mark.parametrize(
    ("name", "says"),
    [("biuld", "did you mean .*:build"), ("number", "gives a int, not a model and a batch"), ("build ", "is no target")],
)
def test_what_a_file_does_not_give(file: Path, name: str, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        load(f"{file}:{name}")


def test_a_file_that_fails_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ny = x.z\n")
    with pytest.raises(TargetError, match=r"broken\.py:2 raised AttributeError"):
        load(f"{path}:build")
    with pytest.raises(TargetError, match="no file"):
        load(f"{tmp_path}/none.py:build")
    with pytest.raises(TargetError, match=r"write path/to/file\.py:name, or hf:ClassName"):
        load("LlamaForCausalLM")


CLASSES = """LlamaForCausalLM GPT2LMHeadModel BertForMaskedLM BertForPreTraining BertForSequenceClassification BertForTokenClassification
BertForQuestionAnswering BertForMultipleChoice T5ForConditionalGeneration BartForConditionalGeneration ViTForImageClassification
MixtralForCausalLM Qwen3ForCausalLM DeepseekV3ForCausalLM OPTForCausalLM GPTNeoXForCausalLM DistilBertForMaskedLM"""


@pytest.mark.parametrize("name", CLASSES.split())
def test_any_class_with_a_loss_is_built_small_and_its_batch_fits(name: str) -> None:
    found = load(f"hf:{name}")
    loss = found.model(**found.batch).loss
    loss.backward()
    assert torch.isfinite(loss) and found.model.training
    assert sum(p.numel() for p in found.model.parameters()) < 500_000
    assert all(t.shape[0] == 8 for t in found.batch.values())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_padding_and_labels_differ_from_row_to_row(name: str) -> None:
    batch = load(f"hf:{name}").batch
    assert len(set(batch["attention_mask"].sum(1).tolist())) > 4
    ignored = (batch["labels"] == IGNORED).sum(1)
    for ranks in (2, 4):  # each data-parallel rank averages over another number of labels
        assert len(set(ignored.view(ranks, -1).sum(1).tolist())) > 1
    assert ((batch["labels"] == IGNORED) | (batch["attention_mask"] == 1)).all()


def test_the_same_model_and_batch_every_time_and_no_mark_on_the_generator() -> None:
    state = torch.random.get_rng_state()
    a, b = load("hf:LlamaForCausalLM"), load("hf:LlamaForCausalLM")
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))
    assert all(torch.equal(a.batch[k], b.batch[k]) for k in a.batch)
    assert torch.equal(state, torch.random.get_rng_state())


def test_what_is_said_wins_and_the_rest_follows() -> None:
    config = load("hf:LlamaForCausalLM(num_hidden_layers=4,hidden_size=128, batch_size=4, sequence_length=100)")
    assert config.batch["input_ids"].shape == (4, 100)
    c = config.model.config
    assert (c.num_hidden_layers, c.hidden_size, c.head_dim, c.intermediate_size) == (4, 128, 32, 256)
    assert c.num_key_value_heads < c.num_attention_heads and c.max_position_embeddings >= 100
    assert load("hf:GPT2LMHeadModel(num_hidden_layers=3)").model.config.n_layer == 3  # its own word is n_layer
    assert shrink({"d_model": 512, "n_heads": 8, "flag": True, "d_ff": None}, {"n_heads": 2}) == {"d_model": 32, "n_heads": 2}
    nested = tiny_config(transformers.Gemma3Config, {})
    assert nested.text_config.num_hidden_layers == nested.vision_config.num_hidden_layers == 2


def test_a_large_model_on_the_meta_device_takes_no_memory() -> None:
    model = load("hf:LlamaForCausalLM(num_hidden_layers=80, hidden_size=8192, intermediate_size=28672, vocab_size=32000)", meta=True).model
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) > 6e10


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hf:LamaForCausalLM", "no class 'LamaForCausalLM'\n.*did you mean LlamaForCausalLM"),
        ("hf:Nothing", "no class 'Nothing'\n  fix: name a model class, as in hf:LlamaForCausalLM$"),  # the nearest word is logging
        ("hf:BertForMaskedLN", "no class 'BertForMaskedLN'\n.*did you mean BertForMaskedLM"),
        ("hf:LlamaConfig", "LlamaConfig of transformers is a configuration, no model\n  fix: name a model class, as in hf:LlamaForCausalLM$"),
        ("hf:AutoModelForCausalLM", "is no model: it has no configuration class\n  fix: name a model class"),
        ("hf:LlamaForCausalLM(xyzzy=3)", "LlamaConfig has no field 'xyzzy'\n  fix: name a field that transformers.LlamaConfig has"),
        ("hf:LlamaModel", "has no loss"),
        ("hf:LlamaForCausalLM(num_layers=3)", "no field 'num_layers'\n.*num_hidden_layers"),
        ("hf:LlamaForCausalLM(3)", "cannot read"),
        ("hf:LlamaForCausalLM(hidden_size=os)", "cannot read"),
        ("hf:Pix2StructForConditionalGeneration", "no batch can be made"),
    ],
)
def test_refusals_of_classes(text: str, says: str) -> None:
    with pytest.raises((TinyError, TargetError), match=says):
        load(text)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("LlamaForCausalLM(hidden_size=33)", r"hidden size \(33\) is not a multiple of the number of attention heads \(4\)"),
        ("LlamaForCausalLM(hidden_size='x')", "'hidden_size' expected int, got str"),
        ("LlamaForCausalLM(num_attention_heads=0)", "ZeroDivisionError"),
        ("LlamaForCausalLM(vocab_size=-1)", r"negative dimension -1: \[-1, 64\]"),
        ("LlamaForCausalLM(hidden_act='xyzzy')", "KeyError: 'xyzzy'"),
        ("Gemma3ForConditionalGeneration(text_config={'hidden_size': 33})", "33"),
        ("ViTForImageClassification(image_size=-1)", "-1"),
        ("LlamaForCausalLM(batch_size='x')", "batch_size is no number of rows"),
        ("LlamaForCausalLM(batch_size=0)", "batch_size is no number of rows"),
        ("LlamaForCausalLM(sequence_length=None)", "sequence_length is no number of tokens"),
    ],
)
def test_what_a_class_refuses_of_its_fields_is_one_line_and_a_fix(call: str, says: str) -> None:
    """Whatever the library raised, where it makes the configuration, the model or the batch."""
    with pytest.raises(TargetError, match=says) as refused:
        load(f"hf:{call}", meta=True)
    why, fix = str(refused.value).split("\n")
    assert call.partition("(")[0] in why and fix.startswith("  fix: ")


def test_calls_and_optimizers() -> None:
    assert parse_call("Name", "") == ("Name", {})
    assert parse_call("f(a=1, b='x', c=(0.9, 0.95))", "") == ("f", {"a": 1, "b": "x", "c": (0.9, 0.95)})
    weights = [nn.Parameter(torch.ones(2))]
    sgd = optimizer_factory("sgd(lr=0.5, momentum=0.9)")
    assert sgd is not None and sgd(weights).defaults["momentum"] == 0.9
    assert isinstance(optimizer_factory("AdamW")(weights), torch.optim.AdamW)  # type: ignore[misc]
    assert optimizer_factory("none") is None
    with pytest.raises(TargetError, match="did you mean adamw"):
        optimizer_factory("adamww")
    with pytest.raises(TargetError, match="momentun"):
        optimizer_factory("sgd(momentun=0.9)")(weights)  # type: ignore[misc]


def test_an_optimizer_like_another_keeps_its_groups() -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    first = torch.optim.AdamW([{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "lr": 0.5}], lr=1e-2)
    made = like(first, model)(other.parameters())
    assert [g["params"][0] is p for g, p in zip(made.param_groups, other.parameters(), strict=True)] == [True, True]
    assert made.param_groups[0]["weight_decay"] == 0.1 and made.param_groups[1]["lr"] == 0.5


def test_only_model_classes_are_suggested() -> None:
    """Whatever a name is near to: configurations, tokenizers and modules of transformers are no targets."""
    for name in ("Loging", "LlamaConfg", "BertTokenizr", "TrainingArgument", "GPT2LMHeadModl"):
        with pytest.raises(TinyError, match=r"\n  fix: ") as refused:
            load(f"hf:{name}")
        found = str(refused.value).partition("did you mean ")[2].rstrip("?")
        assert not found or issubclass(getattr(transformers, found), torch.nn.Module)
    assert found == "GPT2LMHeadModel"

"""A small model under the HF Trainer on each rank, stock (Accelerate's DistributedDataParallel) or DeepSeed's: what it logged and what became of the weights."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from deepseed.hf import DeepSeedArguments, DeepSeedMixin, DeepSeedTrainer, DeepSeedTrainingArguments, enable
from deepseed.trained import Trained

VOCAB = 32
STOCK = "stock"
Stage = int | str | Mapping[str, Any] | None


class Run(NamedTuple):
    logs: list[dict[str, float]]  # one a step
    weights: dict[str, Tensor]
    trainer: Any

    def curve(self, *keys: str) -> list[float]:
        return [float(log[key]) for log in self.logs for key in keys or ("loss", "grad_norm", "learning_rate") if key in log]


class Logs(TrainerCallback):
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, args: object, state: Any, control: object, logs: dict[str, float] | None = None, **kwargs: object) -> None:
        if logs and "loss" in logs:
            self.steps.append({**logs, "step": state.global_step})


def llama(tied: bool = False, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0, **{**sizes, **changes}))


def rows(count: int, lengths: Sequence[int] = (6, 9), seed: int = 1) -> list[dict[str, list[int]]]:
    """Rows of these lengths in turn."""
    g = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB, (lengths[n % len(lengths)],), generator=g).tolist() for n in range(count)]
    return [{"input_ids": row, "labels": row} for row in ids]


def collate(batch: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
    """As long as the longest row."""
    longest = max(len(row["input_ids"]) for row in batch)
    fill = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    given = [{"attention_mask": [1] * len(row["input_ids"]), **row} for row in batch]
    return {key: torch.tensor([[*row[key], *[value] * (longest - len(row[key]))] for row in given]) for key, value in fill.items()}


def config(stage: int, **more: Any) -> dict[str, Any]:
    auto = {key: "auto" for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")}
    return {"zero_optimization": {"stage": stage}, **auto, **more}


def arguments(folder: str, stage: Stage, kind: Any = None, **changes: Any) -> Any:
    """stage: ``STOCK``, or ZeRO's, or a config, or None; kind: the class of a library's arguments."""
    said = {
        "output_dir": folder, "use_cpu": True, "bf16": False, "learning_rate": 1e-2, "max_steps": 4, "logging_steps": 1, "max_grad_norm": 0.5, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 1, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "lr_scheduler_type": "linear", "warmup_steps": 1, "dataloader_pin_memory": False, **changes,
    }  # fmt: skip
    if stage == STOCK:
        return (kind or TrainingArguments)(**said)
    return (DeepSeedTrainingArguments if kind is None else type("Arguments", (DeepSeedArguments, kind), {}))(**said, deepspeed=config(stage) if isinstance(stage, int) else stage)


def train(
    folder: str, stage: Stage, make: Callable[[], nn.Module] = llama, resume: str | None = None, before: Callable[[Any], None] | None = None, kind: Any = None, of: Any = None,
    options: Mapping[str, Any] = {}, lengths: Sequence[int] = (8,), count: int = 64, **changes: Any,
) -> Run:  # fmt: skip
    """Train ``make()`` on rows of these lengths. kind: a library's Trainer class, or ``enable``; of: its class of arguments; options: of the Trainer; changes: of its arguments."""
    quiet()
    AcceleratorState._reset_state(reset_partial_state=False)  # of the Trainer before it in this process, with its precision
    set_seed(0)
    logs = Logs()
    enabled = kind is enable and stage != STOCK
    said = arguments(folder, STOCK if enabled else stage, of, **changes)
    base = Trainer if kind is None or kind is enable else kind
    made = base if stage == STOCK or enabled else type("Mine", (DeepSeedMixin, base), {}) if kind else DeepSeedTrainer
    trainer = made(model=make(), args=said, **{"train_dataset": rows(count, lengths), "data_collator": collate, "callbacks": [logs], **options})
    if enabled:
        assert enable(trainer, config(stage) if isinstance(stage, int) else stage) is trainer
    if before is not None:
        before(trainer)
    trainer.train(resume_from_checkpoint=resume)
    return Run(logs.steps, weights(trainer), trainer)


def weights(trainer: Any) -> dict[str, Tensor]:
    held = trainer.model if isinstance(trainer.model_wrapped, nn.parallel.DistributedDataParallel) or trainer.model_wrapped is trainer.model else trainer.model_wrapped
    return {key: t.detach().clone() for key, t in held.state_dict().items()}


def quiet() -> None:
    warnings.simplefilter("ignore")
    for name in ("transformers", "accelerate", "trl", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def curves_apart(a: Run, b: Run, *keys: str) -> float:
    """The largest relative difference of losses, norms and rates, step by step."""
    x, y = a.curve(*keys), b.curve(*keys)
    assert len(x) == len(y) > 0, (len(x), len(y))
    return max(abs(p - q) / max(abs(p), abs(q), 1e-3) for p, q in zip(x, y, strict=True))


def weights_apart(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    assert list(a) == list(b), (list(a)[:5], list(b)[:5])
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a) / max(float(t.abs().max()) for t in a.values())


# beside the stock Trainer -----------------------------------------------------------------------------------------------


def own_loss(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """A ``compute_loss_func`` in float64."""
    logits, labels = outputs["logits"].double()[:, :-1].reshape(-1, VOCAB), labels[:, 1:].reshape(-1)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / (num_items_in_batch or 1)


CASES: Mapping[str, Mapping[str, Any]] = {
    "ragged": {"lengths": (5, 8), "gradient_accumulation_steps": 2},
    "short last group": {"gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2, "count": 20},
    "each rank's own mean": {"lengths": (6, 9), "gradient_accumulation_steps": 2, "average_tokens_across_devices": False},
    "label smoothing": {"label_smoothing_factor": 0.1, "lengths": (6, 9)},
    "own loss": {"options": {"compute_loss_func": own_loss}, "gradient_accumulation_steps": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "no clipping": {"max_grad_norm": 0.0},
    "no config": {"stage": None},
    "enable": {"kind": enable},
    "tied": {"make": partial(llama, True)},
}


def beside(folder: str, cases: Sequence[tuple[str, int]]) -> list[tuple[float, float]]:
    """How far curves and weights are apart, case by case with ZeRO's stage."""
    found = []
    for name, stage in cases:
        case = {"stage": stage, **CASES[name]}
        ours = train(os.path.join(folder, "ours"), case.pop("stage"), **case)
        stock = train(os.path.join(folder, "stock"), STOCK, **case)
        assert isinstance(ours.trainer.model_wrapped, Trained) and not isinstance(stock.trainer.model_wrapped, Trained)
        found.append((curves_apart(ours, stock), weights_apart(ours.weights, stock.weights)))
    return found


# files ------------------------------------------------------------------------------------------------------------------


def resumed(folder: str, stages: Sequence[int | str], make: Callable[[], nn.Module] = llama, **changes: Any) -> list[tuple[list[float], float]]:
    """A run of stages[0] is saved half-way; each stage goes on from there. By stage, all that was logged minus what the first one logged, and how far weights are apart."""
    first = train(folder, stages[0], make, save_strategy="steps", save_steps=2, **changes)
    found = []
    for stage in stages:
        again = train(f"{folder}-{stage}", stage, make, resume=os.path.join(folder, "checkpoint-2"), **changes)
        assert [log["step"] for log in again.logs] == [3, 4]
        rest = first._replace(logs=first.logs[2:]).curve()
        found.append(([p - q for p, q in zip(again.curve(), rest, strict=True)], weights_apart(again.weights, first.weights)))
    return found


def evaluated(folder: str, stage: int) -> dict[str, Any]:
    """Evaluation before, during and after, predictions of rows of unequal length, and the best model at the end; beside stock.

    The stock Trainer that evaluates first trains without DistributedDataParallel then, each rank for itself: it evaluates later here. The loss rises from
    the second step on, so that the best model is not the last; at a rate of 0.3 rounding grew three hundred times in four steps."""
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant"}
    runs, seen = [], []
    for kind in (STOCK, stage):
        before: list[float] = []

        def evaluate(trainer: Any, before: list[float] = before) -> None:
            before.append(trainer.evaluate()["eval_loss"])

        if kind == STOCK:
            train(os.path.join(folder, "first"), kind, before=evaluate, max_steps=1, options={"eval_dataset": rows(7, (5, 8), 2)})
        run = train(os.path.join(folder, str(kind)), kind, before=evaluate if kind != STOCK else None, options={"eval_dataset": rows(7, (5, 8), 2)}, **more)
        during = [log["eval_loss"] for log in run.trainer.state.log_history if "eval_loss" in log]
        best = run.trainer.state.best_model_checkpoint
        predicted = run.trainer.predict(rows(7, (5, 6, 8), 3))
        seen.append([*during, run.trainer.evaluate()["eval_loss"], predicted.metrics["test_loss"]])
        runs.append((run, predicted, os.path.basename(best), before))
    (a, p, best, before_stock), (b, q, other, before_ours) = runs
    return {
        "losses": max(abs(x - y) / x for x, y in zip(*seen, strict=True)), "best": (best, other), "logits": float(np.abs(p.predictions - q.predictions).max()), "rows": (p.predictions.shape, q.predictions.shape),
        "labels": bool((p.label_ids == q.label_ids).all()), "before": (before_stock[0], before_ours[0]), "during": seen[1], "weights": weights_apart(b.weights, a.weights), "curve": curves_apart(b, a),
    }  # fmt: skip


def saved(folder: str, stage: int, tied: bool) -> dict[str, Any]:
    """What ``from_pretrained`` reads of ``save_model``, and both generate."""
    run = train(folder, stage, partial(llama, tied), max_steps=2)
    run.trainer.save_model()
    dist.barrier()
    read = LlamaForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[3, 4, 5]])
    with run.trainer.model_wrapped.gathered() as whole:
        ours = whole.generate(prompt, max_new_tokens=5, do_sample=False)
    theirs = read.generate(prompt, max_new_tokens=5, do_sample=False)
    tensors = safe_open(os.path.join(folder, "model.safetensors"), "pt").keys()
    return {"weights": weights_apart(dict(read.state_dict()), run.weights), "generated": ours.tolist() == theirs.tolist(), "head in the file": "lm_head.weight" in tensors, "is tied": read.lm_head.weight is read.model.embed_tokens.weight}


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def adapted(folder: str, stage: int) -> dict[str, Any]:
    """LoRA: beside stock, resumed, and what its files have in them."""
    stock = train(os.path.join(folder, "stock"), STOCK, lora)
    at = os.path.join(folder, "ours")
    ours = train(at, stage, lora, save_strategy="steps", save_steps=2)
    again = train(os.path.join(folder, "again"), stage, lora, resume=os.path.join(at, "checkpoint-2"))
    ours.trainer.save_model()
    dist.barrier()
    kept = FileSystemReader(os.path.join(at, "checkpoint-2", "deepseed")).read_metadata().state_dict_metadata
    trained = [name for name, p in again.trainer.model.named_parameters() if p.requires_grad]
    return {
        "curve": curves_apart(ours, stock), "weights": weights_apart(ours.weights, stock.weights), "resumed": weights_apart(again.weights, ours.weights), "steps": [log["step"] for log in again.logs],
        "adapter": sorted(safe_open(os.path.join(at, "adapter_model.safetensors"), "pt").keys()), "trained": trained, "files": sorted(os.listdir(at)),
        "base in the checkpoint": sorted(k for k in kept if "base_layer" in k or "embed_tokens" in k), "tensors in the checkpoint": len(kept),
    }  # fmt: skip


def written(folder: str, stage: Stage) -> dict[str, Any]:
    """Generation in evaluation (``predict_with_generate``), beside stock."""
    found = []
    prompts = [{"input_ids": row["input_ids"][:4], "labels": row["input_ids"][:4]} for row in rows(6, (8,), 2)]
    for kind in (STOCK, stage):
        run = train(os.path.join(folder, str(kind)), kind, kind=Seq2SeqTrainer, of=Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=9)
        found.append(run.trainer.predict(prompts, do_sample=False, max_new_tokens=5).predictions)
    return {"same": bool((found[0] == found[1]).all()), "shape": found[1].shape}


def fine_tuned(folder: str, stage: Stage) -> dict[str, Any]:
    """TRL's SFTTrainer through the mixin, completions alone in the loss, beside stock."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"input_ids": row["input_ids"], "labels": [-100, -100, *row["input_ids"][2:]]} for row in rows(32, (6, 8))])
    common = {
        "kind": SFTTrainer, "of": SFTConfig, "dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_accumulation_steps": 2,
        "options": {"train_dataset": data, "processing_class": tokenizer(), "data_collator": None},
    }  # fmt: skip
    ours, stock = (train(os.path.join(folder, str(kind)), kind, **common) for kind in (stage, STOCK))
    return {
        "curve": curves_apart(ours, stock), "weights": weights_apart(ours.weights, stock.weights), "trained": isinstance(ours.trainer.model_wrapped, Trained),
        "accuracy": [log["mean_token_accuracy"] for log in ours.logs] == [log["mean_token_accuracy"] for log in stock.logs],
    }  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": 0, "<bos>": 1, "<eos>": 2, **{str(n): n for n in range(3, VOCAB)}}))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")

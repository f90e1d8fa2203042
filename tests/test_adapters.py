"""Adapters of PEFT and the head that TRL fuses: frozen parameters have no gradient and no state, and every method means what eager means."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo.module import beside, module, sgd
from torch import Tensor, nn

import deepseed
from deepseed.verify import verify

peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "from_deepspeed"))
from lora import make_model  # noqa: E402

wide = pytest.mark.wide
QV = ["q_proj", "v_proj"]


def batch(rows: int = 8, length: int = 12) -> dict[str, Tensor]:
    """Two rows are shorter."""
    ids = torch.randint(0, 384, (rows, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:], mask[5, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def adapted(method: str = "Lora", checkpointing: bool = False, **options: Any) -> nn.Module:
    """A small Llama with an adapter that does something: PEFT begins at zero."""
    torch.manual_seed(0)
    base = make_model(384)
    if checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    made: nn.Module = peft.get_peft_model(base, getattr(peft, f"{method}Config")(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return made.train()


def trainable(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-2)


LORA: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": QV}
METHODS: dict[str, dict[str, Any]] = {
    "lora with dropout": {**LORA, "lora_dropout": 0.1}, "lora under checkpointing": {**LORA, "checkpointing": True}, "dora": {**LORA, "use_dora": True},
    "lora with a saved head": {**LORA, "modules_to_save": ["lm_head"]}, "lora on embeddings": {**LORA, "target_modules": ["embed_tokens", "q_proj"]},
    "lora with biases": {**LORA, "bias": "all", "use_rslora": True}, "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "PromptTuning": {"num_virtual_tokens": 4}, "PromptEncoder": {"num_virtual_tokens": 4, "encoder_hidden_size": 16}, "PrefixTuning": {"num_virtual_tokens": 4},
    "AdaLora": {"target_modules": QV, "init_r": 4, "target_r": 2, "total_step": 10}, "OFT": {"target_modules": QV, "r": 0, "oft_block_size": 8},
    "BOFT": {"target_modules": QV, "boft_block_size": 4}, "Vera": {"target_modules": ["q_proj"], "r": 4}, "LNTuning": {"target_modules": ["input_layernorm", "norm"]},
}  # fmt: skip
FAST = {"lora with dropout", "Vera"}


@pytest.mark.parametrize("plan", ["zero3+dp2", pytest.param("zero2+dp2+mb2", marks=wide), pytest.param("tp2", marks=wide), pytest.param("pp2+mb2", marks=wide)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in FAST else wide) for n in METHODS])
def test_a_method_means_what_eager_means(name: str, plan: str) -> None:
    options = dict(METHODS[name])
    model = adapted(name if name[0].isupper() else "Lora", **options)
    report = verify(model, batch(), plan, optimizer_factory=trainable, steps=2, backend="simulate")
    assert report.ok, report


def test_frozen_parameters_have_no_gradient_and_no_state() -> None:
    model = adapted(**LORA)
    whole, own = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.parameters() if p.requires_grad)
    step = deepseed.compile(model, "zero2+dp2", optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), backend="simulate", example_batch=batch())
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    step(batch())
    assert all(p.requires_grad == (not torch.equal(p, before[n])) for n, p in model.named_parameters())
    rank = step.explain().ranks[0]
    assert rank.param_bytes == 4 * whole
    assert rank.grad_bytes <= 4 * own and 4 * own <= rank.optimizer_bytes < 4 * own + 8 * len(before)  # two moments, half each; step counts


@pytest.mark.parametrize("plan", ["zero3+dp2", pytest.param("zero0+dp2+mb2", marks=wide), pytest.param("tp2", marks=wide)])
def test_the_head_that_trl_fuses(plan: str) -> None:
    """Log-probabilities in tiles, written in place, by an autograd function of its own; it computes in float32 at any dtype."""
    utils = pytest.importorskip("trl.trainer.utils")
    torch.manual_seed(0)
    base = make_model(384)
    utils.add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **LORA)).double()

    def loss_of(of: Any, rows: dict[str, Tensor]) -> Tensor:
        out = of(**rows, use_cache=False, fused_lm_head=True)
        assert type(out).__name__ == "FusedCausalLMOutput" and out.label_mask.dtype is torch.bool and out.mean_logits is None
        return -out.log_probs.sum() / out.label_mask.sum() - 0.1 * out.entropy.mean()

    worst = beside(module(model, plan, backend="simulate"), copy.deepcopy(model), loss_of, [batch()] * 2, sgd, 1.0)
    assert max(worst.values()) <= 1e-6, worst

"""codegen= of whole models, in float32 and bf16, by the groups' functions, C++ and Inductor: each model and plan by one of the first two here, all of them when run ``wide``."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import deepseed
from deepseed import kernels as back_ends
from deepseed.codegen import inductor

transformers = pytest.importorskip("transformers")
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
MODELS: dict[str, Any] = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, use_cache=False)),
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False, **NO_DROPOUT)),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)),
}  # fmt: skip


def losses(model: str, plan: str, codegen: str) -> list[float]:
    torch.manual_seed(0)
    made = MODELS[model](transformers)
    ids = torch.randint(0, 64, (4, 16))
    step = deepseed.compile(made, plan, optimizer=torch.optim.SGD(made.parameters(), lr=0.1), codegen=codegen, backend="simulate")
    return [float(step({"input_ids": ids, "labels": ids})) for _ in range(3)]


PLANS = ("zero0", "zero1+dp2+bf16")
compiled = pytest.mark.skipif(not inductor.compiler(), reason="no C++ compiler")


def cases() -> list[Any]:
    found = []
    for (m, model), (n, plan), codegen in itertools.product(enumerate(MODELS), enumerate(PLANS), ("functions", "cpp", "inductor")):
        quick = codegen == ("functions", "cpp")[(m + n) % 2]
        found.append(pytest.param(model, plan, codegen, marks=[*([] if quick else [pytest.mark.wide]), *([] if codegen == "functions" else [compiled])]))
    return found


@pytest.mark.parametrize(("model", "plan", "codegen"), cases())
@pytest.mark.turn
def test_kernels_train_as_ops_do(model: str, plan: str, codegen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 sums in another order; in bf16 a group rounds fewer values between its ops, or others: a few units of 2^-8 of a loss near 4, through three steps."""
    monkeypatch.setitem(back_ends.BACK_ENDS, "functions", lambda wanted, folder, tell: [inductor.python(k) for k in wanted])
    assert losses(model, plan, codegen) == pytest.approx(losses(model, plan, "python"), abs=1e-5 if "bf16" not in plan else 0.03)

"""tp discovers Megatron: from rules and costs alone, column then row in attention and MLP, vocab-parallel logits and loss.

Shoeybi et al. 2019, section 3: a layer sends 2 all_reduces forward and 2 backward, together 8 T h (t-1)/t elements a rank.
What a layer costs is the difference between models of three and of two layers, so that nothing is told apart by its name.
"""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest

from deepseed import closed_forms as form
from deepseed import pipeline
from deepseed.counts import sent_bytes
from deepseed.explain import Explanation, explain
from deepseed.ir.layout import Split
from deepseed.ir.mesh import Mesh
from deepseed.ir.program import ITEMSIZE, Program
from deepseed.target import load

pytest.importorskip("transformers")

VOCABULARY, HIDDEN, ROWS, LENGTH = 32000, 512, 8, 256  # real sizes: nothing is computed
TOKENS = ROWS * LENGTH
MODELS = ("LlamaForCausalLM", "GPT2LMHeadModel", "BertForMaskedLM")
RANKS = (2, pytest.param(4, marks=pytest.mark.wide))
every = pytest.mark.parametrize("ranks", RANKS)
models = pytest.mark.parametrize("name", MODELS)


@cache
def lowered(name: str, layers: int, ranks: int) -> tuple[Program, Explanation]:
    import torch

    from deepseed.capture import capture

    kv = f", num_key_value_heads={ranks}" if name.startswith("Llama") and ranks > 2 else ""
    found = load(f"hf:{name}(num_hidden_layers={layers}, vocab_size={VOCABULARY}, hidden_size={HIDDEN}, batch_size={ROWS}, sequence_length={LENGTH}{kv})", meta=True)
    captured = capture(found.model, found.batch, optimizer=torch.optim.AdamW(found.model.parameters()), clip_grad_norm=1.0)
    args = pipeline.arguments(Mesh((("tp", ranks),)), 0, {"tp": 0})
    done = pipeline.run(captured.program, args, pipeline.SHARED[:4], check=False)
    return done[-1].program, explain(done[-1].program)


@models
@every
def test_column_then_row_in_attention_and_mlp(name: str, ranks: int) -> None:
    uses = Counter(w.use for w in lowered(name, 2, ranks)[1].weights for _ in range(w.count) if ".*." in w.key and w.use)
    assert set(uses) == {"tp: column", "tp: row"}
    assert uses["tp: row"] == 2 * 2  # one ends attention, one ends the MLP, in each of two layers


@models
@every
def test_a_layer_sends_what_megatron_sends(name: str, ranks: int) -> None:
    sent, count = Counter[str](), Counter[str]()
    for layers, sign in ((3, 1), (2, -1)):
        p, _ = lowered(name, layers, ranks)
        for op in p.ops:
            if op.target.endswith(".start"):
                small = op.phase == "update"  # reductions of whole small parameters, such as norms, once a step
                sent["small" if small else op.phase] += sign * sent_bytes(p, op) // ITEMSIZE[op.type.dtype]
                count["small" if small else op.phase] += sign
    assert 0 < count["forward"] <= 4 and 0 < count["backward"] <= 4
    bound = form.value(form.tensor_volume(), L=1, T=TOKENS, h=HIDDEN, t=ranks)
    assert sent["forward"] + sent["backward"] <= bound
    assert sent["small"] <= 4 * HIDDEN * 2


@models
@every
def test_logits_and_loss_are_split_over_the_vocabulary(name: str, ranks: int) -> None:
    p, _ = lowered(name, 2, ranks)
    logits = [t for op in p.ops if op.phase != "update" for t in op.types if t.numel >= TOKENS * VOCABULARY]
    assert logits
    for t in logits:
        element = t.layout.on("tp")
        assert isinstance(element, Split) and t.local(p.mesh)[element.dim] * ranks == t.shape[element.dim]
    gathered = [op for op in p.ops if op.phase != "update" and op.target.endswith(".start") and op.type.numel >= TOKENS * VOCABULARY]
    assert not gathered


@models
@every
def test_the_embedding_is_split_too(name: str, ranks: int) -> None:
    """By vocabulary where it is also the output layer's weight. By columns is cheaper where it is not: a gather, T h (t-1)/t,
    in place of an all_reduce, twice as much."""
    (weight,) = [w for w in lowered(name, 2, ranks)[1].weights if w.layout.startswith(f"f32[{VOCABULARY}") and "," in w.layout and "lm_head" not in w.key]
    assert "vocabulary" in weight.use if not name.startswith("Llama") else weight.use


@models
@every
def test_no_product_is_repeated(name: str, ranks: int) -> None:
    _, e = lowered(name, 2, ranks)
    assert not [r for r in e.replicated_ops if r.flops]
    assert e.matmul_flops * ranks == e.matmul_flops_one_device
    assert not e.unruled_ops

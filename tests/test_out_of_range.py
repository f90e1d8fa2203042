"""A number of the batch that picks from a table which does not have it: the batch entry, where in it, the module, both numbers and the fix, for every plan and back end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deepseed
from deepseed.runtime.errors import RankError
from deepseed.tiny import tiny_model

LABELS = r'batch entry "labels" has {value} at \[0, 5\], and aten.nll_loss_forward at the top \(loss_utils.py:\d+\) picks one of {size}\n  fix: it must be 0 to {last}, or the loss\'s ignore_index, which is -100'
IDS = r'batch entry "input_ids" has {value} at \[0, 5\], and embedding at model.embed_tokens \(modeling_llama.py:\d+\) picks one of {size}\n  fix: it must be 0 to {last}; look at the data'


def llama() -> tuple[Any, dict[str, Tensor]]:
    return tiny_model("LlamaForCausalLM", {"num_hidden_layers": 1})


def said(entry: str, value: int, size: int) -> str:
    return (LABELS if entry == "labels" else IDS).format(value=value, size=size, last=size - 1)


def changed(batch: dict[str, Tensor], entry: str, value: int) -> dict[str, Tensor]:
    x = batch[entry].clone()
    if entry == "labels":
        x[0, 2] = -100  # does not count, and is no mistake
    x[0, 5] = value
    return batch | {entry: x}


@pytest.mark.parametrize(("plan", "codegen"), [("zero0", "python"), ("zero0", "cpp"), ("zero3+dp2+mb2", "python"), ("tp2", "python")])
def test_what_and_where(plan: str, codegen: str) -> None:
    """The next step is as if there had been none."""
    model, batch = llama()
    size = model.config.vocab_size
    step = deepseed.compile(model, plan, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), codegen=codegen)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for entry, value in (("input_ids", 99999), ("labels", 99999), ("labels", -7), ("labels", size)):
        with pytest.raises((IndexError, RankError), match=("" if plan == "zero0" else "(?s).*") + said(entry, value, size)):
            step(changed(batch, entry, value))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert float(step(changed(batch, "labels", -100))) > 0


def test_a_module_says_it_too() -> None:
    model, batch = llama()
    module = deepseed.compile(model, "zero0")
    with pytest.raises(IndexError, match=said("input_ids", -1, model.config.vocab_size)):
        module(**changed(batch, "input_ids", -1))


def test_an_error_about_something_else_is_left() -> None:
    """An index that the model makes by itself is not the batch's."""

    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.ones(4, 2))
            self.register_buffer("at", torch.tensor([0, 1]))

        def forward(self, x: Tensor) -> Tensor:
            return (torch.nn.functional.embedding(self.at, self.table).sum() * x).mean()

    model = Own()
    step = deepseed.compile(model, "zero0", optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, b: m(b["x"]))
    step({"x": torch.ones(2)})
    model.at[1] = 9
    with pytest.raises(IndexError, match=r"^index out of range in self$"):
        step({"x": torch.ones(2)})

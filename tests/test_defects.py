"""The 22 most-hit defects of eager ZeRO (DeepSpeed's, and of those who build on it), each with what shows that a compiled step has none of it.

``SHOWN`` names the tests, here and elsewhere. DS#: github.com/deepspeedai/DeepSpeed/issues, HF#: of transformers.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import deepseed
from deepseed.api import TrainStep
from deepseed.verify import verify

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
wide = pytest.mark.wide

SHOWN: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("ZeRO-3 hangs when ranks run different modules (DS#7998, DS#7461)", ("test_guards::test_ranks_recompile_together_when_one_ranks_rows_differ", "test_guards::test_ranks_that_read_different_values_are_told_so", "test_runtime::test_ranks_agree_on_text_and_values")),
    2: ("generate() under ZeRO-3 deadlocks and gathers per token (DS#8262, DS#860)", ("test_hf::test_generation_in_evaluation",)),
    3: ("overlap_comm races: NaN, other gradients (DS#8061, DS#5545)", ("test_runs_are_repeated_bit_for_bit", "test_runtime::test_an_operand_may_be_overwritten_after_the_own_wait", "test_schedule::test_a_scheduled_step_computes_the_same", "test_hand_mutants::test_an_error_is_caught")),
    4: ("reduce_bucket_size changes convergence (DS#6351)", ("test_schedule::test_a_scheduled_step_computes_the_same",)),
    5: ("ZeRO-2 and 3 are incompatible with pipelines (DS#1629, DS#823)", ("test_gloo_pipeline::test_zero3_and_two_stages_on_four_ranks_are_eager_in_float64", "test_train_3d::test_three_axes_simulated_in_float64_train_as_one_device_does")),
    6: ("gradient computed twice for this partition (DS#988, DS#627, HF#18330)", ("test_a_module_that_is_used_twice_and_two_losses",)),
    7: ("no_sync is illegal for ZeRO-2 and 3 (DS#6793)", ("test_module::test_gradients_add_up_over_backwards", "test_engine::test_on_two_ranks", "test_microsteps::test_what_is_sent_and_held_between_boundaries")),
    8: ("the scale of accumulated gradients and of their norm (HF#45305, HF#11919, DS#1107)", ("test_every_stage_and_split_of_a_batch_is_the_same_training", "test_hf::test_a_trainer_is_the_stock_one", "test_scripts::test_the_loop_means_the_same_on_any_ranks_and_however_a_batch_is_cut")),
    9: ("the loss differs between stages 0 to 3 under accumulation; it accumulates in bf16 (DS#1488, DS#1800, DS#2352)", ("test_every_stage_and_split_of_a_batch_is_the_same_training", "test_precision::test_zero_changes_no_bit", "test_precision::test_gradients_are_reduced_and_added_up_in_the_dtype_that_the_plan_says")),
    10: ("resuming with other ranks needs a conversion (DS#2921, DS#3810)", ("test_checkpoint::test_training_goes_on_under_another_plan", "test_resume::test_every_plan_goes_on_from_every_other", "test_checkpoint::test_real_ranks_write_their_parts_and_others_go_on")),
    11: ("load_checkpoint after a step is wrong under ZeRO-3 (DS#1612, DS#1394)", ("test_loading_after_steps_goes_back_to_what_was_saved", "test_checkpoint::test_load_state_dict_of_the_step")),
    12: ("frozen parameters are lost, or make checkpoints huge (DS#3090)", ("test_frozen_parameters_have_no_state_and_survive_a_checkpoint", "test_module::test_frozen_parameters", "test_hf::test_a_model_of_peft")),
    13: ("checkpointing and ZeRO-3: a recomputed shape is [0] (HF#47254)", ("test_checkpointed_layers_under_stage_3", "test_memory_equality::test_memory_changes_no_number")),
    14: ("size-0 placeholders break code that reads shapes (HF#28510, HF#25241)", ("test_parameters_keep_their_shapes_under_stage_3",)),
    15: ("tied weights are lost when they are saved (DS#1896)", ("test_checkpoint::test_tied_and_untied", "test_weights::test_a_tied_weight_under_either_name_or_both", "test_weights::test_from_transformers_and_back")),
    16: ("hooks miss outputs that are dataclasses (DS#5524, DS#1960)", ("test_module::test_nested_outputs_come_in_the_models_own_types", "test_no_hooks_are_left_in_the_model")),
    17: ("torch.compile meets hooks and empty parameters (DS#7228, DS#7487)", ("test_no_hooks_are_left_in_the_model", "test_parameters_keep_their_shapes_under_stage_3")),
    18: ("host memory grows with the ranks under offload (DS#5290, DS#4571)", ("test_predicted_peak::test_the_predicted_peak_is_the_counted_one", "test_weights::test_each_rank_reads_its_own_part", "test_offload::test_the_counted_peak_is_the_predicted_one")),
    19: ("ops that are built at run time fail to build (DS#1846, DS#1077)", ("test_nothing_is_built_by_a_c_compiler",)),
    20: ("the gradient norm is wrong under tensor parallelism (DS#5411, DS#8475)", ("test_every_stage_and_split_of_a_batch_is_the_same_training",)),
    21: ("one engine a process; teachers and GANs are awkward (accelerate#2496)", ("test_two_steps_in_one_process", "test_module::test_teacher_and_student", "test_module::test_two_networks_against_each_other", "test_engine::test_two_engines_against_each_other")),
    22: ("injected kernels give garbage for padded batches and some models (DS#3960, DS#2452)", ("test_guards::test_padded_and_unpadded_masks_are_eager_under_one_step", "test_group_kernels::test_rules_of_fused_ops_by_brute_force", "test_translation::test_a_decomposition_is_run")),
}  # fmt: skip


@cache
def names_in(name: str) -> frozenset[str]:
    tree = ast.parse((HERE / f"{name}.py").read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


def test_every_defect_is_shown_by_tests_that_exist() -> None:
    assert sorted(SHOWN) == list(range(1, 23))
    for defect, names in SHOWN.values():
        for each in names:
            file, _, name = each.rpartition("::")
            assert name in names_in(file or "test_defects"), f"{defect}: there is no {each}"


# the models -------------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.norm, self.checkpointed = nn.LayerNorm(8), checkpointed
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(self.block, layer, x, use_reentrant=False) if self.checkpointed else self.block(layer, x)
        out: Tensor = self.norm(x)
        return out

    @staticmethod
    def block(layer: nn.Module, x: Tensor) -> Tensor:
        return x + torch.tanh(layer(x))


def rows(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)).double()


def square(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def step_of(model: nn.Module, plan: str, loss: Callable[..., Tensor] = square, clip: float | None = 0.05) -> TrainStep:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    made = deepseed.compile(model, plan, optimizer=optimizer, loss_fn=loss, backend="simulate", clip_grad_norm=clip)
    assert isinstance(made, TrainStep)
    return made


BATCHES = [(rows(16, n), rows(16, 10 + n)) for n in range(3)]


@cache
def eager() -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, norms before clipping, and parameters after three steps on one device."""
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, norms = [], []
    for batch in BATCHES:
        loss = square(model, batch)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)))
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms, {name: p.detach() for name, p in model.named_parameters()}


# the defects ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", ["zero1+dp2", "zero2+dp2+mb8", "zero3+dp2+mb4", "zero1+dp2+tp2", *(pytest.param(p, marks=wide) for p in ("zero0+dp2+mb4", "zero2+dp4+mb2", "zero3+dp2+tp2+mb2", "pp2+mb4"))]
)  # (rows of a forward, forwards of a step) = (2, 4), (8, 1), (1, 8), ...
def test_every_stage_and_split_of_a_batch_is_the_same_training(plan: str) -> None:
    losses, norms, parameters = eager()
    step = step_of(Encoder(), plan)
    for batch, loss, norm in zip(BATCHES, losses, norms, strict=True):
        assert float(step(batch)) == pytest.approx(loss, rel=0, abs=1e-12)
        assert float(step.grad_norm) == pytest.approx(norm, rel=0, abs=1e-12)
    state = step.state_dict()
    for name, p in parameters.items():
        torch.testing.assert_close(state[name], p, rtol=0, atol=1e-10)


def test_runs_are_repeated_bit_for_bit() -> None:
    """Ranks are threads that overtake each other; what they compute depends on no order."""
    found = []
    for _ in range(2):
        step = step_of(Encoder(), "zero3+dp2+mb2")
        found.append([*(torch.tensor(float(step(batch))) for batch in BATCHES), *step.state_dict().values()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("plan", ["zero2+dp2+mb2", pytest.param("zero3+dp2", marks=wide)])
def test_a_module_that_is_used_twice_and_two_losses(plan: str) -> None:
    def two(model: Any, batch: dict[str, Tensor]) -> Tensor:
        a, b = model(batch["x"]), model(batch["y"])
        return F.cosine_embedding_loss(a, b, torch.ones(len(a), dtype=a.dtype)) + (a - b).square().mean()

    report = verify(Encoder(), {"x": rows(8), "y": rows(8, 2)}, plan, loss_fn=two)
    assert report.ok, str(report)


@pytest.mark.parametrize("plan", ["zero3+dp2", pytest.param("zero3+dp2+mb2+remat", marks=wide)])
def test_checkpointed_layers_under_stage_3(plan: str) -> None:
    report = verify(Encoder(checkpointed=True), {"x": rows(8), "y": rows(8, 2)}, plan, loss_fn=lambda m, batch: square(m, (batch["x"], batch["y"])))
    assert report.ok, str(report)


def test_loading_after_steps_goes_back_to_what_was_saved(tmp_path: Path) -> None:
    step = step_of(Encoder(), "zero3+dp2")
    step(BATCHES[0])
    step.save(tmp_path / "saved")
    first = [float(step(batch)) for batch in BATCHES]
    step.load(tmp_path / "saved")
    assert [float(step(batch)) for batch in BATCHES] == first


def test_frozen_parameters_have_no_state_and_survive_a_checkpoint(tmp_path: Path) -> None:
    """As a LoRA model has it: a large frozen part beside a small one that is trained."""

    def made(seed: int) -> TrainStep:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)).double()
        model[0].requires_grad_(False)
        return step_of(model, "zero3+dp2")

    step = made(0)
    frozen = step.model.get_parameter("0.weight").detach().clone()
    step(BATCHES[0])
    assert torch.equal(step.state_dict()["0.weight"], frozen)
    assert {key.partition("/")[2] for state in step.states for role, key in state.types if role == "state"} == {"1.weight", "2.weight"}
    step.save(tmp_path / "saved")
    want = [float(step(batch)) for batch in BATCHES]
    other = made(7)
    other.load(tmp_path / "saved")
    assert [float(other(batch)) for batch in BATCHES] == want


def test_parameters_keep_their_shapes_under_stage_3() -> None:
    model = Encoder()
    shapes = [p.shape for p in copy.deepcopy(model).parameters()]
    step = step_of(model, "zero3+dp2")
    for batch in BATCHES[:2]:
        step(batch)
        assert [p.shape for p in model.parameters()] == shapes and [t.shape for t in step.state_dict().values()] == shapes
    wider = nn.Linear(8, 8).double()
    model.layers.append(wider)  # code that changes the model by its shapes works on it as on any
    assert len(list(model.parameters())) == len(shapes) + 2


def test_no_hooks_are_left_in_the_model() -> None:
    model = Encoder()
    step = step_of(model, "zero3+dp2")
    step(BATCHES[0])
    for m in model.modules():
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        assert not any(getattr(m, kind) for kind in kinds) and "forward" not in m.__dict__
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert torch.compile(model, backend="eager")(BATCHES[0][0]).shape == (16, 8)


def test_two_steps_in_one_process() -> None:
    """Each is what it is alone, though they take turns."""
    _, _, parameters = eager()
    both = [step_of(Encoder(), plan) for plan in ("zero3+dp2", "tp2")]
    for batch in BATCHES:
        for step in both:
            step(batch)
    for step in both:
        for name, p in parameters.items():
            torch.testing.assert_close(step.state_dict()[name], p, rtol=0, atol=1e-10)


def test_nothing_is_built_by_a_c_compiler() -> None:
    files = [p for top in ("deepseed", "passes", "codegen") for p in (ROOT / top).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
    assert not [p for p in files if p.suffix in (".c", ".cc", ".cpp", ".cu", ".so")]
    assert not [p for p in files if p.suffix == ".py" and any(word in p.read_text() for word in ("cpp_extension", "load_inline", "CUDAExtension"))]

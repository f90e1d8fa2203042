"""The optimizer and the schedule that a config names: which class with which options, on which parameters; rates as DeepSpeed 0.19 gives them."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import deepseed
from deepseed.adam import UncorrectedAdam
from deepseed.config import Config, ConfigError, read, settings, verdicts
from deepseed.config.objects import optimizer_of, scheduler_of
from deepseed.muon import Muon, orthogonalized


def config(kind: str, name: str, params: dict[str, Any] | None = None) -> Config:
    return read({"train_batch_size": 8, kind: {"type": name, "params": params or {}}})


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).double()


@pytest.mark.parametrize(
    ("name", "params", "made", "has"),
    [
        ("Adam", {"lr": 1e-4, "betas": [0.8, 0.999], "eps": 1e-7}, torch.optim.AdamW, {"lr": 1e-4, "betas": (0.8, 0.999), "eps": 1e-7, "weight_decay": 0.0}),
        ("AdamW", {"lr": "5e-5"}, torch.optim.AdamW, {"lr": 5e-5, "weight_decay": 0.0}),
        ("AdamW", {"lr": 1e-3, "torch_adam": True}, torch.optim.AdamW, {"weight_decay": 0.01}),  # DeepSpeed's own have 0
        ("AdamW", {"lr": 1e-3, "adam_w_mode": False}, torch.optim.AdamW, {}),
        ("Adam", {"lr": 1e-3, "adam_w_mode": False, "weight_decay": 0.1}, torch.optim.Adam, {"weight_decay": 0.1}),
        ("adam", {"torch_adam": True, "adam_w_mode": False, "bias_correction": True, "amsgrad": True}, torch.optim.Adam, {"amsgrad": True, "lr": 1e-3}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        ("Adagrad", {}, torch.optim.Adagrad, {"lr": 1e-2}),
        ("Lion", {"weight_decay": 0.2}, deepseed.Lion, {"lr": 1e-3, "weight_decay": 0.2, "betas": (0.9, 0.99)}),
        ("RMSprop", {"lr": 1e-2, "alpha": "0.9"}, torch.optim.RMSprop, {"alpha": 0.9}),
        ("Adam", {"lr": 3e-5, "bias_correction": False}, UncorrectedAdam, {"lr": 3e-5, "decoupled": True, "weight_decay": 0.0}),
        ("Adam", {"adam_w_mode": False, "bias_correction": False, "weight_decay": 0.1}, UncorrectedAdam, {"decoupled": False, "weight_decay": 0.1}),
        ("nadam", {"lr": 1e-3}, torch.optim.NAdam, {"lr": 1e-3}),
    ],
)
def test_the_optimizer_that_is_named(name: str, params: dict[str, Any], made: type, has: dict[str, Any]) -> None:
    optimizer = optimizer_of(config("optimizer", name, params), model().parameters())
    assert type(optimizer) is made
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in has} == has and len(group["params"]) == 4


def test_no_optimizer_and_no_schedule() -> None:
    none = read({"train_batch_size": 8})
    assert optimizer_of(none, model().parameters()) is None and scheduler_of(none, torch.optim.SGD(model().parameters(), lr=1)) is None


def test_frozen_parameters_are_left_out() -> None:
    m = model()
    m[0].requires_grad_(False)
    for given in (m.parameters(), m.named_parameters(), [{"params": m.parameters()}], [{"params": m[0].parameters()}, {"params": m[2].parameters()}]):
        optimizer = optimizer_of(config("optimizer", "AdamW"), given)
        assert optimizer is not None
        assert [[id(p) for p in g["params"]] for g in optimizer.param_groups] == [[id(p) for p in m[2].parameters()]]
    with pytest.raises(ConfigError, match=r"no parameter requires grad\n  fix: requires_grad_"):
        optimizer_of(config("optimizer", "AdamW"), m.requires_grad_(False).parameters())


def test_groups_keep_their_own_options() -> None:
    m = model()
    optimizer = optimizer_of(config("optimizer", "AdamW", {"lr": 1e-3, "weight_decay": 0.1}), [{"params": m[0].weight, "weight_decay": 0.0, "name": "a"}, {"params": m[2].parameters(), "lr": 1e-4}])
    assert optimizer is not None
    assert [(g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(1e-3, 0.0, 1), (1e-4, 0.1, 2)]
    assert optimizer.param_groups[0]["name"] == "a"


@pytest.mark.parametrize(
    ("kind", "name", "params", "says"),
    [
        ("optimizer", "AdamX", {}, r"unknown optimizer.type 'AdamX': did you mean 'adam"),
        ("optimizer", "Optimizer", {}, r"unknown optimizer.type 'Optimizer'"),
        ("optimizer", "AdamW", {"weight_decy": 0.1}, r"unknown key 'optimizer.params.weight_decy' of AdamW: did you mean 'weight_decay'\?\n  known: amsgrad, betas"),
        ("optimizer", "SGD", {"betas": [0.9, 0.99]}, r"unknown key 'optimizer.params.betas' of SGD"),
        ("optimizer", "Muon", {"beta": 0.9}, r"unknown key 'optimizer.params.beta' of Muon: did you mean 'betas'"),
        ("scheduler", "WarmUpLR", {}, r"unknown scheduler.type 'WarmUpLR': did you mean 'WarmupLR'"),
        ("scheduler", "WarmupLR", {"num_warmup_steps": 3}, r"unknown key 'scheduler.params.num_warmup_steps' of WarmupLR: did you mean 'warmup_num_steps'"),
        ("optimizer", "Adam", {"max_grad_norm": 2.0}, "gradient_clipping alone"),
    ],
)
def test_a_name_that_nobody_knows_is_an_error_at_parse(kind: str, name: str, params: dict[str, Any], says: str) -> None:
    made = read({"train_batch_size": 8, "gradient_clipping": 1.0, kind: {"type": name, "params": params}})
    with pytest.raises(ConfigError, match=says):
        settings(made, 8)


def test_a_value_that_cannot_be_is_said_with_its_section() -> None:
    with pytest.raises(ConfigError, match=r"optimizer.params of AdamW: Invalid learning rate: -1"):
        optimizer_of(config("optimizer", "AdamW", {"lr": -1.0}), model().parameters())
    optimizer = torch.optim.SGD(model().parameters(), lr=1)
    with pytest.raises(ConfigError, match=r"scheduler.params of WarmupLR: warmup_num_steps must be a positive integer, got 0"):
        scheduler_of(config("scheduler", "WarmupLR", {"warmup_num_steps": 0}), optimizer)
    with pytest.raises(ConfigError, match=r"scheduler.params of WarmupDecayLR: .*total_num_steps"):
        scheduler_of(config("scheduler", "WarmupDecayLR"), optimizer)


def test_clipping_that_is_said_among_the_optimizers_options() -> None:
    said = config("optimizer", "Adam", {"lr": 1e-3, "max_grad_norm": 0.3})
    assert settings(said, 8).clip_grad_norm == 0.3
    assert next(v for v in verdicts(said) if v.key.endswith("max_grad_norm")).note == "as gradient_clipping"


def test_what_1_bit_optimizers_need_is_named() -> None:
    found = {v.key: v.verdict for v in verdicts(config("optimizer", "OneBitAdam", {"lr": 1e-3, "freeze_step": 9, "cuda_aware": False, "comm_backend_name": "nccl"}))}
    assert found == {"train_batch_size": "supported", "optimizer.type": "rejected", "optimizer.params.lr": "supported"} | {
        f"optimizer.params.{key}": "rejected" for key in ("freeze_step", "cuda_aware", "comm_backend_name")
    }
    assert {v.verdict for v in verdicts(config("scheduler", "OneCycle")) if v.key == "scheduler.type"} == {"rejected"}


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_without_the_correction_of_its_bias(decoupled: bool) -> None:
    """By its formula, on one number: three steps of the same gradient."""
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = UncorrectedAdam([p], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.5, decoupled=decoupled)
    x, m, v = 2.0, 0.0, 0.0
    for _ in range(3):
        p.grad = torch.tensor([3.0], dtype=torch.float64)
        optimizer.step()
        g = 3.0 if decoupled else 3.0 + 0.5 * x
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x = (x * (1 - 0.1 * 0.5) if decoupled else x) - 0.1 * m / (math.sqrt(v) + 1e-3)
        assert float(p.detach()) == pytest.approx(x, rel=1e-14)


# Muon -------------------------------------------------------------------------------------------------------------------


def test_muon_steps_matrices_and_adamw_the_rest() -> None:
    m = model()
    for p in m.parameters():
        p.use_muon = p.dim() == 2  # type: ignore[attr-defined]
    m[2].weight.use_muon = False  # type: ignore[assignment]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = optimizer_of(config("optimizer", "Muon", {"lr": 0.03, "weight_decay": 0.1, "adam_lr": 1e-2, "betas": [0.8, 0.9], "momentum": 0.9}), m.parameters())
    assert type(optimizer) is Muon
    assert [(g["use_muon"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups] == [(True, 0.03, 0.1, 1), (False, 1e-2, 0.1, 3)]
    assert optimizer.param_groups[0]["momentum"] == 0.9 and optimizer.param_groups[1]["betas"] == (0.8, 0.9) and optimizer.param_groups[1]["eps"] == 1e-10
    with pytest.warns(UserWarning, match=r"4 of 4 parameters have no use_muon; 2 with two dimensions or more are stepped by Muon, 2 by AdamW\n  fix: p.use_muon = False"):
        silent = optimizer_of(config("optimizer", "Muon", {"lr": 0.03}), model().parameters())
    assert silent is not None and [len(g["params"]) for g in silent.param_groups] == [2, 2]
    with pytest.raises(ValueError, match=r"Muon steps matrices, and a parameter has the shape \(12,\)"):
        Muon([{"params": [m[0].bias], "use_muon": True}])


def test_muon_is_torchs_and_its_adamw_is_torchs() -> None:
    """In float64 the matrices are those of torch.optim.Muon, whose iteration is in bfloat16 too; AdamW's to rounding."""
    ours, theirs = model(), model()
    for p in ours.parameters():
        p.use_muon = p.dim() == 2  # type: ignore[attr-defined]
    options = {"muon_lr": 0.02, "adam_lr": 1e-2, "weight_decay": 0.1}
    made = [
        [optimizer_of(config("optimizer", "Muon", options), ours.parameters())],
        [
            torch.optim.Muon([p for p in theirs.parameters() if p.dim() == 2], lr=0.02, weight_decay=0.1),
            torch.optim.AdamW([p for p in theirs.parameters() if p.dim() == 1], lr=1e-2, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.1),
        ],
    ]
    x = torch.randn(16, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        for m, optimizers in zip((ours, theirs), made, strict=True):
            m(x).square().mean().backward()
            for o in optimizers:
                assert o is not None
                o.step()
                o.zero_grad()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-13)


def test_muon_reads_a_convolution_as_a_matrix() -> None:
    p = nn.Parameter(torch.randn(4, 3, 2, 2, dtype=torch.float64))
    p.grad = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    before, grad = p.detach().clone(), p.grad.clone()
    Muon([{"params": [p], "use_muon": True, "lr": 0.5}]).step()
    step = orthogonalized((grad * 0.05 * 0.95 + grad * 0.05).reshape(4, 12)).double()  # momentum from zero: 0.05 g; then 0.05 g of it and 0.95 of that
    torch.testing.assert_close(p, before - 0.5 * step.reshape(p.shape), rtol=0, atol=0.05)  # bfloat16's rounding of the direction
    singular = torch.linalg.svdvals(step)
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3, "nearly orthogonal: all singular values near 1"


def test_muon_in_a_compiled_step() -> None:
    def loss_of(m: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return (m(batch[0]) - batch[1]).square().mean()

    g = torch.Generator().manual_seed(1)
    batch = torch.randn(8, 6, dtype=torch.float64, generator=g), torch.randn(8, 3, dtype=torch.float64, generator=g)
    ours, theirs = model(), model()
    made = []
    for m in (ours, theirs):
        for p in m.parameters():
            p.use_muon = p.dim() == 2  # type: ignore[attr-defined]
        made.append(optimizer_of(config("optimizer", "Muon", {"lr": 0.02, "weight_decay": 0.1}), m.parameters()))
    step = deepseed.compile(ours, "zero2+dp2", loss_fn=loss_of, optimizer=made[0], backend="simulate")
    for _ in range(3):
        loss = step(batch)
        want = loss_of(theirs, batch)
        want.backward()
        assert made[1] is not None
        made[1].step()
        made[1].zero_grad()
        torch.testing.assert_close(loss, want.detach(), rtol=0, atol=1e-12)
    state = step.model.state_dict()
    for name, q in theirs.state_dict().items():
        torch.testing.assert_close(state[name], q, rtol=0, atol=1e-10)


# schedules --------------------------------------------------------------------------------------------------------------

# (name, options, the rates of each group at first and after each of ten steps), printed by DeepSpeed's own classes over SGD of the rates 0.5 and 1
RATES: list[tuple[str, dict[str, Any], list[list[float]]]] = [
    ("WarmupLR", {"warmup_min_lr": 0.1, "warmup_max_lr": 0.7, "warmup_num_steps": 5}, [[0.1], [0.1], [0.358405934844036], [0.509563716691591], [0.616811869688072], [0.7], [0.7], [0.7], [0.7], [0.7], [0.7]]),
    ("WarmupLR", {"warmup_max_lr": 0.3, "warmup_num_steps": 1}, [[0.0], [0.0], [0.3], [0.3], [0.3], [0.3], [0.3], [0.3], [0.3], [0.3], [0.3]]),
    ("WarmupLR", {"warmup_min_lr": [0.0, 0.1], "warmup_max_lr": [0.4, 0.2], "warmup_num_steps": 4, "warmup_type": "linear"}, [[0.0, 0.1], [0.0, 0.1], [0.1, 0.125], [0.2, 0.15], [0.3, 0.175], [0.4, 0.2], [0.4, 0.2], [0.4, 0.2], [0.4, 0.2], [0.4, 0.2], [0.4, 0.2]]),
    ("WarmupDecayLR", {"total_num_steps": 8, "warmup_max_lr": 0.6, "warmup_num_steps": 3}, [[0.0], [0.0], [0.378557852142874], [0.6], [0.6], [0.48], [0.36], [0.24], [0.12], [0.0], [0.0]]),
    ("WarmupDecayLR", {"total_num_steps": 8, "warmup_min_lr": 0.1, "warmup_max_lr": 0.6, "warmup_num_steps": 3, "warmup_type": "linear"}, [[0.1], [0.1], [0.266666666666667], [0.433333333333333], [0.6], [0.5], [0.4], [0.3], [0.2], [0.1], [0.1]]),
    ("WarmupDecayLR", {"total_num_steps": 2, "warmup_max_lr": 0.6, "warmup_num_steps": 4}, [[0.0], [0.0], [0.3], [0.475488750216347], [0.6], [0.0], [0.0], [0.0], [0.0], [0.0], [0.0]]),
    ("WarmupCosineLR", {"total_num_steps": 8, "warmup_num_steps": 3}, [[0.0, 0.0], [0.0, 0.0], [0.315464876785729, 0.630929753571457], [0.5, 1.0], [0.452259023168878, 0.904518046337755], [0.327271523168877, 0.654543046337755], [0.172778476831123, 0.345556953662245], [0.0477909768311225, 0.0955819536622451], [5e-05, 0.0001], [5e-05, 0.0001], [5e-05, 0.0001]]),
    ("WarmupCosineLR", {"total_num_steps": 8, "warmup_min_ratio": 0.2, "cos_min_ratio": 0.05, "warmup_num_steps": 3, "warmup_type": "linear"}, [[0.0], [0.1], [0.233333333333333], [0.366666666666667], [0.45464153616405], [0.33589153616405], [0.18910846383595], [0.07035846383595], [0.025], [0.025], [0.025]]),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 4, "lr_range_test_step_rate": 2.0}, [[0.01], [0.015], [0.02], [0.025], [0.03], [0.035], [0.04], [0.045], [0.05], [0.055], [0.06]]),
    ("LRRangeTest", {"lr_range_test_min_lr": 0.01, "lr_range_test_step_size": 3, "lr_range_test_staircase": True}, [[0.01], [0.01], [0.01], [0.02], [0.02], [0.02], [0.03], [0.03], [0.03], [0.04], [0.04]]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "params", "want"), RATES)
def test_rates_step_by_step_are_deepspeeds(name: str, params: dict[str, Any], want: list[list[float]]) -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 0.5 * (n + 1)} for n in range(len(want[0]))]
    optimizer = torch.optim.SGD(groups, lr=0.5)
    scheduler = scheduler_of(config("scheduler", name, params), optimizer)
    assert scheduler is not None
    found = [[g["lr"] for g in optimizer.param_groups]]
    for _ in want[1:]:
        optimizer.step()
        scheduler.step()
        found.append([g["lr"] for g in optimizer.param_groups])
        assert scheduler.get_last_lr() == found[-1]
    for mine, theirs in zip(found, want, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-14, abs=1e-17)  # they are printed with 15 digits


def test_a_schedule_of_torch_and_numbers_as_text() -> None:
    optimizer = torch.optim.SGD(model().parameters(), lr=0.5)
    scheduler = scheduler_of(config("scheduler", "StepLR", {"step_size": "1", "gamma": "0.5"}), optimizer)
    assert scheduler is not None
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    warm = scheduler_of(config("scheduler", "WarmupLR", {"warmup_num_steps": 1e1, "warmup_max_lr": "1e-3"}), torch.optim.SGD(model().parameters(), lr=0.5))
    assert warm is not None and copy.copy(warm).__dict__["warmup_num_steps"] == 10

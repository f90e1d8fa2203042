"""What an engine tells: progress lines, times, messages and flops, and the files of the monitors, by the keys of the config."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import deepseed
from deepseed.config import ConfigError
from deepseed.engine import Engine
from deepseed.engine.report import messages


def trained(steps: int, scheduler: bool = False, **config: Any) -> tuple[Engine, list[float], list[float]]:
    """An engine after some steps of two microbatches; the loss of each step and its learning rate."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).double()
    asked = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}, **config}
    if scheduler:
        asked["scheduler"] = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 8, "warmup_type": "linear"}}
    engine, *_ = deepseed.initialize(model=model, config=asked)
    losses, rates = [], []
    for n in range(steps):
        each = []
        for m in range(2):
            loss = engine(torch.full((2, 4), 0.1 * n + m, dtype=torch.float64)).square().mean()
            engine.backward(loss)
            engine.step()
            each.append(float(loss.detach()))
        losses.append(sum(each) / 2)
        rates.append(engine.get_lr()[0])
    return engine, losses, rates


@pytest.fixture(autouse=True)
def _alone() -> Any:
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def column(path: Path) -> tuple[list[str], list[tuple[int, float]]]:
    head, *rows = list(csv.reader(path.open()))
    return head, [(int(step), float(value)) for step, value in rows]


def test_csv_files_have_deepspeeds_names_and_layout(tmp_path: Path) -> None:
    engine, losses, rates = trained(5, scheduler=True, csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "job"}, steps_per_print=2)
    folder = tmp_path / "job"
    assert sorted(p.name for p in folder.iterdir()) == ["Train_Samples_lr.csv", "Train_Samples_train_loss.csv"]
    assert column(folder / "Train_Samples_train_loss.csv") == (["step", "train_loss"], [(4 * (n + 1), loss) for n, loss in enumerate(losses[:4])]), "written where it is printed: the fifth waits"
    engine.monitor.flush()
    assert column(folder / "Train_Samples_lr.csv") == (["step", "lr"], [(4 * (n + 1), lr) for n, lr in enumerate(rates)])
    written: list[Any] = []

    class Mine:
        def write_events(self, events: Any) -> None:
            written.extend(events)

    engine.monitor.writers.append(Mine())
    engine.monitor.write_events([("Train/Samples/accuracy", torch.tensor(0.5), 20)])
    assert written == [("Train/Samples/accuracy", 0.5, 20)] and column(folder / "Train_Samples_accuracy.csv") == (["step", "accuracy"], [(20, 0.5)])


def test_the_lines_of_steps_per_print(capsys: pytest.CaptureFixture[str]) -> None:
    engine, losses, rates = trained(4, scheduler=True, steps_per_print=2, wall_clock_breakdown=True, memory_breakdown=True, comms_logger={"enabled": True}, flops_profiler={"enabled": True, "profile_step": 3})
    said = [line.removeprefix("deepseed: ") for line in capsys.readouterr().err.splitlines()]
    headlines = [line for line in said if line.startswith("step=")]
    assert headlines == [f"step={n}, skipped=0, lr=[{rates[n - 1]}], mom=[(0.9, 0.999)], loss={losses[n - 1]:.6g}" for n in (2, 4)]
    assert sum(bool(re.fullmatch(r"epoch=0/micro_step=(4|8)/global_step=(2|4), RunningAvgSamplesPerSec=[\d.]+, CurrSamplesPerSec=[\d.]+, MemAllocated=[\d.]+GB, MaxMemAllocated=[\d.]+GB", line)) for line in said) == 2
    times = [line for line in said if line.startswith("time (ms)")]
    number = r"[\d.]+"
    assert len(times) == 4 and all(re.search(rf"fwd: {number} \| bwd: {number} \| step: {number} \| compile: {number}$", line.replace("compile: 0.00 | ", "")) or "compile" in line for line in times)
    assert "mean of 2 steps" in times[1] and sum(line.startswith("memory | allocated: ") for line in said) == 2
    assert sum(line.startswith("comms of ") for line in said) == 2 and "what one rank sends in a run | nothing" in next(line for line in said if line.startswith("comms of "))
    (profile,) = [line for line in said if line.startswith("flops of ") and "forward" in line]
    assert f"forward: {2 * 2 * (4 * 8 + 8) / 1e9:.4g} GFLOP" in profile and engine.global_steps == 4


def test_nothing_is_read_from_the_device_between_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a loss is read as a number: of three steps between prints, in none."""
    reads: list[int] = []
    engine, *_ = trained(2, steps_per_print=100, csv_monitor={"enabled": True, "output_path": str(tmp_path)})
    whole = torch.Tensor.__float__
    monkeypatch.setattr(torch.Tensor, "__float__", lambda t: (reads.append(1), whole(t))[1])  # type: ignore[func-returns-value]
    engine.global_steps, before = 5, len(reads)
    engine.report.lost(torch.tensor(1.0))
    engine.report.stepped(engine)
    assert len(reads) == before and not list((tmp_path / "DeepSpeedJobName").iterdir())
    engine.monitor.flush()
    assert len(reads) > before


def test_messages_are_those_of_the_program() -> None:
    model = torch.nn.Linear(8, 8)
    step = deepseed.compile(model, "zero3", world_size=2, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=lambda m, b: m(b["x"]).square().mean(), example_batch={"x": torch.ones(4, 8)})
    said, found = messages(step.program), step.explain().collectives
    assert found and all(f"{c.op} over {c.axis}: {c.count}, " in said for c in found)


@pytest.mark.parametrize("key", ["tensorboard", "wandb"])
def test_a_library_that_is_missing_is_said_at_initialize(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, key, None)
    with pytest.raises(ConfigError, match=rf'"{key}" is enabled in the config, and {key} cannot be imported .*\n  fix: pip install "deepseed\[{key}\]"'):
        trained(0, **{key: {"enabled": True}})
    trained(0, **{key: {"enabled": False}})


def test_tensorboard_reads_what_is_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-not-found,unused-ignore]

    engine, losses, _ = trained(3, tensorboard={"enabled": True, "output_path": str(tmp_path), "job_name": "job"}, wall_clock_breakdown=True)
    engine.monitor.flush()
    found = EventAccumulator(str(tmp_path / "job")).Reload()
    assert {"Train/Samples/lr", "Train/Samples/train_loss", "Train/Samples/elapsed_time_ms_forward"} <= set(found.Tags()["scalars"])
    assert [(e.step, e.value) for e in found.Scalars("Train/Samples/train_loss")] == [(4 * (n + 1), pytest.approx(loss, rel=1e-6)) for n, loss in enumerate(losses)]  # it stores float32


def test_wandb_offline_has_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    engine, losses, _ = trained(2, wandb={"enabled": True, "project": "p", "group": "g"})
    engine.monitor.flush()
    run = wandb.run
    assert run.group == "g" and run.project == "p" and run.summary["Train/Samples/train_loss"] == losses[0], "wandb ends a step when the next one begins: more can be logged at the same samples"
    run.log({"last": 1}, step=12)
    assert run.summary["Train/Samples/train_loss"] == losses[1]
    wandb.finish()


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_folder_of_a_monitor_that_cannot_be_written(when: str, tmp_path: Path) -> None:
    config = {"enabled": True, "output_path": str(tmp_path / "out"), "job_name": "job"}
    says = rf'"csv_monitor": {tmp_path}/out/job.* cannot be written: Not a directory\n  fix: "output_path": a folder that this process may write'
    if when == "at the start":
        (tmp_path / "out").touch()
        with pytest.raises(ConfigError, match=says):
            trained(1, csv_monitor=config)
        return
    engine, *_ = trained(1, csv_monitor=config)
    engine.monitor.flush()
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").touch()
    engine.monitor.add([("Train/Samples/lr", 1.0, 4)])
    with pytest.raises(ConfigError, match=says):
        engine.monitor.flush()


def test_a_negative_number_of_steps_to_print_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"steps_per_print is -1\n  fix: a number of steps; 0 or null prints nothing"):
        trained(1, steps_per_print=-1)
    trained(1, steps_per_print=0)


def test_files_of_a_monitor_stay_in_its_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'"job_name" is "\.\./out", which is not within'):
        trained(1, csv_monitor={"enabled": True, "output_path": str(tmp_path), "job_name": "../out"})

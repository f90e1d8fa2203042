"""DeepSpeed's names beside the engine: zero, comm, get_accelerator, checkpointing, utils, ops.adam, and a tutorial's script with one import changed."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo.engine import Net, begin, config, passes, rows
from gloo.launch import ranks
from gloo.whole import asked, gathered, on_ranks
from safetensors.torch import save_file
from torch import Tensor, nn

import deepseed
from deepseed.adam import UncorrectedAdam
from deepseed.build import CompileError
from deepseed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepseed.runtime.distributed import stop
from deepseed.runtime.folder import CheckpointError
from deepseed.utils import log_dist, logger
from deepseed.utils.zero_to_fp32 import (
    convert_zero_checkpoint_to_fp32_state_dict,
    get_fp32_state_dict_from_zero_checkpoint,
    load_state_dict_from_zero_checkpoint,
)

wide = pytest.mark.wide


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    yield
    if dist.is_initialized():
        stop()


def test_names_are_looked_up_without_torch() -> None:
    code = "import sys, deepseed\nassert 'torch' not in sys.modules\nassert deepseed.zero.Init and deepseed.comm.get_rank and deepseed.checkpointing.checkpoint and deepseed.utils.logger\nassert 'torch' in sys.modules\n"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'pipe'"):
        _ = deepseed.pipe


def test_whole_parameters_alone() -> None:
    gathered(3)
    asked(0)


def test_whole_parameters_on_two_ranks(tmp_path: Path) -> None:
    model = Net()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    found = ranks(2, on_ranks, [("gathered", (3,)), ("gathered", (1,)), ("asked", (3,)), ("from_a_file", (tmp_path / "model.safetensors",)), ("spoken", ())])
    assert [each[-1] for each in found] == [(1.0, 2, 2)] * 2


@wide
def test_whole_parameters_under_every_stage() -> None:
    ranks(2, on_ranks, [(name, (stage,)) for name in ("gathered", "asked") for stage in range(4)])


def test_init_builds_what_is_built_without() -> None:
    with deepseed.zero.Init(config_dict_or_path=config(3), dtype=torch.bfloat16):
        model = Net()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Net().parameters(), strict=True))


def test_weights_in_one_process(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(8, 4), nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("scale", torch.ones(3, dtype=torch.bfloat16))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embed(x))

    engine = begin(config(1), Tied())
    for _ in range(2):
        engine.backward(engine(torch.arange(4)).square().mean())
        engine.step()
    engine.save_checkpoint(tmp_path / "c")
    found = get_fp32_state_dict_from_zero_checkpoint(tmp_path / "c")
    now = engine.module_state_dict()
    assert found.keys() == now.keys() == {"embed.weight", "head.weight", "scale"} and found["scale"].dtype == torch.float32
    assert all(torch.equal(found[n], t.float()) for n, t in now.items()) and found["head.weight"] is found["embed.weight"]
    assert torch.equal(load_state_dict_from_zero_checkpoint(Tied(), tmp_path / "c", "global_step2").embed.weight, now["embed.weight"])
    convert_zero_checkpoint_to_fp32_state_dict(tmp_path / "c" / "global_step2", tmp_path / "out")
    assert torch.equal(torch.load(tmp_path / "out" / "pytorch_model.bin")["embed.weight"], now["embed.weight"])
    data = next((tmp_path / "c" / "global_step2").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match="fix: read another checkpoint"):
        get_fp32_state_dict_from_zero_checkpoint(tmp_path / "c")


def test_adam_by_deepspeeds_names() -> None:
    p = [nn.Parameter(torch.ones(2))]
    made = FusedAdam(p), FusedAdam(p, adam_w_mode=False), FusedAdam(p, bias_correction=False), DeepSpeedCPUAdam(p, lr=0.5, weight_decay=0.1)
    assert [type(o) for o in made] == [torch.optim.AdamW, torch.optim.Adam, UncorrectedAdam, torch.optim.AdamW]
    assert made[0].defaults["weight_decay"] == 0.0 and made[3].defaults["lr"] == 0.5 and made[3].defaults["weight_decay"] == 0.1
    for wrong in (lambda: FusedAdam(p, bias_correction=False, amsgrad=True), lambda: DeepSpeedCPUAdam(p, fp32_optimizer_states=False)):
        with pytest.raises(ValueError, match="fix: leave"):
            wrong()


def test_state_does_not_move_between_steps() -> None:
    engine = begin(config())
    for move in (engine.offload_states, engine.reload_states):
        with pytest.raises(CompileError, match=r'does not move between steps\n  fix: "offload_optimizer"'):
            move()


def test_activation_checkpointing_is_torchs(capsys: pytest.CaptureFixture[str]) -> None:
    class Twice(Net):
        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            found: Tensor = deepseed.checkpointing.checkpoint(super().forward, x)
            return found

    deepseed.checkpointing.configure(None, partition_activations=True, checkpoint_in_cpu=True)
    assert deepseed.checkpointing.is_configured() and "remat+offload(activations)" in capsys.readouterr().err
    plain, again = begin(config()), begin(config(), Twice())
    assert passes(plain, rows(2)) == passes(again, rows(2))


def test_the_accelerator_is_torchs() -> None:
    here = deepseed.get_accelerator()
    assert (here is deepseed.get_accelerator() and here.is_available() and torch.device(here.current_device_name()) == here.device(here.current_device())) or here.kind == "cpu"
    here.set_device(0)
    here.synchronize()
    here.empty_cache()
    here.reset_peak_memory_stats()
    assert here.memory_allocated() >= 0 <= here.max_memory_allocated() and here.device_count() >= 1
    with pytest.raises(AttributeError, match=r"no 'op_builder_dir'\n  fix: torch.accelerator"):
        _ = here.op_builder_dir


def test_the_log_is_of_some_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = said.append  # type: ignore[method-assign]
    monkeypatch.setattr(logger, "handlers", [handler])
    log_dist("here", ranks=[0])
    log_dist("elsewhere", ranks=[1])
    log_dist("all")
    assert [r.getMessage() for r in said] == ["[Rank -1] here", "[Rank -1] all"]


TUTORIAL = '''
import argparse
import torch
import deepseed as deepspeed
from deepseed.accelerator import get_accelerator
from deepseed.utils import log_dist, logger

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args([])
deepspeed.init_distributed()
torch.manual_seed(0)
config = {"train_batch_size": 8, "steps_per_print": 2000, "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.8, 0.999], "eps": 1e-8}},
          "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.01, "warmup_num_steps": 10}}, "gradient_clipping": 1.0,
          "bf16": {"enabled": True}, "wall_clock_breakdown": False, "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True}}
with deepspeed.zero.Init(config_dict_or_path=config):
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
parameters = filter(lambda p: p.requires_grad, net.parameters())
data = torch.utils.data.TensorDataset(torch.randn(64, 8), torch.randint(0, 4, (64,)))
model_engine, optimizer, trainloader, _ = deepspeed.initialize(args=args, model=net, model_parameters=parameters, training_data=data, config=config)
device = get_accelerator().device_name(model_engine.local_rank)
target = torch.bfloat16 if model_engine.bfloat16_enabled() else None
criterion = torch.nn.CrossEntropyLoss()
losses = []
for epoch in range(4):
    for x, y in trainloader:
        outputs = model_engine(x.to(device).to(target))
        loss = criterion(outputs, y.to(device))
        model_engine.backward(loss)
        model_engine.step()
        losses.append(loss.item())
deepspeed.comm.barrier()
with deepspeed.zero.GatheredParameters(net[0].weight):
    log_dist(f"norm {net[0].weight.norm().item()}", ranks=[0])
'''


def test_a_tutorials_script() -> None:
    found: dict[str, object] = {"__name__": "tutorial"}
    exec(compile(TUTORIAL, "tutorial.py", "exec"), found)
    losses = found["losses"]
    assert isinstance(losses, list) and len(losses) == 32 and sum(losses[-8:]) < sum(losses[:8])

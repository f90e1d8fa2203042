"""Makes the checkpoints of this folder with DeepSpeed itself, two gloo ranks each, and ``losses.json``: the losses of its own next three steps.

    python tests/data/deepspeed/make.py        in an environment that has deepspeed (0.19.8 made these) and transformers

A checkpoint is ``NAME.tar.xz``: ``latest``, and the folder that ``save_checkpoint`` wrote after three steps, without its script.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "OMP_NUM_THREADS": "1"}
HERE = Path(__file__).parent
RANKS = 2
BASE = {"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "steps_per_print": 10**9}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-2, "warmup_num_steps": 5, "warmup_type": "linear"}}
CASES: dict[str, dict[str, Any]] = {
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero1-config": {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "weight_decay": 0.1, "torch_adam": True}}, "scheduler": WARMUP},
    "zero2": {"zero_optimization": {"stage": 2}},
    "zero2-elastic": {"zero_optimization": {"stage": 2, "elastic_checkpoint": True, "round_robin_gradients": True}},
    "zero3": {"zero_optimization": {"stage": 3, "sub_group_size": 200}},
    "zero1-bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
    "zero1-bf16-fp32sums": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "zero3-bf16": {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}},
    "zero2-fp16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True, "initial_scale_power": 8, "loss_scale_window": 2, "hysteresis": 1}},
    "llama-zero3": {"zero_optimization": {"stage": 3}},
}
UNIVERSAL = ("zero2", "zero3")


def train(case: str, folder: str) -> None:
    sys.path.insert(0, str(HERE))
    import deepspeed
    import model as small
    import torch
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    rank = torch.distributed.get_rank()
    config = {**BASE, **CASES[case]}
    if case.startswith("llama"):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        subject: Any = LlamaForCausalLM(LlamaConfig(**small.LLAMA))
        loss_of = lambda engine, rows: engine(input_ids=rows, labels=rows).loss  # noqa: E731
    else:
        subject = small.model()
        loss_of = lambda engine, rows: engine(rows)  # noqa: E731
    if "optimizer" in config:
        engine, _, _, _ = deepspeed.initialize(model=subject, model_parameters=[p for p in subject.parameters() if p.requires_grad], config=config)
    else:
        optimizer = small.adamw(subject)
        engine, _, _, _ = deepspeed.initialize(model=subject, optimizer=optimizer, lr_scheduler=small.schedule(optimizer), config=config)
    losses, rates = [], []
    for n, batch in enumerate(small.batches()):
        if n == 3:
            engine.save_checkpoint(folder, client_state={"epoch": 5, "note": "from DeepSpeed"})
        loss = loss_of(engine, batch[rank * 2 : rank * 2 + 2])
        engine.backward(loss)
        engine.step()
        every = [torch.zeros((), dtype=torch.float64) for _ in range(RANKS)]
        torch.distributed.all_gather(every, loss.detach().double())
        losses.append(float(sum(every) / RANKS))
        rates.append(engine.get_lr())
    if rank == 0:
        scale = float(getattr(engine.optimizer, "cur_scale", 0) or getattr(engine.optimizer, "loss_scale", 0) or 0)
        Path(folder, "losses.json").write_text(json.dumps({"losses": losses[3:], "before": losses[:3], "rates": rates, "scale": scale}))
    torch.distributed.destroy_process_group()


def launched(case: str, folder: Path) -> None:
    port = str(29600 + os.getpid() % 1000)
    ranks = [
        subprocess.Popen([sys.executable, __file__, case, str(folder)], env={**os.environ, "RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port})
        for n in range(RANKS)
    ]
    if any([each.wait() for each in ranks]):
        raise SystemExit(f"{case} failed")


def packed(name: str, folder: Path, latest: str) -> None:
    for script in folder.glob("*.py"):
        script.unlink()

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(HERE / f"{name}.tar.xz", "w:xz", preset=9) as tar:
        tar.add(folder, "global_step3", filter=plain)
        (folder.parent / latest).write_text("global_step3")
        tar.add(folder.parent / latest, latest, filter=plain)


def main() -> None:
    said = json.loads((HERE / "losses.json").read_text()) if (HERE / "losses.json").exists() else {}
    for case in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            launched(case, folder)
            said[case] = json.loads((folder / "losses.json").read_text())
            if case in UNIVERSAL:
                other = folder / "universal" / "global_step3"
                command = "from deepspeed.checkpoint.ds_to_universal import main, parse_arguments; main(parse_arguments())"
                subprocess.run([sys.executable, "-c", command, "--input_folder", folder / "global_step3", "--output_folder", other, "--inject_missing_state", "--num_extract_workers", "1", "--num_merge_workers", "1"], check=True)
                packed(f"{case}-universal", other, "latest_universal")
            packed(case, folder / "global_step3", "latest")
        (HERE / "losses.json").write_text(json.dumps(said, indent=1) + "\n")
    shutil.rmtree(HERE / "__pycache__", ignore_errors=True)


if __name__ == "__main__":
    if len(sys.argv) == 3 and "RANK" in os.environ:
        train(sys.argv[1], sys.argv[2])
    else:
        main()

"""One rank of a plan on GPUs: ``torchrun nccl_worker.py PLAN FILE [graphs]``; rank 0 writes losses and parameters. See test_gpu.py, test_graphs_gpu.py."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

import deepseed
from deepseed.runtime.distributed import stop
from deepseed.runtime.elsewhere import Elsewhere
from deepseed.target import load


def main() -> None:
    found = load("hf:LlamaForCausalLM")
    optimizer = torch.optim.SGD(found.model.parameters(), lr=1e-2, momentum=0.9)
    step = deepseed.compile(found.model, sys.argv[1], optimizer=optimizer, clip_grad_norm=1.0, backend="nccl", cuda_graphs="graphs" in sys.argv[3:])
    losses = [float(step(found.batch)) for _ in range(5 if "graphs" in sys.argv[3:] else 3)]
    device = torch.device("cuda", torch.cuda.current_device())
    own = [p for p in found.model.parameters() if not isinstance(p, Elsewhere)]  # the others are of another stage
    assert own and all(p.device == device for p in own), "the state is on this rank's own device"
    values = {name: t.cpu() for name, t in step.state_dict().items()}
    if dist.get_rank() == 0:
        torch.save({"losses": losses, "values": values}, sys.argv[2])
    stop()


if __name__ == "__main__":
    main()

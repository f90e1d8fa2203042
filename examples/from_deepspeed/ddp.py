"""The training of three scripts of this folder in plain PyTorch, for comparison: DistributedDataParallel, clip_grad_norm_, an optimizer.

    torchrun --nproc-per-node 2 examples/from_deepspeed/ddp.py raw_loop --deepspeed_config examples/from_deepspeed/ds_config.json

Of the config it reads sizes, clipping and AdamW's arguments; the Trainer's scripts need no twin: without ``--deepspeed`` they train under DDP.
"""

import argparse
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import bert as bert_script
import cifar as cifar_script
import raw_loop as loop_script
import torch
import torch.distributed as dist
from data import images, report, tokenizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from transformers import get_linear_schedule_with_warmup


def train(model: nn.Module, loss_of: Callable[[nn.Module, Any], Tensor], loaders: Iterable[Iterable[Any]], optimizer: torch.optim.Optimizer, config: dict[str, Any], scheduler: Any = None) -> None:
    model = DistributedDataParallel(model)
    accumulation = config.get("gradient_accumulation_steps", 1)
    micro_steps, total = 0, 0.0
    for loader in loaders:
        for batch in loader:
            micro_steps += 1
            boundary = micro_steps % accumulation == 0
            with nullcontext() if boundary else model.no_sync():
                loss = loss_of(model, batch) / accumulation
                loss.backward()
            total += loss.item()
            if not boundary:
                continue
            norm = nn.utils.clip_grad_norm_(model.parameters(), config["gradient_clipping"])
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            report(micro_steps // accumulation, total, norm)
            total = 0.0


def adamw(model: nn.Module, config: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **{k: v for k, v in config["optimizer"]["params"].items() if k != "torch_adam"})


def cifar(args: argparse.Namespace, config: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    model, dataset = cifar_script.Net(), images(320)
    sampler = DistributedSampler(dataset)
    loader = DataLoader(dataset, batch_size=config["train_micro_batch_size_per_gpu"], sampler=sampler)

    def epochs() -> Iterable[DataLoader]:
        for epoch in range(args.epochs):
            sampler.set_epoch(epoch)
            yield loader

    train(model, lambda m, data: nn.functional.cross_entropy(m(data[0]), data[1]), epochs(), adamw(model, config), config)
    return model


def bert(args: argparse.Namespace, config: dict[str, Any]) -> nn.Module:
    model = bert_script.make_model(len(tokenizer()))
    optimizer = bert_script.make_optimizer(model)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=24)
    loader, sampler, epochs = bert_script.make_loader(config["train_micro_batch_size_per_gpu"], dist.get_rank(), dist.get_world_size())

    def epoch_loaders() -> Iterable[DataLoader]:
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            yield loader

    train(model, lambda m, batch: m(**batch).loss, epoch_loaders(), optimizer, config, scheduler)
    return model


def raw_loop(args: argparse.Namespace, config: dict[str, Any]) -> nn.Module:
    model = loop_script.make_model()
    micro = config["train_micro_batch_size_per_gpu"]
    loader = loop_script.make_loader(micro, dist.get_rank(), dist.get_world_size(), args.steps, micro * config["gradient_accumulation_steps"])
    train(model, lambda m, batch: m(**batch).loss, [loader], adamw(model, config), config)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", choices=["cifar", "bert", "raw_loop"])
    parser.add_argument("--deepspeed_config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("-e", "--epochs", type=int, default=2)
    parser.add_argument("--save", type=Path, help="write the trained weights into this folder")
    args, _ = parser.parse_known_args()
    dist.init_process_group("gloo")
    model = {"cifar": cifar, "bert": bert, "raw_loop": raw_loop}[args.script](args, json.loads(args.deepspeed_config.read_text()))
    if args.save and dist.get_rank() == 0:
        args.save.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), args.save / "pytorch_model.bin")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

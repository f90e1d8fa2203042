"""Train a small Hugging Face Llama on English text under a plan of three axes: ZeRO-3 over `dp`, split weights over `tp`, stages over `pp`.

    python examples/train_3d.py                                   # eight gloo ranks on this machine
    python examples/train_3d.py --simulate                        # the same ranks, all in this process
    torchrun --nproc-per-node 8 examples/train_3d.py              # the same ranks, started by hand
    python examples/train_3d.py --compare                         # and plain PyTorch on one device beside them

A row of the batch is one paragraph of the text, cut or padded to `--seq` tokens; what is padded counts in no loss. So no two microbatches
have the same number of labels, and the loss is still the mean over all tokens of the batch, as on one device. With ``--dtype float64``
the model's own casts to float32 are float64 too, on both sides, as `deepseed verify` has them: what differs is rounding in float64 alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.distributed.run import main as torchrun
from train_text import CLIP, Batch, make_tokenizer, text, warmup_then_cosine
from transformers import LlamaConfig, LlamaForCausalLM

import deepseed
from deepseed.api import TrainStep
from deepseed.capture.eager import eager_reference
from deepseed.runtime.distributed import stop

IGNORED = -100  # a label that counts in no loss


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    if not args.simulate and "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        return torchrun(["--standalone", f"--nproc-per-node={args.ranks}", "--", __file__, *arguments])
    first = os.environ.get("RANK", "0") == "0"
    batches = list(make_batches(make_tokenizer(args.vocab), args))
    model = make_model(args)
    plain = OneDevice(copy.deepcopy(model), args) if args.compare and first else None

    started = perf_counter()
    optimizer, schedule = make_optimizer(model, args)
    compiler = deepseed.compile if args.dtype == "float32" else partial(TrainStep, widen=True)
    step = compiler(model, args.plan, optimizer=optimizer, clip_grad_norm=CLIP, world_size=args.ranks, backend="simulate" if args.simulate else None)
    step.compile(batches[0])
    log = Log(args, step, perf_counter() - started) if first else None
    for batch in batches:
        started = perf_counter()
        loss = float(step(batch))
        schedule.step()
        if log is not None:
            log.step(loss, perf_counter() - started, plain.step(batch) if plain is not None else None, int((batch["labels"] != IGNORED).sum()))
    if log is not None:
        log.close()
    stop()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--plan", default="zero3+tp2+pp2+mb4", help='any plan, also "zero3+pp4+zb" or "zero1+tp4" (default %(default)s)')
    p.add_argument("--ranks", type=int, default=8, help="processes to start, unless a launcher has, or ranks to simulate (default 8)")
    p.add_argument("--simulate", action="store_true", help="run all ranks in this process")
    p.add_argument("--compare", action="store_true", help="train the same model in plain PyTorch on one device, and say how far the losses are apart")
    p.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--batch", type=int, default=16, help="rows in the global batch")
    p.add_argument("--seq", type=int, default=48, help="tokens in a row")
    p.add_argument("--lr", type=float, default=3e-3, help="the schedule's highest learning rate")
    p.add_argument("--vocab", type=int, default=1024)
    p.add_argument("--hidden", type=int, default=128)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--log", type=Path, help="write one JSON line a step here")
    return p.parse_args(arguments)


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights, the same on every rank; 1.0 million of them with the default sizes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4 * args.seq, initializer_range=args.hidden**-0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, args.dtype))


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine(args.steps))


def make_batches(tokenizer: ByteLevelBPETokenizer, args: argparse.Namespace) -> Iterator[Batch]:
    """Global batches of [batch, seq] tokens: paragraphs in an order that the seed fixes; the labels of what is padded are ignored."""
    encoded = [tokens for line in text().split("\n") if len(tokens := tokenizer.encode(line).ids[: args.seq]) > 2]
    rows = torch.zeros(len(encoded), args.seq, dtype=torch.int64)
    labels = torch.full_like(rows, IGNORED)
    for row, label, tokens in zip(rows, labels, encoded, strict=True):
        row[: len(tokens)] = label[: len(tokens)] = torch.tensor(tokens)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    for number in range(args.steps):
        at = order[torch.arange(number * args.batch, (number + 1) * args.batch) % len(rows)]
        yield {"input_ids": rows[at], "labels": labels[at]}


class OneDevice:
    """The loop that everybody writes, without DeepSeed."""

    def __init__(self, model: nn.Module, args: argparse.Namespace) -> None:
        self.model, self.widen = model, args.dtype == "float64"
        self.optimizer, self.schedule = make_optimizer(model, args)

    def step(self, batch: Batch) -> float:
        self.optimizer.zero_grad()
        wide: AbstractContextManager[Any] = eager_reference(self.model, widen=True) if self.widen else nullcontext()
        with wide:
            loss: Tensor = self.model(**batch).loss
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())


class Log:
    """What the first rank prints: a line every few steps, and one JSON line a step for ``--log``."""

    def __init__(self, args: argparse.Namespace, step: TrainStep, seconds: float) -> None:
        self.args, self.number, self.apart, self.took = args, 0, 0.0, [0.0]
        self.file = args.log.open("w") if args.log else None
        parameters = sum(p.numel() for p in step.model.parameters())
        print(f"{step.plan} on {step.mesh} ({step.backend}), {parameters / 1e6:.1f}M parameters, {args.dtype}; compiled in {seconds:.1f} s")
        print(f"{'step':>4} {'tokens':>7} {'loss':>12}" + (f" {'one device':>12} {'relative':>9}" if args.compare else ""), flush=True)

    def step(self, loss: float, seconds: float, plain: float | None, tokens: int) -> None:
        self.number += 1
        self.took.append(seconds)
        said: dict[str, float] = {"loss": loss, "seconds": seconds, "tokens": tokens}
        line = f"{self.number:4} {tokens:7} {loss:12.8f}"
        if plain is not None:
            apart = abs(loss - plain) / abs(plain)
            self.apart = max(self.apart, apart)
            said["one_device"] = plain
            line += f" {plain:12.8f} {apart:9.1e}"
        if self.number == 1 or self.number % 5 == 0 or self.number == self.args.steps:
            print(line, flush=True)
        if self.file:
            print(json.dumps(said), file=self.file, flush=True)

    def close(self) -> None:
        print(f"{sorted(self.took)[len(self.took) // 2]:.2f} s a step, the median")
        if self.args.compare:
            print(f"largest relative difference from one device over {self.number} steps: {self.apart:.1e}")
        if self.file:
            self.file.close()


if __name__ == "__main__":
    main(sys.argv[1:])

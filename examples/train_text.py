"""Train a Llama of 7 million parameters on English text that ships with Python: on one device, or under any plan.

    python examples/train_text.py                                   # plain PyTorch on one device
    python examples/train_text.py --plan zero3 --ranks 2            # two ranks on this machine
    torchrun --nproc-per-node 2 examples/train_text.py --plan tp2   # the same ranks, started by hand

Model, optimizer and schedule are plain Hugging Face and PyTorch; what DeepSeed asks for is the one call of ``deepseed.compile``.
Every rank makes the same model and reads the same batches; the plan says which rank keeps and computes what.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from time import perf_counter

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.distributed.run import main as torchrun
from transformers import LlamaConfig, LlamaForCausalLM

import deepseed

CLIP = 1.0  # bound of the global gradient norm
Batch = dict[str, Tensor]


def main(arguments: Sequence[str]) -> None:
    args = parse(arguments)
    if args.ranks > 1 and "RANK" not in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        return torchrun(["--standalone", f"--nproc-per-node={args.ranks}", "--", __file__, *arguments])

    tokenizer = make_tokenizer(args.vocab)
    model = make_model(args)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_then_cosine(args.steps))
    batches = list(make_batches(tokenizer, args))

    started = perf_counter()
    if args.plan == "eager":
        step: Callable[[Batch], Tensor] = eager_step(model, optimizer)
    else:
        step = deepseed.compile(model, args.plan, optimizer=optimizer, clip_grad_norm=CLIP, example_batch=batches[0])
    log = Log(args)
    log.write(ready=perf_counter() - started)

    for batch in batches:
        started = perf_counter()
        loss = float(step(batch))
        schedule.step()
        log.step(loss, perf_counter() - started)

    if args.plan != "eager":
        explained = step.explain()
        rank = explained.ranks[0]
        log.write(
            parameters=rank.param_bytes, gradients=rank.grad_bytes, optimizer=rank.optimizer_bytes, sent=sum(c.bytes for c in explained.collectives)
        )  # fmt: skip
    log.close()
    if args.save:
        state = model.state_dict() if args.plan == "eager" else step.state_dict()  # whole tensors: every rank takes part
        if log.first:
            torch.save(state, args.save)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--plan", default="eager", help='"zero3", "tp2", "zero1+tp2" ..., or "eager": plain PyTorch (default)')
    p.add_argument("--ranks", type=int, default=1, help="processes to start, unless a launcher has (default 1)")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--batch", type=int, default=16, help="sequences in the global batch")
    p.add_argument("--seq", type=int, default=64, help="tokens in a sequence")
    p.add_argument("--lr", type=float, default=3e-3, help="the schedule's highest learning rate")
    p.add_argument("--vocab", type=int, default=4096)
    p.add_argument("--hidden", type=int, default=256)
    p.add_argument("--layers", type=int, default=4)
    p.add_argument("--log", type=Path, help="write one JSON line a step here")
    p.add_argument("--save", type=Path, help="write the trained weights here, as the model's own state_dict")
    return p.parse_args(arguments)


def make_tokenizer(vocab: int) -> ByteLevelBPETokenizer:
    """A byte-level BPE of the text, the same on every rank."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text()], vocab_size=vocab, show_progress=False)
    return tokenizer


def text() -> str:
    """Python's own manual of the language, some 430 thousand characters; a paragraph is a line."""
    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    return "\n".join(" ".join(paragraph.split()) for paragraph in paragraphs if paragraph.strip())


def make_batches(tokenizer: ByteLevelBPETokenizer, args: argparse.Namespace) -> Iterator[Batch]:
    """Global batches of [batch, seq] tokens, windows of the text in an order that the seed fixes."""
    tokens = torch.tensor(tokenizer.encode(text()).ids)
    windows = tokens[: len(tokens) // args.seq * args.seq].view(-1, args.seq)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    for number in range(args.steps):
        rows = windows[order[torch.arange(number * args.batch, (number + 1) * args.batch) % len(windows)]]
        yield {"input_ids": rows, "labels": rows}


def make_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights; 7.2 million of them with the default sizes."""
    torch.manual_seed(0)
    heads = max(args.hidden // 64, 2)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.hidden * 11 // 2, num_hidden_layers=args.layers,
            num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=4 * args.seq, initializer_range=args.hidden**-0.5,
        )
    )  # fmt: skip


def warmup_then_cosine(steps: int) -> Callable[[int], float]:
    warmup = max(steps // 10, 1)
    return lambda n: (n + 1) / warmup if n < warmup else 0.1 + 0.45 * (1 + math.cos(math.pi * (n - warmup) / max(steps - warmup, 1)))


def eager_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Batch], Tensor]:
    """The loop that everybody writes: the reference for every plan."""

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.detach()

    return step


class Log:
    """A progress bar, and one JSON line a step for ``--log``; both by the first rank only."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.first = os.environ.get("RANK", "0") == "0"
        self.file = args.log.open("w") if args.log and self.first else None
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"), TimeElapsedColumn())
        self.bar = Progress(*columns, disable=not self.first)
        self.task = self.bar.add_task(args.plan, total=args.steps, loss=math.nan)
        self.bar.start()

    def step(self, loss: float, seconds: float) -> None:
        self.bar.update(self.task, advance=1, loss=loss)
        self.write(loss=loss, seconds=seconds)

    def write(self, **fields: float) -> None:
        if self.file:
            print(json.dumps(fields), file=self.file, flush=True)

    def close(self) -> None:
        self.bar.stop()
        if self.file:
            self.file.close()


if __name__ == "__main__":
    main(sys.argv[1:])

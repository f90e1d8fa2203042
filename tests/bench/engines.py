"""One engine on one rank, for turns.py: sets up, and then does a step each time it is asked for one, and says what it measured.

An engine is a word and what it is to do besides, behind ``+``: ``ddp``, ``ddp+compile``, ``fsdp2-zero2+offload``, ``deepseed-zero1:inductor``. What 16 bits mean to each: DDP and eager PyTorch
have ``torch.autocast`` (weights are cast for each forward, gradients are float32); FSDP2 casts its shards and gathers and reduces 16 bits, DeepSpeed trains a bf16 copy beside a float32 one, as
DeepSeed's plan word ``bf16`` does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import socket
import sys
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter, process_time, thread_time
from typing import Any, NoReturn, TextIO

import torch
import torch.distributed as dist
import transformers

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}  # at 1e-3, without a warm-up, GPT-2 of 60M jumps about, and what rounding does grows from step to step
CLIP = 1.0
Batch = dict[str, Any]
Step = Callable[[list[Batch]], Any]  # of the microbatches of a step: their mean loss


def main(a: Namespace, engine: str, rank: int, world: int, folder: Path, words: TextIO, answers: TextIO) -> None:
    """The engine's words come from ``words``: ``step``, ``parts``; each is answered with a line."""
    torch.set_num_threads(a.threads)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    model = MODELS[a.model](a)
    parameters = sum(p.numel() for p in model.parameters())
    batches = tokens(a, [rank] if world > 1 else range(a.ranks))
    rss_model = peak_rss()
    began = perf_counter()
    step = ENGINES[engine.split("-")[0].split("+")[0]](a, engine, model)
    at, slept, awake = 0, 0.0, 0.0

    def train() -> float:
        nonlocal at
        loss = float(step([batches[(at * a.accumulation + k) % len(batches)] for k in range(a.accumulation)]))
        at += 1
        return loss

    def measured() -> dict[str, Any]:
        before = pace()
        if world > 1:
            dist.barrier()
        c, w = process_time(), perf_counter()
        loss = train()
        took = {"cpu": process_time() - c, "wall": perf_counter() - w}
        return {**took, "pace": min(before, pace()), "loss": loss, "rss": peak_rss(), "idle": awake / slept if slept else 0.0}

    def say(what: Any) -> None:
        print(json.dumps(what), file=answers, flush=True)

    say({"setup": perf_counter() - began, "rss_model": rss_model, "parameters": parameters, "codegen": getattr(step, "codegen", None),
         "versions": {"torch": torch.__version__, "transformers": transformers.__version__}})  # fmt: skip
    c, w = process_time(), perf_counter()
    for word in words:
        slept, awake = slept + perf_counter() - w, awake + process_time() - c
        say(measured() if word.strip() == "step" else parts(train))
        c, w = process_time(), perf_counter()


def pace(size: int = 256, times: int = 30) -> float:
    """GFLOP/s of float32 products that stay in the second cache, for 10 ms: what this core gives now, whatever engine asks."""
    a = torch.ones(size, size)
    out = torch.mm(a, a)
    began = thread_time()
    for _ in range(times):
        torch.mm(a, a, out=out)
    return 2e-9 * times * size**3 / (thread_time() - began)


def parts(train: Callable[[], float], steps: int = 5) -> dict[str, float]:
    """CPU seconds a step: in all, and of gloo's own threads; then, in steps in which each op's is taken, of matrix products and of attention."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            began = thread_time()
            result = op(*args, **(kwargs or {}))
            took[op.overloadpacket.__name__] += thread_time() - began
            return result

    took: Counter[str] = Counter()
    before, c = threads(), process_time()
    for _ in range(steps):
        train()
    cpu, after = process_time() - c, threads()
    gloo = sum(t - before.get(at, ("", 0.0))[1] for at, (name, t) in after.items() if "gloo" in name)
    with Ops():
        for _ in range(steps):
            train()
    products = sum(took[op] for op in ("mm", "addmm", "bmm", "baddbmm"))
    attention = sum(t for op, t in took.items() if "attention" in op)
    return {"cpu": cpu / steps, "gloo": gloo / steps, "products": products / steps, "attention": attention / steps}


def threads() -> dict[str, tuple[str, float]]:
    """Name and CPU seconds of each thread of this process (Linux)."""
    return {at.name: ((at / "comm").read_text().strip(), int((at / "schedstat").read_text().split()[0]) / 1e9) for at in Path("/proc/self/task").iterdir()}


def llama(a: Namespace) -> Any:
    heads = max(a.hidden // 64, 2)
    config = transformers.LlamaConfig(vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.hidden * 8 // 3 // 32 * 32, num_hidden_layers=a.layers,
                                      num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=max(a.seq, 128), use_cache=False)  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def gpt2(a: Namespace) -> Any:
    """Without dropout: each engine would draw its own."""
    config = transformers.GPT2Config(vocab_size=a.vocab, n_embd=a.hidden, n_layer=a.layers, n_head=max(a.hidden // 64, 2), n_positions=max(a.seq, 128), use_cache=False,
                                     resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0)  # fmt: skip
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config)


def tokens(a: Namespace, ranks: Iterable[int]) -> list[Batch]:
    """Eight microbatches of token ids [len(ranks) * batch, seq]; a rank's stream depends on its number only."""
    streams = []
    for r in ranks:
        g = torch.Generator().manual_seed(1000 + r)
        streams.append([torch.randint(0, a.vocab, (a.batch, a.seq), generator=g) for _ in range(8)])
    found = [torch.cat(parts) for parts in zip(*streams, strict=True)]
    return [{"input_ids": x, "labels": x} for x in found]


def peak_rss() -> float:
    """Peak resident memory of this process, MB (2^20 bytes)."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


# engines ------------------------------------------------------------------------------------------------------------


def adamw(a: Namespace, parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, fused=a.fused or None, **ADAMW)


def loop(a: Namespace, trained: Any, optimizer: Any, sync: Callable[[bool], Any] = lambda last: contextlib.nullcontext(), autocast: bool = True) -> Step:
    """PyTorch's own training loop around ``trained``; ``sync``: what stands around a microbatch, given whether it is the last."""

    def step(batches: list[Batch]) -> Any:
        total = torch.zeros(())
        for n, batch in enumerate(batches):
            with sync(n + 1 == len(batches)):
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast and a.dtype == "bf16"):
                    loss = trained(**batch).loss / len(batches)
                loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def eager(a: Namespace, engine: str, model: Any) -> Step:
    return loop(a, torch.compile(model) if engine.endswith("+compile") else model, adamw(a, model.parameters()))


def ddp(a: Namespace, engine: str, model: Any) -> Step:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    if engine.startswith("ddp-zero1"):
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, fused=a.fused or None, **ADAMW)
    else:
        optimizer = adamw(a, model.parameters())
    return loop(a, torch.compile(wrapped) if engine.endswith("+compile") else wrapped, optimizer, lambda last: contextlib.nullcontext() if last else wrapped.no_sync())


def fsdp2(a: Namespace, engine: str, model: Any) -> Step:
    """``-zero2`` keeps gathered parameters from forward to backward, ``-zero3`` drops them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    mesh, words = init_device_mesh("cpu", (a.ranks,)), engine.split("+")[1:]
    options: dict[str, Any] = {
        "mesh": mesh, "offload_policy": CPUOffloadPolicy(pin_memory=False) if "offload" in words else OffloadPolicy(), "reshard_after_forward": "zero2" not in engine,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.bfloat16) if a.dtype == "bf16" else MixedPrecisionPolicy(),
    }  # fmt: skip
    for layer in next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        if "compile" in words:
            layer.compile()
        fully_shard(layer, **options)
    fully_shard(model, **options)
    return loop(a, model, adamw(a, model.parameters()), autocast=False)


def deepspeed(a: Namespace, engine: str, model: Any) -> Step:
    import logging

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # its C++ build takes a minute and training does not use it
    stage, *words = engine.removeprefix("deepspeed-zero").split("+")
    if "cpuadam" in words:  # its own C++ kernel: compiled on first use, which takes minutes
        optimizer: Any = deepspeed.ops.adam.DeepSpeedCPUAdam(model.parameters(), adamw_mode=True, **ADAMW)
    else:
        optimizer = adamw(a, model.parameters())
    zero = {"stage": int(stage), **({"offload_optimizer": {"device": "cpu"}} if "offload" in words else {})}
    config = {"train_micro_batch_size_per_gpu": a.batch, "gradient_accumulation_steps": a.accumulation, "gradient_clipping": CLIP, "steps_per_print": 10**9,
              "bf16": {"enabled": a.dtype == "bf16"}, "zero_optimization": zero, "zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}  # fmt: skip
    trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=model.parameters(), config=config)

    def step(batches: list[Batch]) -> Any:
        total = torch.zeros(())
        for batch in batches:
            loss = trained(**batch).loss
            trained.backward(loss)
            trained.step()
            total += loss.detach() / len(batches)
        return total

    return step


def deepseed(a: Namespace, engine: str, model: Any) -> Step:
    import deepseed

    plan, _, codegen = engine.removeprefix("deepseed-").replace("single", "").partition(":")
    words = [w for w in (plan, a.dtype if a.dtype != "fp32" else "", f"mb{a.accumulation}" if a.accumulation > 1 else "") if w]
    optimizer = torch.optim.AdamW(model.parameters(), **ADAMW)
    compiled: Any = deepseed.compile(model, plan="+".join(words), optimizer=optimizer, clip_grad_norm=CLIP, batch="local", codegen=codegen or "python")

    def step(batches: list[Batch]) -> Any:
        return compiled({key: torch.cat([b[key] for b in batches]) for key in batches[0]} if len(batches) > 1 else batches[0])

    step.codegen = compiled.programs.subject.codegen  # type: ignore[attr-defined]  # what ``auto`` means here
    return step


MODELS: dict[str, Callable[[Namespace], Any]] = {"llama": llama, "gpt2": gpt2}
ENGINES: dict[str, Callable[[Namespace, str, Any], Step]] = {"eager": eager, "ddp": ddp, "fsdp2": fsdp2, "deepspeed": deepspeed, "deepseed": deepseed}


# processes ----------------------------------------------------------------------------------------------------------


def mother(family: str) -> NoReturn:
    """Imports once what a family of engines needs, and forks a rank for each order that comes through the socket on stdin: ``{"fork": ...}`` with the rank's own socket and its log, answered with its
    process id; ``{"wait": pid}``, answered with its exit status, or null while it lives. Linux and macOS."""
    for model in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        getattr(transformers, model)
    if family in ("deepspeed", "deepseed"):
        importlib.import_module(family)
    gc.freeze()
    orders = socket.socket(fileno=0)
    while True:
        message, handles, _, _ = socket.recv_fds(orders, 1 << 16, 2)
        if not message:
            os._exit(0)
        order = json.loads(message)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            orders.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
            continue
        pid = os.fork()
        if not pid:
            orders.close()
            born(order["fork"], *handles)
        for handle in handles:
            os.close(handle)
        orders.send(json.dumps(pid).encode())


def born(order: dict[str, Any], talk: int, log: int) -> NoReturn:
    status = 1
    try:
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable()
        os.environ.update(order["environment"])
        with open(talk, closefd=False) as words, open(talk, "w") as answers:
            main(Namespace(**order["settings"]), order["engine"], order["rank"], order["world"], Path(order["folder"]), words, answers)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)  # what an engine does on leaving is nobody's measurement


if __name__ == "__main__":
    mother(sys.argv[1])

"""How large a model trains in a fixed amount of device memory? A Llama is made deeper until its step no longer fits, under plan after plan.

    python tests/bench/bench_largest.py                          # 256 MiB a rank, two ranks; found by prediction
    python tests/bench/bench_largest.py --confirm                # and one real step of each, in an arena of that size
    python tests/bench/bench_largest.py --memory 64MiB --hidden 256

The peak of a step is affine in the depth, so two depths give the depth that fits (deepseed.memory, on a model without values); that depth and the next are then
predicted themselves. Bytes a layer stand beside the closed form: with Psi the bytes of a layer's parameters (Adam holds 2 Psi more) and N ranks, 4 Psi under
zero0, 4 Psi/N under zero3, 2 Psi/N with the optimizer's state on the host, and what is saved of a layer's forward; with all on the host nothing. Depths end at `--most`.
Fails where a step does not run in the memory in which it was predicted to, and, with `--gate`, where the last model is not ten times the first.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import deepseed
from deepseed import pipeline
from deepseed.capture import capture
from deepseed.explain_text import amount
from deepseed.ir.amounts import parse_bytes
from deepseed.ir.program import Program
from deepseed.memory import memory
from deepseed.meshes import program_mesh
from deepseed.plan import parse_plan

RANKS = 2
ALL = "offload(optimizer,gradients,params,activations)"
PLANS = ("zero0", "zero3", "zero3+remat", "zero3+remat+offload(optimizer)", f"zero3+remat+{ALL}")
STATE = {"zero0": 4.0, "zero3": 4.0 / RANKS, "zero3+remat": 4.0 / RANKS, "zero3+remat+offload(optimizer)": 2.0 / RANKS, f"zero3+remat+{ALL}": 0.0}  # of Psi
FITTED = 4, 6  # layers


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--memory", default="256MiB", help="of a rank's device")
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--vocab", type=int, default=512)
    p.add_argument("--batch", type=int, default=4, help="sequences of all ranks")
    p.add_argument("--seq", type=int, default=128)
    p.add_argument("--most", type=int, default=64, help="layers that are tried")
    p.add_argument("--confirm", action="store_true", help="run a step of each")
    p.add_argument("--gate", action="store_true", help="fail where the last is not ten times the first")
    return p.parse_args()


def model(said: argparse.Namespace, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=said.vocab, hidden_size=said.hidden, intermediate_size=said.hidden * 8 // 3, num_hidden_layers=layers,
        num_attention_heads=said.hidden // 64, num_key_value_heads=said.hidden // 64, max_position_embeddings=said.seq, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batch(said: argparse.Namespace) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, said.vocab, (said.batch, said.seq), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone()}


class Search:
    """Predicted peaks by depth and plan; a depth is captured once."""

    def __init__(self, said: argparse.Namespace) -> None:
        self.said = said
        self.captured = cache(self._captured)
        self.peak = cache(self._peak)

    def _captured(self, layers: int) -> tuple[Program, int]:
        with deepseed.meta():
            made = model(self.said, layers)
        program = capture(made, batch(self.said), optimizer=torch.optim.AdamW(made.parameters()), clip_grad_norm=1.0).program
        return program, sum(p.numel() for p in made.parameters())

    def _peak(self, layers: int, plan: str) -> int:
        parsed = parse_plan(f"{plan}+dp{RANKS}")
        program, _ = self.captured(layers)
        args = pipeline.arguments(program_mesh(program, parsed, parsed.mesh()), parsed.stage, {}, plan=parsed)
        return memory(pipeline.run(program, args, pipeline.SHARED, check=False)[-1].program).peak_bytes

    def deepest(self, plan: str, limit: int) -> tuple[int, float]:
        """The layers that fit, `--most` at most, and bytes of the peak that each takes."""
        a, b = FITTED
        each = (self.peak(b, plan) - self.peak(a, plan)) / (b - a)
        layers = min(self.said.most, int(a + (limit - self.peak(a, plan)) / each)) if each > 0 else self.said.most
        while layers > 1 and self.peak(layers, plan) > limit:
            layers -= 1
        while layers < self.said.most and self.peak(layers + 1, plan) <= limit:
            layers += 1
        return layers, each


def confirmed(said: argparse.Namespace, layers: int, plan: str) -> int:
    """The most that a rank was counted to hold in a step within the memory: an op that asks for more fails."""
    torch.manual_seed(0)
    made = model(said, layers)
    step = deepseed.compile(
        made, f"{plan}+dp{RANKS}", optimizer=torch.optim.AdamW(made.parameters()), clip_grad_norm=1.0, backend="simulate", device_memory=said.memory
    )
    step(batch(said))
    return max(each["device"] for each in step.counted_peak_bytes)


def main() -> None:
    said = arguments()
    limit, search = parse_bytes(said.memory), Search(said)
    print(f"Llama, hidden {said.hidden}, {said.batch} x {said.seq} tokens, AdamW, clipped, float32; {RANKS} ranks with {said.memory} each", flush=True)
    print("| plan | layers | parameters, M | grows | peak, MiB | KiB a layer | of state, by closed form | counted peak, MiB |\n|---|---|---|---|---|---|---|---|")
    psi = 4 * (search.captured(FITTED[1])[1] - search.captured(FITTED[0])[1]) / (FITTED[1] - FITTED[0])
    sizes: list[int] = []
    for plan in PLANS:
        layers, each = search.deepest(plan, limit)
        sizes.append(search.captured(layers)[1])
        peak = search.peak(layers, plan)
        counted = f"{confirmed(said, layers, plan) / 2**20:.1f}" if said.confirm else ""
        at_least = " (at least)" if layers == said.most else ""
        print(f"| `{plan}` | {layers}{at_least} | {sizes[-1] / 1e6:.1f} | {sizes[-1] / sizes[0]:.2f} | {peak / 2**20:.1f} | {each / 1024:.0f} | {STATE[plan] * psi / 1024:.0f} | {counted} |", flush=True)
    print(f"Psi of a layer: {amount(psi)}")
    if said.gate and sizes[-1] < 10 * sizes[0]:
        sys.exit(f"the last model has {sizes[-1] / sizes[0]:.1f} times the parameters of the first, fewer than ten times")


if __name__ == "__main__":
    main()

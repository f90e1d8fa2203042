"""What AdamW's update of all parameters of a 60M Llama takes on this CPU, clipped: DeepSeed's own in C++, torch's fused one, and with gradients of 16 bits torch's on wide copies. One thread, by turns, medians.

python tests/bench/bench_update.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from bench_products import LLAMA

from deepseed.codegen import cpp_files
from deepseed.codegen.updates import formula
from deepseed.ir.text import parse
from deepseed.runtime.executable import cache_dir
from deepseed.runtime.pages import keep_freed_memory

UPDATE = """program p mesh() facts()
%param : f32[4] batch "param"
%grad : {dtype}[4] batch "grad"
%step : f32[] batch "step"
%exp_avg : f32[4] batch "exp_avg"
%exp_avg_sq : f32[4] batch "exp_avg_sq"
%lr : f64[] batch "lr"
%scale : f32[] batch "scale"
%w, %m, %v = optim.adamw(%param, %grad, %step, %exp_avg, %exp_avg_sq, %lr, states=["step", "exp_avg", "exp_avg_sq"], betas=[0.9, 0.999], eps=1e-8, weight_decay=0.01, scale=%scale) : f32[4], f32[4], f32[4] {{phase="update"}}
return %w output "w"
"""


def seconds(do: Callable[[], object]) -> float:
    began = time.process_time()
    do()
    return time.process_time() - began


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--rounds", type=int, default=15)
    a = p.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    shapes = [*LLAMA, (8192, 768)]
    params, first, second = ([torch.rand(shape) for shape in shapes] for _ in range(3))
    steps, lr, scale = [torch.tensor(3.0) for _ in shapes], torch.tensor(1e-3, dtype=torch.float64), torch.tensor(0.9)

    def torchs(grads: list[torch.Tensor]) -> None:
        torch._fused_adamw_(params, grads, first, second, [], steps, lr=lr, weight_decay=0.01, beta1=0.9, beta2=0.999, eps=1e-8, amsgrad=False, maximize=False, grad_scale=scale.reciprocal())

    print(f"{sum(x.numel() for x in params) / 1e6:.0f} million parameters, CPU milliseconds\n| gradients | own | torch's fused | times as fast |\n|---|---|---|---|")
    for name, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)):
        grads = [torch.rand(shape).to(dtype) for shape in shapes]
        program = parse(UPDATE.format(dtype=name))
        own = cpp_files.update([formula(program, program.ops)], cache_dir() / "kernels")
        turns = {"own": lambda own=own, grads=grads: own(params, grads, steps, first, second, lr, scale), "torch": lambda grads=grads: torchs([g.float() for g in grads])}
        taken: dict[str, list[float]] = {who: [] for who in turns}
        for _ in range(a.rounds):
            for who, do in turns.items():
                taken[who].append(seconds(do))
        mine, theirs = (1e3 * median(taken[who]) for who in turns)
        print(f"| {name} | {mine:.1f} | {theirs:.1f} | {theirs / mine:.2f} |", flush=True)


if __name__ == "__main__":
    main()

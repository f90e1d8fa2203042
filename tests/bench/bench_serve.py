"""What the server costs over the bare engine: the same prompts, 32 at a time, given to the engine in this process and sent to a server around it by clients in another process.

    python tests/bench/bench_serve.py path/to/model [--rounds 5] [--concurrency 32] [--tokens 48]

Rounds alternate. Throughput is output tokens a second of the clock, where the clients' own work counts too on a machine with few cores; the second figure is this process's CPU seconds alone.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from statistics import median
from typing import Any

import torch
import uvicorn

from deepseed.inference.engine import Engine
from deepseed.inference.sampling import SamplingParams
from deepseed.serve.app import Server
from deepseed.serve.run import bound


def clients(url: str, concurrency: int, tokens: int, seed: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "deepseed", "bench", "serve", "--base-url", url, "--num-prompts", str(concurrency), "--random-input-len", "16", "--random-output-len", str(tokens), "--seed", str(seed), "--json"]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def bare(engine: Engine, concurrency: int, tokens: int, seed: int) -> tuple[float, float]:
    draw = random.Random(seed)
    prompts = [[draw.randrange(engine.vocabulary) for _ in range(16)] for _ in range(concurrency)]
    wall, cpu = time.perf_counter(), time.process_time()
    engine.generate(prompts, SamplingParams(tokens, ignore_eos=True))
    return concurrency * tokens / (time.perf_counter() - wall), time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine = Engine(args.model, dtype="fp32", cache="256MiB", prefix=False)
    server = Server(engine, "bench")
    listening = bound("127.0.0.1", 0)
    listening.listen(2048)
    uv = uvicorn.Server(uvicorn.Config(server.app, log_level="error"))
    thread = threading.Thread(target=uv.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    rates: list[list[float]] = [[], []]
    seconds: list[list[float]] = [[], []]
    try:
        clients(url, args.concurrency, 2, 0)
        for n in range(args.rounds):
            rate, cpu = bare(engine, args.concurrency, args.tokens, n)
            began = time.process_time()
            found = clients(url, args.concurrency, args.tokens, n)
            for row, values in ((rate, rates[0]), (found["output_throughput"], rates[1]), (cpu, seconds[0]), (time.process_time() - began, seconds[1])):
                values.append(row)
            print(f"round {n + 1}: engine {rate:.1f} tokens/s, {cpu:.2f} CPU s; server {found['output_throughput']:.1f} tokens/s, {seconds[1][-1]:.2f} CPU s", flush=True)
    finally:
        uv.should_exit = True
        thread.join()
    a, b, x, y = (median(v) for v in (*rates, *seconds))
    many = args.concurrency * args.tokens
    print(f"medians: engine {a:.1f} tokens/s, server {b:.1f} ({1 - b / a:+.1%} lost); CPU {x:.2f} s, {y:.2f} s ({y / x - 1:+.1%}, {(y - x) / many * 1e6:.0f} us a token)")


if __name__ == "__main__":
    main()

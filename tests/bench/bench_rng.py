"""Counter-based draws against PyTorch's own, in nanoseconds an element of CPU time on one thread.

    python tests/bench/bench_rng.py

Measured (2 shared cores, torch 2.13), 256k elements | 2M elements:
dropout 2.9 | 8.7 against F.dropout 6.1 | 9.9; bernoulli 2.6 | 2.7 against 5.8 | 5.9; uniform 3.6 | 3.7; normal 16 | 16 against 3.8.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from deepseed.ops import bernoulli, normal, uniform


def main() -> None:
    torch.set_num_threads(1)
    rng = torch.tensor([1, 2])
    for n in (1 << 18, 1 << 21):
        x = torch.randn(n)
        rows = [[(n // 128,)], [(2, 1, 1), (128,)]]  # half of a split last dimension
        odd = [[(n // 128,)], [(128,), (2, 1, 1)]]  # every second element: one hash each
        cases: dict[str, Callable[[], object]] = {
            "F.dropout": lambda x=x: F.dropout(x, 0.1, True),  # type: ignore[misc]
            "dropout": lambda x=x, n=n: x * (bernoulli(rng, (n,), 0.9, "s", torch.float32) / 0.9),  # type: ignore[misc]
            "Tensor.bernoulli_": lambda x=x: torch.empty_like(x).bernoulli_(0.9),  # type: ignore[misc]
            "bernoulli": lambda n=n: bernoulli(rng, (n,), 0.9, "s", torch.float32),  # type: ignore[misc]
            "bernoulli, rows of a shard": lambda n=n, i=rows: bernoulli(rng, (n // 128, 128), 0.9, "s", torch.float32, i),  # type: ignore[misc]
            "bernoulli, every second": lambda n=n, i=odd: bernoulli(rng, (n // 128, 128), 0.9, "s", torch.float32, i),  # type: ignore[misc]
            "uniform": lambda n=n: uniform(rng, (n,), 0.0, 1.0, "s", torch.float32),  # type: ignore[misc]
            "normal": lambda n=n: normal(rng, (n,), 0.0, 1.0, "s", torch.float32),  # type: ignore[misc]
            "torch.randn": lambda n=n: torch.randn(n),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(11):
            for name, case in cases.items():  # interleaved: a busy machine slows all alike
                start = time.process_time_ns()
                case()
                times[name].append((time.process_time_ns() - start) / n)
        print(f"{n} elements")
        for name, found in times.items():
            print(f"  {name:28} {sorted(found)[len(found) // 2]:6.2f} ns")


if __name__ == "__main__":
    main()

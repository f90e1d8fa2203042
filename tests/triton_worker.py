"""A process in which Triton kernels are interpreted: it reads (source, inputs) and writes (outputs, what was read and written). An input may be a list of tensors; what returns nothing gives its inputs back.

The interpreter is chosen when triton is imported, so it needs a process of its own. Its casts to bfloat16 are made to round as a device's do. Tensors travel as pickles on the two pipes.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Traffic:
    """Bytes by tensor number, and of what the launches made themselves as -1; ``once``: of each launch and each of its lines that load, every address once; ``again``: bytes
    that one program reads a second time."""

    read: dict[int, int] = field(default_factory=dict)
    once: dict[int, int] = field(default_factory=dict)
    written: int = 0
    again: int = 0
    launches: int = 0


class Interpreter:
    """The other process, from the outside."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def run(self, source: str, inputs: list[Any]) -> tuple[Any, Traffic]:
        assert self.process.stdin is not None and self.process.stdout is not None
        pickle.dump((source, inputs), self.process.stdin)
        self.process.stdin.flush()
        ok, result = pickle.load(self.process.stdout)
        if not ok:
            raise RuntimeError(f"{result}\n{source}")
        return result

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    import importlib.util
    import traceback

    import numpy as np
    import torch
    import triton  # noqa: F401
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def nearest(x: Any, old: Any, new: Any, mode: Any) -> Any:
        """float32 to bfloat16 as devices do it, to the nearest, ties to even; the interpreter cuts off."""
        if (str(old), str(new)) != ("fp32", "bf16"):
            return convert(x, old, new, mode)
        bits = np.ascontiguousarray(x).view(np.uint32)
        rounded = (bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(bits & 0x7FFFFFFF > 0x7F800000, (bits >> 16) | 0x40, rounded).astype(np.uint16).reshape(x.shape)

    interpreter._convert_float = nearest
    builder = interpreter.InterpreterBuilder
    load, store, grid = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    reads: list[tuple[Any, int, int]] = []  # addresses, bytes of each and the line that loads them, of this program
    state: dict[str, Any] = {"traffic": Traffic(), "ranges": []}

    touched: list[tuple[Any, int, int]] = []  # of this launch

    def launched() -> None:
        """What each line of the launch before read of each tensor, every address once."""
        for size, line in {(size, line) for _, size, line in touched}:
            addresses = np.unique(np.concatenate([a for a, *each in touched if each == [size, line]]))
            rest = len(addresses)
            for n, (first, end) in enumerate(state["ranges"]):
                inside = int(((addresses >= first) & (addresses < end)).sum())
                state["traffic"].once[n] = state["traffic"].once.get(n, 0) + inside * size
                rest -= inside
            state["traffic"].once[-1] = state["traffic"].once.get(-1, 0) + rest * size
        touched.clear()

    def account() -> None:
        for addresses, size, line in reads:
            for n, (first, end) in enumerate(state["ranges"]):
                inside = int(((addresses >= first) & (addresses < end)).sum())
                if inside:
                    state["traffic"].read[n] = state["traffic"].read.get(n, 0) + inside * size
            touched.append((np.unique(addresses), size, line))
        for size in {size for _, size, _ in reads}:
            each = [np.unique(a) for a, its, _ in reads if its == size]
            state["traffic"].again += size * (sum(map(len, each)) - len(np.unique(np.concatenate(each))))
        reads.clear()

    def counted_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        out = load(self, ptrs, mask, *rest)
        frame = sys._getframe(1)
        while frame.f_back is not None and not frame.f_code.co_filename.startswith(folder):
            frame = frame.f_back
        reads.append((np.asarray(ptrs.data)[np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(ptrs.data))].ravel(), out.data.itemsize, frame.f_lineno))
        return out

    def counted_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        state["traffic"].written += int(np.broadcast_to(np.asarray(mask.data, dtype=bool), np.shape(ptrs.data)).sum()) * value.data.itemsize
        return store(self, ptrs, value, mask, *rest)

    def counted_grid(self: Any, x: int, y: int, z: int) -> None:
        account()
        if (x, y, z) == (0, 0, 0):
            launched()
            state["traffic"].launches += 1
        grid(self, x, y, z)

    builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx = counted_load, counted_store, counted_grid
    loaded: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = os.fdopen(os.dup(1), "wb")
        os.dup2(2, 1)  # what is printed goes elsewhere
        while True:
            try:
                source, inputs = pickle.load(sys.stdin.buffer)
            except EOFError:
                return
            try:
                if source not in loaded:
                    path = Path(folder) / f"kernels_{len(loaded)}.py"
                    path.write_text(source)
                    spec = importlib.util.spec_from_file_location(path.stem, path)
                    assert spec is not None and spec.loader is not None
                    module = importlib.util.module_from_spec(spec)
                    spec.loader.exec_module(module)
                    loaded[source] = module
                state["traffic"] = Traffic()
                tensors = [x for given in inputs for x in (given if isinstance(given, list) else [given])]
                state["ranges"] = [(x.data_ptr(), x.data_ptr() + x.untyped_storage().nbytes()) for x in tensors]
                with torch.no_grad():
                    result = loaded[source].launch(*inputs)
                account()
                launched()
                pickle.dump((True, (inputs if result is None else result, state["traffic"])), out)
            except Exception:
                reads.clear()
                touched.clear()
                pickle.dump((False, traceback.format_exc()), out)
            out.flush()


if __name__ == "__main__":
    sys.modules["triton_worker"] = sys.modules["__main__"]
    Traffic.__module__ = "triton_worker"
    main()

"""Kernels through torch's Inductor: C++ on a CPU. Each function is traced once and compiled for operands that lie as the program says they do.

What is compiled is kept in a folder by content (source, shapes, strides, dtypes, torch version, processor, threads): a later process loads it and lowers nothing. Several
processes share the work: whoever holds a kernel's lock compiles it. Compiled code refuses operands that lie otherwise; then it is compiled once more for those.
Where there is no C++ compiler, or Inductor fails, the function itself runs.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from time import sleep
from typing import Any

import torch
from torch import Tensor

from deepseed import ops
from deepseed.codegen.donation import may_alias
from deepseed.codegen.expressions import DTYPES
from deepseed.codegen.kernels import COMPILED, Kernel, is_attention
from deepseed.ops import traced

Code = Callable[..., Sequence[Tensor]]
EACH = 3  # kernels that a further process must have to do before it pays to start it


def compiled(wanted: Sequence[Kernel], folder: Path, tell: Callable[[str], object]) -> list[Code]:
    """Each kernel as a callable, compiled now where the folder has none. Attention runs as the kernel that it is."""
    if any(is_attention(k) for k in wanted):
        rest = iter(compiled([k for k in wanted if not is_attention(k)], folder, tell))
        return [python(k) if is_attention(k) else next(rest) for k in wanted]
    if not wanted:
        return []
    functions = [python(k) for k in wanted]
    if not told_compiler(tell):
        return functions
    specs = [spec(k) for k in wanted]
    paths = [write(folder, k.name, each, k.source) for k, each in zip(wanted, specs, strict=True)]
    if missing := [path for path in dict.fromkeys(paths) if not _done(path)]:
        _compile_all(missing, folder)
    for path in paths:
        if _failed(path).exists():
            once(tell, f"Inductor fails, so that {path.stem} runs as plain Python: {_failed(path).read_text()[:300]}")
    return [_Loaded(path, folder, f, k) if path.exists() else f for path, f, k in zip(paths, functions, wanted, strict=True)]


def python(k: Kernel) -> Code:
    """The function itself."""
    return _function(k.source, k.name, ops)


def spec(k: Kernel) -> dict[str, Any]:
    """What decides the code beside the source."""
    operands = [(list(i.type.shape), list(s), i.type.dtype) for i, s in zip(k.fragment.inputs, k.strides, strict=True)]
    return {"operands": operands, "torch": torch.__version__, "cpu": processor(), "threads": torch.get_num_threads()}


def write(folder: Path, name: str, found: Mapping[str, Any], source: str) -> Path:
    """The place of a kernel's code; its source and what decides it stand beside."""
    text = json.dumps(found, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256((source + text + _ops_digest()).encode()).hexdigest()[:16]}.bin"
    for suffix, content in ((".py", source), (".json", text)):
        beside = path.with_suffix(suffix)
        if not beside.exists():
            folder.mkdir(parents=True, exist_ok=True)
            fresh = beside.with_suffix(f".{os.getpid()}.tmp")
            fresh.write_text(content)
            fresh.replace(beside)
    return path


class _Loaded:
    """A compiled kernel; operands that lie otherwise than it was compiled for have one of their own."""

    def __init__(self, path: Path, folder: Path, function: Code, k: Kernel) -> None:
        self.code: Code = self._first
        self.loaded, self.path, self.folder, self.function, self.kernel = load(path), path, folder, function, k
        self.others: dict[tuple[tuple[int, ...], ...], Code] = {}

    def __call__(self, *operands: Tensor) -> Sequence[Tensor]:
        try:
            return self.code(*operands)
        except AssertionError:  # raised before anything is computed
            return self._other(operands)(*operands)

    def _first(self, *operands: Tensor) -> Sequence[Tensor]:
        """The first call looks whether a result lies in an operand's memory, or in another result's, where the program has two: then the function is run,
        since what writes in place later would write into both."""
        results = self.loaded(*operands)
        p, taken = self.kernel.fragment, {x.untyped_storage().data_ptr() for x in operands}
        for o, x in zip(p.outputs, results, strict=True):
            if x.numel() and x.untyped_storage().data_ptr() in taken and not may_alias(p.producers[o.ref.name], p):
                self.code = self.function
                return self.function(*operands)
            taken.add(x.untyped_storage().data_ptr())
        self.code = self.loaded
        return results

    def _other(self, operands: Sequence[Tensor]) -> Code:
        lying = tuple([x.stride() for x in operands])
        if lying not in self.others:
            found = {**spec(self.kernel), "operands": [(list(x.shape), list(x.stride()), i.type.dtype) for x, i in zip(operands, self.kernel.fragment.inputs, strict=True)]}
            path = write(self.folder, self.kernel.name, found, self.kernel.source)
            if not _done(path):
                _build(path)
            self.others[lying] = _Loaded(path, self.folder, self.function, self.kernel) if path.exists() and path != self.path else self.function
        return self.others[lying]


# compiling ----------------------------------------------------------------------------------------------------------


def compiler() -> str:
    """A C++ compiler; "" where there is none."""
    return next((found for name in (os.environ.get("CXX") or "g++", "clang++", "g++") if (found := shutil.which(name))), "")


def told_compiler(tell: Callable[[str], object]) -> str:
    """``compiler()``; says where there is none, or not the one that was asked for."""
    name, asked = compiler(), os.environ.get("CXX")
    if not name:
        once(tell, "no C++ compiler: kernels run as plain Python\n  fix: install g++ or clang++, or set CXX")
    elif asked and not shutil.which(asked):
        once(tell, f"CXX={asked!r} is no program: {name} compiles\n  fix: unset CXX, or name one compiler, without options")
    return name


def _compile_all(paths: Sequence[Path], folder: Path) -> None:
    counted = COMPILED.get()
    helpers = min((os.cpu_count() or 1) - 1, (len(paths) - 1) // EACH)
    others = [subprocess.Popen([sys.executable, "-m", "deepseed.codegen.inductor", str(folder), *[p.name for p in paths[::-1]]], stdout=subprocess.DEVNULL, env=_environment()) for _ in range(helpers)]
    try:
        for _ in _build_all(paths):
            counted(sum(map(_done, paths)), len(paths))
    finally:
        for each in others:
            each.wait()


def _environment() -> dict[str, str]:
    root = str(Path(ops.__file__).resolve().parent.parent.parent)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": str(torch.get_num_threads())}


def _build_all(paths: Sequence[Path]) -> Iterator[Path]:
    """Compile what nobody else compiles, then wait for the rest; a process that dies leaves its lock."""
    left = list(paths)
    while left:
        before = len(left)
        for path in list(left):
            if _done(path) or _build(path):
                left.remove(path)
                yield path
        if left and len(left) == before:
            sleep(0.1)


def _build(path: Path) -> bool:
    """Compile one kernel; False where another process does."""
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not _done(path):
            try:
                _compile(path)
            except Exception as error:  # whatever Inductor may raise: the function itself runs then
                _failed(path).write_text(f"{type(error).__name__}: {error}")
    return True


def _compile(path: Path) -> None:
    from torch._inductor import standalone_compile
    from torch.fx.experimental.proxy_tensor import make_fx

    found = json.loads(path.with_suffix(".json").read_text())
    operands: list[Any] = [torch.empty_strided(shape, stride, dtype=getattr(torch, DTYPES[dtype].removeprefix("torch."))) for shape, stride, dtype in found["operands"]]
    function = _function(path.with_suffix(".py").read_text(), path.stem.rpartition("-")[0], traced)
    with torch.no_grad(), _kept(path.parent):
        graph = make_fx(function, tracing_mode="fake")(*operands)
        code = standalone_compile(graph, operands, dynamic_shapes="from_example_inputs")
        fresh = path.with_suffix(f".{os.getpid()}.tmp")
        code.save(path=str(fresh), format="binary")
    fresh.replace(path)


def load(path: Path) -> Code:
    from torch._inductor import CompiledArtifact  # type: ignore[attr-defined]

    with _kept(path.parent):
        code: Code = CompiledArtifact.load(path=str(path), format="binary")
    return getattr(code, "_compiled_fn", code)


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[None]:
    """Inductor's own files lie in the folder too."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        else:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def _function(source: str, name: str, namespace: Any) -> Code:
    names: dict[str, Any] = {"torch": torch, "ops": namespace}
    exec(compile(source, f"<{name}>", "exec"), names)
    found: Code = names[name]
    return found


def _done(path: Path) -> bool:
    return path.exists() or _failed(path).exists()


def _failed(path: Path) -> Path:
    return path.with_suffix(".failed")


@cache
def _ops_digest() -> str:
    """Of the traced ops' own source: another text is another kernel."""
    return hashlib.sha256(Path(str(traced.__file__)).read_bytes()).hexdigest()


@cache
def processor() -> str:
    """What is another word on a machine for whose processor a compiler makes other code."""
    try:
        known = instructions(Path("/proc/cpuinfo").read_text())
    except OSError:  # no Linux
        known = platform.processor()
    return f"{platform.machine()} {hashlib.sha256(known.encode()).hexdigest()[:8]}"


_INSTRUCTIONS = ("flags", "Features", "features", "isa", "uarch", "cpu", "CPU implementer", "CPU architecture", "CPU variant", "CPU part")  # of x86, ARM, s390, RISC-V, POWER


def instructions(cpuinfo: str) -> str:
    """The lines of /proc/cpuinfo that say what a processor is able to do, each once: cores may be of several kinds."""
    return "\n".join(dict.fromkeys(" ".join(line.split()) for line in cpuinfo.splitlines() if line.partition(":")[0].strip() in _INSTRUCTIONS))


_told: set[str] = set()


def once(tell: Callable[[str], object], text: str) -> None:
    if text not in _told:
        _told.add(text)
        tell(text)


if __name__ == "__main__":
    where, *given = sys.argv[1:]
    for _ in _build_all([Path(where, name) for name in given]):
        pass

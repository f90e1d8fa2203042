"""Kernels compiled for a GPU that is not there, with what the assembler says of them.

    compiled(source(fragment), "sm_90") -> one Compiled a kernel: registers, spills, shared memory, and where its assembly is kept
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS: dict[str, tuple[str, Any, int]] = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}


class CompileError(RuntimeError):
    """Kernels that cannot be compiled here, or that the compiler refuses."""


@dataclass(frozen=True)
class Compiled:
    """One kernel for one target. ``registers``: of a thread; ``spilled``: bytes a thread that did not fit; ``shared``: bytes a program."""

    kernel: str
    target: str
    registers: int
    spilled: int
    shared: int
    assembly: Path


def known(target: str) -> None:
    """Raises CompileError where no GPU is called ``target``."""
    if target not in TARGETS:
        raise CompileError(f"{target} is no target\n  fix: one of {', '.join(TARGETS)}")


def check(target: str) -> None:
    """Raises CompileError, with the fix, where nothing can be compiled for ``target`` in this process."""
    known(target)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise CompileError("kernels of this process are interpreted, as TRITON_INTERPRET=1 says: they cannot be compiled too\n  fix: compile in a process without it")
    if importlib.util.find_spec("triton") is None:
        raise CompileError("triton is not installed\n  fix: pip install 'deepseed[triton]'")


def writable(folder: Path) -> None:
    """Makes the cache folder where it is not there. Raises CompileError, with the fix, where it cannot be made, or nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: Path, error: OSError) -> CompileError:
    return CompileError(f"the cache folder {folder} cannot be written: {error.strerror or error}\n  fix: set DEEPSEED_CACHE_DIR to a folder that can")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise _unwritable(path.parent, error) from None


def compiled(source: str, target: str, folder: Path | None = None) -> list[Compiled]:
    """The kernels of a file that ``deepseed.codegen.triton.source`` made. Assembly is kept in ``folder``: default ``triton`` in ``$DEEPSEED_CACHE_DIR``. Raises CompileError."""
    check(target)
    folder = folder or Path(os.environ.get("DEEPSEED_CACHE_DIR") or Path(tempfile.gettempdir()) / f"deepseed-{os.getuid()}") / "triton"
    name = f"fragment_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = folder / f"{name}.py"
    _write(path, source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [_compiled(getattr(module, kernel), kernel, types, warps, target, folder / f"{name}.{kernel}.{target}") for kernel, (types, warps) in module.KERNELS.items()]


def _compiled(function: Any, kernel: str, types: dict[str, Any], warps: int, target: str, path: Path) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {name: t for name, t in types.items() if not isinstance(t, str)}
    signature = {name: "constexpr" if name in constants else t for name, t in types.items()}
    at = function.arg_names.index
    aligned = {(at(name),): [["tt.divisibility", 16]] for name, t in signature.items() if t.startswith("*")}
    made = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs={(at(name),): value for name, value in constants.items()}, attrs=aligned),
        target=GPUTarget(*TARGETS[target]), options={"num_warps": warps},
    )  # fmt: skip
    text = "ptx" if target.startswith("sm") else "amdgcn"
    path = path.with_name(f"{path.name}.{text}")
    _write(path, made.asm[text])
    registers, spilled = _ptxas(path, target) if text == "ptx" else _amdgcn(made.asm[text])
    return Compiled(kernel, target, registers, spilled, int(made.metadata.shared), path)


def _ptxas(path: Path, target: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread, as NVIDIA's assembler counts them."""
    from triton.backends.nvidia.compiler import get_ptxas

    assembler = get_ptxas(TARGETS[target][1]).path
    architecture = re.search(r"^\.target (\w+)", path.read_text(), re.M)
    command = [assembler, "-v", f"--gpu-name={architecture.group(1) if architecture else target}", str(path), "-o", os.devnull]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    used, spilled = re.search(r"Used (\d+) registers", said.stderr), re.search(r"(\d+) bytes spill stores", said.stderr)
    if said.returncode or used is None:
        raise CompileError(f"{path} is refused by ptxas: {said.stderr.strip()}")
    return int(used.group(1)), int(spilled.group(1)) if spilled else 0


def _amdgcn(text: str) -> tuple[int, int]:
    """Vector registers and spilled bytes of a thread, as the assembly's own metadata has them."""
    used, spilled = re.search(r"\.vgpr_count:\s*(\d+)", text), re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    return int(used.group(1)) if used else 0, 4 * int(spilled.group(1)) if spilled else 0

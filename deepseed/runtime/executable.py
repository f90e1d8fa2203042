"""What one rank runs: generated source, written to a file that one can read and step through, compiled once a process."""

from __future__ import annotations

import hashlib
import linecache
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from deepseed.ir.program import Input, Output
from deepseed.logs import warn
from deepseed.runtime.collectives import Runtime
from deepseed.runtime.pages import settle


class Executable:
    """``Executable(source)(rt, inputs)``: ``inputs`` are local tensors in the program's order; the list is emptied.

    ``inputs``, ``outputs``: of the rank's program; it returns its outputs other than new parameters, buffers and state. ``kernels``: functions that the source calls, by name,
    of the back end ``codegen``. ``path`` is the file that holds the source: a debugger steps through it, a traceback shows its lines.
    """

    def __init__(
        self, source: str, name: str = "step", inputs: Sequence[Input] = (), outputs: Sequence[Output] = (), kernels: Mapping[str, Callable[..., Any]] | None = None, codegen: str = ""
    ) -> None:
        self.source, self.inputs, self.outputs, self.kernels, self.codegen = source, inputs, outputs, kernels or {}, codegen
        self._loaded = _load(source, name, self.kernels, codegen)
        self.path = self._loaded.path

    def __call__(self, rt: Runtime, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        counted = rt.arena.step(inputs, [i.type.host for i in self.inputs]) if rt.arena is not None else nullcontext()
        with torch.no_grad(), counted:
            step: Callable[[Any, list[Tensor]], tuple[Tensor, ...]] = self._loaded.names["step"]
            out = step(rt, inputs)
        settle()
        return out

    def halves(self) -> Halves:
        """One run of a program with tangents, in two calls."""
        return Halves(self)


class Halves:
    """``forward`` is called first, with the inputs that are no tangents; then, once, ``backward`` with these: each as an ``Executable`` is called.

    What the second half reads is held in between, stored parameters in their own memory."""

    def __init__(self, executable: Executable) -> None:
        self.inputs = executable.inputs
        self._names, self._kept = executable._loaded.names, None

    def forward(self, rt: Runtime, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad(), self._counted(rt, inputs, [i.type.host for i in self.inputs if i.role != "tangent"]):
            shown, self._kept = self._names["forward"](rt, inputs)
        out: tuple[Tensor, ...] = shown
        return out

    def backward(self, rt: Runtime, tangents: list[Tensor]) -> tuple[Tensor, ...]:
        kept, self._kept = self._kept, None
        with torch.no_grad(), self._counted(rt, tangents, [i.type.host for i in self.inputs if i.role == "tangent"]):
            out: tuple[Tensor, ...] = self._names["backward"](rt, kept, tangents)
        settle()
        return out

    def _counted(self, rt: Runtime, given: Sequence[Tensor], host: Sequence[bool]) -> AbstractContextManager[None]:
        return rt.arena.step(given, host) if rt.arena is not None else nullcontext()


@cache
def _without_files(why: str) -> None:
    """Said once."""
    warn(f"warning: generated source cannot be kept in {cache_dir() / 'source'}: {why}\n  fix: DEEPSEED_CACHE_DIR=FOLDER, one that can be written")


def cache_dir() -> Path:
    """``$DEEPSEED_CACHE_DIR``, else a folder of this user's in the system's temporary folder."""
    root = os.environ.get("DEEPSEED_CACHE_DIR")
    return Path(root) if root else Path(tempfile.gettempdir()) / f"deepseed-{os.getuid() if hasattr(os, 'getuid') else 'cache'}"


@dataclass(eq=False)
class _Loaded:
    """A loaded source: shared by the executables of it, gone with the last one."""

    path: Path
    names: Mapping[str, Any]  # "step", or "forward" and "backward"


_loaded: WeakValueDictionary[tuple[str, str, str], _Loaded] = WeakValueDictionary()


def _load(source: str, name: str, kernels: Mapping[str, Callable[..., Any]], codegen: str) -> _Loaded:
    known = _loaded.get((source, name, codegen))
    if known is not None:
        return known
    digest = hashlib.sha256(source.encode()).hexdigest()
    path = cache_dir() / "source" / f"{name}-{digest[:16]}.py"
    try:
        if not path.exists() or path.read_text() != source:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(f".{os.getpid()}.tmp")
            fresh.write_text(source)
            fresh.replace(path)  # at once: other ranks may be writing the same file
    except OSError as error:
        _without_files(error.strerror or str(error))
        linecache.cache[str(path)] = len(source), None, source.splitlines(keepends=True), str(path)  # a traceback shows its lines all the same
    namespace: dict[str, Any] = {**kernels, "__name__": f"deepseed.generated.{name}", "__file__": str(path)}
    exec(compile(source, str(path), "exec"), namespace)
    _loaded[source, name, codegen] = made = _Loaded(path, namespace)
    return made

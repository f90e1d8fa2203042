"""``deepseed env``: what is installed, which devices there are, whether they fit together, and what to do where they do not. Quick, and never fails."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

PACKAGES = ("deepseed", "torch", "numpy", "scipy", "triton", "transformers", "accelerate", "safetensors", "tensorboard", "wandb")
VARIABLES = re.compile(r"^(DEEPSEED_|CUDA_|NCCL_|OMP_NUM_THREADS$|RANK$|WORLD_SIZE$|LOCAL_RANK$|MASTER_)")


def collect() -> dict[str, Any]:
    """All of it, as plain data; what cannot be asked is the error's text."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "torch": _tried(_torch),
        "machine": {"system": platform.platform(), "cores": _tried(_cores), "memory": _tried(_memory), "shm": _tried(lambda: _disk("/dev/shm"))},
        "caches": _tried(_caches),
        "environment": {key: value for key, value in sorted(os.environ.items()) if VARIABLES.match(key)},
        "verdicts": _tried(_verdicts),
    }


def text(found: dict[str, Any]) -> str:
    """One screen."""
    lines: list[str] = []
    for section, values in found.items():
        lines.append(section)
        if section == "verdicts" and isinstance(values, list):
            lines += [f"  {v['verdict']:5} {v['what']}" + (f"\n        fix: {v['fix']}" if v["fix"] else "") for v in values]
        elif isinstance(values, dict):
            wide = max(map(len, values), default=0)
            lines += [f"  {key:{wide}}  {_said(value)}" for key, value in values.items()] or ["  none"]
        else:
            lines.append(f"  {values}")
    return "\n".join(lines)


def _said(value: Any) -> str:
    if value is None:
        return "not there"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and value >= 1 << 20:
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_said(v)}" for k, v in value.items())
    return "; ".join(map(_said, value)) or "none" if isinstance(value, list) else str(value)


def _tried(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return f"cannot be asked: {type(error).__name__}: {error}"


def _version(name: str) -> str | None:
    try:
        if name == "torch":  # with what it is built for, such as +cu130, which its metadata may lack
            return str(import_module("torch.version").__version__)
        return metadata.version(name)
    except Exception:
        return "0 (from source)" if name == "deepseed" else None


def _torch() -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    backends = {name: bool(dist.is_available() and dist.is_backend_available(name)) for name in ("gloo", "nccl")}
    return {
        "built for CUDA": torch.version.cuda, "accelerator": torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu",  # type: ignore[union-attr]
        "devices": [_tried(partial(_device, torch, n)) for n in range(torch.cuda.device_count())] if cuda else [],
        **backends, "NCCL": _tried(partial(_nccl, torch)) if cuda and backends["nccl"] else None, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _nccl(torch: Any) -> str:
    return ".".join(map(str, torch.cuda.nccl.version()))


def _device(torch: Any, n: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(n)
    free, total = torch.cuda.mem_get_info(n)
    return {"name": properties.name, "capability": f"{properties.major}.{properties.minor}", "memory": total, "free": free}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> dict[str, int]:
    from deepseed.runtime.staged import host_memory

    return host_memory()


def _disk(path: str) -> dict[str, int]:
    usage = shutil.disk_usage(path)
    return {"total": usage.total, "free": usage.free}


def _caches() -> dict[str, Any]:
    from deepseed.runtime.executable import cache_dir

    source = cache_dir() / "source"
    files = list(source.glob("*.py")) if source.is_dir() else []
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return {
        "generated source": str(source), "files in it": len(files), "programs that passes gave": len(list((cache_dir() / "programs").glob("*.program"))), "writable": os.access(next(p for p in (source, *source.parents) if p.exists()), os.W_OK),
        "triton": os.environ.get("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache")), "inductor": inductor,
    }  # fmt: skip


def _verdicts() -> list[dict[str, str]]:
    """``good``, ``note`` or ``bad``; what is bad has a fix."""
    out: list[dict[str, str]] = []

    def say(fine: bool, what: str, fix: str = "", worst: str = "bad") -> None:
        out.append({"verdict": "good" if fine else worst, "what": what, "fix": "" if fine else fix})

    say(sys.version_info >= (3, 11), f"Python {platform.python_version()} (3.11 or later)", "install Python 3.11 or later")
    for name, low, high in (("torch", (2, 11), (2, 14)), ("transformers", (4, 46), None), ("triton", (3, 6), None), ("tensorboard", (2, 14), None), ("wandb", (0, 16), None)):
        have = _version(name)
        wants = f"at least {'.'.join(map(str, low))}" + (f", below {'.'.join(map(str, high))}" if high else "")
        needed = name == "torch"
        if have is None:
            extra = {"transformers": "hf"}.get(name, name)
            say(not needed, f"{name} is not installed ({wants}" + (")" if needed else "; optional)"), f'pip install "{name}"' if needed else f'pip install "deepseed[{extra}]"')
            continue
        numbers = tuple(int(n) for n in re.findall(r"\d+", have)[:2])
        say(low <= numbers and (high is None or numbers < high), f"{name} {have} ({wants})", f'pip install "{name}>={".".join(map(str, low))}' + (f',<{".".join(map(str, high))}"' if high else '"'))
    import torch
    import torch.distributed as dist

    gloo = dist.is_available() and dist.is_gloo_available()
    say(gloo, "ranks over gloo", "a torch that is built with torch.distributed and gloo")
    if gloo and sys.platform == "linux":
        from deepseed.runtime.neighbours import possible

        read = possible()
        say(read, f"ranks of this host {'read' if read else 'do not read'} each other's memory", "leave out DEEPSEED_CMA=0; in a container --cap-add=SYS_PTRACE", worst="note")
    if torch.cuda.is_available():
        say(dist.is_available() and dist.is_nccl_available(), "ranks over NCCL", "a torch that is built with NCCL")
    else:
        say(False, "no GPU: ranks are CPU processes", "", worst="note")
    shm = _tried(lambda: _disk("/dev/shm")["total"])
    if isinstance(shm, int):
        say(shm >= 1 << 30, f"/dev/shm has {shm / 2**30:.1f} GiB (1 GiB or more, for data loaders and ranks on one machine)", "docker run --shm-size=8g", worst="note")
    return out

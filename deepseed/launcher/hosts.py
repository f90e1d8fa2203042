"""Which nodes there are, and which slots of them run a rank: a hostfile, or this machine; filtered by --include or --exclude."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from deepseed.launcher.errors import LaunchError
from deepseed.launcher.options import Options

LOCAL = "localhost"
Nodes = dict[str, tuple[int, ...]]  # host -> the numbers of its slots


def nodes_of(o: Options) -> Nodes:
    """The nodes in order. By hand (``--node_rank``) every node has as many slots as this one. Raises LaunchError."""
    if o.hostfile is not None and not o.hostfile.is_file():
        raise LaunchError(f"--hostfile: no file {o.hostfile}")
    if o.node_rank is not None:
        slots = _own(o)
        return {f"node {n}": slots for n in range(o.num_nodes or 1)}
    if o.hostfile is None:
        if o.num_nodes not in (None, 1):
            raise LaunchError(f"--num_nodes {o.num_nodes} without a hostfile\n  fix: --hostfile FILE, or --node_rank I on each node")
        return {LOCAL: _own(o)}
    found = {host: tuple(range(slots)) for host, slots in read_hostfile(o.hostfile).items()}
    if o.include or o.exclude:
        found = chosen(found, o.include, o.exclude)
    if o.num_nodes is not None:
        if o.num_nodes > len(found):
            raise LaunchError(f"--num_nodes {o.num_nodes}, and {o.hostfile} has {len(found)}")
        found = dict(list(found.items())[: o.num_nodes])
    if o.num_gpus is not None:
        for host, slots in found.items():
            if o.num_gpus > len(slots):
                raise LaunchError(f"--num_gpus {o.num_gpus}, and {host} has {len(slots)} slots in {o.hostfile}")
        found = {host: slots[: o.num_gpus] for host, slots in found.items()}
    return found


def _own(o: Options) -> tuple[int, ...]:
    """This machine's slots: its GPUs, or as many as are asked for."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    said = tuple(int(word) for word in visible.split(",") if word.strip().isdigit())
    gpus = said or tuple(range(_gpus()))
    if o.include or o.exclude:
        return chosen({LOCAL: gpus or tuple(range(_most(o.include or o.exclude) + 1))}, o.include, o.exclude)[LOCAL]
    if o.num_gpus is None:
        return gpus or (0,)
    if gpus and o.num_gpus > len(gpus):
        raise LaunchError(f"--num_gpus {o.num_gpus}, and this machine has {len(gpus)}{f' (CUDA_VISIBLE_DEVICES={visible})' if said else ''}")
    return gpus[: o.num_gpus] or tuple(range(o.num_gpus))


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _most(text: str) -> int:
    return max((int(n) for n in re.findall(r"\d+", text.partition(":")[2])), default=0)


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots by host, from lines ``name slots=N``; ``#`` begins a comment. Raises LaunchError naming the line."""
    found: dict[str, int] = {}
    for n, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        m = re.fullmatch(r"(\S+)\s+slots\s*=\s*(\d+)", text)
        if m is None or int(m[2]) < 1:
            raise LaunchError(f"{path}, line {n}: {text!r}\n  fix: a line is: worker-0 slots=8")
        if m[1] in found:
            raise LaunchError(f"{path}, line {n}: the host {m[1]} is there twice")
        found[m[1]] = int(m[2])
    if not found:
        raise LaunchError(f"{path} names no host\n  fix: lines such as: worker-0 slots=8")
    return found


def chosen(nodes: Mapping[str, tuple[int, ...]], include: str, exclude: str) -> Nodes:
    """Of ``nodes`` what ``worker-0@worker-1:0,2`` names, or all but that; a host without slots means all of them.

    >>> chosen({"a": (0, 1), "b": (0, 1)}, "", "b:0")
    {'a': (0, 1), 'b': (1,)}
    """
    named: Nodes = {}
    for part in (include or exclude).split("@"):
        host, colon, numbers = part.strip().partition(":")
        if host not in nodes:
            raise LaunchError(f"{part!r}: no host {host!r}\n  fix: one of {', '.join(nodes)}")
        words = [word.strip() for word in numbers.split(",")] if colon else []
        if not all(word.isdigit() for word in words):
            raise LaunchError(f"{part!r}: slots are numbers, as in {host}:0,2")
        slots = tuple(dict.fromkeys(map(int, words))) or nodes[host]
        if wrong := [n for n in slots if n not in nodes[host]]:
            raise LaunchError(f"{part!r}: {host} has the slots {', '.join(map(str, nodes[host]))}, not {wrong[0]}")
        named[host] = named.get(host, ()) + slots
    if include:
        return named
    rest = {host: tuple(n for n in slots if n not in named.get(host, ())) for host, slots in nodes.items()}
    left = {host: slots for host, slots in rest.items() if slots}
    if not left:
        raise LaunchError(f"--exclude {exclude} leaves no slot")
    return left

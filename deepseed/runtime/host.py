"""The ranks that this process runs: all of them (``simulate``), or its own (``gloo``, ``nccl``). Front doors see no other difference.

A host's mesh is that of the ranks: it has the axis ``pp`` of pipeline stages, which programs lack, and no axis in time. A value lives at
one position on ``pp``, its home: ranks elsewhere have None for a part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from deepseed.ir.mesh import STAGES, Mesh, MeshError, whole_axis
from deepseed.ir.program import Input, Type
from deepseed.ops import torch_dtype
from deepseed.runtime import agree, board, channels, environment
from deepseed.runtime.arena import Arena
from deepseed.runtime.board import Board
from deepseed.runtime.boxfile import Sums, check_boxes
from deepseed.runtime.collectives import Runtime
from deepseed.runtime.distributed import DistributedRuntime, start, world
from deepseed.runtime.errors import AgreementError
from deepseed.runtime.folder import CheckpointError, DamagedError, faults
from deepseed.runtime.simulate import Step, simulate
from deepseed.runtime.state import Key, State, StateError, at_home, gather, gather_over, gather_states, held, position, write_back

BACKENDS = ("simulate", "gloo", "nccl")
R = TypeVar("R")
Attempt: TypeAlias = tuple[R | None, str, type[CheckpointError]]


class Host(Protocol):
    """``run`` gives what each hosted rank's executable returned, in the order of ``coordinates``."""

    mesh: Mesh
    backend: str
    first: bool  # whether rank 0 is here: it solves, and it speaks
    device: torch.device
    coordinates: Sequence[Mapping[str, int]]
    arenas: Sequence[Arena]  # accounts of memory of the hosted ranks, where they are counted

    def refine(self, mesh: Mesh) -> None: ...
    def position(self, coordinate: Mapping[str, int]) -> int: ...
    def run(self, executables: Sequence[Step], inputs: Sequence[list[Tensor]]) -> list[tuple[Tensor, ...]]: ...
    def whole(self, parts: Sequence[Tensor | None], type_: Type, home: int = 0) -> Tensor: ...
    def bind(self, module: nn.Module, states: Sequence[State], alike: bool = False) -> None: ...
    def begin(self, module: nn.Module, states: Sequence[State]) -> None: ...
    def settle(self, module: nn.Module, states: Sequence[State], keys: Collection[Key] | None = None) -> None: ...
    def of_first(self, states: Sequence[State], keys: Sequence[Key], axis: str) -> None: ...
    def decide(self, make: Callable[[], str]) -> str: ...
    def as_on_rank_0(self, named: Mapping[str, Tensor]) -> list[str]: ...
    def agree(self, values: Sequence[tuple[str, object]]) -> None: ...
    def agree_on(self, text: str, what: str) -> None: ...
    def same(self, text: str) -> bool: ...
    def together(self) -> AbstractContextManager[None]: ...
    def everyone(self, value: Any) -> list[Any]: ...
    def hand(self, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, source: int, target: int) -> Tensor | None: ...
    def board(self) -> Board: ...


class _Alone(Runtime):
    """The runtime of a mesh of one rank: there is nobody to exchange with."""

    def exchange(self, kind: str, x: Tensor, axis: str, reduce: str, *, owned: bool = False) -> Callable[[], Tensor]:
        raise RuntimeError(f"{kind} over {axis} on a mesh of one rank")

    def exchange_rows(self, x: Tensor, sends: Sequence[int], receives: Sequence[int], axis: str) -> Callable[[], Tensor]:
        raise RuntimeError(f"rows over {axis} on a mesh of one rank")

    def post(self, x: Tensor, rank: int) -> None:
        raise RuntimeError(f"a message to rank {rank} on a mesh of one rank")

    def fetch(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Callable[[], Tensor]:
        raise RuntimeError(f"a message from rank {rank} on a mesh of one rank")

    def spread(self, x: Tensor, axis: str, source: int) -> Callable[[], Tensor]:
        raise RuntimeError(f"a broadcast over {axis} on a mesh of one rank")

    def flush(self) -> None:
        return None


class SimulatedHost:
    """Every rank of the mesh in this process, one thread each; one rank runs without a thread."""

    backend: str = "simulate"
    first: bool = True

    def __init__(self, mesh: Mesh, device: torch.device | str = "cpu") -> None:
        self.mesh, self.device = mesh, torch.device(device)
        self.coordinates: Sequence[Mapping[str, int]] = [mesh.coordinate(rank) for rank in range(mesh.ranks)]
        self.arenas: Sequence[Arena] = ()
        self._shown: dict[Key, tuple[int, int]] = {}  # the module's tensors as they were last seen equal to the ranks'

    def refine(self, mesh: Mesh) -> None:
        """See the same ranks with the sub-axes of a program's mesh, before any state lies there."""
        self.mesh = refined(self.mesh, mesh)
        self.coordinates = [self.mesh.coordinate(rank) for rank in range(self.mesh.ranks)]

    def position(self, coordinate: Mapping[str, int]) -> int:
        return position(coordinate)

    def run(self, executables: Sequence[Step], inputs: Sequence[list[Tensor]]) -> list[tuple[Tensor, ...]]:
        if self.mesh.ranks == 1:
            rt = _Alone(self.mesh, 0, self.device)
            rt.arena = self.arenas[0] if self.arenas else None
            return [executables[0](rt, inputs[0])]
        return simulate(self.mesh, executables, inputs, self.device, self.arenas)

    def whole(self, parts: Sequence[Tensor | None], type_: Type, home: int = 0) -> Tensor:
        """The whole value from one part a rank. ``home``: the position on the pipeline whose ranks have it."""
        return gather(at_home(parts, self.mesh, home), type_, self.mesh.without(STAGES))

    def bind(self, module: nn.Module, states: Sequence[State], alike: bool = False) -> None:
        """One rank's tensors are the module's own; several ranks need a storage each."""
        if self.mesh.ranks == 1:
            states[0].bind(module)
            return
        for state in states:
            state.tensors = {key: t if state.on_disk(key[0]) else _own(t) for key, t in state.tensors.items()}
        self._remember(module, states)

    def begin(self, module: nn.Module, states: Sequence[State]) -> None:
        """Before a step: what was written into the module since (load_state_dict, another step) goes to the simulated ranks."""
        if self.mesh.ranks == 1:
            return
        for role, key in states[0].types:
            if role in ("param", "buffer"):
                mine = held(module, role, key)
                if self._shown.get((role, key), _mark(mine)) != _mark(mine) or not self._holds(states, (role, key), mine):
                    for state in states:
                        state.put(Input("", state.types[role, key], role, key, state.homes[role, key]), mine.detach().clone())

    def _holds(self, states: Sequence[State], key: Key, mine: Tensor) -> bool:
        """Whether the ranks hold what the module has: a write through ``.data`` leaves no mark."""
        if mine.is_meta or any(state.on_disk(key[0]) for state in states):
            return True
        whole = gather_states(states, [key])[key].to(mine.device, mine.dtype)
        return torch.allclose(whole, mine, 0, 0, equal_nan=True) if mine.is_floating_point() else torch.equal(whole, mine)

    def settle(self, module: nn.Module, states: Sequence[State], keys: Collection[Key] | None = None) -> None:
        """After a step: show the module what the simulated ranks hold. ``keys``: what the step has written; None: it may be anything."""
        if self.mesh.ranks > 1:
            write_back(module, states, keys)
            self._remember(module, states)

    def of_first(self, states: Sequence[State], keys: Sequence[Key], axis: str) -> None:
        """What is stored of these keys becomes what the first rank along ``axis`` stores."""
        for state in states:
            first = next(s for s in states if s.coordinate == {**state.coordinate, axis: 0})
            for key in (k for k in keys if k in state.tensors and first is not state):
                state.tensors[key].copy_(first.tensors[key])

    def _remember(self, module: nn.Module, states: Sequence[State]) -> None:
        self._shown = {(role, key): _mark(held(module, role, key)) for role, key in states[0].types if role in ("param", "buffer")}

    def decide(self, make: Callable[[], str]) -> str:
        return make()

    def as_on_rank_0(self, named: Mapping[str, Tensor]) -> list[str]:
        return []

    def agree(self, values: Sequence[tuple[str, object]]) -> None:
        return None

    def agree_on(self, text: str, what: str) -> None:
        return None

    def same(self, text: str) -> bool:
        return True

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()

    def everyone(self, value: Any) -> list[Any]:
        return [value]

    def hand(self, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, source: int, target: int) -> Tensor | None:
        return x

    def board(self) -> Board:
        return board.Alone()


def _own(t: Tensor) -> Tensor:
    return t.clone().pin_memory() if t.is_pinned() else t.clone()


def _mark(t: Tensor) -> tuple[int, int]:
    """Changes whenever a tensor is written or given other memory."""
    return t._version, t.data_ptr()


class DistributedHost:
    """This process's rank under torch.distributed."""

    def __init__(self, mesh: Mesh, backend: str | None = None) -> None:
        self.device = start(backend)
        self._join(mesh)
        self.backend = str(dist.get_backend())
        self.first = self.rt.rank == 0
        self.arenas: Sequence[Arena] = ()

    def _join(self, mesh: Mesh) -> None:
        self.mesh, self.rt = mesh, DistributedRuntime(mesh, self.device)
        self.coordinates: Sequence[Mapping[str, int]] = [mesh.coordinate(self.rt.rank)]
        self.meshes = stage_meshes(self.rt)

    def refine(self, mesh: Mesh) -> None:
        """See the same ranks with the sub-axes of a program's mesh, before any state lies there. Every rank must call it: it makes groups."""
        if (fine := refined(self.mesh, mesh)) != self.mesh:
            self._join(fine)

    def position(self, coordinate: Mapping[str, int]) -> int:
        return position(coordinate)

    def run(self, executables: Sequence[Step], inputs: Sequence[list[Tensor]]) -> list[tuple[Tensor, ...]]:
        self.rt.arena = self.arenas[0] if self.arenas else None
        with self.together():
            return [executables[0](self.rt, inputs[0])]

    def whole(self, parts: Sequence[Tensor | None], type_: Type, home: int = 0) -> Tensor:
        """The whole value on every rank: gathered by the ranks of its home, which tell those of the other positions on the pipeline."""
        with self.together(), torch.no_grad():
            if position(self.rt.coordinate) == home:
                if parts[0] is None:
                    raise StateError(f"rank {self.rt.rank} of {self.mesh} has no part of a value of pipeline rank {home}, where it lies")
                out = gather_over(self.rt, parts[0].to(self.device), type_)
            else:
                out = torch.empty(type_.shape, dtype=torch_dtype(type_.dtype), device=self.device)
            return out if self.mesh.sizes.get(STAGES, 1) == 1 else self._told(out.contiguous(), home)

    def _told(self, x: Tensor, home: int) -> Tensor:
        """``x`` of the rank at position ``home`` on all ranks of this pipeline."""
        group, source = self.rt.device_mesh.get_group(STAGES), self.mesh.group(STAGES, self.rt.rank)[home]
        raw = torch.view_as_real(x) if x.is_complex() else x
        if raw.numel():
            self.rt.world.run(lambda: dist.broadcast(raw, source, group, async_op=True), f"a value of rank {source} over {STAGES}")
        return x

    def bind(self, module: nn.Module, states: Sequence[State], alike: bool = False) -> None:
        """``alike``: where one parameter is a DTensor all are."""
        states[0].bind(module, self.meshes, alike)

    def begin(self, module: nn.Module, states: Sequence[State]) -> None:
        return None

    def settle(self, module: nn.Module, states: Sequence[State], keys: Collection[Key] | None = None) -> None:
        return None

    def of_first(self, states: Sequence[State], keys: Sequence[Key], axis: str) -> None:
        for key in (k for k in keys if k in states[0].tensors):
            self.rt.spread(states[0].tensors[key], axis, 0)()

    def decide(self, make: Callable[[], str]) -> str:
        """Rank 0's text on every rank; if making it fails there, every rank raises."""
        run = self.rt.world.run
        if self.first:
            self.rt.world.watch.doing = "compiling"
            try:
                text = make()
            except Exception as error:
                agree.broadcast_text(f"error {type(error).__name__}: {error}", self.device, run)
                raise
            return agree.broadcast_text(text, self.device, run)
        text = agree.broadcast_text(None, self.device, run)
        if text.startswith("error "):
            raise AgreementError(f"rank 0 could not compile: {text.removeprefix('error ')}")
        return text

    def agree(self, values: Sequence[tuple[str, object]]) -> None:
        with self.together():
            agree.agree_on_values(values, self.device, self.rt.world.run)

    def agree_on(self, text: str, what: str) -> None:
        """Like ``agree`` for a long text: the error shows the first line that differs."""
        with self.together():
            agree.agree_on_text(text, what, self.device, self.rt.world.run)

    def same(self, text: str) -> bool:
        """Whether every rank holds this text: one small collective."""
        with self.together():
            return not agree.differs(text, self.device, self.rt.world.run)

    def together(self) -> AbstractContextManager[None]:
        """Around what all ranks do: an error of one is told to the others, which raise RankError instead of waiting."""
        return self.rt.world.guarded()

    def as_on_rank_0(self, named: Mapping[str, Tensor]) -> list[str]:
        """Make tensors that differ between ranks those of rank 0, in place; their names."""
        with self.together():
            return agree.as_on_rank_0(named, self.device, self.rt.world.run)

    def everyone(self, value: Any) -> list[Any]:
        with self.together():
            return agree.everyone(value, self.device, self.rt.world.run)

    def hand(self, x: Tensor | None, shape: Sequence[int], dtype: torch.dtype, source: int, target: int) -> Tensor | None:
        """``x`` of rank ``source`` (elsewhere None) on rank ``target`` (elsewhere None)."""
        with self.together():
            return channels.hand(self.rt.world, x, shape, dtype, source, target)

    def board(self) -> Board:
        """Notes between the ranks, for threads."""
        return board.Shared(self.rt.world)


def refined(ranks: Mesh, program: Mesh) -> Mesh:
    """The mesh of the ranks with the sub-axes that a program's mesh has of its axes. Raises MeshError where these have another size."""
    axes: list[tuple[str, int]] = []
    for name, n in ranks.axes:
        subs = [(sub, size) for sub, size in program.axes if sub != name and whole_axis(sub) == name]
        if subs and prod(size for _, size in subs) != n:
            raise MeshError(f"{program} has {' x '.join(f'{sub}={size}' for sub, size in subs)}, the ranks lie on {ranks}")
        axes += subs or [(name, n)]
    return Mesh(tuple(axes))


def stage_meshes(rt: DistributedRuntime) -> list[DeviceMesh]:
    """For each position on the pipeline the mesh of its ranks, without ``pp``. A rank communicates on its own position's only."""
    mesh, own = rt.mesh, position(rt.coordinate)
    if STAGES not in mesh.names:
        return [rt.device_mesh]
    rest, out = mesh.without(STAGES), []
    for at in range(mesh.size(STAGES)):
        if at == own and rest.names:
            out.append(rt.device_mesh[rest.names])
            continue
        ranks = [rank for rank in range(mesh.ranks) if position(mesh.coordinate(rank)) == at]
        shape = tuple(n for _, n in rest.axes) or (1,)
        out.append(DeviceMesh(rt.device.type, torch.tensor(ranks).reshape(shape), mesh_dim_names=rest.names or ("world",), _init_backend=False))
    return out


def join(backend: str | None, said: Sequence[tuple[str, object]]) -> int:
    """Join the process group; every rank must say the same of ``said``, before anything is made of it. The number of ranks."""
    device = start(backend)
    here = world(device)
    with here.guarded():
        agree.agree_on_values(said, device, here.run)
    return here.size


def everywhere(host: Host, what: str, do: Callable[[], R]) -> list[R]:
    """What ``do`` gives on every rank. Where it fails on one, all raise CheckpointError: they stay in step, and training can go on."""
    return agreed(host.everyone(attempted(what, do)))


def attempted(what: str, do: Callable[[], R]) -> Attempt[R]:
    """What ``do`` gives, or the text and the kind of the CheckpointError to raise for what went wrong."""
    try:
        return do(), "", CheckpointError
    except CheckpointError as error:
        return None, str(error), type(error)
    except Exception as error:
        return None, f"{what}: {type(error).__name__}: {error}", CheckpointError


def agreed(said: Sequence[Attempt[R]]) -> list[R]:
    """What every rank has ``attempted``. Raises where one failed."""
    wrong = [(rank, text, kind) for rank, (_, text, kind) in enumerate(said) if text]
    if wrong:
        rank, text, kind = wrong[0]
        raise kind(text if len(wrong) == len(said) else f"rank {rank}: {text}")
    return [value for value, _, _ in said]  # type: ignore[misc]  # there, where there is no text


def check_files(host: Host, folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Sizes of a folder's files, and the checksums of those whose boxes have none: these are read by turns, each once. Raises DamagedError."""
    hosted = {host.mesh.rank(c) for c in host.coordinates}
    whole = [name for name in sorted(files) if "boxes" not in files[name]]
    wrong = faults(folder, files, sorted(files), sizes=True) or faults(folder, files, [name for n, name in enumerate(whole) if n % host.mesh.ranks in hosted])
    if wrong:
        raise DamagedError("\n  ".join(wrong) + "\n  nothing was loaded\n  fix: load another checkpoint")


def check_rest(host: Host, folder: Path, sums: Sums, checked: int) -> None:
    """Read the boxes that no rank has read, by turns, to check them. Raises DamagedError."""
    hosted = {host.mesh.rank(c) for c in host.coordinates}
    mine = [key for n, key in enumerate(sums.left(checked)) if n % host.mesh.ranks in hosted]
    check_boxes(folder, {(*key, sums.boxes[key][1]): False for key in mine}, sums)


def launched() -> bool:
    """Whether this process is one of several ranks: a process group exists, or the environment of a launcher, srun or mpirun."""
    return dist.is_available() and (dist.is_initialized() or environment.adopt())


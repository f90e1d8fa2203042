"""Parameters, buffers and optimizer state as they lie on the ranks; whole tensors cut into parts, and put together again.

State belongs to the compiled model: its layouts are those of the first program, and generated source updates it in place.
The module's own parameters *are* this state, no second copy: whole ones keep their storage, split ones become DTensors.

With pipeline stages a key lives at one position on the axis ``pp``, its home: only ranks there store a part. All ranks know each key's
type and home. No layout names ``pp``; without that axis every key is at home at position 0, on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from deepseed.ir import layout as ir
from deepseed.ir.collective import step
from deepseed.ir.layout import Layout, chunk, factors
from deepseed.ir.mesh import STAGES, Mesh
from deepseed.ir.program import Input, Program, Type
from deepseed.runtime.collectives import Runtime, join, widest
from deepseed.runtime.disk import Disk
from deepseed.runtime.elsewhere import Elsewhere
from deepseed.runtime.memories import HOST, stored_on

Key = tuple[str, str]  # role, key


class StateError(ValueError):
    """A tensor that does not fit its input: names the key and both shapes or dtypes."""


def position(coordinate: Mapping[str, int]) -> int:
    """Where a rank lies on the pipeline."""
    return coordinate.get(STAGES, 0)


def home(entry: Input, mesh: Mesh) -> int:
    """The position whose ranks store a parameter, buffer or state: its stage's."""
    return entry.stage % mesh.sizes.get(STAGES, 1)


def at_home(parts: Sequence[Tensor | None], mesh: Mesh, home: int) -> list[Tensor]:
    """Of one part a rank those of the ranks at a position: one for each rank of the mesh without ``pp``, in its order."""
    out = []
    for rank, part in enumerate(parts):
        if position(mesh.coordinate(rank)) == home:
            if part is None:
                raise StateError(f"rank {rank} of {mesh} has no part of a value of pipeline rank {home}, where it lies")
            out.append(part)
    return out


def shard(full: Tensor, type_: Type, mesh: Mesh, coordinate: Mapping[str, int]) -> Tensor:
    """The part of a whole tensor at ``coordinate``: a view where one exists. A summand is the whole at coordinate 0, zeros elsewhere."""
    if tuple(full.shape) != type_.shape:
        raise StateError(f"a tensor of shape {list(full.shape)} for a value of shape {list(type_.shape)}")
    out = full
    for dim, size in enumerate(type_.shape):
        if not type_.layout.splits(dim):
            continue
        parts = factors(size, dim, type_.layout, mesh)
        seen = out.reshape(*out.shape[:dim], *(n for n, _ in parts), *out.shape[dim + 1 :])
        for at, (n, axis) in enumerate(parts, dim):
            if axis is not None:
                held = chunk(n, mesh.size(axis), coordinate[axis])
                seen = seen.narrow(at, held.start, len(held))
        out = seen.flatten(dim, dim + len(parts) - 1)
    if any(op == "sum" and coordinate[axis] for axis, op in type_.layout.partials):
        return torch.zeros_like(out)
    return out


def gather(parts: Sequence[Tensor], type_: Type, mesh: Mesh) -> Tensor:
    """The whole tensor from every rank's part, in the order of the ranks; partial values are reduced. Replicas: the first is taken."""
    have = {rank: part for rank, part in enumerate(parts)}
    for axis in mesh.names:
        after = type_.laid(type_.layout.with_(axis, None))
        element, n = type_.layout.on(axis), mesh.size(axis)
        heads = [rank for rank in have if mesh.coordinate(rank)[axis] == 0]
        merged: dict[int, Tensor] = {}
        for rank in heads:
            group = [have[r] for r in mesh.group(axis, rank)]
            if element is None or n == 1:
                merged[rank] = group[0]
            elif isinstance(element, ir.Partial):
                stacked = torch.stack(group)
                merged[rank] = stacked.amax(0) if element.op == "max" else stacked.sum(0).to(group[0].dtype)
            else:
                place = step(type_.shape, type_.layout, after.layout, axis, mesh.seen_from(mesh.coordinate(rank))).put
                assert place is not None
                merged[rank] = join(torch.stack([widest(x, n, place.numbers) for x in group]), place.numbers)
        have, type_ = merged, after
    return have[0]


def gather_over(rt: Runtime, local: Tensor, type_: Type) -> Tensor:
    """The whole tensor on every rank, by collectives (all ranks call it)."""
    for axis in rt.mesh.names:
        element = type_.layout.on(axis)
        if element is None:
            continue
        after = type_.laid(type_.layout.with_(axis, None))
        s = step(type_.shape, type_.layout, after.layout, axis, rt.mesh.seen_from(rt.coordinate))
        if s.put is not None:
            local = rt.wait(rt.all_gather_start(local, axis, s.put.numbers))
        else:
            local = rt.wait(rt.all_reduce_start(local, axis, s.reduce))
        type_ = after
    return local


def placements(type_: Type, mesh: Mesh) -> tuple[Placement, ...]:
    """The layout as DTensor placements, one an axis of the mesh. DTensor splits in the order of the mesh, so an axis that lies
    inside a later one's range becomes a strided shard. Raises StateError where DTensor has no such placement: see ``shown``."""
    out: list[Placement] = []
    for n, axis in enumerate(mesh.names):
        element = type_.layout.on(axis)
        if element is None:
            out.append(Replicate())
        elif isinstance(element, ir.Partial):
            out.append(Partial(element.op))
        else:
            if not shown(type_, mesh):
                raise StateError(f"DTensor has no placement for {element} of {list(type_.shape)} on {mesh}: it cuts whole dimensions only, where {axis} does not divide them")
            before = 1  # factors left of this one that are still whole when DTensor comes to this axis
            for size, name in factors(type_.shape[element.dim], element.dim, type_.layout, mesh):
                if name == axis:
                    break
                if name is None or mesh.names.index(name) > n:
                    before *= size
            out.append(Shard(element.dim) if before == 1 else _StridedShard(element.dim, split_factor=before))
    return tuple(out)


def shown(type_: Type, mesh: Mesh) -> bool:
    """Whether DTensor has placements for the layout: an uneven cut must be of a whole dimension, with no other axis there."""
    splits = [type_.layout.splits(d) for d in range(len(type_.shape))]
    return all(len(here) == 1 and e.of == size for here, size in zip(splits, type_.shape, strict=True) for _, e in here if e.of)


def layout_of(dtensor_placements: Sequence[Placement], shape: Sequence[int], mesh: Mesh) -> Layout:
    """The inverse of ``placements``. Raises StateError where the parts are uneven inside of another split."""
    found = Layout()
    for axis, placement in zip(mesh.names, dtensor_placements, strict=True):
        if isinstance(placement, _StridedShard | Shard):
            left = int(getattr(placement, "split_factor", 1))
            if left == 1 and shape[placement.dim] % mesh.size(axis) and not found.splits(placement.dim):
                found = found.with_(axis, ir.Split(placement.dim, 1, shape[placement.dim]))
                continue
            for outer in (d for d in range(1, shape[placement.dim] + 1) if shape[placement.dim] % d == 0):
                wider = found.with_(axis, ir.Split(placement.dim, outer))
                if not ir.valid(shape, wider, mesh):
                    continue
                s = step(tuple(shape), found, wider, axis, mesh)
                if s.take is not None and s.take.outer == left:
                    found = wider
                    break
            else:
                raise StateError(f"{placement} of dimension {placement.dim} of {list(shape)} over {axis} is not an even split")
        elif isinstance(placement, Partial):
            found = found.with_(axis, ir.Partial(str(placement.reduce_op)))
    return found


@dataclass
class State:
    """What one rank stores, by (role, key): ``types`` and ``homes`` (positions on the pipeline) of every key, ``tensors`` of the keys
    whose home this rank's position is. ``mesh`` and ``coordinate`` are those of the ranks, ``pp`` among them."""

    mesh: Mesh
    coordinate: Mapping[str, int]
    device: torch.device
    tensors: dict[Key, Tensor] = field(default_factory=dict)
    types: dict[Key, Type] = field(default_factory=dict)
    homes: dict[Key, int] = field(default_factory=dict)
    disk: Disk | None = None  # files for what is stored there

    def put(self, entry: Input, full: Tensor) -> Tensor:
        """Store this rank's part of a whole tensor (its own storage where the layout keeps it whole), contiguous. An empty tensor
        where other ranks of the pipeline store it."""
        if not self._enter(entry):
            return torch.empty(0, dtype=_torch_dtype(entry.type.dtype), device=self.device)
        part = shard(full, entry.type, self.mesh, self.coordinate)
        if self.on_disk(entry.role):
            return self.reserve(entry).copy_(part.detach())
        part = stored_on(part.detach().to(_torch_dtype(entry.type.dtype)), entry.type.host, self.device)
        whole = entry.type.layout == ir.REPLICATED or part.is_pinned()
        self.tensors[entry.role, entry.key] = part.contiguous() if whole else part.clone(memory_format=torch.contiguous_format)
        return self.tensors[entry.role, entry.key]

    def fill(self, entry: Input, value: float = 0) -> Tensor:
        """Store a part filled with one value, without ever making the whole tensor. Returns as ``put``."""
        return self.reserve(entry).fill_(value)

    def reserve(self, entry: Input) -> Tensor:
        """Store a part whose values are to be written yet. Returns as ``put``."""
        dtype = _torch_dtype(entry.type.dtype)
        if not self._enter(entry):
            return torch.empty(0, dtype=dtype, device=self.device)
        shape = entry.type.local(self.mesh.seen_from(self.coordinate))
        if self.on_disk(entry.role):
            assert self.disk is not None
            local = self.disk.tensor((entry.role, entry.key), shape, dtype)
        else:
            local = stored_on(torch.empty(shape, dtype=dtype, device=HOST if entry.type.host else self.device), entry.type.host, self.device)
        self.tensors[entry.role, entry.key] = local
        return local

    def on_disk(self, role: str) -> bool:
        return self.disk is not None and role in self.disk.roles

    def _enter(self, entry: Input) -> bool:
        """Note where a key lies and how; whether its part is stored here."""
        key = entry.role, entry.key
        self.types[key], self.homes[key] = entry.type, home(entry, self.mesh)
        return self.homes[key] == position(self.coordinate)

    def stored(self, i: Input) -> Tensor | None:
        """This rank's part for an input of its program; None for what no rank stores. Raises StateError where it is another rank's of the
        pipeline."""
        key = i.role, i.key
        if key in self.types and (key not in self.tensors or home(i, self.mesh) != position(self.coordinate)):
            raise self._elsewhere(i)
        return self.tensors.get(key)

    def inputs(self, p: Program, others: Mapping[str, Tensor]) -> list[Tensor]:
        """The arguments of a step, in the program's order: stored tensors, and ``others`` by value name (whole; this rank's part is
        taken). Raises StateError where one is missing or does not fit."""
        out = []
        for i in p.inputs:
            stored = self.stored(i)
            if stored is not None:
                if self.types[i.role, i.key] != i.type:
                    raise StateError(f"{i.role} {i.key!r} is stored as {self.types[i.role, i.key]}, the program wants {i.type}")
                out.append(stored)
            elif i.name in others:
                x = others[i.name]
                if tuple(x.shape) != i.type.shape or x.dtype is not _torch_dtype(i.type.dtype):
                    given = f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
                    raise StateError(f"{i.role} {i.key!r}: {given} for an input of {i.type.dtype}{list(i.type.shape)}")
                out.append(shard(x.to(self.device), i.type, self.mesh, self.coordinate))
            else:
                raise StateError(f"no value for {i.role} {i.key!r} (%{i.name})")
        return out

    def _elsewhere(self, i: Input) -> StateError:
        where, wants = self.homes[i.role, i.key], home(i, self.mesh)
        here = f"which stores what is of pipeline rank {position(self.coordinate)}"
        fix = "give each rank the program of its own stages (localize)" if where == wants else "pin the stages of what is stored: the first program has cut them"
        return StateError(f"{i.role} {i.key!r} is stored on pipeline rank {where}, the program of rank {self.mesh.rank(self.coordinate)}, {here}, reads it on {wants}\n  fix: {fix}")

    def dtensor(self, key: Key, mesh: DeviceMesh) -> DTensor:
        """A stored tensor as a DTensor on the same memory. ``mesh``: of the ranks of its home."""
        type_ = self.types[key]
        stride = torch.empty(type_.shape, device="meta").stride()
        return DTensor.from_local(
            self.tensors[key], mesh, placements(type_, self.mesh.without(STAGES)), run_check=False, shape=torch.Size(type_.shape), stride=stride
        )

    def bind(self, module: nn.Module, meshes: Sequence[DeviceMesh] = (), alike: bool = False) -> None:
        """Make the module's parameters and buffers be this state. ``meshes``: the ranks of each position of the pipeline. ``alike``: where
        one parameter is a DTensor all are: foreach optimizers and ``clip_grad_norm_`` take no mixture.

        A key becomes a DTensor on the mesh of its home, or the stored tensor itself where it is whole, or where DTensor has no such
        placement or would copy it from the host to the device (this rank's part then); where it is stored by other ranks of the pipeline, an ``Elsewhere``."""
        mixed = alike and any(role == "param" and t.layout != ir.REPLICATED for (role, _), t in self.types.items())
        for (role, key), type_ in self.types.items():
            if role not in ("param", "buffer"):
                continue
            own = self.tensors.get((role, key))
            whole = own is not None and type_.layout == ir.REPLICATED
            if not meshes and not whole:
                raise StateError(f"{role} {key!r} is split, which needs a DeviceMesh to show as a DTensor")
            if own is None:
                value = self._shown_elsewhere(type_, meshes[self.homes[role, key]])
            else:
                whole = whole and not (mixed and role == "param")
                plain = whole or not shown(type_, self.mesh) or own.device.type != self.device.type
                value = own if plain else self.dtensor((role, key), meshes[self.homes[role, key]])
            new: nn.Parameter | None = None  # one for all names of a tied weight
            for owner, name in _owners(module, role, key):
                if role == "buffer":
                    owner._buffers[name] = value
                    continue
                old = owner._parameters[name]
                assert old is not None
                if whole and not old.is_meta:
                    old.data = value
                else:
                    new = nn.Parameter(value, requires_grad=old.requires_grad) if new is None else new
                    owner._parameters[name] = new

    def _shown_elsewhere(self, type_: Type, mesh: DeviceMesh) -> Tensor:
        """Its placements where DTensor has them; else whole, as these tell of other ranks only."""
        found = placements(type_, self.mesh.without(STAGES)) if shown(type_, self.mesh) else ()
        return Elsewhere.like(type_.shape, _torch_dtype(type_.dtype), mesh, found or [Replicate()] * mesh.ndim)


def gather_states(states: Sequence[State], keys: Iterable[Key] | None = None) -> dict[Key, Tensor]:
    """Whole tensors from all ranks' states (a simulation)."""
    first = states[0]
    wanted = list(first.types) if keys is None else list(keys)
    ranks = first.mesh.without(STAGES)
    return {key: gather(at_home([s.tensors.get(key) for s in states], first.mesh, first.homes[key]), first.types[key], ranks) for key in wanted}


def write_back(module: nn.Module, states: Sequence[State], keys: Iterable[Key] | None = None) -> None:
    """Copy a simulation's parameters and buffers (``keys``; None: all) into the module, whole; what is on the meta device there is replaced by values."""
    with torch.no_grad():
        for (role, key), full in gather_states(states, [k for k in (states[0].types if keys is None else keys) if k[0] in ("param", "buffer")]).items():
            old = held(module, role, key)
            if not old.is_meta:
                old.copy_(full)
                continue
            new: Any = torch.empty_like(old, device=full.device).copy_(full)
            if role == "param":
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            for owner, name in _owners(module, role, key):
                (owner._buffers if role == "buffer" else owner._parameters)[name] = new


def check_disks(states: Sequence[State], module: nn.Module) -> None:
    """Before a step: what lies in files is what the latest step has left there. Raises DiskError."""
    for state in states:
        if state.disk is not None:
            state.disk.check(lambda key: _version(module, key))


def seal_disks(states: Sequence[State], module: nn.Module) -> None:
    """Behind a step: checksums of what it has left in files."""
    for state in states:
        if state.disk is not None:
            state.disk.seal(lambda key: _version(module, key))


def _version(module: nn.Module, key: Key) -> int:
    """Another one after each write to the module's own tensor."""
    return held(module, *key)._version if key[0] == "param" else 0


def held(module: nn.Module, role: str, key: str) -> Tensor:
    """The module's own tensor for a parameter or buffer."""
    owner, name = _owners(module, role, key)[0]
    found = owner._buffers[name] if role == "buffer" else owner._parameters[name]
    assert found is not None
    return found


def _owners(module: nn.Module, role: str, key: str) -> list[tuple[nn.Module, str]]:
    """Every place in the module that holds the tensor (tied weights have several), the one named ``key`` first."""
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    table = "_buffers" if role == "buffer" else "_parameters"
    tensor = getattr(owner, table)[name]
    tied = [(m, n) for m in module.modules() for n, t in getattr(m, table).items() if t is tensor and (m, n) != (owner, name)]
    return [(owner, name), *tied]


def _torch_dtype(name: str) -> torch.dtype:
    from deepseed.ops import torch_dtype

    return torch_dtype(name)

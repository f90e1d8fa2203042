"""A batch (or a model's output) as named tensors, and back: ``{"input_ids": t}``, ``(x, y)``, a tensor, a BatchEncoding.

Keys are the user's own words: dict keys and positions joined by dots (``"input_ids"``, ``"1"``, ``"targets.mask"``); a batch
that is one tensor has the key ``"input"``. Entries that are no tensors are constants of the captured program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseed.capture.errors import BatchError
from deepseed.ir.program import Type

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool", torch.complex64: "c64", torch.complex128: "c128",
}  # fmt: skip


def type_of(t: Tensor) -> Type:
    """dtype and shape of a tensor, real, fake or meta."""
    if t.dtype not in DTYPES:
        raise BatchError(f"a tensor of dtype {t.dtype} has no place in a program; known: {', '.join(DTYPES.values())}")
    return Type(DTYPES[t.dtype], tuple(int(n) for n in t.shape))


def leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, leaf) in order; containers are mappings, lists, tuples and dataclasses."""
    for name, item in _items(value):
        key = f"{prefix}.{name}" if prefix else name
        if _is_container(item):
            yield from leaves(item, key)
        else:
            yield key, item
    if not _is_container(value):
        yield prefix or "input", value


def rebuild(value: Any, new: Mapping[str, Any], prefix: str = "") -> Any:
    """``value`` with each leaf replaced by ``new[key]`` where there is one."""
    if not _is_container(value):
        return new.get(prefix or "input", value)
    items = {name: rebuild(item, new, f"{prefix}.{name}" if prefix else name) for name, item in _items(value)}
    if isinstance(value, Mapping):
        plain = {k: items[str(k)] for k in value}
        if type(value) is dict:
            return plain
        try:
            return type(value)(**plain) if dataclasses.is_dataclass(value) else type(value)(plain)  # type: ignore[call-arg]
        except TypeError:
            return plain
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(**items)
    return type(value)(items.values())


@dataclass(frozen=True)
class Call:
    """What a call gives a model, where it is positions and keywords: a batch with the keys ``"args.0"``, ``"kwargs.labels"``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of a call as a batch: a tuple, a mapping, or both."""
    return Call(args, kwargs) if args and kwargs else kwargs or args


def tensors(value: Any) -> dict[str, Tensor]:
    """The tensors of a batch or an output by key."""
    return {key: leaf for key, leaf in leaves(value) if isinstance(leaf, Tensor)}


def _is_container(value: Any) -> bool:
    if isinstance(value, (str, bytes, Tensor, type)):
        return False
    return isinstance(value, (Mapping, tuple, list)) or dataclasses.is_dataclass(value)


def _items(value: Any) -> list[tuple[str, Any]]:
    if not _is_container(value):
        return []
    if isinstance(value, Mapping):
        return [(str(k), v) for k, v in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, Sequence):
        return [(str(i), v) for i, v in enumerate(value)]
    return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]


@dataclass(frozen=True)
class BatchSpec:
    """What a batch must look like: the type of each tensor and the value of every other entry."""

    types: Mapping[str, Type]
    constants: Mapping[str, Any]

    @staticmethod
    def of(batch: Any) -> BatchSpec:
        found = dict(leaves(batch))
        for key, value in found.items():
            if not isinstance(value, Tensor) and tuple(getattr(value, "shape", None) or ()):
                raise BatchError(
                    f"batch entry {key!r} is a {type(value).__module__}.{type(value).__name__} {getattr(value, 'dtype', '')}{list(value.shape)}, not a tensor",
                    fix="torch.as_tensor(...), which shares its memory",
                )
        return BatchSpec(
            {k: type_of(v) for k, v in found.items() if isinstance(v, Tensor)},
            {k: v for k, v in found.items() if not isinstance(v, Tensor)},
        )

    def flatten(self, batch: Any) -> dict[str, Tensor]:
        """The tensors by key. Raises BatchError where keys, shapes, dtypes or constants differ from the captured batch."""
        found = dict(leaves(batch))
        want = set(self.types) | set(self.constants)
        if set(found) != want:
            missing, extra = sorted(want - set(found)), sorted(set(found) - want)
            raise BatchError(
                "the batch has other entries than the captured one:"
                + (f" missing {', '.join(missing)}" if missing else "")
                + (f" unexpected {', '.join(extra)}" if extra else ""),
                fix="give every batch the same entries, or compile another program for this one",
            )
        for key, value in self.constants.items():
            if isinstance(found[key], Tensor) or type(found[key]) is not type(value) or found[key] != value:
                raise BatchError(f"batch entry {key!r} is a constant of the program: {value!r} when captured, {found[key]!r} now", fix="compile again for this value")
        out: dict[str, Tensor] = {}
        for key, type_ in self.types.items():
            t = found[key]
            if not isinstance(t, Tensor):
                raise BatchError(f"batch entry {key!r} was a tensor when captured, is a {type(t).__name__} now")
            now = type_of(t)
            if now != type_:
                raise BatchError(
                    f"batch entry {key!r} is {now.dtype}{list(now.shape)}, captured as {type_.dtype}{list(type_.shape)}",
                    fix="a program serves one shape: pad the batch, or compile again for this shape",
                )
            out[key] = t
        return out

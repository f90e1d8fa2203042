"""A parameter or buffer that other ranks of the pipeline store: shape, dtype and place without values.

It is a DTensor on the mesh of the ranks that store it, of which this rank is none. PyTorch knows that case: the local part is empty,
``state_dict()`` gives it, and torch.distributed.checkpoint saves and loads such a tensor on the ranks of its mesh only. What PyTorch
does not do is say so when somebody computes with it (``full_tensor`` gives an empty tensor, ``sum`` gives 0): that is an error here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.utils._pytree import tree_leaves

from deepseed.runtime.errors import ElsewhereError

_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.clone.default, torch.ops.aten.zeros_like.default, torch.ops.aten.empty_like.default)


class Elsewhere(DTensor):
    """Writing into it does nothing, as on any rank that stores no part; its copies are like it; all else raises ElsewhereError."""

    @staticmethod
    def like(shape: Sequence[int], dtype: torch.dtype, mesh: DeviceMesh, placements: Sequence[Placement]) -> Elsewhere:
        """``mesh``: of the ranks that store it, without this one."""
        whole = torch.empty(tuple(shape), dtype=dtype, device="meta")
        spec = DTensorSpec(mesh, tuple(placements), TensorMeta(whole.shape, whole.stride(), dtype))  # from_local takes no shape of 0 dimensions
        return _made(torch.empty(0, dtype=dtype, device=mesh.device_type), spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Elsewhere({str(self.dtype).removeprefix('torch.')}{list(self.shape)} on ranks {_ranks(self)})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if isinstance(first, Elsewhere):
            if func in _SAME:
                return _made(first._local_tensor, first._spec)
            if func._schema.is_mutable and func._schema.name.endswith("_"):
                return first
        next(a for a in tree_leaves((args, kwargs)) if isinstance(a, Elsewhere))._refuse(str(func))

    def _refuse(self, what: str) -> NoReturn:
        raise ElsewhereError(
            f"{what} of a tensor {str(self.dtype).removeprefix('torch.')}{list(self.shape)} that this rank of the pipeline does not store: ranks {_ranks(self)} do\n"
            "  fix: run the model by step(batch); step.state_dict() gives whole tensors, on every rank"
        )

    def full_tensor(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("full_tensor")

    def redistribute(self, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse("redistribute")


def _ranks(t: DTensor) -> list[int]:
    found: list[int] = t.device_mesh.mesh.flatten().tolist()
    return found


def _made(empty: Tensor, spec: DTensorSpec) -> Elsewhere:
    return Elsewhere(empty, spec, requires_grad=False)  # type: ignore[no-untyped-call]

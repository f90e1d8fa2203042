"""The weights of a checkpoint as one plain state dict, in one process, whatever plan and however many ranks have written it.

    python -m deepseed.utils.zero_to_fp32 checkpoint_dir output_dir [--tag TAG] [--exclude_frozen_parameters]
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from deepseed.fits import Saved
from deepseed.ir.layout import REPLICATED
from deepseed.ir.mesh import Mesh
from deepseed.runtime.folder import CheckpointError, faults, find
from deepseed.runtime.saved import Want, read
from deepseed.runtime.series import LATEST

Folder = str | os.PathLike[str]


def get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir: Folder, tag: str | None = None, exclude_frozen_parameters: bool = False, lazy_mode: bool = False) -> dict[str, Tensor]:
    """Parameters and buffers by the model's names, tied ones as one tensor; floats in 16 bits as float32. ``checkpoint_dir``: what ``save_checkpoint`` was given, or a
    tag's folder in it. Raises CheckpointError. ``lazy_mode`` and ``exclude_frozen_parameters`` are accepted: what was left out when it was saved is not there."""
    folder, manifest = find(_folder(Path(checkpoint_dir), tag))
    if wrong := faults(folder, manifest["files"], sorted(manifest["files"])):
        raise CheckpointError("\n  ".join(wrong) + "\n  fix: read another checkpoint")
    saved = Saved.of(folder, manifest)
    own = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in saved.model.items() if name not in saved.tied}
    read(folder, [Want(f"model.{name}", tuple(t.shape), REPLICATED, {}, t) for name, t in own.items()], Mesh(()))
    wide = {name: t.float() if t.is_floating_point() and t.itemsize < 4 else t for name, t in own.items()}
    return {name: wide[saved.tied.get(name, name)] for name in saved.model}


def load_state_dict_from_zero_checkpoint(model: nn.Module, checkpoint_dir: Folder, tag: str | None = None) -> nn.Module:
    """The model with the checkpoint's weights in it."""
    model.load_state_dict(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag), strict=False)
    return model


def convert_zero_checkpoint_to_fp32_state_dict(checkpoint_dir: Folder, output_dir: Folder, tag: str | None = None, exclude_frozen_parameters: bool = False) -> None:
    """Write ``output_dir/pytorch_model.bin``, which ``torch.load`` reads."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    torch.save(get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag, exclude_frozen_parameters), Path(output_dir) / "pytorch_model.bin")


def _folder(given: Path, tag: str | None) -> Path:
    if tag is not None:
        return given / tag
    latest = given / LATEST
    return given / latest.read_text().strip() if latest.is_file() else given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint_dir")
    parser.add_argument("output_dir")
    parser.add_argument("-t", "--tag")
    parser.add_argument("--exclude_frozen_parameters", action="store_true")
    args = parser.parse_args()
    convert_zero_checkpoint_to_fp32_state_dict(args.checkpoint_dir, args.output_dir, args.tag, args.exclude_frozen_parameters)


if __name__ == "__main__":
    main()

"""``offload(.., disk=DIR)``: state in files equals state in memory; what is wrong with a file is said with its name."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

import deepseed
from deepseed.api import TrainStep
from deepseed.runtime import disk
from deepseed.runtime.disk import Disk, DiskError
from deepseed.verify import verify
from tests.test_offload import batch, llama

ROLES = frozenset(("state", "param"))


def unmarked(key: tuple[str, str]) -> int:
    return 0


def written(folder: Path) -> Disk:
    """Two tensors of one rank, after a step."""
    made = Disk(folder, 0, ROLES)
    made.tensor(("state", "exp_avg/w"), (4, 8), torch.float32).fill_(1.5)
    made.tensor(("param", "w"), (4, 8), torch.bfloat16).fill_(2)
    made.seal(unmarked)
    settle(made)
    return made


def settle(made: Disk) -> None:
    """Wait until every checksum is taken."""
    for file in made._files.values():
        assert file.sum is not None
        file.sum.result()


def trained(plan: str) -> TrainStep:
    model = llama()
    step = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), clip_grad_norm=1.0)
    assert isinstance(step, TrainStep)
    step(batch())
    return step


@pytest.mark.parametrize("plan", ["zero3+dp2+mb2+offload(optimizer, params, disk={})", pytest.param("zero0+offload(optimizer, disk={})", marks=pytest.mark.wide)])
def test_training_from_files_is_eager_training(plan: str, tmp_path: Path) -> None:
    report = verify(llama(), batch(), plan.format(tmp_path), steps=2)
    assert report.ok, str(report)


def test_a_file_holds_what_the_tensor_holds_and_goes_with_the_process(tmp_path: Path) -> None:
    made = written(tmp_path)
    path = made.paths["state", "exp_avg/w"]
    assert path.stat().st_size == 4 * 8 * 4 and torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32).eq(1.5).all()
    made.check(unmarked)
    del made
    assert list(tmp_path.iterdir()) == []


def test_what_the_process_writes_itself_is_no_damage(tmp_path: Path) -> None:
    made = written(tmp_path)
    made.tensor(("state", "exp_avg/w"), (4, 8), torch.float32)[0, 0] = 7
    made.check(unmarked)
    made.check(lambda key: 1)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    made = written(tmp_path)
    path = made.paths["param", "w"]
    with path.open("r+b") as file:
        file.seek(10)
        file.write(b"x")
    with pytest.raises(DiskError, match=r"w.bin, which holds param 'w', is damaged: crc32 [0-9a-f]{8} was written, [0-9a-f]{8} is there\n  fix: start again from the last checkpoint"):
        made.check(unmarked)


@pytest.mark.parametrize(("wrong", "said"), [("torn", "is torn: 64 bytes were written, 40 are there"), ("gone", "is gone")])
def test_a_torn_file_is_found_before_it_is_read(tmp_path: Path, wrong: str, said: str) -> None:
    made = written(tmp_path)
    path = made.paths["param", "w"]
    os.truncate(path, 40) if wrong == "torn" else path.unlink()
    with pytest.raises(DiskError, match=f"{path.name}, which holds param 'w', {said}"):
        made.check(unmarked)


def test_a_full_disk_is_found_when_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = Disk(tmp_path, 0, ROLES)
    monkeypatch.setattr(disk.os, "posix_fallocate", full)
    with pytest.raises(DiskError, match=r"state-exp_avg_w.bin: 128 bytes of state 'exp_avg/w' cannot be stored: No space left on device\n  fix: "):
        made.tensor(("state", "exp_avg/w"), (4, 8), torch.float32)
    assert list(made.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a read-only one fails alike, but not for root
    with pytest.raises(DiskError, match=r"file/rank0-.*: no folder for offloaded state can be made: Not a directory\n  fix: disk= a folder that this process may write"):
        Disk(tmp_path / "file", 0, ROLES)


def test_damage_between_two_steps_ends_training_and_a_checkpoint_goes_on(tmp_path: Path) -> None:
    plan = f"zero0+offload(optimizer, disk={tmp_path / 'Scratch'})"
    step = trained(plan)
    step.save(tmp_path / "checkpoint")
    want = [float(step(batch())) for _ in range(2)]
    found = step.states[0].disk
    assert found is not None and found.paths and all(role == "state" for role, _ in found.paths)
    path = next(p for (_, key), p in found.paths.items() if key.startswith("exp_avg/"))
    settle(found)
    with path.open("r+b") as raw:
        raw.write(b"\x7f" * 8)
    before = step.steps
    for use in (lambda: step(batch()), lambda: step.save(tmp_path / "damaged"), step.state_dict, lambda: deepseed.Checkpoints(step, tmp_path / "series").save()):
        with pytest.raises(DiskError, match=path.name):
            use()  # a checkpoint of it would be sealed as whole
    assert step.steps == before and not (tmp_path / "damaged").exists()
    step.load(tmp_path / "checkpoint")
    assert [float(step(batch())) for _ in range(2)] == pytest.approx(want, rel=1e-6)

"""``offload(.., disk=DIR)``: state in files equals state in memory; what is wrong with a file is said with its name."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import subprocess
import sys
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


def spoil(t: torch.Tensor) -> None:
    """As a disk does that loses something: the tensor's version does not tell."""
    ctypes.memset(t.data_ptr() + 10, 0x7F, 1)


def maps() -> str:
    return Path("/proc/self/maps").read_text()


def test_a_tensor_lies_in_a_file_that_has_no_name_and_goes_with_it(tmp_path: Path) -> None:
    made = written(tmp_path)
    assert list(tmp_path.iterdir()) == [] and len(re.findall(rf"{tmp_path}/deepseed-\w+.bin \(deleted\)", maps())) == 2
    made.check(unmarked)
    assert made.tensor(("state", "exp_avg/w"), (4, 8), torch.float32).eq(1.5).all()
    descriptors = len(os.listdir("/proc/self/fd"))
    for n in range(20):
        made.tensor(("state", str(n)), (4,), torch.float32)
    assert len(os.listdir("/proc/self/fd")) == descriptors  # the number of tensors is not bounded by that of open files
    del made
    assert str(tmp_path) not in maps()


DIES = """
import os, signal, sys, torch
from deepseed.runtime.disk import Disk
made = Disk(sys.argv[1], 0, frozenset(("state",)))
made.tensor(("state", "w"), (2**20,), torch.float32).fill_(1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_of_a_process_that_is_killed(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DIES, str(tmp_path / "scratch")], env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])})
    assert done.returncode == -signal.SIGKILL and list(tmp_path.rglob("*")) == [tmp_path / "scratch"]


def test_what_the_process_writes_itself_is_no_damage(tmp_path: Path) -> None:
    made = written(tmp_path)
    made.tensor(("state", "exp_avg/w"), (4, 8), torch.float32)[0, 0] = 7
    made.check(unmarked)
    made.check(lambda key: 1)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    made = written(tmp_path)
    spoil(made.tensor(("param", "w"), (4, 8), torch.bfloat16))
    with pytest.raises(DiskError, match=rf"the file of param 'w' in {tmp_path} is damaged: crc32 [0-9a-f]{{8}} was written, [0-9a-f]{{8}} is there\n  fix: load the last checkpoint"):
        made.check(unmarked)


def test_a_full_disk_is_found_when_the_file_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    made = Disk(tmp_path, 0, ROLES)
    monkeypatch.setattr(disk.os, "posix_fallocate", full)
    with pytest.raises(DiskError, match=rf"{tmp_path}: 128 bytes of state 'exp_avg/w' cannot be stored: No space left on device\n  fix: "):
        made.tensor(("state", "exp_avg/w"), (4, 8), torch.float32)
    assert list(made.folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # a read-only one fails alike, but not for root
    with pytest.raises(DiskError, match=r"/file/deep: no folder for offloaded state can be made: Not a directory\n  fix: disk= a folder that this process may write"):
        Disk(tmp_path / "file" / "deep", 0, ROLES)


def test_damage_between_two_steps_ends_training_and_a_checkpoint_goes_on(tmp_path: Path) -> None:
    plan = f"zero0+offload(optimizer, disk={tmp_path / 'Scratch'})"
    step = trained(plan)
    step.save(tmp_path / "checkpoint")
    want = [float(step(batch())) for _ in range(2)]
    found = step.states[0].disk
    assert found is not None and found._files and all(role == "state" for role, _ in found._files)
    key = next(key for key in found._files if key[1].startswith("exp_avg/"))
    settle(found)
    spoil(found._files[key].tensor)
    before = step.steps
    for use in (lambda: step(batch()), lambda: step.save(tmp_path / "damaged"), step.state_dict, lambda: deepseed.Checkpoints(step, tmp_path / "series").save()):
        with pytest.raises(DiskError, match=re.escape(key[1])):
            use()  # a checkpoint of it would be sealed as whole
    assert step.steps == before and not (tmp_path / "damaged").exists()
    step.load(tmp_path / "checkpoint")
    assert [float(step(batch())) for _ in range(2)] == pytest.approx(want, rel=1e-6)

"""The arena: what it counts, against sums by hand; where it stops an op; and a whole step under a limit."""

from __future__ import annotations

import pytest
import torch

import deepseed
from deepseed.ir.mesh import Mesh
from deepseed.runtime.arena import Arena, DeviceMemoryError, accounts
from deepseed.runtime.errors import RankError
from deepseed.runtime.host import _Alone
from tests.test_offload import batch, llama


def test_storages_are_counted_once_and_until_their_last_view_ends() -> None:
    arena = Arena(0)
    x = torch.ones(100)
    with arena.step([x], [False]):
        assert arena.now == 400
        y = x + 1
        v = y.view(10, 10)[2:]
        del y
        assert arena.now == 800
        z = v.sum()
        del v
        assert arena.now == 404
        del z
    assert (arena.now, arena.peak, arena.host_peak) == (400, 804, 0)


def test_what_an_op_makes_of_the_hosts_is_the_hosts_and_moves_change_it() -> None:
    rt = _Alone(Mesh(), 0)
    arena = rt.arena = Arena(0)
    w, x = torch.ones(100), torch.ones(10)
    with arena.step([w, x], [True, False]):
        d = rt.wait(rt.to_device_start(w))
        h = rt.wait(rt.to_host_start(x))
        assert (arena.now, arena.host_now) == (440, 440)
        assert d.data_ptr() != w.data_ptr() and torch.equal(d, w) and torch.equal(h, x)
        with rt.on_host:
            made = torch.zeros(5)
        more = made.add(1)
        assert (arena.now, arena.host_now) == (440, 480)
        w.add_(1)
        torch._foreach_mul_([w, more], 2.0)
        assert (arena.now, arena.host_now) == (440, 480)
    assert arena.peak == 440 and arena.host_peak == 480


def test_a_move_holds_what_it_reads_until_its_wait() -> None:
    rt = _Alone(Mesh(), 0)
    arena = rt.arena = Arena(0)
    with arena.step([], []):
        x = torch.ones(100)
        handle = rt.to_host_start(x)
        del x
        assert arena.now == 400
        y = rt.wait(handle)
        assert arena.now == 0 and arena.host_now == y.nbytes


def test_an_allocation_above_the_limit_fails_and_says_what_asked() -> None:
    arena, x = Arena(3, 1000), torch.ones(200)
    with pytest.raises(DeviceMemoryError, match=r"rank 3 is out of device memory: aten.add.Tensor asked for 800 bytes; 800 of 1000 bytes are in use") as caught, arena.step([x], [False]):
        x.add(1)
    assert isinstance(caught.value, torch.OutOfMemoryError) and "fix: " in str(caught.value)


@pytest.mark.parametrize(("text", "said"), [("12 parsecs", "12 parsecs"), ("-3MiB", "-3MiB"), ("0", "'0'")])
def test_no_amount_of_memory(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        accounts(text, torch.device("cpu"), [0])


def test_the_environment_says_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEED_DEVICE_MEMORY", "2KiB")
    assert [a.limit for a in accounts(None, torch.device("cpu"), [0, 1])] == [2048, 2048]
    assert [a.limit for a in accounts("unlimited", torch.device("cpu"), [4])] == [None]
    assert accounts(None, torch.device("cuda", 0), [0]) == []
    monkeypatch.delenv("DEEPSEED_DEVICE_MEMORY")
    assert accounts(None, torch.device("cpu"), [0]) == []


def test_a_step_runs_in_what_it_was_counted_to_need_and_not_in_less() -> None:
    def step(plan: str, limit: str) -> deepseed.TrainStep:
        model = llama()
        out = deepseed.compile(model, plan, optimizer=torch.optim.AdamW(model.parameters()), clip_grad_norm=1.0, device_memory=limit)
        out(batch())
        return out  # type: ignore[return-value]

    needed = step("zero0", "unlimited").counted_peak_bytes[0]["device"]
    assert step("zero0", str(needed)).counted_peak_bytes[0]["device"] == needed
    with pytest.raises(DeviceMemoryError, match=f"of {needed - 1} bytes are in use"):
        step("zero0", str(needed - 1))
    assert step("zero0+offload(optimizer)", str(needed - 1)).counted_peak_bytes[0]["host"] > 0
    with pytest.raises(RankError, match=r"rank \d is out of device memory"):
        step("zero0+dp2", "4KiB")

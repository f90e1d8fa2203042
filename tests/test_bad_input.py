"""What users do wrong is answered by what, where, the numbers that disagree and the fix; never by a hang or a bare assertion."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import mistakes
from gloo.launch import forkserver, ranks
from gloo.mistakes import Branching, Mlp, batch, made
from torch import Tensor, nn

import deepseed
from deepseed.build import CompileError
from deepseed.capture import CaptureError
from deepseed.capture.errors import BatchError
from deepseed.ir.contract import PassError
from deepseed.plan import PlanError

HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore")


def refused(error: type[Exception], *said: str) -> Any:
    """The error's class, and each of ``said`` in its message, in any order."""
    return pytest.raises(error, match="".join(f"(?=(.|\n)*{re.escape(each)})" for each in said))


# the plan and the ranks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("plan", "nearest"), [("zer3", "did you mean zero3?"), ("zero3+tpp2", "did you mean tp2?"), ("ddp", "did you mean zero0?"), ("zero7", "ZeRO has the stages 0, 1, 2 and 3")])
def test_an_unknown_plan_word_names_the_nearest(plan: str, nearest: str) -> None:
    with refused(PlanError, f"in plan {plan!r}", nearest, "words: dpN, zero0"):
        made(plan)


def test_a_world_size_that_the_plan_does_not_divide() -> None:
    with refused(PlanError, "tp4 splits each weight over 4 ranks", "world size 6", "6 = 4 * 1 + 2", 'fix: use plan "zero3+tp2", or start 8 ranks'):
        made("zero3+tp4", world_size=6)
    with refused(PlanError, "dp4 x tp2 = 8 ranks", "world size is 4", "fix:"):
        made("dp4+tp2", world_size=4)


def test_more_ranks_than_any_dimension_has() -> None:
    with refused(PassError, "tp=32 splits no weight", "16 = 32 * 0 + 16", "fix: use tp=16"):
        made("zero1+dp2+tp32", example_batch=batch())


def test_precisions_that_contradict() -> None:
    with refused(PlanError, "computes in bf16, dtype= says fp16", "fix: say it once"):
        made("zero1+dp2+bf16", dtype=torch.float16)
    with refused(PlanError, "gradients are made in fp32, and bf16 does not hold what fp32 does", "fix: grads(fp32)"):
        made("zero1+dp2+fp32+grads(bf16)")


def test_other_arguments() -> None:
    with refused(CompileError, "unknown backend 'mpi'", "fix: one of simulate, gloo, nccl"):
        made("zero1", backend="mpi")
    with refused(CompileError, "backend='gloo' needs one process a rank", "fix: start the script by `deepseed run"):
        made("zero1", backend="gloo")
    with refused(CompileError, "batch='whole'", 'batch="global"', 'batch="local"'):
        made("zero1+dp2", batch="whole")
    with refused(PlanError, "unknown dtype 'float8'", "fix: one of bf16"):
        made("zero1+dp2", dtype="float8")


# the batch --------------------------------------------------------------------------------------------------------------


def trained() -> Any:
    step = made("zero1+dp2")
    step(batch())
    return step


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"x": torch.zeros(8, 8)}, ("KeyError: 'y'", "batch: x f32[8, 8]", "the one before: x f32[8, 8], y f32[8, 4] (missing y)")),
        ({"x": torch.zeros(8, 6), "y": torch.zeros(8, 4)}, ("batch: x f32[8, 6], y f32[8, 4]", "x is f32[8, 6], was f32[8, 8]", "last op at up")),
        ({"x": torch.zeros(8, 8).long(), "y": torch.zeros(8, 4)}, ("x is i64[8, 8], was f32[8, 8]", "last op at up")),
        ({"x": torch.zeros(8, 8), "y": torch.zeros(6, 4)}, ("y is f32[6, 4], was f32[8, 4]",)),
        ((torch.zeros(8, 8), torch.zeros(8, 4)), ("batch: 0 f32[8, 8], 1 f32[8, 4]", "missing x, y; unexpected 0, 1")),
    ],
)  # fmt: skip
def test_a_batch_whose_keys_shapes_or_dtypes_cannot_be_served(other: Any, said: tuple[str, ...]) -> None:
    step = trained()
    with refused(CompileError, "Mlp cannot run on this batch", *said, "fix: give the batch the entries, shapes and dtypes"):
        step(other)
    assert torch.isfinite(step(batch(1)))  # the step is still good


def test_arguments_that_the_model_does_not_take() -> None:
    compiled = deepseed.compile(Mlp(), "tp2")
    with refused(CompileError, "Mlp cannot run on this batch: TypeError", "unexpected keyword argument 'z'", "batch: z f32[8, 8]", "fix:"):
        compiled(z=torch.zeros(8, 8))


def test_a_dtype_that_has_no_place() -> None:
    with refused(BatchError, "a tensor of dtype torch.uint16", "known: f64, f32"):
        made("zero1+dp2")({**batch(), "z": torch.zeros(8, dtype=torch.uint16)})


# the model and the optimizer --------------------------------------------------------------------------------------------


def test_a_model_that_branches_on_data() -> None:
    line = next(n for n, text in enumerate(Path(mistakes.__file__).read_text().splitlines(), 1) if "the line that is named" in text)
    with refused(CaptureError, "depends on param 'up.weight'", f"mistakes.py:{line}", "fix: use torch.where"):
        made("zero1+dp2", Branching(), example_batch=batch())


def test_a_shape_that_depends_on_data() -> None:
    class Selecting(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[x[:, 0] > 0])

    said = "sub with a tensor of as many dimensions, not chosen by the same mask, of x[mask], whose size depends on data"
    with refused(CaptureError, said, "mistakes.py:", "fix: keep the whole tensor and mask it"):
        made("zero1+dp2", Selecting(), example_batch=batch())


def test_an_optimizer_that_cannot_be_traced() -> None:
    with refused(CaptureError, "LBFGS cannot be traced", "fix:"):
        made("zero1+dp2", optimizer=torch.optim.LBFGS, example_batch=batch())

    class Counting(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    rows = p.grad.nonzero()[:, 0]  # how many depends on values
                    p[rows] -= 0.1

    with refused(CaptureError, "Counting", "fix:"):
        made("zero1+dp2", optimizer=Counting, example_batch=batch())


def test_an_optimizer_of_another_model() -> None:
    stranger = torch.optim.AdamW(nn.Linear(2, 2).parameters())
    with refused(CaptureError, "2 of the 2 parameters of AdamW are not among the model's 4", "fix:"):
        deepseed.compile(Mlp(), "zero1+dp2", optimizer=stranger, loss_fn=mistakes.mse, example_batch=batch())


def test_a_model_without_a_loss() -> None:
    model = Mlp()
    with refused(CaptureError, "loss of Mlp is f32[8, 4], not one float", "fix:"):
        deepseed.compile(model, "zero1+dp2", optimizer=torch.optim.AdamW(model.parameters()), example_batch=batch()["x"])


# real ranks that go on ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> list[dict[str, tuple[str, str, float]]]:
    return ranks(2, mistakes.messages)


BOTH: dict[str, tuple[str, tuple[str, ...]]] = {  # mistake -> the class and parts of the message, on both ranks
    "plans": ("AgreementError", ("plan = 'zero1' on rank 0", "plan = 'tp2' on rank 1", "fix:")),
    "a plan that one cannot read": ("AgreementError", ("plan = 'zero1' on rank 0", "plan = 'zer1' on rank 1")),
    "unknown word": ("PlanError", ("unknown word 'zero33'",)),
    "world size": ("PlanError", ("world size 2", "2 = 3 * 0 + 2", "fix:")),
    "more ranks than started": ("CompileError", ("world_size=4, but 2 processes", "fix:")),
    "models": ("AgreementError", ("captured programs", 'rank 0: %up.weight : f32[16, 8] param "up.weight"', 'rank 1: %up.weight : f32[32, 8] param "up.weight"', "fix:")),
    "optimizers": ("AgreementError", ("optimizer = 'AdamW' on rank 0", "optimizer = 'SGD' on rank 1")),
    "options": ("AgreementError", ("clip_grad_norm = 1.0 on rank 0", "clip_grad_norm = 2.0 on rank 1")),
    "none can capture": ("CaptureError", ("depends on param 'up.weight'", "mistakes.py:", "fix:")),
    "keys": ("AgreementError", ("x f32[8, 8], y f32[8, 4]' on rank 0", "z f32[8]' on rank 1", "fix:")),
    "shapes": ("AgreementError", ("x f32[8, 8]", "x f32[10, 8], y f32[10, 4]' on rank 1", "fix:")),
    "local for global": ("CompileError", ('batch="global" means the same whole batch', "rank 0 and rank 1", "x f32[4, 8]", 'fix: compile(..., batch="local")')),
    "global for local": ("CompileError", ('batch="local" means', "all 2 hold the same ones: x f32[8, 8]", 'fix: compile(..., batch="global")')),
    "modes": ("AgreementError", ("modes", "on rank 0", "on rank 1")),
    "lr": ("AgreementError", ("lr of AdamW = 0.001 on rank 0, lr of AdamW = 0.002 on rank 1", "fix:")),
    "lr, local rows": ("AgreementError", ("lr of AdamW = 0.001 on rank 0, lr of AdamW = 0.002 on rank 1", "fix:")),
    "decay": ("AgreementError", ("weight_decay of AdamW = 0.01 on rank 0, weight_decay of AdamW = 0.02 on rank 1", "fix:")),
}  # fmt: skip


@pytest.mark.parametrize("mistake", BOTH)
def test_ranks_are_told_together(real: list[dict[str, tuple[str, str, float]]], mistake: str) -> None:
    error, said = BOTH[mistake]
    for rank in (0, 1):
        name, message, seconds = real[rank][mistake]
        assert name == error, f"rank {rank}: {name}: {message}"
        assert all(each in message for each in said), f"rank {rank}: {message}"
        assert seconds < 20


def test_what_rank_0_cannot_place_all_ranks_hear(real: list[dict[str, tuple[str, str, float]]]) -> None:
    for rank, name in ((0, "PassError"), (1, "AgreementError")):
        kind, message, _ = real[rank]["none can place"]
        assert kind == name and "sp=2 splits the batch's sequence" in message and "fix:" in message
    assert "rank 0 could not compile" in real[1]["none can place"][1]


def test_what_one_rank_cannot_capture_the_others_hear(real: list[dict[str, tuple[str, str, float]]]) -> None:
    name, message, seconds = real[0]["one cannot capture"]
    assert name == "RankError" and "rank 1 failed: CaptureError" in message and "mistakes.py:" in message and seconds < 20
    assert real[1]["one cannot capture"][0] == "CaptureError"
    for each in real:  # one has left a collective that the other never came to
        assert each["after that"][0] == "RankError" and "out of step" in each["after that"][1] and "fix: end all processes" in each["after that"][1]


def test_after_mistakes_that_all_ranks_make_a_step_still_works(real: list[dict[str, tuple[str, str, float]]]) -> None:
    assert real[0]["nothing"][1] == real[1]["nothing"][1] == repr(float(made("zero1+dp2")(batch())))


# ranks that end ----------------------------------------------------------------------------------------------------------


Ended = tuple[list[tuple[int | None, str, str]], float]
PIPELINE = "zero3+dp2+pp2+mb4"
QUICK = {"die": 3, "raise": 3, "compile": 3, f"{PIPELINE}@2 die": 4, f"{PIPELINE}@2 raise": 4}  # kinds, and ranks of each


def begun(folder: Path, kind: str, number: int) -> list[Any]:
    """Processes that no launcher watches, so that each must notice for itself."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
    each = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]
    running = [forkserver().Process(target=mistakes.child, args=(str(folder), e, kind), daemon=True) for e in each]
    for process in running:
        process.start()
    return running


def end(folder: Path, running: Sequence[Any]) -> Ended:
    """Exit code, stdout and stderr of processes; and the seconds from the first one's end to the last one's."""
    started = time.monotonic()
    ended: list[float] = []
    left = {process.sentinel for process in running}
    while left and time.monotonic() < started + 150:
        gone = wait(list(left), timeout=1.0)
        left -= set(gone)
        ended += [time.monotonic()] * len(gone)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    seconds = ended[-1] - ended[0] if not left else float("inf")
    return [(code, (folder / f"{n}.out").read_text(), (folder / f"{n}.err").read_text()) for n, code in enumerate(codes)], seconds


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, int], Ended]]:
    """``end`` of a kind on so many ranks. Most of it is waiting for the silence of the dead, which the quick ones do at the same time."""
    with ThreadPoolExecutor(len(QUICK)) as waiting:

        def start(kind: str, number: int) -> Future[Ended]:
            folder = tmp_path_factory.mktemp("ranks")
            return waiting.submit(end, folder, begun(folder, kind, number))

        under_way = {(kind, number): start(kind, number) for kind, number in QUICK.items()}
        yield lambda *asked: (under_way.get(asked) or start(*asked)).result()


@pytest.mark.parametrize(("kind", "said"), [("die", "rank 2 died"), ("raise", "rank 2 "), ("compile", "rank 2 died")])
def test_the_others_name_the_rank_that_ended(ends: Callable[[str, int], Ended], kind: str, said: str) -> None:
    done, _ = ends(kind, 3)
    for rank, (code, out, err) in enumerate(done):
        assert code not in (0, None) and "not reached" not in out, f"rank {rank}: {code}\n{err}"
        if rank < 2:
            assert "RankError" in err and said in err, f"rank {rank}:\n{err}"
    if kind == "raise":
        assert "shard 3 of the data is unreadable" in done[2][2]


wide = pytest.mark.wide


@pytest.mark.parametrize(
    ("plan", "number", "who"),
    [
        (PIPELINE, 4, 2),
        pytest.param(PIPELINE, 4, 0, marks=wide),  # it keeps the store where ranks meet
        pytest.param("zero1+pp4+mb8+zb", 4, 1, marks=wide),
        pytest.param("zero3+dp2+tp2+pp2+mb4", 8, 5, marks=wide),
    ],
)
@pytest.mark.parametrize("how", ["die", "raise"])
def test_a_rank_that_ends_between_microbatches_is_named_by_all_others(ends: Callable[[str, int], Ended], plan: str, number: int, who: int, how: str) -> None:
    """By SIGKILL, or by an exception: all others exit in error within half a minute, its neighbours or not."""
    done, seconds = ends(f"{plan}@{who} {how}", number)
    for rank, (code, out, err) in enumerate(done):
        assert code not in (0, None) and "not reached" not in out, f"rank {rank}: {code}\n{err}"
        if rank != who:
            says = f"rank {who} failed: MemoryError: a microbatch does not fit" if how == "raise" else f"rank {who} died" if who else "rank 0, which keeps the store"
            assert "RankError" in err and says in err and f"rank {rank} gave up after" in err, f"rank {rank}:\n{err}"
    assert done[who][0] == (-signal.SIGKILL if how == "die" else 1)
    assert seconds < 30


def test_a_launcher_names_the_rank_that_ended_and_exits_in_error(tmp_path: Path) -> None:
    call: Callable[..., Any] = subprocess.run
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--log-dir={tmp_path}", "-m", "gloo.mistakes", "die"]
    env = {**os.environ, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}", "OMP_NUM_THREADS": "1"}
    done = call(command, capture_output=True, text=True, env=env, timeout=120, check=False)
    assert done.returncode != 0 and "not reached" not in done.stdout
    assert re.search(r"rank\s*: 1\b|rank 1 died", done.stderr), done.stderr[-3000:]

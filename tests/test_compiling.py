"""What a compilation shows of itself: a bar on a terminal, one line to anything else, nothing where it is quick, asked not to, or another rank than the first."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import deepseed.compiling as module
from deepseed.codegen import inductor
from deepseed.compiling import Compiling

SCRIPT = """
import sys, torch, deepseed
import deepseed.compiling as module
module.SOON, module.SLOW = float(sys.argv[1]), float(sys.argv[2])
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.LayerNorm(8))
step = deepseed.compile(model, "zero0", optimizer=torch.optim.AdamW(model.parameters()), loss_fn=lambda m, x: m(x["x"]).square().mean(), codegen=sys.argv[3])
step({"x": torch.ones(4, 8)})
"""
CODEGEN = "cpp" if inductor.compiler() else "python"


def stderr_of(tmp_path: Path, *given: str, terminal: bool = False, ranks: int = 0, log: str = "") -> str:
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "DEEPSEED_LOG": log, "DEEPSEED_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, *(("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}") if ranks else ()), str(tmp_path / "script.py"), *given]
    if not terminal:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout == ""
        return done.stderr
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment) as process:
        os.close(theirs)
        found = b""
        try:
            while more := os.read(ours, 1 << 16):
                found += more
        except OSError:  # the other end is closed
            pass
        assert process.stdout is not None and process.stdout.read() == b"" and process.wait() == 0, found[-2000:]
    os.close(ours)
    return found.decode()


def test_a_terminal_shows_what_is_being_compiled(tmp_path: Path) -> None:
    """Each pass as it is through, and kernels where a back end compiles them; the bar is taken away again, and the line stays."""
    shown = stderr_of(tmp_path, "0", "0", CODEGEN, terminal=True)
    at = [shown.index(f"{n} of {len(module_passes())} {name}") for n, name in enumerate(module_passes(), 1)]
    assert at == sorted(at) and "deepseed: compiling" in shown
    assert CODEGEN == "python" or "kernels 0 of " in shown
    assert shown.rstrip().splitlines()[-1].count("deepseed: compiled in") == 1


def module_passes() -> list[str]:
    from deepseed import pipeline

    return [p.name for p in pipeline.SHARED]


def test_a_pipe_gets_one_line(tmp_path: Path) -> None:
    (line,) = stderr_of(tmp_path, "0", "0", CODEGEN).splitlines()
    assert line.startswith("deepseed: compiled in ") and "capture " in line and "passes " in line and (" kernels " in line) == (CODEGEN == "cpp")


@pytest.mark.parametrize(("given", "log", "terminal"), [(("99", "99", "python"), "", True), (("0", "0", "python"), "warning", True)])
@pytest.mark.turn
def test_nothing_is_said_of_what_is_quick_or_unwanted(given: tuple[str, ...], log: str, terminal: bool, tmp_path: Path) -> None:
    assert stderr_of(tmp_path, *given, terminal=terminal, log=log) == ""


def test_one_rank_speaks(tmp_path: Path) -> None:
    assert stderr_of(tmp_path, "0", "0", "python", ranks=2).count("compiled in") == 1


def test_a_compilation_that_fails_says_its_error_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOW", 0.0)
    with pytest.raises(ValueError, match="no"), Compiling(True) as at:
        at("capture")
        raise ValueError("no")
    assert capsys.readouterr().err == ""
    with Compiling(True) as at:
        at("capture")
    assert capsys.readouterr().err.startswith("deepseed: compiled in 0.0 s: capture 0.0 s")

"""Where a rank is, as the watch says it to the others."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest
import torch

from deepseed.runtime import whereabouts


def test_node_and_line_are_the_main_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Innermost first: the generated line within, then the first of neither ours nor a library's; names that are not ASCII are read back."""
    monkeypatch.setenv("DEEPSEED_CACHE_DIR", str(tmp_path))
    generated = tmp_path / "source" / "step-12.py"
    generated.parent.mkdir()
    generated.write_text("def step(rt):\n    wait(rt)\n")
    stacks = f"""Thread 0x00007f0000000001 (most recent call first):
  File "/home/me/other.py", line 3 in loader

Current thread 0x00007f0000000002 [main] (most recent call first):
  File "{whereabouts.__file__}", line 30 in main_thread
  File "{generated}", line 2 in step
  File "{torch.__file__}", line 1 in call
  File "{threading.__file__}", line 5 in wait
  File "/home/\\xe9lan/\\u65e5.py", line 20 in main
  File "/home/me/launch.py", line 1 in <module>
"""
    assert whereabouts.of(stacks, 0x7F0000000002) == "wait(rt), at /home/élan/日.py:20 in main"
    assert whereabouts.of(stacks, 0x7F0000000001) == "at /home/me/other.py:3 in loader"
    assert whereabouts.of(stacks, 0x7F0000000003) == ""


def test_a_thread_that_runs_is_looked_at_while_it_runs() -> None:
    """From another thread, as the watch does, with the interpreter given away as often as it can be."""
    said, done, interval = list[str](), threading.Event(), sys.getswitchinterval()

    def watch() -> None:
        while not done.is_set():
            said.append(whereabouts.main_thread())

    watching = threading.Thread(target=watch)
    sys.setswitchinterval(1e-6)
    try:
        watching.start()
        while len(said) < 300:
            sum(n for n in range(20))
    finally:
        sys.setswitchinterval(interval)
        done.set()
        watching.join()
    assert set(said) <= {f"at {__file__}:{line} in {name}" for line in range(1, 80) for name in (test_a_thread_that_runs_is_looked_at_while_it_runs.__name__, "<genexpr>")}

"""A rank that ends takes its threads with it: one that asks for the interpreter while it goes down aborts the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import atexit, sys, threading
import torch.distributed as dist

def left():  # registered first, so it runs last
    print([t.name for t in threading.enumerate() if t.name == "deepseed watch"])

atexit.register(left)
from deepseed.runtime.distributed import world

dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 1), rank=0, world_size=1)
world()
print([t.name for t in threading.enumerate() if t.name == "deepseed watch"])
"""


def test_the_watch_ends_before_the_interpreter(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / "store")], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["['deepseed watch']", "[]"]

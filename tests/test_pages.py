"""What is in use lies in huge pages, and memory does not grow by it."""

from __future__ import annotations

import subprocess
import sys

import pytest

CHILD = """
import ctypes, sys
import torch
from deepseed.runtime import pages

def amount(name, path="/proc/self/status"):
    return sum(int(line.split()[1]) for line in open(path) if line.startswith(name + ":")) << 10

whole, sparse = torch.ones(64 << 18), torch.empty(64 << 18)
sparse[:: 1 << 19] = 1  # a page of 4 KiB in each 2 MiB
before, had = amount("VmRSS"), amount("AnonHugePages", "/proc/self/smaps_rollup")
found = pages.huge_pages()
print(found, amount("AnonHugePages", "/proc/self/smaps_rollup") - had, amount("VmRSS") - before, bool((whole == 1).all()), had)
"""


def test_memory_in_use_gets_huge_pages_and_does_not_grow() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("Linux only")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CHILD], capture_output=True, text=True, check=True)
    found, more, grown, same, had = done.stdout.split()
    if int(found) == 0:
        pytest.skip("this kernel makes no huge pages on request")
    assert same == "True"
    assert int(more) + int(had) >= 60 << 20  # of 64 MiB that are in use
    assert int(grown) <= 8 << 20  # the other 64 MiB stay away

"""Tests that need a CUDA device. They are collected everywhere, and skipped with the reason where there is none."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def cuda() -> torch.device:
    """The first CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device: torch {torch.__version__} " + ("sees none" if torch.version.cuda else "is built for the CPU"))
    return torch.device("cuda", 0)

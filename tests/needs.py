"""What some tests need of the machine: ``@needs.triton``, ``@needs.compiler``."""

from __future__ import annotations

import importlib.util

import pytest

from deepseed.codegen import inductor

triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'deepseed[triton]'")
compiler = pytest.mark.skipif(not inductor.compiler(), reason="no C++ compiler")

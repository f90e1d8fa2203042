"""Train the same model on one device and under two plans on two local ranks, and lay the curves on each other.

    python examples/demo.py [--steps 50] [--out out/demo]

Runs ``train_text.py`` as a user would: plain PyTorch, then DeepSeed on one device, under ``zero3`` and under ``tp2``. Exits
with 1 if a curve leaves that of plain PyTorch. Needs matplotlib for the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import matplotlib
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import train_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

SCRIPT = Path(train_text.__file__)
REFERENCE = "PyTorch"
ALONE = "DeepSeed, one device"

# Relative difference of the loss from plain PyTorch that a step may have, float32. Another order of the same sums is a rounding of
# 6e-8 each; training multiplies it. Measured over 50 steps: see TOLERANCE_FIGURES. A wrong mean, clip or update is off by 1e-3 and more.
TOLERANCE = 1e-4

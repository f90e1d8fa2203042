"""Capture: an unmodified model, its loss and its optimizer become one Program, without touching a parameter's value.

    captured = capture(model, batch, optimizer=torch.optim.AdamW(model.parameters()), clip_grad_norm=1.0)
    print(captured.program)
"""

from deepseed.capture.batch import BatchSpec
from deepseed.capture.eager import eager_reference
from deepseed.capture.errors import BatchError, CaptureError
from deepseed.capture.gradients import LossScale
from deepseed.capture.guards import Guard
from deepseed.capture.pending import capture_update
from deepseed.capture.state import StateSlot
from deepseed.capture.step import Captured, capture

__all__ = ["BatchError", "BatchSpec", "CaptureError", "Captured", "Guard", "LossScale", "StateSlot", "capture", "capture_update", "eager_reference"]

"""What can go wrong in inference, each with the numbers and the fix."""

from __future__ import annotations


class InferenceError(ValueError):
    """A model that the engine cannot run, or a request that it cannot serve."""

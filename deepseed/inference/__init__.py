"""Inference: the forward of an unmodified model, captured once, runs many requests at a time.

    engine = deepseed.inference.Engine("path/to/model")
    print(engine.generate("The capital of France is", max_tokens=16)[0].text)

    capture     transformers' forward as one graph of a packed step, with one paged attention a layer
    executable   the same as a program, placed and compiled: what runs, on one rank as on many
    prompts     what a caller gives as such
    attention, native, gpu   that op on this device; ``paged`` says what it means
    blocks, scheduler   which tokens the next step computes and where their keys and values lie; no tensors
    lookup      drafts: tokens that may come next because they did before
    sampling, detokenize   from logits to tokens, from tokens to text
    engine, stream   requests in, text out
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepseed.inference.engine import Engine as Engine
    from deepseed.inference.errors import InferenceError as InferenceError
    from deepseed.inference.outputs import Completion as Completion
    from deepseed.inference.outputs import Output as Output
    from deepseed.inference.outputs import Update as Update
    from deepseed.inference.sampling import SamplingParams as SamplingParams

_WHERE = {"Completion": "outputs", "Engine": "engine", "Output": "outputs", "Update": "outputs", "InferenceError": "errors", "SamplingParams": "sampling"}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"deepseed.inference.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'deepseed.inference' has no attribute {name!r}")

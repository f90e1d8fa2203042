"""Inference: the forward of an unmodified model, captured once, runs many requests at a time.

    engine = deepseed.inference.Engine("path/to/model")
    print(engine.generate("The capital of France is", max_tokens=16)[0].text)

    capture     transformers' forward as one graph of a packed step, with one paged attention a layer
    attention   that op on this device; ``paged`` says what it means
    blocks, scheduler   which tokens the next step computes and where their keys and values lie; no tensors
    sampling, detokenize   from logits to tokens, from tokens to text
    engine, stream   requests in, text out
"""

from deepseed.inference.engine import Completion, Engine, Output, Update
from deepseed.inference.errors import InferenceError
from deepseed.inference.sampling import SamplingParams

__all__ = ["Completion", "Engine", "InferenceError", "Output", "SamplingParams", "Update"]

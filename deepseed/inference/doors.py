"""DeepSpeed's doors to inference: ``deepseed.init_inference`` and, in MII's manner, ``deepseed.pipeline``.

    engine = deepseed.init_inference(model, tensor_parallel={"tp_size": 1}, dtype=torch.bfloat16)
    ids = engine.generate(input_ids, max_new_tokens=32)      # as the model's own generate

    pipe = deepseed.pipeline("path/to/model")
    print(pipe(["DeepSeed is", "Seattle is"], max_new_tokens=64))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseed.inference.engine import Engine
from deepseed.inference.errors import InferenceError
from deepseed.inference.outputs import Completion
from deepseed.inference.prompts import Prompt
from deepseed.inference.sampling import SamplingParams, asked_for

_ACCEPTED = {"replace_with_kernel_inject", "kernel_inject", "enable_cuda_graph", "max_out_tokens", "max_tokens", "min_out_tokens", "zero", "triangular_masking", "return_tuple", "injection_policy", "replace_method"}  # what DeepSpeed needs to be told, and a compiler does not
_ENGINE = ("cache", "block", "budget", "sequences", "chunk", "prefix", "max_length", "tokenizer", "device", "weights", "codegen", "speculative", "draft", "quantize")
_RENAMED = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


def init_inference(model: nn.Module | str, config: Mapping[str, Any] | None = None, **said: Any) -> InferenceModel:
    """DeepSpeed's call. ``tensor_parallel={"tp_size": n}`` (or ``mp_size``) is the plan ``tpN``; kernels need not be asked for."""
    said = {**(config or {}), **said}
    parallel = said.pop("tensor_parallel", said.pop("tp", None)) or {}
    size = parallel.get("tp_size", 1) if isinstance(parallel, Mapping) else getattr(parallel, "tp_size", 1)
    size = max(int(size), int(said.pop("mp_size", 1)))
    dtype = said.pop("dtype", None)
    engine = {name: said.pop(name) for name in _ENGINE if name in said}
    if said.pop("checkpoint", None) is not None:
        raise InferenceError("init_inference(checkpoint=): a model gets its values before, or from weights=\n  fix: from_pretrained, or weights= for a checkpoint of DeepSeed")
    unknown = sorted(set(said) - _ACCEPTED)
    if unknown:
        raise InferenceError(f"init_inference does not know {', '.join(unknown)}\n  fix: leave it out; the engine's own are {', '.join(_ENGINE)}")
    return InferenceModel(Engine(model, f"tp{size}", dtype, **engine))


class InferenceModel:
    """What ``init_inference`` gives: ``generate`` on tensors, as transformers' has it. ``engine`` is the engine itself."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.module, self.config = engine, engine.model, engine.config

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **asked: Any) -> Tensor:
        """Rows of ids, padded on the left or right where ``attention_mask`` is 0, with their continuations; short ones are padded at the end."""
        kept = attention_mask.bool() if attention_mask is not None else torch.ones_like(input_ids, dtype=torch.bool)
        done = self.engine.generate([row[k].tolist() for row, k in zip(input_ids, kept, strict=True)], _params(asked))
        outputs = [(n, o.token_ids) for n, c in enumerate(done) for o in c.outputs]
        pad = getattr(self.config, "pad_token_id", None)
        pad = pad if pad is not None else next(iter(sorted(self.engine.ends)), 0)
        longest = max(len(t) for _, t in outputs)
        rows = [[*input_ids[n].tolist(), *tokens, *[pad] * (longest - len(tokens))] for n, tokens in outputs]
        return torch.tensor(rows, dtype=input_ids.dtype, device=input_ids.device)

    def __getattr__(self, name: str) -> Any:
        if name in ("engine", "module", "config"):
            raise AttributeError(name)
        return getattr(self.module, name)


class Pipeline:
    """MII's: prompts in, completions out."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __call__(self, prompts: Prompt | Sequence[Prompt], **asked: Any) -> list[Completion]:
        return self.engine.generate(prompts, _params(asked))


def pipeline(model: nn.Module | str, plan: str = "tp1", **said: Any) -> Pipeline:
    return Pipeline(Engine(model, plan, **said))


def _params(asked: Mapping[str, Any]) -> SamplingParams:
    """transformers' and MII's names: without ``do_sample`` greedy, as ``generate`` is; MII's names sample where a temperature is given."""
    out = {_RENAMED.get(name, name): value for name, value in asked.items() if name not in ("do_sample", "num_return_sequences", "pad_token_id", "use_cache", "eos_token_id")}
    out["n"] = asked.get("num_return_sequences", asked.get("n", 1))
    if "eos_token_id" in asked:  # in the place of the model's own; None: nothing ends a text
        ends = asked["eos_token_id"]
        out["stop_token_ids"] = (*out.get("stop_token_ids", ()), *(() if ends is None else map(int, ends) if isinstance(ends, list | tuple) else (int(ends),)))
        out["ignore_eos"] = True
    said = out.get("temperature")
    sampled = asked.get("do_sample", said is not None)
    out["temperature"] = (1.0 if said is None else said) if sampled else 0.0
    return asked_for(out)

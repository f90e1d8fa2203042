"""The forward of an unmodified model, captured once as one program of a packed step.

    captured = capture(model)            # model: a causal language model of transformers
    captured.graph                       # torch.fx, aten ops and one deepseed::paged_attention an attention layer

Three doors of transformers are used, and no line of a model: its table of attention functions, its table of mask functions, and the cache
object that a forward takes. The first becomes the paged op, the second tells which tokens a layer sees (``masks``), the third hands keys and
values through and counts the layers that wanted to remember something. Where that count is not the number of paged ops some layer
remembers or attends by itself and would be silently wrong: refused. Numbers of tokens and of sequences are dynamic; nothing is decomposed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache, DynamicLayer

from deepseed.capture.switches import switched
from deepseed.inference import paged  # noqa: F401  # registers the op
from deepseed.inference.errors import InferenceError
from deepseed.inference.masks import Wanted, wanted

NAME = "deepseed_paged"
INPUTS = ("ids", "positions", "blocks", "slots", "context", "starts", "last")
PAGELESS: list[tuple[Tensor, Tensor]] = []  # the op without its caches: for a program, whose runtime has them
_TOKENS, _SEQUENCES, _BLOCK = 12, 3, 4  # sizes of the example step
_LARGEST = {torch.ops.aten.max, torch.ops.aten.amax}
_HARMLESS = ("position_ids", "position_embeddings", "cu_seq_lens_q", "cu_seq_lens_k")  # tensors that attention may get and not read


@dataclass(frozen=True)
class Layer:
    """One attention layer's memory: heads and widths of what it keeps of a token."""

    heads: int
    width: int
    value_width: int
    window: int


@dataclass(frozen=True)
class CapturedForward:
    """``graph`` takes ``names`` in order, then INPUTS, then keys and values of each layer in turn; returns logits [sequences, vocabulary]."""

    graph: torch.fx.GraphModule
    names: tuple[str, ...]  # parameters, buffers and constants, as the model calls them
    constants: dict[str, Tensor]
    layers: tuple[Layer, ...]


@dataclass
class Recorder:
    """What a forward did while it was traced."""

    step: dict[str, Tensor]
    caches: list[tuple[Tensor, Tensor]] | None  # None: only look
    layers: list[Layer] = field(default_factory=list)
    remembered: int = 0


class _Through(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer of a cache that keeps nothing: the paged op does."""

    recorder: Recorder

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.recorder.remembered += 1
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float | None = None, dropout: float = 0.0,
    softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None, deepseed_recorder: Recorder | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """The entry of ``AttentionInterface``: query [1, heads, T, width], of all sequences of the step."""
    r, where = deepseed_recorder, f"{type(module).__name__}, attention layer {len(deepseed_recorder.layers) if deepseed_recorder else '?'}"
    if r is None:
        raise InferenceError(f"{where}: the model does not hand keyword arguments to its attention\n  fix: the engine needs that; open a request with the model's name")
    strange = sorted(n for n, x in others.items() if isinstance(x, Tensor) and n not in _HARMLESS)
    if strange:
        raise InferenceError(f"{where}: attention takes {', '.join(strange)}, which paged attention does not know\n  fix: serve a model without it")
    if attention_mask is None and (is_causal if is_causal is not None else getattr(module, "is_causal", False)):
        attention_mask = Wanted(0)
    if not isinstance(attention_mask, Wanted):
        kind = "no mask and is not causal" if attention_mask is None else f"a mask of the model's own, {type(attention_mask).__name__}"
        raise InferenceError(f"{where}: attention has {kind}; which tokens it sees cannot be read\n  fix: serve a causal language model whose masks come from transformers.masking_utils")
    batch, heads, tokens, width = query.shape
    n = len(r.layers)
    r.layers.append(Layer(int(key.shape[1]), int(key.shape[3]), int(value.shape[3]), attention_mask.window))
    if r.caches is None:
        return query.new_zeros(batch, tokens, heads, value.shape[3]), None
    if r.caches is not PAGELESS and n >= len(r.caches):
        raise InferenceError(f"{where}: more attention layers than when the model was looked at ({len(r.caches)})")
    flat = [x.transpose(1, 2).reshape(batch * tokens, x.shape[1], x.shape[3]) for x in (query, key, value)]
    s, scale, cap = r.step, float(width**-0.5 if scaling is None else scaling), float(softcap or 0.0)
    if r.caches is PAGELESS:
        out = torch.ops.deepseed.paged(*flat, s_aux, n, scale, attention_mask.window, cap)
    else:
        out = torch.ops.deepseed.paged_attention(*flat, *r.caches[n], s["blocks"], s["slots"], s["context"], s["starts"], scale, attention_mask.window, cap, s_aux)
    return out.view(batch, tokens, heads, -1), None


class PackedStep:
    """The model on a packed step, ``call`` being its forward."""

    def __init__(self, model: nn.Module, recorder: Recorder, call: Callable[..., Any]) -> None:
        self._call, self._recorder = call, recorder
        known = inspect.signature(model.forward).parameters
        self._cache = next((n for n in ("cache", "past_key_values") if n in known), "")
        self._keeps = "logits_to_keep" in known
        lacks = [what for what, missing in (("a key-value cache", not self._cache), ("position_ids", "position_ids" not in known)) if missing]
        if lacks:
            raise InferenceError(
                f"{type(model).__name__} cannot be served: its forward takes no {' and no '.join(lacks)}; the tokens of a packed step, of many sequences, would get wrong positions\n"
                f"  fix: serve a causal language model whose forward does, or use {type(model).__name__}.generate()"
            )

    def __call__(self, ids: Tensor, positions: Tensor, last: Tensor, caches: list[tuple[Tensor, Tensor]] | None, **tables: Tensor) -> Tensor:
        r = self._recorder
        r.step, r.caches = tables, caches
        r.layers, r.remembered = [], 0
        through = type("Through", (_Through,), {"recorder": r})
        asked: dict[str, Any] = {self._cache: Cache(layer_class_to_replicate=through), **({"logits_to_keep": last} if self._keeps else {})}
        out = self._call(input_ids=ids[None], position_ids=positions[None], use_cache=True, deepseed_recorder=r, **asked)
        logits: Tensor = out.logits
        return logits[0] if self._keeps else logits[0].index_select(0, last)


class _Exported(nn.Module):
    """What torch.export traces."""

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        super().__init__()
        self.model, self._step = model, PackedStep(model, recorder, model)

    def forward(self, ids: Tensor, positions: Tensor, blocks: Tensor, slots: Tensor, context: Tensor, starts: Tensor, last: Tensor, caches: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        return self._step(ids, positions, last, caches, blocks=blocks, slots=slots, context=context, starts=starts)


def look(model: nn.Module) -> tuple[Layer, ...]:
    """The attention layers of a model that can be served, in the order in which they run. Raises InferenceError."""
    recorder = Recorder({}, None)
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with hooked(model), torch.no_grad(), _refused(model), fake, _Positions(model) as watched:
        empty = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in values.items()}  # all on one device, be the model on meta
        step = PackedStep(model, recorder, lambda **said: torch.func.functional_call(model, empty, (), said))
        ids, positions, *_, last = (torch.empty(x.shape, dtype=x.dtype) for x in _example(torch.device("cpu")))
        watched.storage = positions.untyped_storage()._cdata
        step(ids, positions, last, None)
    complete(model, len(recorder.layers), recorder.remembered)
    return tuple(recorder.layers)


class _Positions(TorchDispatchMode):
    """Refuses a forward that asks for the largest position of a step: its tokens are of many sequences, and what one gets would depend on the others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.storage = model, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _LARGEST and args[0].untyped_storage()._cdata == self.storage:
            name = type(self.model).__name__
            raise InferenceError(
                f"{name} cannot be served: its forward asks for the largest of all positions ({func}), which in a step of many sequences is another one's\n"
                f"  fix: serve a model whose positions are each token's own (rope without lengths that it switches at), or use {name}.generate()"
            )
        return func(*args, **(kwargs or {}))


@contextmanager
def _refused(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except InferenceError:
        raise
    except Exception as error:
        raise InferenceError(f"{type(model).__name__} cannot be captured: {type(error).__name__}: {error}\n  fix: see whether its forward reads sizes or values of tensors in Python") from error


def capture(model: nn.Module) -> CapturedForward:
    """Reads no value of a parameter: the model may be on the meta device. Raises InferenceError, naming what the model lacks."""
    layers = look(model)
    recorder = Recorder({}, None)
    step = _Exported(model, recorder)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    caches = [tuple(torch.empty(la.heads, 7, _BLOCK, w, dtype=dtype, device=device) for w in (la.width, la.value_width)) for la in layers]
    tokens, sequences, longest, pool = Dim("tokens", min=2), Dim("sequences", min=2), Dim("longest", min=2), Dim("pool", min=2)
    free = {
        "ids": {0: tokens}, "positions": {0: tokens}, "blocks": {0: sequences, 1: longest}, "slots": {0: tokens},
        "context": {0: sequences}, "starts": {0: sequences + 1}, "last": {0: Dim("wanted", min=2)},
        "caches": [({1: pool}, {1: pool}) for _ in layers],
    }  # fmt: skip
    with hooked(model), torch.no_grad(), _refused(model):
        exported = torch.export.export(step, (*_example(device), caches), dynamic_shapes=free, strict=False)
    graph = exported.graph_module
    complete(model, sum(n.target is torch.ops.deepseed.paged_attention.default for n in graph.graph.nodes), recorder.remembered)
    signature = exported.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    changed = {b for b in signature.buffers_to_mutate.values()}
    if changed:
        raise InferenceError(f"{type(model).__name__} writes into its buffers as it runs: {', '.join(sorted(changed))}\n  fix: serve a model that remembers in its cache only")
    names = []
    for node in graph.graph.nodes:
        if node.op == "placeholder" and node.name in lifted:
            names.append(lifted[node.name].removeprefix("model."))
    constants = {n.removeprefix("model."): t for n, t in exported.constants.items() if isinstance(t, Tensor)}
    return CapturedForward(graph, tuple(names), constants, layers)


def complete(model: nn.Module, ops: int, remembered: int) -> None:
    """One paged op for each layer that remembers, and at least one. Raises InferenceError."""
    if ops and ops == remembered:
        return
    name = type(model).__name__
    raise InferenceError(
        f"{name} cannot be served: {remembered} of its layers keep something in the cache, {ops} of them attend through transformers' AttentionInterface\n"
        f"  a layer that bypasses it would see only the tokens of its own step, and the text would be wrong without a word\n"
        f"  fix: serve a model whose attention calls ALL_ATTENTION_FUNCTIONS, or use {name}.generate()"
    )


@contextmanager
def hooked(model: nn.Module) -> Iterator[None]:
    """The model's attention is the paged op, its masks are what is wanted of them; undone at the end."""
    transformers.AttentionInterface.register(NAME, attention)
    transformers.AttentionMaskInterface.register(NAME, wanted)
    configs = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None and hasattr(c, "_attn_implementation_internal")]
    before = [(c, c._attn_implementation_internal) for c in {id(c): c for c in configs}.values()]
    training = model.training
    model.eval()
    try:
        with switched(model):
            for config, _ in before:
                config._attn_implementation_internal = NAME
            yield
    finally:
        for config, old in before:
            config._attn_implementation_internal = old
        model.train(training)


def _example(device: torch.device) -> list[Tensor]:
    """A step that mixes: 3 sequences, 12 tokens."""
    each = [
        torch.zeros(_TOKENS), torch.arange(_TOKENS), torch.zeros(_SEQUENCES, 5), torch.arange(_TOKENS),
        torch.full((_SEQUENCES,), 4), torch.arange(0, _TOKENS + 1, 4), torch.tensor([3, 11]),
    ]  # fmt: skip
    return [x.long().to(device) for x in each]

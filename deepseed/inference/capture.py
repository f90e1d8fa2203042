"""The forward of an unmodified model on a packed step, as it is traced.

Three doors of transformers are used, and no line of a model: its table of attention functions, its table of mask functions, and the cache
object that a forward takes. The first becomes the op ``paged_attention``, the second tells which tokens a layer sees (``masks``), the third hands keys and
values through and counts the layers that wanted to remember something. Where that count is not the number of paged ops some layer
remembers or attends by itself and would be silently wrong: refused.
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, cache_utils
from transformers.cache_utils import Cache, DynamicLayer

from deepseed.capture.switches import switched
from deepseed.inference.errors import InferenceError
from deepseed.inference.masks import Wanted, wanted

NAME = "deepseed_paged"
TOKENS, WANTED = 12, 2  # of the step that a forward is looked at with
_STATE: Any = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)  # of layers that keep a state: of convolutions, of a recurrence
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
class Looked:
    """What a forward showed: its attention layers, and the numbers among its sizes and arguments."""

    layers: tuple[Layer, ...]
    numbers: frozenset[int]


@dataclass
class Recorder:
    """What a forward did while it was traced. ``attends``: whether the paged op is traced, or the forward only looked at."""

    attends: bool = False
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
    if not r.attends:
        return query.new_zeros(batch, tokens, heads, value.shape[3]), None
    flat = [x.transpose(1, 2).reshape(batch * tokens, x.shape[1], x.shape[3]) for x in (query, key, value)]
    scale = float(width**-0.5 if scaling is None else scaling)
    out = torch.ops.deepseed.paged(*flat, s_aux, n, scale, attention_mask.window, float(softcap or 0.0))
    return out.view(batch, tokens, heads, -1), None


class PackedStep:
    """The model on a packed step, ``call`` being its forward."""

    def __init__(self, model: nn.Module, recorder: Recorder, call: Callable[..., Any]) -> None:
        self._call, self._recorder = call, recorder
        known = inspect.signature(model.forward).parameters
        self._cache = next((n for n in ("cache", "past_key_values") if n in known), "")
        self._keeps = "logits_to_keep" in known
        lacks = [what for what, missing in (("key-value cache", not self._cache), ("position_ids", "position_ids" not in known)) if missing]
        if lacks:
            raise InferenceError(
                f"{type(model).__name__} cannot be served: its forward takes no {' and no '.join(lacks)}; the tokens of a packed step, of many sequences, would get wrong positions\n"
                f"  fix: serve a causal language model whose forward does, or use {type(model).__name__}.generate()"
            )

    def __call__(self, ids: Tensor, positions: Tensor, last: Tensor) -> Tensor:
        r = self._recorder
        r.layers, r.remembered = [], 0
        through = type("Through", (_Through,), {"recorder": r})
        asked: dict[str, Any] = {self._cache: Cache(layer_class_to_replicate=through), **({"logits_to_keep": last} if self._keeps else {})}
        out = self._call(input_ids=ids[None], position_ids=positions[None], use_cache=True, deepseed_recorder=r, **asked)
        logits: Tensor = out.logits
        return logits[0] if self._keeps else logits[0].index_select(0, last)


def stateless(model: nn.Module) -> None:
    """The cache that transformers makes for the model keeps keys and values alone. Raises InferenceError where a layer keeps a state, which the paged op does not."""
    config: Any = getattr(model, "config", None)
    if _STATE is None or config is None:
        return
    try:
        layers = DynamicCache(config=config.get_text_config(decoder=True)).layers
    except Exception:  # a model without such a cache, whose forward says the rest
        return
    states = [n for n, layer in enumerate(layers) if isinstance(layer, _STATE)]
    if states:
        name = type(model).__name__
        raise InferenceError(
            f"{name} cannot be served: {len(states)} of its {len(layers)} layers, number {states[0]} the first, keep a state in the cache ({type(layers[states[0]]).__name__}), not keys and values of each token\n"
            f"  fix: serve a model whose layers all attend, or use {name}.generate()"
        )


def look(model: nn.Module) -> Looked:
    """The forward of a model that can be served, run once without values; it reads none, so the model may be on the meta device. Raises InferenceError."""
    stateless(model)
    recorder = Recorder()
    values = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    fake = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with hooked(model), untouched(model), torch.no_grad(), _refused(model), fake, _Watch(model) as watched:
        empty = {name: torch.empty(x.shape, dtype=x.dtype) for name, x in values.items()}  # all on one device, be the model on meta
        step = PackedStep(model, recorder, lambda **said: torch.func.functional_call(model, empty, (), said))
        ids, positions, last = torch.empty(TOKENS, dtype=torch.long), torch.empty(TOKENS, dtype=torch.long), torch.empty(WANTED, dtype=torch.long)
        watched.storage = positions.untyped_storage()._cdata
        step(ids, positions, last)
    complete(model, len(recorder.layers), recorder.remembered)
    told = {n for number, layer in enumerate(recorder.layers) for n in (number, layer.window)}  # in the paged op, which was not run
    return Looked(tuple(recorder.layers), frozenset(watched.numbers | told))


class _Watch(TorchDispatchMode):
    """Collects numbers; refuses a forward that asks for the largest position of a step: its tokens are of many sequences, and what one gets would depend on the others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.model, self.storage = model, 0
        self.numbers: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in _LARGEST and args[0].untyped_storage()._cdata == self.storage:
            name = type(self.model).__name__
            raise InferenceError(
                f"{name} cannot be served: its forward asks for the largest of all positions ({func}), which in a step of many sequences is another one's\n"
                f"  fix: serve a model whose positions are each token's own (rope without lengths that it switches at), or use {name}.generate()"
            )
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            self.numbers.update([x] if type(x) is int else x.shape if isinstance(x, Tensor) else ())
        return out


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """What a forward puts into its modules goes again: it ran on no values."""
    before = [(m, dict(m.__dict__), {name: dict(m.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")}) for m in model.modules()]
    try:
        yield
    finally:
        for module, own, tables in before:
            for name, table in tables.items():
                own[name].clear()
                own[name].update(table)
            module.__dict__.clear()
            module.__dict__.update(own)


@contextmanager
def _refused(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except InferenceError:
        raise
    except Exception as error:
        raise InferenceError(f"{type(model).__name__} cannot be captured: {type(error).__name__}: {error}\n  fix: see whether its forward reads sizes or values of tensors in Python") from error


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

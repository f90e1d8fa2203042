"""Any Hugging Face class with a loss, small, with random weights, and a batch made to fit it.

Nothing here knows a model. A configuration is shrunk by what its fields mean (``deepseed.tiny_fields``), the batch follows from
the class's task and from what its ``forward`` takes (``deepseed.tiny_batch``), and the result is tried once, eagerly, before it
is handed out: where the sizes that the table gives disagree, the same class is shrunk in another way; where a length that the user says does, it is refused. What the user says wins;
what is left out follows from it (a width of 128 with 4 heads makes heads of 32).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from torch import nn

from deepseed.tiny_batch import ROWS, TinyError, task_of, tiny_batch
from deepseed.tiny_fields import TOKENS, WAYS, shrink

__all__ = ["TinyError", "shrink", "tiny_batch", "tiny_config", "tiny_model"]

SEED = 0
BATCH_WORDS = {"batch_size": ROWS, "sequence_length": TOKENS}  # said like fields, but of the batch
MOST_PARAMETERS = 30_000_000  # more is not small: another way of shrinking is tried


def tiny_model(name: str, said: Mapping[str, Any], *, meta: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The class ``name`` of transformers, in training mode, and a batch of ``batch_size`` rows x ``sequence_length`` tokens.

    ``meta``: parameters on the meta device, which have a shape and no memory; the batch is real. Raises TinyError.
    """
    cls = _class(name)
    rows, tokens = (_count(name, word, said.get(word, default)) for word, default in BATCH_WORDS.items())
    with _refusing(name, said):
        return _model(cls, said, rows, tokens, meta)


def _model(cls: Any, said: Mapping[str, Any], rows: int, tokens: int, meta: bool) -> tuple[nn.Module, dict[str, Any]]:
    fields = _decoder(cls) | {key: value for key, value in said.items() if key not in BATCH_WORDS}
    try:
        way = _way(cls)
    except TinyError as error:
        if error.final or not said:
            raise
        way = WAYS[0]  # what is said may be what it lacked
    model = _built(cls, tiny_config(cls.config_class, fields, tokens, way), meta)
    batch = tiny_batch(model, rows, tokens)
    if "sequence_length" in said and not meta:  # positions may be fewer
        with torch.random.fork_rng(devices=[]), torch.no_grad(), _quiet():
            copy.deepcopy(model)(**batch)
    return model, batch


def tiny_config(config_class: Any, said: Mapping[str, Any], tokens: int = TOKENS, way: str = WAYS[0]) -> Any:
    """An instance of ``config_class``; nested configurations are shrunk in the same way. Raises TinyError on an unknown field."""
    with _quiet():
        default = config_class()
        fields = default.to_dict()
    other_names = getattr(config_class, "attribute_map", None) or {}
    nested = {name: getattr(default, name, None) for name in getattr(config_class, "sub_configs", None) or {}}
    known = {*fields, *other_names}
    for name in said:
        if name not in known:
            near = get_close_matches(name, known, n=1, cutoff=0.5)
            raise TinyError(f"{config_class.__name__} has no field {name!r}\n  fix: " + (f"did you mean {near[0]}?" if near else f"name a field that transformers.{config_class.__name__} has"))
    own = {other_names.get(name, name): value for name, value in said.items()}
    plain = {key: value for key, value in fields.items() if key not in nested}
    out = shrink(plain, own, tokens, way, follows=lambda changed: _followers(config_class, plain, changed))
    for name, config in nested.items():
        given = own.get(name)
        if config is not None and hasattr(config, "to_dict") and (given is None or isinstance(given, Mapping)):
            out[name] = tiny_config(type(config), given or {}, tokens, way)
    with _quiet():
        config = config_class(**out)
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = getattr(config, "pad_token_id", None) or 0
    return config


def _followers(config_class: Any, defaults: Mapping[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that a configuration computes from ``changed`` by itself, with their new values; none where it cannot be made."""
    try:
        with _quiet():
            now = config_class(**changed).to_dict()
    except Exception:  # validators of configurations raise what they like
        return {}
    return {name: value for name, value in now.items() if name in defaults and name not in changed and value != defaults[name]}


def _count(name: str, word: str, value: Any) -> int:
    if not isinstance(value, int) or value < 1:
        raise TinyError(f"hf:{name}({word}={value!r}): {word} is no number of {'rows' if word == 'batch_size' else 'tokens'}\n  fix: {word}={BATCH_WORDS[word]}, or another whole number from 1")
    return value


@contextmanager
def _refusing(name: str, said: Mapping[str, Any]) -> Iterator[None]:
    """What a class, its configuration or its batch raises, as a TinyError: they raise what they like on a field that does not fit."""
    try:
        yield
    except TinyError:
        raise
    except Exception as error:
        call = f"hf:{name}" + (f"({', '.join(f'{key}={value!r}' for key, value in said.items())})" if said else "")
        change = f"give {' or '.join(said)} another value, or the fields that disagree with it too" if said else f"give fields that fit, as in hf:{name}(num_hidden_layers=4)"
        raise TinyError(f"{call} cannot be built: {_one_line(error)}\n  fix: {change}; or write a file target, path/to/file.py:name") from error


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


# building and trying -------------------------------------------------------------------------------------------------


@cache
def _way(cls: Any) -> str:
    """The first way of shrinking with which the class, with nothing said about it, can be built and has a loss."""
    first: Exception | None = None
    for way in WAYS:
        try:
            config = tiny_config(cls.config_class, _decoder(cls), TOKENS, way)
            size = sum(p.numel() for p in _built(cls, config, meta=True).parameters())
            if size > MOST_PARAMETERS:
                raise TinyError(f"{cls.__name__} would still have {size:,} parameters\n  fix: give smaller fields in a file target, path/to/file.py:name")
            model = _built(cls, config)
            batch = tiny_batch(model)
            with torch.random.fork_rng(devices=[]), torch.no_grad(), _quiet():
                out = copy.deepcopy(model)(**batch)
            if getattr(out, "loss", None) is None:
                raise TinyError(
                    f"{cls.__name__} has no loss: given {', '.join(batch)} it returns none\n"
                    "  fix: use a class with a head, such as one that ends in ForCausalLM, or write a file target with a loss_fn, path/to/file.py:name",
                    final=True,
                )
            return way
        except Exception as error:  # a model that does not fit its sizes raises what it likes
            if isinstance(error, TinyError) and error.final:
                raise
            first = first or error
    assert first is not None
    if isinstance(first, TinyError):
        raise first
    raise TinyError(
        f"{cls.__name__} cannot be made small: {_one_line(first)}\n"
        "  fix: write a file target that returns model and batch, path/to/file.py:name"
    ) from first


def _decoder(cls: Any) -> dict[str, Any]:
    """A class for causal language is a decoder, where its configuration asks."""
    with _quiet():
        fields = cls.config_class().to_dict()
    asks = task_of(cls.__name__) == "CAUSAL_LM" and fields.get("is_decoder") is False and not fields.get("is_encoder_decoder")
    return {"is_decoder": True} if asks else {}


def _built(cls: Any, config: Any, meta: bool = False) -> nn.Module:
    if getattr(config, "pad_token_id", 0) is None and task_of(cls.__name__) != "CAUSAL_LM":
        config.pad_token_id = 0  # others want to know where a row ends
    with torch.random.fork_rng(devices=[]), _quiet(), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(SEED)
        try:
            model: nn.Module = cls(config)
        except Exception as error:
            raise TinyError(
                f"{cls.__name__} cannot be built from this tiny {type(config).__name__}: {_one_line(error)}\n"
                f"  fix: give the fields that disagree, as in hf:{cls.__name__}(num_hidden_layers=4), or write a file target, path/to/file.py:name"
            ) from error
    return model.train()


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's remarks on defaults that we are about to replace are left out."""
    from transformers.utils import logging as library

    logging: Any = library
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _class(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise TinyError(f"hf:{name} needs transformers ({error})\n  fix: pip install 'deepseed[hf]'") from None
    cls = getattr(transformers, name, None)
    if not isinstance(cls, type):
        near = next((n for n in get_close_matches(name, dir(transformers), n=20, cutoff=0.5) if _is_model(n)), None)
        raise TinyError(f"transformers has no class {name!r}\n  fix: " + (f"did you mean {near}?" if near else "name a model class, as in hf:LlamaForCausalLM"))
    if issubclass(cls, transformers.PretrainedConfig):
        raise TinyError(f"{name} of transformers is a configuration, no model\n  fix: name a model class, as in hf:LlamaForCausalLM")
    if not _is_model(name):
        raise TinyError(f"{name} of transformers is no model: it has no configuration class\n  fix: name a model class, as in hf:LlamaForCausalLM")
    return cls


def _is_model(name: str) -> bool:
    """Whether a name of transformers is a class that is built from a configuration; what cannot be imported here is none."""
    import transformers

    try:
        cls = getattr(transformers, name)
        return isinstance(cls, type) and getattr(cls, "config_class", None) is not None
    except (AttributeError, ImportError, RuntimeError):  # each module is loaded when it is asked for
        return False

"""Outputs that follow a JSON schema, a regex, a list of choices or a grammar, by llguidance (optional: ``pip install deepseed[constrained]``).

The request carries its grammar in its sampling parameters. In each draw only those tokens may come with which some text of the grammar goes on; the
model's end token may where the text is complete. An output that ends by its length is the beginning of a text of the grammar.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import numpy
from numpy.typing import NDArray

from deepseed.inference.sampling import SamplingParams
from deepseed.serve.errors import ServeError
from deepseed.serve.protocol import Asked

COMPACT = {"whitespace_flexible": False}  # else a model may go on with spaces between two words of JSON until its length ends it


@dataclass(frozen=True)
class Grammar:
    """A form of outputs, as llguidance writes it."""

    text: str

    def follow(self, tokenizer: Any, ends: frozenset[int], vocabulary: int) -> Followed:
        return Followed(self.text, compiled_tokenizer(tokenizer, ends), ends, vocabulary)


def grammar_of(asked: Asked) -> str | None:
    """llguidance's form of what the request wants its outputs to be; None where it does not say."""
    wanted = asked.structured_outputs
    format_ = asked.response_format
    if format_ is not None and format_.type == "text":
        format_ = None
    said = [*([format_] if format_ is not None else ()), *([v for v in (wanted.json_, wanted.regex, wanted.choice, wanted.grammar) if v is not None] if wanted is not None else ())]
    if wanted is not None and format_ is None and not said:
        raise ServeError(400, "structured_outputs needs one of json, regex, choice, grammar", param="structured_outputs")
    if not said:
        return None
    if len(said) > 1:
        raise ServeError(400, f"{len(said)} forms of one output are asked for; give one", param="structured_outputs" if wanted is not None else "response_format")
    matcher = _library("response_format" if format_ is not None else "structured_outputs").LLMatcher
    try:
        if format_ is not None:
            if format_.type == "json_schema" and (format_.json_schema is None or format_.json_schema.schema_ is None):
                raise ServeError(400, "response_format of type json_schema needs json_schema.schema", param="response_format")
            schema = format_.json_schema.schema_ if format_.type == "json_schema" and format_.json_schema is not None else {"type": "object"}
            return _text(matcher.grammar_from_json_schema(json.dumps(schema), overrides=COMPACT))
        assert wanted is not None
        if wanted.json_ is not None:
            return _text(matcher.grammar_from_json_schema(wanted.json_ if isinstance(wanted.json_, str) else json.dumps(wanted.json_), overrides=COMPACT))
        if wanted.regex is not None:
            return _text(matcher.grammar_from_regex(wanted.regex))
        if wanted.choice is not None:
            return _text(matcher.grammar_from_lark("start: " + " | ".join(json.dumps(c) for c in wanted.choice)))
        return _text(matcher.grammar_from_lark(wanted.grammar))
    except (ValueError, RecursionError) as error:
        raise ServeError(400, f"the form of the output: {error}"[:500], param="response_format" if format_ is not None else "structured_outputs") from None


def constrained(params: SamplingParams, grammar: str, tokenizer: Any, ends: frozenset[int]) -> SamplingParams:
    """The same with its grammar, which is compiled once here to see whether it can be."""
    if not ends:
        raise ServeError(400, "the model has no end token, so an output cannot be complete; set eos_token_id in its generation config", param="response_format")
    if params.ignore_eos or params.min_tokens:
        raise ServeError(400, "ignore_eos and min_tokens contradict the form of the output, which says where it ends", param="ignore_eos" if params.ignore_eos else "min_tokens")
    wrong = _library("response_format").LLMatcher.validate_grammar(grammar, compiled_tokenizer(tokenizer, ends))
    if wrong and not wrong.startswith("WARNING"):
        raise ServeError(400, f"the form of the output cannot be compiled: {wrong}"[:500], param="response_format")
    return replace(params, form=Grammar(grammar))


class Followed:
    """How far one output has come in its grammar."""

    def __init__(self, grammar: str, tokenizer: Any, ends: frozenset[int], vocabulary: int) -> None:
        self.matcher = _library("response_format").LLMatcher(tokenizer, grammar, log_level=0)
        self.ends, self.vocabulary, self.read = ends, vocabulary, list[int]()

    def allowed(self, output: Sequence[int]) -> NDArray[numpy.bool_]:
        same = next((n for n, (a, b) in enumerate(zip(self.read, output, strict=False)) if a != b), min(len(self.read), len(output)))
        if same < len(self.read):  # a draft was wrong
            self.matcher.rollback(len(self.read) - same)
        self.read, new = self.read[:same], list(output[same:])
        may = numpy.zeros(self.vocabulary, dtype=bool)
        taken = self.matcher.try_consume_tokens(new) if new else 0
        self.read += new[:taken]
        if taken == len(new) and not self.matcher.is_stopped() and not self.matcher.is_error():
            bits = numpy.unpackbits(numpy.frombuffer(self.matcher.compute_bitmask(), dtype=numpy.uint8), bitorder="little")[: self.vocabulary]
            may[: len(bits)] = bits
        if not may.any():
            may[[e for e in self.ends if e < self.vocabulary]] = True
        return may


_TOKENIZERS: dict[tuple[int, frozenset[int]], tuple[Any, Any]] = {}  # by the id of a tokenizer, which is kept so that the id stays its own
_LOCK = Lock()


def compiled_tokenizer(tokenizer: Any, ends: frozenset[int]) -> Any:
    """llguidance's form of a tokenizer, made once."""
    with _LOCK:
        key = (id(tokenizer), ends)
        if key not in _TOKENIZERS:
            from llguidance.hf import from_tokenizer

            try:
                _TOKENIZERS[key] = (tokenizer, from_tokenizer(tokenizer, eos_token=sorted(ends)))
            except ValueError as error:
                raise ServeError(400, f"the model's tokenizer cannot be constrained: {error}"[:500], param="response_format") from None
        return _TOKENIZERS[key][1]


def _library(param: str) -> Any:
    try:
        import llguidance
    except ImportError:
        raise ServeError(400, "the form of an output needs llguidance on the server: pip install 'deepseed[constrained]'", param=param, code="unsupported_parameter") from None
    return llguidance


def _text(grammar: Any) -> str:
    return str(grammar)

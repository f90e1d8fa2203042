"""Outputs that follow a JSON schema, a regex, a list of choices or a grammar, by llguidance (optional: ``pip install deepseed[constrained]``).

The request carries its grammar in its sampling parameters. In each draw only those tokens may come with which some text of the grammar goes on; the
model's end token may where the text is complete. An output that ends by its length, or by a stop string of the request, is the beginning of a text of the grammar.

A grammar is bounded in characters, and in the processor time of its masks: the first few are made when it is compiled, where no step waits, and a grammar that
fails there is refused; one that fails later ends its output by an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from threading import Lock
from time import thread_time
from typing import Any

import numpy
from numpy.typing import NDArray

from deepseed.inference.errors import InferenceError
from deepseed.inference.sampling import SamplingParams
from deepseed.serve.errors import ServeError
from deepseed.serve.protocol import Asked

COMPACT = {"whitespace_flexible": False}  # else a model may go on with spaces between two words of JSON until its length ends it
MOST_CHARACTERS, MOST_OF_CHOICES, MOST_OF_CHOICE = 1 << 17, 1 << 19, 1 << 12  # of a grammar, of all choices together, of one
MOST_STATES = 50_000  # of a lexer: one or two KiB each
MOST_SECONDS, MOST_A_TOKEN = 0.25, 0.02  # of an output's masks, in their thread alone: at first, and on the average
EXACT = 1 << 53  # integers up to it are floats, which llguidance has them as
PROBED = 4  # tokens of a text that is tried at once


@dataclass
class Grammar:
    """A form of outputs, as llguidance writes it; compiled on first use, and anew in another process."""

    text: str
    compiled: Any = field(default=None, compare=False, repr=False)

    def follow(self, tokenizer: Any, ends: frozenset[int], vocabulary: int) -> Followed:
        if self.compiled is None:
            self.compiled = matcher(self.text, tokenizer, ends)
        return Followed(self.compiled.deep_copy(), ends, vocabulary)

    def __getstate__(self) -> dict[str, Any]:
        return {"text": self.text, "compiled": None}


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
    param = "response_format" if format_ is not None else "structured_outputs"
    if len(said) > 1:
        raise ServeError(400, f"{len(said)} forms of one output are asked for; give one", param="structured_outputs" if wanted is not None else "response_format")
    library = _library(param).LLMatcher
    try:
        if format_ is not None:
            if format_.type == "json_schema" and (format_.json_schema is None or format_.json_schema.schema_ is None):
                raise ServeError(400, "response_format of type json_schema needs json_schema.schema", param="response_format")
            return _schema(format_.json_schema.schema_ if format_.type == "json_schema" and format_.json_schema is not None else {"type": "object"}, param)
        assert wanted is not None
        if wanted.json_ is not None:
            return _schema(json.loads(wanted.json_) if isinstance(wanted.json_, str) else wanted.json_, param)
        if wanted.choice is not None:
            return _choice(wanted.choice)
        of, text = (library.grammar_from_regex, wanted.regex) if wanted.regex is not None else (library.grammar_from_lark, wanted.grammar)
        return str(of(_short(text or "", param)))
    except (ValueError, RecursionError) as error:
        raise ServeError(400, f"the form of the output: {error}"[:500], param=param) from None


def _schema(schema: Any, param: str) -> str:
    exact = _exact(schema, param)
    return str(_library(param).LLMatcher.grammar_from_json_schema(_short(json.dumps(exact), param), overrides=COMPACT))


def _choice(choices: list[str]) -> str:
    """One lexeme, for a rule of so many alternatives would have them all under way at once."""
    param = "structured_outputs"
    size, longest = sum(map(len, choices)), max(map(len, choices))
    if size > MOST_OF_CHOICES or longest > MOST_OF_CHOICE:
        raise ServeError(400, f"choices of {size} characters, the longest of {longest}; at most {MOST_OF_CHOICES} together and {MOST_OF_CHOICE} each", param=param)
    said = " | ".join(json.dumps(c) for c in choices if c)
    lark = (f"start: CHOICE{'?' if '' in choices else ''}\nCHOICE: " + said) if said else 'start: ""'
    return str(_library(param).LLMatcher.grammar_from_lark(lark))


def _short(text: str, param: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise ServeError(400, f"a form of {len(text)} characters; at most {MOST_CHARACTERS}", param=param)
    return text


def _exact(schema: Any, param: str) -> Any:
    """The schema with bounds no wider than what is exact. ServeError where it asks for numbers beyond that."""
    if isinstance(schema, list):
        return [_exact(s, param) for s in schema]
    if not isinstance(schema, dict):
        return schema
    out = dict[str, Any]()
    for key, value in schema.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in ("const", "enum"):
            far = next((n for n in _leaves(value) if isinstance(n, int) and abs(n) > EXACT), None)
            out[key] = value
            if (longest := max((len(s) for s in _leaves(value) if isinstance(s, str)), default=0)) > MOST_OF_CHOICE:
                raise ServeError(400, f"the form of the output: {key} has a text of {longest} characters; at most {MOST_OF_CHOICE}", param=param)
        elif number and key in ("minimum", "exclusiveMinimum"):
            far, out[key] = value if value > EXACT else None, max(value, -EXACT)
        elif number and key in ("maximum", "exclusiveMaximum"):
            far, out[key] = value if value < -EXACT else None, min(value, EXACT)
        elif number and key == "multipleOf":
            far, out[key] = value if value > EXACT else None, value
        else:
            far, out[key] = None, _exact(value, param)
        if far is not None:
            raise ServeError(400, f"the form of the output: {key} {str(far)[:40]} lies beyond 2**53, where numbers are not exact", param=param)
    return out


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def constrained(params: Sequence[SamplingParams], grammar: str, tokenizer: Any, ends: frozenset[int], vocabulary: int, param: str) -> list[SamplingParams]:
    """The same with their grammar, compiled, and tried for some tokens. This may take seconds."""
    if not ends:
        raise ServeError(400, "the model has no end token, so an output cannot be complete; set eos_token_id in its generation config", param=param)
    for p in params:
        if p.ignore_eos or p.min_tokens:
            raise ServeError(400, "ignore_eos and min_tokens contradict the form of the output, which says where it ends", param="ignore_eos" if p.ignore_eos else "min_tokens")
    try:
        form = Grammar(grammar, matcher(grammar, tokenizer, ends))
        followed, output = Followed(form.compiled, ends, vocabulary), list[int]()
        for _ in range(PROBED):
            may = followed.allowed(output).nonzero()[0]
            if ends & set(may[:64].tolist()) or (len(may) and int(may[0]) in ends):
                break
            output.append(int(may[0]))
        form.compiled.reset()  # what its lexer has learned stays
    except InferenceError as error:
        raise ServeError(400, str(error)[:500], param=param) from None
    return [replace(p, form=form) for p in params]


def matcher(grammar: str, tokenizer: Any, ends: frozenset[int]) -> Any:
    """At the beginning of the grammar. Raises InferenceError where it cannot be compiled."""
    library = _library("response_format")
    limits = library.LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
    made = library.LLMatcher(compiled_tokenizer(tokenizer, ends), grammar, log_level=0, limits=limits)
    if made.is_error():
        raise InferenceError(f"the form of the output cannot be compiled: {made.get_error()}")
    return made


class Followed:
    """How far one output has come in its grammar."""

    def __init__(self, matcher: Any, ends: frozenset[int], vocabulary: int) -> None:
        self.matcher, self.ends, self.vocabulary, self.read = matcher, ends, vocabulary, list[int]()
        self.spent = 0.0  # seconds

    def allowed(self, output: Sequence[int]) -> NDArray[numpy.bool_]:
        """Raises InferenceError where the grammar goes beyond the library's limits, or leads nowhere."""
        began = thread_time()
        same = next((n for n, (a, b) in enumerate(zip(self.read, output, strict=False)) if a != b), min(len(self.read), len(output)))
        if same < len(self.read):  # a draft was wrong
            self.matcher.rollback(len(self.read) - same)
        self.read, new = self.read[:same], list(output[same:])
        may = numpy.zeros(self.vocabulary, dtype=bool)
        taken = self.matcher.try_consume_tokens(new) if new else 0
        self.read += new[:taken]
        self._check()
        if taken < len(new) or self.matcher.is_stopped():  # a draft that will not be taken, or all is said
            may[[e for e in self.ends if e < self.vocabulary]] = True
            return may
        bits = numpy.unpackbits(numpy.frombuffer(self.matcher.compute_bitmask(), dtype=numpy.uint8), bitorder="little")[: self.vocabulary]
        self._check()
        may[: len(bits)] = bits
        if not may.any():
            raise InferenceError("the form of the output leads nowhere: no token of the model goes on with it")
        self.spent += thread_time() - began
        if self.spent > MOST_SECONDS + MOST_A_TOKEN * len(output):
            raise InferenceError(f"the form of the output is too large: {self.spent:.2f} s for {len(output) + 1} tokens to see which may come, of at most {MOST_A_TOKEN:g} s a token")
        return may

    def _check(self) -> None:
        if self.matcher.is_error():
            said = self.matcher.get_error().splitlines()[0]
            raise InferenceError(f"the form of the output: {'no text has it' if said == 'NoExtensionBias' else said}")


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


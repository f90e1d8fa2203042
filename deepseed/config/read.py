"""The file as a dict: a path, a dict, JSON text or its base64; comments and a comma too many are fine, a key that is said twice is not."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deepseed.config.fields import ConfigError, Section
from deepseed.config.model import Config

Source = str | os.PathLike[str] | Mapping[str, Any]
_COMMENT = re.compile(r'("(?:\\.|[^"\\])*")|//[^\n]*|\#[^\n]*|/\*.*?\*/', re.DOTALL)
_COMMA = re.compile(r'("(?:\\.|[^"\\])*")|,(?=\s*[}\]])')


def read(source: Source) -> Config:
    """Parse and check. Raises ConfigError naming every key that is unknown (with the nearest known one) or has an unfit value."""
    raw, name = raw_config(source)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{name}: " + "\n".join(_lines(error.errors(), raw))) from None


def raw_config(source: Source) -> tuple[dict[str, Any], str]:
    """The dict, and what to call it in messages."""
    if isinstance(source, Mapping):
        return dict(source), "config"
    if not isinstance(source, str | os.PathLike):
        raise ConfigError(f"a config is a path, a dict or a string, not {type(source).__name__}")
    text = os.fspath(source)
    if "{" not in text and len(text) < 4096 and Path(text).exists():
        try:
            return parse(Path(text).read_text(), text), text
        except OSError as error:
            raise ConfigError(f"{text}: {error.strerror}") from None
    if "{" in text:
        return parse(text, "config"), "config"
    try:
        decoded = base64.urlsafe_b64decode(text.encode()).decode()
    except (binascii.Error, UnicodeError, ValueError):
        decoded = ""
    if "{" not in decoded:
        raise ConfigError(f"{text!r} is no file, no JSON and no base64 of JSON\n  fix: a path to a ds_config.json, or a dict")
    return parse(decoded, "config"), "config"


def parse(text: str, name: str) -> dict[str, Any]:
    """JSON with comments (``//``, ``#``, ``/* */``) and trailing commas. Raises ConfigError with the line, or naming a key said twice."""
    bare = _COMMENT.sub(lambda m: m.group(1) or re.sub(r"[^\n]", " ", m.group()), text)
    bare = _COMMA.sub(lambda m: m.group(1) or " ", bare)
    try:
        found = json.loads(bare, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{name} holds {type(found).__name__}, an object of keys is expected")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
    if twice:
        raise ConfigError(f"Found duplicate keys in DeepSpeed config: {', '.join(twice)}\n  fix: say each once")
    return dict(pairs)


def _lines(errors: Iterable[Any], raw: Mapping[str, Any]) -> list[str]:
    """Findings of pydantic in our words, a line a key: what each member of a union says stands behind one another."""
    found: dict[str, list[str]] = {}
    for error in errors:
        path = [str(part) for part in error["loc"]]
        if error["type"] == "extra_forbidden":
            found[f"unknown key {'.'.join(path)!r}{suggestion(path)}"] = []
            continue
        keys: list[str] = []
        at: Any = raw
        for part in path:
            if not isinstance(at, Mapping) or part not in at:
                break
            keys.append(part)
            at = at[part]
        said, message = json.dumps(at, default=str), error["msg"].removeprefix("Value error, ")
        found.setdefault(f"{'.'.join(keys) or 'config'} is {said if len(said) < 80 else said[:77] + '...'}: ", []).append(f"{message[:1].lower()}{message[1:]}")
    return [place + "; or ".join(messages) for place, messages in found.items()]


def suggestion(path: list[str]) -> str:
    """The nearest known key of the same section, else of any other."""
    known = dict(known_keys(Config))
    here = [k for k in known if k.rpartition(".")[0] == ".".join(path[:-1])]
    near = get_close_matches(path[-1].lower(), [k.rpartition(".")[2] for k in here], n=1, cutoff=0.6)
    if near:
        return f": did you mean {'.'.join([*path[:-1], near[0]])!r}?"
    elsewhere = [k for k in known if k.rpartition(".")[2] == path[-1]]
    if elsewhere:
        return f": it belongs into {elsewhere[0].rpartition('.')[0] or 'the top'!r}"
    near = get_close_matches(path[-1].lower(), [k.rpartition(".")[2] for k in known], n=1, cutoff=0.8)
    return f": did you mean {next(k for k in known if k.rpartition('.')[2] == near[0])!r}?" if near else ""


def known_keys(section: type[Section], prefix: str = "") -> list[tuple[str, Any]]:
    """(path, field) of every key that a config can have."""
    from deepseed.config.verdicts import sections_of

    out: list[tuple[str, Any]] = []
    for name, field in section.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        out.append((key, field))
        for inner in sections_of(field.annotation):
            out += known_keys(inner, f"{key}.")
    return out

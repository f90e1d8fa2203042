"""What each token is: its bytes within a text, and where tokens begin in one.

A token may hold a part of a character, and a tokenizer's own ``decode`` of it alone then says little; so bytes are read from its vocabulary, as its decoder would.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

SPACE = "\u2581"  # how vocabularies of SentencePiece write it


class Tokens:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.raw, self.text = lru_cache(1 << 16)(self._raw), lru_cache(1 << 16)(self._text)
        self._added: dict[int, Any] = dict(getattr(tokenizer, "added_tokens_decoder", {}))
        self.special = frozenset(tokenizer.all_special_ids) | {n for n, t in self._added.items() if t.special}
        decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
        kinds = set(_kinds(json.loads(decoder.__getstate__()))) if decoder is not None else set[str]()
        self._bytes = {c: b for b, c in byte_level().items()} if "ByteLevel" in kinds else {}
        self._fallback, self._spaces = "ByteFallback" in kinds, bool(kinds & {"Metaspace", "Replace"})

    def _raw(self, token: int) -> bytes:
        name = str(self._added[token]) if token in self._added else self._tokenizer.convert_ids_to_tokens(token)
        if name is None:
            return b""
        if token in self._added:
            return name.encode()
        if self._bytes and all(c in self._bytes for c in name):
            return bytes(self._bytes[c] for c in name)
        if self._fallback and (byte := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", name)):
            return bytes.fromhex(byte[1])
        if self._spaces and SPACE in name:
            return str(name).replace(SPACE, " ").encode()
        text: str = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.encode()

    def _text(self, token: int) -> str:
        return self.raw(token).decode("utf-8", "replace")


class Place:
    """Where the next token begins in a text that begins with ``known``, in characters; a part of a character begins where that does."""

    def __init__(self, tokens: Tokens, at: int = 0, known: str = "") -> None:
        self.tokens, self.at, self.known = tokens, at, known
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> int:
        at, raw = self.at, self.tokens.raw(token)
        if token in self.tokens.special and not self.known.startswith(raw.decode("utf-8", "replace"), at):
            raw = b""  # texts leave it out, but where the user wrote it
        elif at == 0 and self.known and raw.startswith(b" ") and not self.known.startswith(" "):
            raw = raw[1:]
        if raw and self._decoder.getstate()[0] and not 0x80 <= raw[0] < 0xC0:
            at += 1  # what was begun is no character
        self.at += len(self._decoder.decode(raw))
        return at


def byte_level() -> dict[int, str]:
    """How a byte-level vocabulary writes each byte: itself where it is visible, else a letter from 256 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def _kinds(decoder: Any) -> Iterator[str]:
    if decoder:
        yield decoder["type"]
        for each in decoder.get("decoders", ()):
            yield from _kinds(each)

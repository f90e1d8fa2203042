"""The bytes of tokens and where they begin, of vocabularies of both kinds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from deepseed.inference.detokenize import TextOf
from deepseed.serve.tokens import Place, Tokens
from tests.serving import tokenizer

TEXTS = st.text(st.sampled_from("aé日😀 \n\u2581<end>"), min_size=1, max_size=12)
BYTE_LEVEL = tokenizer()


def sentence_piece() -> Any:
    """As Llama 2 has it: spaces as a letter of their own, bytes where there is no token, and no space at the beginning of a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", "a", "\u2581a", "é", "aa"]
    made: Any = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [("\u2581", "a"), ("a", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_bytes_of_tokens_are_those_of_the_text(text: str) -> None:
    tokens = Tokens(BYTE_LEVEL)
    ids = BYTE_LEVEL(text)["input_ids"]
    assert b"".join(map(tokens.raw, ids)) == text.encode()
    place, at = Place(tokens, 0, text), 0
    for token in ids:
        assert place.add(token) == len(text.encode()[:at].decode("utf-8", "ignore"))
        at += len(tokens.raw(token))
    assert place.at == len(text)


@pytest.mark.parametrize("text", ["a aa é", "日a😀", "aé 日"])
def test_a_vocabulary_with_spaces_and_bytes(text: str) -> None:
    made = sentence_piece()
    tokens, ids = Tokens(made), made(text)["input_ids"]
    assert b"".join(map(tokens.raw, ids)) == b" " + text.encode()
    place = Place(tokens, 0, text)
    offsets = [place.add(t) for t in ids]
    assert place.at == len(text) == len(made.decode(ids)) and offsets[0] == 0
    for token, at in zip(ids, offsets, strict=True):
        if "\ufffd" not in tokens.text(token) and at:
            assert text[at:].startswith(tokens.text(token))


def test_outputs_and_special_tokens() -> None:
    """What comes after a prompt counts from there; a special token is no part of the text, but where the prompt has it written."""
    tokens, end = Tokens(BYTE_LEVEL), BYTE_LEVEL.eos_token_id
    ids = [*BYTE_LEVEL("日")["input_ids"], end, *BYTE_LEVEL("ok")["input_ids"]]
    text = TextOf(BYTE_LEVEL, [])
    place = Place(tokens)
    for token in ids:
        at = place.add(token)
        text.add(token)
    text.end()
    assert place.at == len(text.text) == 3 and at <= 2
    written = Place(tokens, 0, "a<end>b")
    assert [written.add(t) for t in BYTE_LEVEL("a<end>b")["input_ids"]] == [0, 1, 6] and written.at == 7

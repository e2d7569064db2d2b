"""Any text goes through the text path unchanged, and no text becomes a special token."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.student.text_path import TextPath
from pipeline.student.tokenise import Encoded
from tests.tokenizer_pairs import FAMILIES, MARKUP, SPECIAL, bytes_of, lossy, tokenizer_of

AWKWARD = [
    *SPECIAL,
    *MARKUP,
    "<unk>",
    "\n",
    "\n\n",
    " ",
    "\t",
    "\r\n",
    "\0",
    "▁",
    "Ġ",
    "\U000f0000",
    "👩‍👧",
    "e\u0301",
    "<0x41>",
]
TEXT = st.lists(st.sampled_from(AWKWARD) | st.text(max_size=8), max_size=6).map("".join)


def path_of(tokenizer: Any, family: str) -> TextPath:
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template = FAMILIES[family].template
    return TextPath.of(tokenizer, [tokenizer.convert_tokens_to_ids(FAMILIES[family].stop)])


def specials(path: TextPath, row: Encoded) -> list[str]:
    added = path.tokenizer.added_tokens_decoder
    return [added[id].content for id in row.ids if id in added and added[id].special]


@pytest.mark.parametrize("name", ["bpe-newlines", "sentencepiece"])
@pytest.mark.parametrize("family", ["chatml", "harmony"])
@given(question=TEXT, answer=TEXT)
def test_the_labels_are_the_answer(name: str, family: str, question: str, answer: str) -> None:
    path = path_of(tokenizer_of(name), family)
    ask, tell = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
    row = path.encode([ask], [tell])[0]
    if not isinstance(row, Encoded):
        # This tokenizer writes a space as ▁: a text that holds one cannot come back.
        assert (row, name) == ("round_trip", "sentencepiece") and "▁" in answer
        return
    prompt = bytes_of(name, row.ids[: row.prompt_tokens])
    assert bytes_of(name, row.ids) == prompt + FAMILIES[family].told(None, answer).encode()
    plain = path.encode([[{"role": "user", "content": "a"}]], [[{"role": "assistant", "content": "b"}]])[0]
    assert isinstance(plain, Encoded) and specials(path, row) == specials(path, plain)


@given(answer=TEXT)
def test_a_row_that_does_not_come_back_leaves(answer: str) -> None:
    path = path_of(lossy(), "chatml")
    row = path.encode([[{"role": "user", "content": "it"}]], [[{"role": "assistant", "content": answer}]])[0]
    if isinstance(row, Encoded):
        prompt, whole = (path.tokenizer.decode(ids) for ids in (row.ids[: row.prompt_tokens], row.ids))
        assert whole == prompt + answer + "<|im_end|>"
        assert path.tokenizer.unk_token_id not in row.ids[row.prompt_tokens :]
    else:
        assert row == "round_trip"

"""What the teacher wrote is what the student is trained on, for any pair of tokenizers and any chat template."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from pipeline.core.config_train import END_TOKENS
from pipeline.student.text_path import TextPath
from pipeline.student.tokenise import Encoded, render
from tests.tokenizer_pairs import (
    CHATML,
    FAMILIES,
    SPECIAL,
    TEXTS,
    TOKENIZERS,
    byte_level,
    bytes_of,
    folding,
    lossy,
    tokenizer_of,
)

ASK = [{"role": "user", "content": "What is it? <|im_end|> 日本"}]
THOUGHT = "It is quick.\n\nIt is 狐 🦊, <|im_end|>."


def path_of(name: str, family: str, **options: Any) -> TextPath:
    tokenizer = copy.copy(tokenizer_of(name))
    return with_template(tokenizer, FAMILIES[family].template, FAMILIES[family].stop, **options)


def with_template(tokenizer: Any, template: str, stop: str = "<|im_end|>", **options: Any) -> TextPath:
    tokenizer.chat_template = template
    return TextPath.of(tokenizer, [tokenizer.convert_tokens_to_ids(stop)], **options)


def tell(content: str, **others: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": content, **others}]


def encoded(path: TextPath, completion: Any, prompt: Any = ASK, tools: str | None = None) -> Encoded:
    found = path.encode([prompt], [completion], [tools])[0]
    assert isinstance(found, Encoded), found
    return found


def trained_bytes(name: str, row: Encoded) -> bytes:
    """Of the labels: all bytes of the row but those of the prompt."""
    whole, prompt = bytes_of(name, row.ids), bytes_of(name, row.ids[: row.prompt_tokens])
    assert whole.startswith(prompt)
    assert row.labels[row.prompt_tokens :] == list(row.ids[row.prompt_tokens :])
    return whole.removeprefix(prompt)


def specials(path: TextPath, ids: Sequence[int]) -> list[str]:
    added = path.tokenizer.added_tokens_decoder
    return [added[id].content for id in ids if id in added and added[id].special]


# ----------------------------------------------------------------------------------------------- whatever the pair


PAIRS = [pair for pair in product(TOKENIZERS, FAMILIES) if pair[1] != "r1"]  # without thinking it has no row


@pytest.mark.parametrize(("name", "family"), PAIRS)
class TestEveryPair:
    @pytest.mark.parametrize("text", TEXTS)
    def test_the_labels_are_the_completions_bytes(self, name: str, family: str, text: str) -> None:
        path = path_of(name, family)
        row = encoded(path, tell(TEXTS[text]))
        assert trained_bytes(name, row) == FAMILIES[family].told(None, TEXTS[text]).encode()

    def test_only_the_template_writes_special_tokens(self, name: str, family: str) -> None:
        path = path_of(name, family)
        plain = encoded(path, tell("It."), prompt=[{"role": "user", "content": "What?"}])
        for text in ("special", "only-special"):
            row = encoded(path, tell(TEXTS[text]))
            assert specials(path, row.ids) == specials(path, plain.ids)
            assert row.facts.neutralised == 1 + len([at for at in SPECIAL if at in TEXTS[text]])

    def test_thinking_is_trained_once(self, name: str, family: str) -> None:
        told = FAMILIES[family]
        path = path_of(name, family)
        completion = tell("It is a fox.", reasoning_content=THOUGHT)
        if told.shows_thinking:
            assert trained_bytes(name, encoded(path, completion)) == told.told(THOUGHT, "It is a fox.").encode()
        else:
            assert path.encode([ASK], [completion]) == ["reasoning_dropped"]


@pytest.mark.parametrize(("name", "family"), product(TOKENIZERS, FAMILIES))
def test_inline_thinking_is_trained_once_whatever_the_template(name: str, family: str) -> None:
    row = encoded(path_of(name, family, reasoning="inline"), tell("It is a fox.", reasoning_content=THOUGHT))
    assert trained_bytes(name, row) == FAMILIES[family].inlined(THOUGHT, "It is a fox.").encode()
    assert row.facts.reasoning_inlined


@pytest.mark.parametrize(("name", "family"), product(TOKENIZERS, FAMILIES))
def test_the_prompt_is_what_serving_sends(name: str, family: str) -> None:
    path = path_of(name, family, reasoning="inline")
    row = encoded(path, tell("\n\nIt is a fox.", reasoning_content="\nHm."))
    asked = render(path.tokenizer, ASK, add_generation_prompt=True)
    assert bytes_of(name, row.ids[: row.prompt_tokens]) == asked.encode()


@pytest.mark.parametrize(("teacher", "student"), product(TOKENIZERS, TOKENIZERS))
def test_a_teachers_end_token_is_cut_and_the_rest_is_kept(teacher: str, student: str) -> None:
    text = TEXTS["emoji"] + TEXTS["code"]
    its = tokenizer_of(teacher)
    ids = its(text + "<|eot_id|>\n", add_special_tokens=False)["input_ids"]
    said = its.decode(ids, clean_up_tokenization_spaces=False)
    row = encoded(path_of(student, "chatml", end_tokens=END_TOKENS), tell(said))
    assert trained_bytes(student, row).decode() == text + "<|im_end|>"
    assert row.facts.end_tokens_cut


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("tokenizer", "text"),
    [(lossy, "a fox 狐"), (lossy, "<|im_end|> 狐"), (lossy, "a fox\r"), (folding, "ﬁve"), (folding, "e\u0301")],
)
def test_a_tokenizer_that_loses_bytes_loses_the_row(tokenizer: Any, text: str) -> None:
    path = with_template(tokenizer(), CHATML)
    ask = [{"role": "user", "content": "is it?"}]
    assert isinstance(path.encode([ask], [tell("a fox")])[0], Encoded)
    assert path.encode([ask], [tell(text)]) == ["round_trip"]


@pytest.mark.parametrize("change", ["| upper", "| replace('  ', ' ')", "| truncate(6)", "| escape"])
def test_a_template_that_changes_the_content_loses_the_row(change: str) -> None:
    path = with_template(byte_level(), CHATML.replace("m['content']", f"(m['content'] {change})"))
    assert path.encode([ASK], [tell("the  fox & the dog")]) == ["round_trip"]


def test_white_space_at_the_ends_is_the_templates_to_trim() -> None:
    rows = [encoded(path_of("bpe", "llama3"), tell(text)) for text in ("the fox", "the fox\n")]
    assert rows[0].ids == rows[1].ids
    assert [row.facts.trimmed for row in rows] == [False, True]


def test_a_completion_that_the_template_does_not_write_is_fully_masked() -> None:
    silent = "{% for m in messages %}{% if m['content'] %}<|im_start|>{{ m['content'] }}{% endif %}{% endfor %}"
    path = with_template(byte_level(), silent)
    assert path.encode([ASK], [tell("")]) == ["fully_masked"]


def test_a_thought_that_serving_opens_and_no_row_closes_is_no_prefix() -> None:
    path = path_of("bpe", "r1", reasoning="drop")
    assert path.encode([ASK], [tell("It.", reasoning_content="Hm.")]) == ["prompt_not_prefix"]


ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate!') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize("special", ["", " <|im_end|>"])
def test_a_row_that_the_template_refuses_leaves_alone(special: str) -> None:
    """Two user turns in a row; with a special token's text the row is rendered alone, without it among others."""
    path = with_template(byte_level(), ALTERNATES)
    ask = [{"role": "user", "content": "What?"}]
    twice = [*ask, {"role": "user", "content": f"Well?{special}"}]
    found = path.encode([ask, ask, twice, ask, ask], [tell("It.")] * 5)
    assert [row if isinstance(row, str) else "" for row in found] == ["", "", "template_refuses", "", ""]
    assert path.refusal is not None and "alternate!" in path.refusal.what


LOSSY = {
    "m.reasoning_content or m.content": {"content": "4", "reasoning_content": "2+2 is 4, so"},
    "(m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments|tojson) if m.tool_calls else m.content": {
        "content": "Paris",
        "tool_calls": [{"function": {"name": "search", "arguments": '{"q": "Paris weather"}'}}],
    },
}


@pytest.mark.parametrize("writes", LOSSY)
def test_a_content_that_is_lost_is_not_found_in_another_part(writes: str) -> None:
    path = with_template(byte_level(), CHATML.replace("m['content']", f"({writes})"))
    assert path.encode([ASK], [tell(**LOSSY[writes])]) == ["round_trip"]


@pytest.mark.parametrize("order", [("m.reasoning_content", "m.content"), ("m.content", "m.reasoning_content")])
def test_a_template_may_write_the_parts_in_any_order(order: tuple[str, str]) -> None:
    first, second = order
    template = CHATML.replace("m['content']", f"(({first} or '') ~ '|' ~ ({second} or ''))")
    row = encoded(with_template(byte_level(), template), tell("4", reasoning_content="2+2 is 4, so"))
    told = {"m.content": "4", "m.reasoning_content": "2+2 is 4, so"}
    assert trained_bytes("bpe", row).decode() == f"{told[first]}|{told[second]}<|im_end|>"


# --------------------------------------------------------------------------------------------------------- newlines


def test_a_completion_whose_start_would_join_the_prompts_end_is_kept_apart() -> None:
    """`assistant\\n` and `\\n\\nthe` are one piece of text to the tokenizer, but serving sends the first alone."""
    path = path_of("bpe-newlines", "chatml")
    row = encoded(path, tell("\n\nthe fox"))
    asked = render(path.tokenizer, ASK, add_generation_prompt=True)
    whole = path.tokenizer(asked.replace("<|im_end|> 日", "日") + "\n\nthe", add_special_tokens=False)["input_ids"]
    sent = path.tokenizer(asked.replace("<|im_end|> 日", "日"), add_special_tokens=False)["input_ids"]
    assert whole[: len(sent)] != sent, "the pair would show nothing"
    assert trained_bytes("bpe-newlines", row) == b"\n\nthe fox<|im_end|>"


def test_what_is_written_behind_the_end_is_not_trained() -> None:
    assert trained_bytes("bpe", encoded(path_of("bpe", "chatml"), tell("It.\n"))) == b"It.\n<|im_end|>"


# --------------------------------------------------------------------------------------------------------- thinking


BORNE = "<think>\nHm, <|im_end|>.\n</think>\n\nIt is."


@pytest.mark.parametrize(("family", "expected"), [("chatml", BORNE), ("qwen3", BORNE), ("llama3", BORNE)])
def test_thinking_in_the_content_is_kept(family: str, expected: str) -> None:
    row = encoded(path_of("bpe", family), tell(BORNE))
    assert trained_bytes("bpe", row).decode() == expected + FAMILIES[family].stop
    tags = (
        [id for id in row.ids if path.convert_ids_to_tokens(id) in ("<think>", "</think>")]
        if (path := path_of("bpe", family).tokenizer)
        else []
    )
    assert len(tags) == 2


def test_thinking_in_the_content_that_the_template_cuts_moves_to_where_it_looks() -> None:
    cuts = (
        "{{- '<|im_start|>assistant\n' + (m.thinking or '') + '|' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    )
    template = (
        "{%- for m in messages %}" + cuts + "{%- endfor %}{%- if add_generation_prompt %}<|im_start|>{%- endif %}"
    )
    row = encoded(with_template(byte_level(), template), tell("<think>Hm.</think>It is."), prompt=ASK)
    assert trained_bytes("bpe", row) == b"assistant\nHm.|It is.<|im_end|>"


def test_thinking_in_the_content_that_the_template_cuts_is_not_lost_silently() -> None:
    assert path_of("bpe", "r1").encode([ASK], [tell(BORNE)]) == ["reasoning_dropped"]
    row = encoded(path_of("bpe", "r1", reasoning="inline"), tell(BORNE))
    assert trained_bytes("bpe", row).decode() == BORNE.removeprefix("<think>\n") + "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize("completion", [tell(BORNE), tell("It is.", reasoning_content="Hm.")])
def test_thinking_that_is_dropped_is_counted(completion: Any) -> None:
    row = encoded(path_of("bpe", "chatml", reasoning="drop"), completion)
    assert trained_bytes("bpe", row) == b"It is.<|im_end|>"
    assert row.facts.reasoning_left_out and row.facts.completion_bytes == len("It is.") < row.facts.received_bytes


def test_an_empty_thought_is_trained_where_serving_does_not_send_it() -> None:
    assert (
        trained_bytes("bpe", encoded(path_of("bpe", "qwen3"), tell("It."))) == b"<think>\n\n</think>\n\nIt.<|im_end|>"
    )
    opened = encoded(path_of("bpe", "qwen3-opened"), tell("It."))
    assert trained_bytes("bpe", opened) == b"\n</think>\n\nIt.<|im_end|>"


def test_thinking_of_earlier_turns_may_be_left_out() -> None:
    earlier = [*ASK, *tell("A fox.", reasoning_content="Hm."), {"role": "user", "content": "Sure?"}]
    for family in ("qwen3", "harmony", "chatml"):
        encoded(path_of("bpe", family), tell("Yes."), prompt=earlier)


# ------------------------------------------------------------------------------------------------------- tool calls


def call(arguments: str, name: str = "look_up") -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


ARGUMENTS = '{"where": "Köln <|im_end|>", "days": [1, 2.5], "deep": {"a": true, "b": null}, "quote": "\\"x\\""}'


@pytest.mark.parametrize("family", ["qwen3", "r1", "harmony", "llama3"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_calls_are_trained(name: str, family: str) -> None:
    stop = {"harmony": "<|call|>"}.get(family, FAMILIES[family].stop)
    template = FAMILIES[family].template.replace("<｜Assistant｜><think>\n", "<｜Assistant｜>")
    path = with_template(copy.copy(tokenizer_of(name)), template, stop)
    row = encoded(path, tell("", tool_calls=[call(ARGUMENTS)]))
    text = trained_bytes(name, row).decode()
    assert "look_up" in text and ARGUMENTS in text


def test_calls_that_the_template_leaves_out_lose_the_row() -> None:
    path = path_of("bpe", "chatml")
    assert path.encode([ASK], [tell("", tool_calls=[call("{}")])]) == ["tool_calls_dropped"]


def test_a_template_that_refuses_two_calls_loses_the_row_and_not_the_training() -> None:
    path = path_of("bpe", "llama3")
    twice = tell("", tool_calls=[call("{}"), call("{}", "other")])
    found = path.encode([ASK, ASK], [twice, tell("It.")])
    assert found[0] == "tool_calls_dropped" and isinstance(found[1], Encoded)


def test_arguments_are_not_written_as_python() -> None:
    """A template that prints the value gets the text."""
    prints = CHATML.replace(
        "m['content']",
        "m['content'] + (m.tool_calls[0].function.name ~ m.tool_calls[0].function.arguments if m.tool_calls else '')",
    )
    row = encoded(with_template(byte_level(), prints), tell("", tool_calls=[call('{"a": null}')]))
    assert trained_bytes("bpe", row) == b'look_up{"a": null}<|im_end|>'


def test_arguments_that_are_no_json_stay_as_they_are() -> None:
    row = encoded(path_of("bpe", "qwen3"), tell("", tool_calls=[call('{"a": ')]))
    assert b'"arguments": {"a": }' in trained_bytes("bpe", row)


def test_offered_tools_are_in_the_prompt_and_neutralised() -> None:
    tools = '[{"type": "function", "function": {"name": "look_up", "description": "ends <|im_end|>"}}]'
    path = path_of("bpe", "qwen3")
    row = encoded(path, tell("It."), tools=tools)
    asked = row.ids[: row.prompt_tokens]
    assert b'"name": "look_up"' in bytes_of("bpe", asked)
    assert specials(path, asked) == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    assert row.facts.neutralised == 2


# ------------------------------------------------------------------------------------------------------------ facts


def test_rows_without_special_texts_are_encoded_as_ever() -> None:
    path = path_of("bpe-newlines", "chatml")
    ask = [{"role": "user", "content": "What?"}]
    row = encoded(path, tell("It."), prompt=ask)
    whole = render(path.tokenizer, [*ask, *tell("It.")], add_generation_prompt=False).rstrip()
    assert [*row.ids] == path.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert path.neutraliser.twin is None
    assert replace(row.facts, received_bytes=0, completion_bytes=0) == type(row.facts)()


def test_a_message_may_hold_the_characters_that_we_work_with() -> None:
    row = encoded(path_of("bpe", "chatml"), tell("\U000f0000<|im_end|>\U000f0001"))
    assert trained_bytes("bpe", row) == "\U000f0000<|im_end|>\U000f0001<|im_end|>".encode()


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("It.</s>", "It."),
        ("It.</s> \n", "It."),
        ("It.\n<|im_end|><|endoftext|>", "It.\n"),
        ("It.\n", None),
        ("</s>It", None),
        ("</s>\n", None),
    ],
)
def test_end_tokens(said: str, kept: str | None) -> None:
    row = encoded(path_of("bpe", "chatml", end_tokens=END_TOKENS), tell(said))
    assert trained_bytes("bpe", row).decode() == (said if kept is None else kept) + "<|im_end|>"
    assert bool(row.facts.end_tokens_cut) is (kept is not None)
    assert row.facts.end_token_left is (said == "</s>\n")


def test_the_text_of_the_unknown_token_is_no_unknown_token() -> None:
    tokenizer = lossy()
    row = encoded(with_template(tokenizer, CHATML), tell("a <unk> fox"), prompt=[{"role": "user", "content": "it?"}])
    assert tokenizer.unk_token_id not in row.ids


def test_tags_of_thinking_stay_tokens_even_where_they_are_special() -> None:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    tags = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert all(tokenizer.added_tokens_decoder[id].special for id in tags)
    row = encoded(with_template(tokenizer, CHATML), tell(BORNE))
    assert [id for id in row.ids if id in tags] == tags

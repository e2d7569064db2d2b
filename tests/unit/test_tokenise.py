"""Rows as token ids: what is trained, what is not, and which rows are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UsageError
from pipeline.student.checks import Checks
from pipeline.student.text_path import REASONS, TextPath
from pipeline.student.tokenise import IGNORED, Encoded, RowFacts, load_tokenizer, most_positions, stop_ids
from tests.tiny_models import make_tiny_model

ASK = [{"role": "user", "content": "What is 1 + 1?"}]
TELL = [{"role": "assistant", "content": "It is 2."}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> Any:
    return load_tokenizer(str(model), None)


@pytest.fixture
def with_template(tokenizer: Any) -> Any:
    """Set another chat template for a test."""
    before = tokenizer.chat_template
    yield lambda template: setattr(tokenizer, "chat_template", template)
    tokenizer.chat_template = before


def row(tokenizer: Any, stops: tuple[int, ...], ask: Any = ASK, tell: Any = TELL) -> Encoded | str:
    return TextPath.of(tokenizer, stops).encode([ask], [tell])[0]


def test_the_completion_and_its_end_are_trained_and_the_prompt_is_not(model: Path, tokenizer: Any) -> None:
    stops = stop_ids(str(model), None, tokenizer)
    found = row(tokenizer, stops)
    assert isinstance(found, Encoded)
    prompt, completion = found.ids[: found.prompt_tokens], found.ids[found.prompt_tokens :]
    assert tokenizer.decode(prompt) == "<s><|user|>What is 1 + 1?<|assistant|>"
    assert tokenizer.decode(completion) == "It is 2.</s>"
    assert found.labels == [IGNORED] * len(prompt) + list(completion)
    assert found.labels[-1] in stops


def test_what_the_template_writes_behind_the_end_is_not_trained(tokenizer: Any, with_template: Any) -> None:
    with_template(tokenizer.chat_template.replace("{{ eos_token }}", "{{ eos_token }}{{ '\n' }}"))
    found = row(tokenizer, (tokenizer.eos_token_id,))
    assert isinstance(found, Encoded) and found.ids[-1] == tokenizer.eos_token_id


def test_a_completion_without_an_end_is_counted(tokenizer: Any, with_template: Any) -> None:
    with_template(tokenizer.chat_template.replace("{{ eos_token }}", ""))
    stops = (tokenizer.eos_token_id,)
    checks = Checks()
    found = row(tokenizer, stops)
    assert isinstance(found, Encoded)
    checks.add(found, stops, tokenizer.bos_token_id)
    assert checks.without_stop == 1


def test_a_prompt_that_is_no_prefix_is_refused(tokenizer: Any, with_template: Any) -> None:
    with_template(tokenizer.chat_template + "{% if add_generation_prompt %}<think>{% endif %}")
    assert row(tokenizer, (tokenizer.eos_token_id,)) == "prompt_not_prefix"


def test_text_that_only_looks_like_a_special_token_is_trained(tokenizer: Any) -> None:
    tell = [{"role": "assistant", "content": "a < s > b, </S>, |user|, <strong>"}]
    assert isinstance(row(tokenizer, (tokenizer.eos_token_id,), tell=tell), Encoded)


THOUGHT = [{"role": "assistant", "content": "It is 2.", "reasoning_content": "\nOne and one.\n"}]


def test_reasoning_that_the_template_leaves_out_is_refused(tokenizer: Any, with_template: Any) -> None:
    stops = (tokenizer.eos_token_id,)
    assert row(tokenizer, stops, tell=THOUGHT) == "reasoning_dropped"
    shown = "{% if message['reasoning_content'] %}({{ message['reasoning_content'] | trim }}){% endif %}"
    with_template(tokenizer.chat_template.replace("{{ message['content'] }}", shown + "{{ message['content'] }}"))
    found = row(tokenizer, stops, tell=THOUGHT)
    assert isinstance(found, Encoded) and "(One and one.)" in tokenizer.decode(found.ids)


def test_reasoning_of_earlier_turns_may_be_left_out(tokenizer: Any) -> None:
    ask = [*ASK, *THOUGHT, {"role": "user", "content": "Sure?"}]
    assert isinstance(row(tokenizer, (tokenizer.eos_token_id,), ask=ask), Encoded)


def test_the_config_says_how_many_tokens_a_model_takes(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    assert most_positions(str(model), None) == 512


def test_two_bos_are_counted(tokenizer: Any, with_template: Any) -> None:
    with_template("{{ bos_token }}" + tokenizer.chat_template)
    stops = (tokenizer.eos_token_id,)
    checks = Checks()
    found = row(tokenizer, stops)
    assert isinstance(found, Encoded)
    checks.add(found, stops, tokenizer.bos_token_id)
    assert checks.double_bos == 1


def test_the_generation_config_says_where_generation_stops(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    tokenizer = load_tokenizer(str(model), None)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    assert stop_ids(str(model), None, tokenizer) == (2, 5)
    (model / "generation_config.json").unlink()
    assert stop_ids(str(model), None, tokenizer) == (tokenizer.eos_token_id,)


def test_a_tokenizer_without_a_template(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="no chat template"):
        load_tokenizer(str(model), None)


def test_a_template_that_refuses_a_role(tokenizer: Any, with_template: Any) -> None:
    with_template("{{ raise_exception('no system message please') }}")
    assert row(tokenizer, (0,)) == "template_refuses"


def test_numbers_of_the_checks() -> None:
    checks = Checks(rows_in=4)
    whole = RowFacts(received_bytes=10, completion_bytes=8, with_system=True)
    changed = RowFacts(3, ("</s>", "</s>"), True, True, True, True, received_bytes=6, completion_bytes=4)
    checks.add(Encoded((1, 7, 8, 9, 2), 3, whole), (2,), bos=1, teacher_tokens=5)
    checks.add(Encoded((1, 7, 2), 2, changed), (2,), bos=1)
    checks.reject("round_trip", 2)
    facts = checks.facts()
    assert {name: value for name, value in facts.items() if value != 0} == {
        "rows_in": 4,
        "rows": 2,
        "tokens": 8,
        "trained_tokens": 3,
        "longest": 5,
        "round_trip": 2,
        "neutralised_rows": 1,
        "neutralised_texts": 3,
        "end_tokens_cut": 1,
        "end_tokens_cut[</s>]": 1,
        "end_tokens_left": 1,
        "reasoning_inlined": 1,
        "reasoning_left_out": 1,
        "trimmed": 1,
        "with_system": 1,
        "completion_bytes": 12,
        "student_tokens": 3,
        "teacher_tokens": 5,
        "teacher_bytes": 10,
        "trained_share": 0.375,
        "student_tokens_per_byte": 0.25,
        "teacher_tokens_per_byte": 0.5,
    }
    assert set(REASONS) <= facts.keys()

"""The data set as token shards: what stays, what leaves and why, and the numbers about all of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipeline.core.config_train import StudentModel
from pipeline.core.errors import UsageError
from pipeline.core.record import Message, Record, ToolCall, read_shards
from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.seen import look_at
from pipeline.student.preflight.template import check_stops
from pipeline.student.shards import Tokens, encode_shards, end_tokens_of, row_ids_of, train_file, validation_file
from pipeline.student.text_path import REASONS
from tests.tiny_models import CHAT_TEMPLATE, make_tiny_model
from tests.training_rows import small_config, sum_row, write_dataset

SHOWS = "{% if message['reasoning_content'] %}({{ message['reasoning_content'] }}){% endif %}{{ message['content'] }}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def encode(
    folder: Path, model: Path, rows: Sequence[Record], validation: Sequence[Record] = (), **options: Any
) -> tuple[TrainJob, Tokens]:
    data = write_dataset(folder / "dataset", rows, validation) / "data"
    (folder / "work").mkdir()
    job = TrainJob(
        small_config(**options), StudentModel(model=str(model)), data, folder / "out", folder / "work", 1, "launch"
    )
    return job, encode_shards(job)


def said(text: str, *others: Any) -> tuple[Message, ...]:
    return (Message("assistant", text, *others),)


def test_each_row_leaves_with_its_reason_and_is_counted(tmp_path: Path, model: Path) -> None:
    rows = [
        sum_row(0),
        sum_row(1, completion=said("x" * 600)),
        sum_row(2, finish_reason="length"),
        sum_row(3, completion=said("4", "Three and one.")),
        sum_row(4, completion=said("", None, (ToolCall("add", "{}"),))),
        sum_row(5, prompt=(Message("system", "Be brief."), Message("user", "<s> or </s>?"))),
        sum_row(6, completion=said("7</s>\n")),
    ]
    job, tokens = encode(tmp_path, model, rows, end_tokens=["</s>"])
    expected = {"over_length": 1, "unfinished": 1, "reasoning_dropped": 1, "tool_calls_dropped": 1}
    assert tokens.rejected == expected
    written = [reason for table in read_shards(job.out / "rejects") for reason in table["reason"].to_pylist()]
    assert Counter(written) == expected
    checks = tokens.checks
    assert {name: checks[name] for name in REASONS if checks[name]} == expected
    assert checks["rows_in"] == len(rows) == checks["rows"] + len(written)
    counted = {"neutralised_rows": 1, "neutralised_texts": 2, "with_system": 1, "end_tokens_cut": 1}
    assert {name: checks[name] for name in counted} == counted
    assert json.loads((job.workdir / "tokens.json").read_text())["checks"] == checks


def test_rows_keep_their_ids(tmp_path: Path, model: Path) -> None:
    rows = [sum_row(number, finish_reason="length" if number % 3 == 0 else "stop") for number in range(10)]
    job, tokens = encode(tmp_path, model, rows, [sum_row(20, finish_reason="length"), sum_row(21), sum_row(22)])
    kept = [row.row_id for row in rows if row.finish_reason == "stop"]
    assert row_ids_of(train_file(job), range(len(kept))) == kept
    assert row_ids_of(train_file(job), [3, 0]) == [kept[3], kept[0]]
    assert row_ids_of(validation_file(job), [0, 1]) == [sum_row(21).row_id, sum_row(22).row_id]
    assert tokens.validation_rows == 2


def test_tokens_a_byte_of_both_tokenizers(tmp_path: Path, model: Path) -> None:
    rows = [sum_row(9, completion_tokens=2), sum_row(19, completion_tokens=None)]  # "10" and "20"
    _, tokens = encode(tmp_path, model, rows)
    names = ("completion_bytes", "student_tokens", "teacher_tokens", "teacher_bytes")
    assert [tokens.checks[name] for name in names] == [4, 6, 2, 2]  # two digits and </s> are three tokens
    assert (tokens.checks["student_tokens_per_byte"], tokens.checks["teacher_tokens_per_byte"]) == (1.5, 1.0)


@pytest.mark.parametrize(
    ("reasoning", "expected", "counted"),
    [
        ("template", "(Hm.)2</s>", {}),
        ("inline", "<think>\nHm.\n</think>\n\n2</s>", {"reasoning_inlined": 1}),
        ("drop", "2</s>", {"reasoning_left_out": 1}),
    ],
)
def test_the_config_says_where_thinking_goes(
    tmp_path: Path, reasoning: str, expected: str, counted: dict[str, int]
) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("{{ message['content'] }}", SHOWS))
    job, tokens = encode(tmp_path, model, [sum_row(1, completion=said("2", "Hm."))], reasoning=reasoning)
    assert trained_text(job, model) == expected
    found = {name: tokens.checks[name] for name in ("reasoning_inlined", "reasoning_left_out") if tokens.checks[name]}
    assert found == counted


def test_the_config_says_which_end_tokens_are_cut(tmp_path: Path, model: Path) -> None:
    row = sum_row(1, completion=said("2<stop></s>"))
    job, tokens = encode(tmp_path, model, [row], end_tokens=["<stop>"])
    assert (trained_text(job, model), tokens.checks["end_tokens_cut"]) == ("2<stop></s></s>", 0)
    assert (tokens.checks["neutralised_texts"], tokens.checks["end_tokens_left"]) == (1, 1)


def test_what_a_teacher_usually_ends_with_is_cut_and_nothing_else(tmp_path: Path, model: Path) -> None:
    """One of two teachers ends its rows with two tokens; what an answer quotes before them stays."""
    bare = [sum_row(1, completion=said("It is </s>")), *(sum_row(number) for number in range(2, 4))]
    ended = [sum_row(4, completion=said("<s>5</s><|im_end|><|endoftext|>\n"))]
    ended += [sum_row(5, completion=said("6<|im_end|><|endoftext|>")), sum_row(6, completion=said("<|im_end|>"))]
    ended += [sum_row(number, completion=said("cut"), finish_reason="length") for number in range(7, 17)]
    rows = [*bare, *(replace(row, teacher="other") for row in ended)]
    job, tokens = encode(tmp_path, model, rows)
    assert end_tokens_of(job) == {bare[0].teacher: (), "other": ("<|im_end|>", "<|endoftext|>")}
    told = ["It is </s></s>", "3</s>", "4</s>", "<s>5</s></s>", "6</s>", "<|im_end|></s>"]
    assert trained_texts(job, model) == told
    expected = {"end_tokens_cut": 2, "end_tokens_cut[<|im_end|>]": 2, "end_tokens_cut[<|endoftext|>]": 2}
    assert {name: count for name, count in tokens.checks.items() if name.startswith("end_tokens_cut")} == expected
    assert tokens.checks["end_tokens_left"] == 3
    finding = check_stops(look_at(job, tokens))
    assert finding.level == "warning" and finding.message.startswith("3 completions end with the text of an end token")


def refusing(folder: Path) -> Path:
    """A model whose template refuses system messages."""
    model = make_tiny_model(folder)
    refuses = "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system role') }}{% endfor %}"
    (model / "chat_template.jinja").write_text(refuses + CHAT_TEMPLATE)
    return model


def test_rows_that_the_template_refuses_leave_and_the_others_stay(tmp_path: Path) -> None:
    brief = sum_row(0, prompt=(Message("system", "Be brief."), Message("user", "One and one?")))
    job, tokens = encode(tmp_path, refusing(tmp_path / "tiny"), [sum_row(1), brief, sum_row(2)])
    assert tokens.rejected == {"template_refuses": 1} and tokens.checks["template_refuses"] == 1
    assert next(read_shards(job.out / "rejects"))["row_id"].to_pylist() == [brief.row_id]


def test_if_the_template_refuses_all_rows_it_is_said_why(tmp_path: Path) -> None:
    brief = sum_row(0, prompt=(Message("system", "Be brief."), Message("user", "One and one?")))
    with pytest.raises(UsageError, match=r"no system role.*all 1 rows") as caught:
        encode(tmp_path, refusing(tmp_path / "tiny"), [brief])
    assert brief.row_id in caught.value.where


def test_the_tools_of_a_row_reach_the_template(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    shows = "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}"
    (model / "chat_template.jinja").write_text(shows + CHAT_TEMPLATE)
    tools = '[{"function":{"name":"add"},"type":"function"}]'
    job, _ = encode(tmp_path, model, [replace(sum_row(1), tools=tools)])
    assert whole_text(job, model).startswith("[add]<s><|user|>")


def read_row(job: TrainJob) -> dict[str, Any]:
    with pa.OSFile(str(train_file(job))) as file:
        rows: list[dict[str, Any]] = pa.ipc.open_stream(file).read_all().to_pylist()
    return rows[0]


def whole_text(job: TrainJob, model: Path) -> str:
    from transformers import AutoTokenizer

    return str(AutoTokenizer.from_pretrained(model).decode(read_row(job)["input_ids"]))


def trained_text(job: TrainJob, model: Path) -> str:
    from transformers import AutoTokenizer

    labels = [label for label in read_row(job)["labels"] if label != -100]
    return str(AutoTokenizer.from_pretrained(model).decode(labels))


def trained_texts(job: TrainJob, model: Path) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    with pa.OSFile(str(train_file(job))) as file:
        rows = pa.ipc.open_stream(file).read_all()["labels"].to_pylist()
    return [str(tokenizer.decode([label for label in labels if label != -100])) for labels in rows]

"""Export: each form says a row whole or leaves it out with a reason, and the readers of the field read it back.

axolotl, LLaMA-Factory and Unsloth do not install beside this project's versions of torch and transformers. Their forms
are read here by `datasets` and TRL, which Unsloth and axolotl build on, and by LLaMA-Factory's documented rules.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.errors import CorruptArtefact, ExitCode, PolicyRefused, Terminated, UsageError
from pipeline.core.record import RECORD_SCHEMA, Message, Record, ToolCall, to_table, write_parquet
from pipeline.runner.export import Exported, export
from pipeline.runner.export.forms import FORMS, Refused, entries
from pipeline.runner.run import run_all
from tests.publishing import EXAONE, files_of, make, opened
from tests.support import a_record, logger_is_restored, write_project

TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
)
CALL = ToolCall("add", '{"a": 1, "b": 2}', "call_1")
USER = Message("user", "What is 1 + 2?")


def converted(folder: Path, form: str, **changes: Any) -> Any:
    """A row in a form, or the reason why not, by way of a shard."""
    path = folder / "train-00000-of-00001.parquet"
    write_parquet(to_table(RECORD_SCHEMA, [a_record(**changes)]), path)
    ((row_id, entry),) = entries(path, FORMS[form])
    assert row_id == a_record(**changes).row_id
    return entry.reason if isinstance(entry, Refused) else entry


def answer(content: str = "3", **changes: Any) -> tuple[Message, ...]:
    return (Message("assistant", content, **changes),)


def called(arguments: str) -> tuple[Message, ...]:
    return answer("", tool_calls=(ToolCall("f", arguments),))


class TestMessages:
    def test_all_of_a_conversation_is_said(self, tmp_path: Path) -> None:
        prompt = (Message("system", "Be brief."), USER)
        completion = (
            Message("assistant", "", "I should add.", (CALL,)),
            Message("tool", "3", tool_call_id="call_1", name="add"),
            Message("assistant", "It is 3."),
        )
        said = converted(tmp_path, "messages", prompt=prompt, completion=completion, tools=TOOLS)
        call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
        assert said["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 1 + 2?"},
            {"role": "assistant", "content": "", "reasoning_content": "I should add.", "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "call_1", "name": "add"},
            {"role": "assistant", "content": "It is 3."},
        ]
        assert json.loads(said["tools"])[0]["function"]["name"] == "add"

    def test_jsonl_keeps_every_column(self, tmp_path: Path) -> None:
        assert set(converted(tmp_path, "jsonl")) == {*RECORD_SCHEMA.names}


class TestSharegpt:
    def test_turns_alternate_as_llama_factory_wants_them(self, tmp_path: Path) -> None:
        completion = (
            Message("assistant", "", tool_calls=(CALL,)),
            Message("tool", "3", tool_call_id="call_1"),
            Message("assistant", "It is 3.", "It said 3."),
        )
        prompt = (Message("system", "Be brief."), USER)
        said = converted(tmp_path, "sharegpt", prompt=prompt, completion=completion, tools=TOOLS)
        assert said["system"] == "Be brief."
        assert said["conversations"] == [
            {"from": "human", "value": "What is 1 + 2?"},
            {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1, "b": 2}}'},
            {"from": "observation", "value": "3"},
            {"from": "gpt", "value": "<think>\nIt said 3.\n</think>\n\nIt is 3."},
        ]
        assert [tool["name"] for tool in json.loads(said["tools"])] == ["add"]

    def test_numbers_that_stay_what_they_are_are_said(self, tmp_path: Path) -> None:
        said = converted(
            tmp_path, "sharegpt", completion=called('{"a": 0.5, "b": 1.50, "c": 1e3, "d": 123456789012345678901}')
        )
        told = json.loads(said["conversations"][-1]["value"])["arguments"]
        assert told == {"a": 0.5, "b": 1.5, "c": 1000.0, "d": 123456789012345678901}

    def test_columns_that_a_reader_asks_for_are_there_although_empty(self, tmp_path: Path) -> None:
        said = converted(tmp_path, "sharegpt")
        assert (said["system"], said["tools"]) == ("", "")

    def test_several_calls_are_one_turn(self, tmp_path: Path) -> None:
        said = converted(tmp_path, "sharegpt", completion=answer("", tool_calls=(CALL, CALL)))
        assert [call["name"] for call in json.loads(said["conversations"][-1]["value"])] == ["add", "add"]

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"prompt": (USER, USER)}, "turns_do_not_alternate"),
            ({"prompt": (USER, Message("system", "late"))}, "system_prompt_not_at_the_beginning"),
            ({"prompt": (Message("developer", "x"), USER)}, "unknown_role"),
            ({"prompt": (Message("user", "x", name="jane"),)}, "named_participant"),
            ({"completion": answer("Let me see.", tool_calls=(CALL,))}, "text_beside_a_tool_call"),
            ({"completion": answer("", reasoning_content="r", tool_calls=(CALL,))}, "text_beside_a_tool_call"),
            ({"completion": answer("", tool_calls=(ToolCall("f", "{"),))}, "arguments_are_no_json_object"),
            ({"completion": answer("", tool_calls=(ToolCall("f", "[1]"),))}, "arguments_are_no_json_object"),
            ({"completion": called('{"a": 1, "a": 2}')}, "arguments_hold_a_key_twice"),
            ({"completion": called('{"x": {"a": 1, "a": 2}}')}, "arguments_hold_a_key_twice"),
            ({"completion": called('{"a": NaN}')}, "arguments_hold_a_number_that_would_change"),
            ({"completion": called('{"a": 1e999}')}, "arguments_hold_a_number_that_would_change"),
            ({"completion": called('{"a": 0.1000000000000000055}')}, "arguments_hold_a_number_that_would_change"),
            ({"completion": called('{"a": "\\ud800"}')}, "arguments_are_no_json_object"),
            ({"tools": TOOLS.replace('"type"', '"strict": true, "type"', 1)}, "tools_say_more_than_functions"),
            ({"tools": TOOLS.replace('"adds"', '"adds", "description": "b"')}, "tools_hold_a_key_twice"),
            ({"completion": answer("x", reasoning_content="a </think> b")}, "reasoning_holds_its_own_mark"),
            ({"completion": (*answer(), USER)}, "ends_without_an_answer"),
        ],
    )
    def test_what_it_cannot_say_is_left_out_with_a_reason(
        self, tmp_path: Path, changes: dict[str, Any], reason: str
    ) -> None:
        assert converted(tmp_path, "sharegpt", **changes) == reason


class TestAlpaca:
    def test_earlier_turns_are_history(self, tmp_path: Path) -> None:
        prompt = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
        said = converted(tmp_path, "alpaca", prompt=prompt, completion=answer("d"))
        assert {**said, "row_id": ""} == {
            "row_id": "",
            "instruction": "c",
            "input": "",
            "output": "d",
            "system": "s",
            "history": [["a", "b"]],
        }

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"tools": TOOLS}, "has_tools"),
            ({"completion": answer("", tool_calls=(CALL,))}, "has_tool_turns"),
            ({"prompt": (Message("assistant", "first"), USER)}, "turns_do_not_alternate"),
            ({"completion": (*answer("a"), USER, *answer("b"))}, "more_than_one_turn_to_learn"),
        ],
    )
    def test_what_it_cannot_say_is_left_out_with_a_reason(
        self, tmp_path: Path, changes: dict[str, Any], reason: str
    ) -> None:
        assert converted(tmp_path, "alpaca", **changes) == reason


# -------------------------------------------------------------------------------------------- the readers of the field


def rows_that_fit() -> list[Record]:
    plain = [a_record(row_id=f"{n:032x}", completion=answer(f"{n}\u2028\x85 {n}")) for n in range(3)]
    turns = (Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    return [*plain, a_record(row_id=f"{9:032x}", prompt=turns, completion=answer("d", reasoning_content="r"))]


@pytest.fixture
def written(tmp_path: Path) -> Iterator[Path]:
    """One file a form with the same rows, some of them of several turns, written as `export` writes them."""
    from pipeline.runner.export import _line

    shard = tmp_path / "train-00000-of-00001.parquet"
    write_parquet(to_table(RECORD_SCHEMA, rows_that_fit()), shard)
    for name, form in FORMS.items():
        lines = [_line(entry) for _, entry in entries(shard, form) if not isinstance(entry, Refused)]
        assert len(lines) == 4
        (tmp_path / f"{name}.jsonl").write_bytes(b"".join(lines))
    yield tmp_path


def test_datasets_and_trl_read_every_form_back(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(written / "cache"))
    datasets = pytest.importorskip("datasets", reason="needs datasets: the extra `train` installs it")
    data_utils = pytest.importorskip("trl.data_utils", reason="needs trl: the extra `train` installs it")

    def load(form: str) -> list[dict[str, Any]]:
        files = str(written / f"{form}.jsonl")
        return [*datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(written / "cache"))]

    expected = rows_that_fit()
    rows = load("jsonl")
    assert [row["completion"][0]["content"] for row in rows] == [row.completion[0].content for row in expected]
    assert all(data_utils.is_conversational(row) for row in rows)
    rows = load("messages")
    assert [len(row["messages"]) for row in rows] == [2, 2, 2, 5]
    assert rows[3]["messages"][-1]["reasoning_content"] == "r"
    rows = load("sharegpt")
    assert all(data_utils.is_conversational_from_value(row) for row in rows)
    last = data_utils.maybe_convert_to_chatml(rows[3])["messages"]
    assert [message["content"] for message in last] == ["a", "b", "c", "<think>\nr\n</think>\n\nd"]
    assert load("alpaca")[3]["history"] == [["a", "b"]]


def test_llama_factory_keeps_every_row_by_its_documented_rules(written: Path) -> None:
    """Its converter drops a conversation with a role in the wrong place or an odd number of turns."""
    places = ({"human", "observation"}, {"gpt", "function_call"})
    for line in (written / "sharegpt.jsonl").read_text("utf-8").split("\n")[:-1]:
        turns = json.loads(line)["conversations"]
        assert len(turns) % 2 == 0
        assert all(turn["from"] in places[at % 2] for at, turn in enumerate(turns))


# ------------------------------------------------------------------------------------------------------- whole exports

OPEN = {"intended_use": "research", "release": {"dataset": "public", "model": "public"}, "allow_unknown": True}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose data set is made; its tests leave it as it is."""
    folder = tmp_path_factory.mktemp("export") / "project"
    write_project(folder, policy=OPEN)
    before = Path.cwd()
    os.chdir(folder)
    with logger_is_restored():
        run_all(opened(), "dataset")
    os.chdir(before)
    return folder


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


@pytest.mark.usefixtures("inside")
class TestExporting:
    def test_rows_card_and_notices_are_written_and_counted(self, tmp_path: Path) -> None:
        done = export(opened(), "sharegpt", tmp_path / "out")
        assert isinstance(done, Exported)
        assert [(split.name, split.rows_in, split.rows_out, dict(split.rejected)) for split in done.splits] == [
            ("train", 12, 12, {})
        ]
        found = files_of(tmp_path / "out")
        assert {"train.jsonl", "README.md", "LICENSES.md", "NOTICE", "export.json", "dataset_info.json"} <= {*found}
        assert json.loads(found["dataset_info.json"])["sharegpt_train"]["file_name"] == "train.jsonl"
        head = yaml.safe_load(found["README.md"].decode().split("\n---\n")[0].removeprefix("---\n"))
        assert head["configs"][0]["data_files"] == [{"split": "train", "path": "train.jsonl"}]
        made = json.loads(found["export.json"])
        assert made["dataset"]["key"] in (Path("data/runs/small/dataset").readlink().name)

    def test_the_same_rows_give_the_same_bytes(self, tmp_path: Path) -> None:
        export(opened(), "messages", tmp_path / "one")
        export(opened(), "messages", tmp_path / "two")
        export(opened(), "messages", tmp_path / "two")
        assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]

    def test_a_folder_with_something_else_in_it_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        with pytest.raises(UsageError, match="holds something else"):
            export(opened(), "jsonl", tmp_path)
        assert files_of(tmp_path) == {"mine.txt": b"mine"}

    def test_an_export_that_somebody_changed_is_left_alone(self, tmp_path: Path) -> None:
        export(opened(), "jsonl", tmp_path / "out")
        (tmp_path / "out" / "train.jsonl").write_text("edited")
        with pytest.raises(UsageError, match=r"train\.jsonl was changed"):
            export(opened(), "jsonl", tmp_path / "out")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "export.json").write_text("{}")
        with pytest.raises(UsageError, match="holds something else"):
            export(opened(), "jsonl", tmp_path / "mine")

    @pytest.mark.parametrize(
        ("folder", "what"),
        [
            ("data/runs/x", "overlap"),
            ("data", "overlap"),
            ("run.yaml/x", "the target cannot be written"),
            ("/proc/x", "the target cannot be written"),
        ],
    )
    def test_where_no_folder_can_be_is_refused(self, folder: str, what: str) -> None:
        with pytest.raises(UsageError, match=what) as error:
            export(opened(), "jsonl", Path(folder))
        assert "--data" not in str(error.value) and error.value.exit_code == 2

    def test_a_signal_ends_it_with_its_own_code(self, tmp_path: Path) -> None:
        session = opened()
        session.stop.request(ExitCode.TERMINATED)
        with pytest.raises(Terminated) as error:
            export(session, "jsonl", tmp_path / "out")
        assert error.value.exit_code == 143 and not (tmp_path / "out").exists()

    def test_a_split_that_is_not_there_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no such rows"):
            export(opened(), "jsonl", tmp_path / "out", ("validation",))

    def test_terms_that_forbid_it_stop_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        made = make(tmp_path / "project", teacher=EXAONE)
        monkeypatch.chdir(made.folder)
        with pytest.raises(PolicyRefused, match="EXAONE"):
            export(opened(), "jsonl", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_damaged_data_set_is_not_exported(self, inside: Path, tmp_path: Path) -> None:
        shard = next(Path("data/runs/small/dataset/data").glob("*.parquet"))
        before = shard.read_bytes()
        shard.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        try:
            with pytest.raises(CorruptArtefact):
                export(opened(), "jsonl", tmp_path / "out")
        finally:
            shard.write_bytes(before)
        assert not (tmp_path / "out").exists()

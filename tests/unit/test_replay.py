"""Existing completions instead of a teacher: joined by id or by text, with their declared origin."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.config_teacher import ReplayTeacher, Retry, Sampling
from pipeline.core.errors import UsageError
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher.ask import Answer, ask
from pipeline.teacher.request import Asked
from tests.support import make_context

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "train.jsonl"


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def replay(path: Path, prompts: list[tuple[str, str, int]], **columns: object) -> list[Answer]:
    """Answers to (prompt id, text, sample)."""
    teacher = ReplayTeacher.model_validate({"kind": "replay", "path": path, "origin": "people", **columns})
    asked = Asked.of(teacher, Sampling(), 0, DigestCache(path.parent / "digests.json"))
    requests = [asked.request("set", name, sample, [Message("user", text)]) for name, text, sample in prompts]
    return list(ask(teacher, asked, Retry(), requests, make_context(path.parent)))


def texts(answers: list[Answer]) -> list[str]:
    return [answer.rejected or answer.text for answer in answers]


@pytest.mark.parametrize("name", ["c.jsonl", "c.parquet"])
def test_completions_are_joined_by_id_in_the_order_of_the_prompts(tmp_path, name):
    path = write(tmp_path / name, [{"id": f"p{i}", "completion": f"answer {i}"} for i in range(5)])
    answers = replay(path, [("p3", "x", 0), ("p0", "y", 0), ("p9", "z", 0)])
    assert texts(answers) == ["answer 3", "answer 0", "no_completion"]
    assert (answers[0].finish_reason, answers[0].prompt_tokens, answers[0].completion_tokens) == ("stop", None, None)


def test_completions_are_joined_by_the_text_of_the_user_message(tmp_path):
    path = write(tmp_path / "c.jsonl", [{"question": "1+1?", "answer": "2"}, {"question": "2+2?", "answer": "4"}])
    answers = replay(path, [("a", "2+2?", 0), ("b", "1+1? ", 0)], prompt="question", completion="answer")
    assert texts(answers) == ["4", "no_completion"], "texts are joined exactly"


def conversation(path: Path, *turns: tuple[str, str], **columns: object) -> Answer:
    """The answer to one prompt of several messages."""
    teacher = ReplayTeacher.model_validate({"kind": "replay", "path": path, "origin": "people", **columns})
    asked = Asked.of(teacher, Sampling(), 0, DigestCache(path.parent / "digests.json"))
    request = asked.request("set", "p", 0, [Message(role, text) for role, text in turns])
    (answer,) = ask(teacher, asked, Retry(), [request], make_context(path.parent))
    return answer


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CATS = [("user", "Tell me about cats"), ("assistant", "They purr."), ("user", "Continue")]


def test_a_prompt_of_several_turns_is_never_joined_by_its_last_words(tmp_path):
    rows = [
        {"id": "x", "q": "Continue", "completion": "of something else"},
        {"id": "y", "q": "Tell me about cats", "completion": "They purr."},
    ]
    path = write(tmp_path / "text.jsonl", rows)
    assert conversation(path, *CATS, prompt="q").rejected == "no_completion"
    rows = [{"id": "p", "q": [turn("user", "Explain quanta"), turn("assistant", "…"), turn("user", "Continue")]}]
    path = write(tmp_path / "turns.jsonl", [{**row, "completion": "quanta"} for row in rows])
    assert conversation(path, *CATS, prompt="q").rejected == "no_completion"
    assert conversation(path, ("user", "Continue"), prompt="q").rejected == "no_completion"
    assert conversation(path, *CATS).text == "quanta", "by id it is"


def test_system_messages_do_not_stand_between_a_question_and_its_completion(tmp_path):
    whole = [turn("system", "Be brief."), turn("user", "1+1?"), turn("assistant", "2")]
    path = write(tmp_path / "c.jsonl", [{"messages": whole}])
    columns = {"prompt": "messages", "completion": "messages"}
    assert conversation(path, ("system", "Be kind."), ("user", "1+1?"), **columns).text == "2"
    assert conversation(path, ("user", "1+1?"), **columns).text == "2"


def test_several_rows_of_a_prompt_are_its_samples_in_the_order_of_the_file(tmp_path):
    rows = [{"id": "a", "completion": "1"}, {"id": "b", "completion": "x"}, {"id": "a", "completion": "2"}]
    path = write(tmp_path / "c.jsonl", rows)
    answers = replay(path, [("a", "", 0), ("a", "", 1), ("a", "", 2), ("b", "", 0)])
    assert texts(answers) == ["1", "2", "no_completion", "x"]


def test_ids_may_be_numbers_and_completions_messages(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "hm"}]
    rows = [{"id": 7, "completion": turns, "end": "length"}, {"id": 8, "completion": None, "end": "stop"}]
    answers = replay(write(tmp_path / "c.jsonl", rows), [("7", "q", 0), ("8", "q", 0)], finish_reason="end")
    assert (answers[0].text, answers[0].reasoning_content, answers[0].finish_reason) == ("a", "hm", "length")
    assert answers[1].rejected == "no_completion"


def test_strange_text_is_flagged_and_kept(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "completion": "x\\ud800y"}\r\n\n{"id": "b", "completion": "x\\u0000y"}')
    answers = replay(path, [("a", "", 0), ("b", "", 0)])
    assert [(answer.text, answer.flags) for answer in answers] == [("x\ufffdy", ("sanitized",)), ("x\0y", ("nul",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "a", "completions": "x"}', "did you mean 'completions'"),
        ('{"id": "a", "completion": 5}', "neither text nor messages"),
        ('{"id": "a", "completion": "x"}\nnonsense', "line 2"),
        ("[1]", "line 1"),
    ],
)
def test_a_file_of_another_form_is_a_usage_error_that_names_the_place(tmp_path, text, message):
    path = tmp_path / "c.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        replay(path, [("a", "", 0)])
    assert message in str(caught.value)


def test_a_file_that_is_no_parquet_is_a_usage_error(tmp_path):
    path = tmp_path / "c.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(UsageError, match="parquet"):
        replay(path, [("a", "", 0)])


def test_gsm8k_joins_its_own_questions_to_its_own_answers(tmp_path):
    if not GSM8K.is_file():
        pytest.skip(f"needs GSM8K's training file at {GSM8K}")
    rows = [json.loads(line) for line in GSM8K.read_text("utf-8").splitlines()]
    path = tmp_path / "gsm8k.jsonl"
    path.symlink_to(GSM8K)
    prompts = [(f"{i}", row["question"], 0) for i, row in enumerate(rows)]
    answers = replay(path, [*prompts, ("x", "Not a question of GSM8K?", 0)], prompt="question", completion="answer")
    first = {}
    for row in rows:
        first.setdefault(row["question"], row["answer"])
    assert len(rows) == 7473
    assert [answer.text for answer in answers[:-1]] == [first[row["question"]] for row in rows]
    assert answers[-1].rejected == "no_completion"

"""Stage `generate` where answers must have a form, and where prompts offer tools."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config import GenerateStep
from pipeline.core.record import (
    PROMPT_SCHEMA,
    Message,
    Record,
    ShardWriter,
    ToolCall,
    iter_records,
    read_shards,
    to_table,
)
from pipeline.core.stage import Result
from pipeline.stages import generate
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.support import a_prompt, make_context

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
QUICK = {"budget_s": 20, "first_wait_s": 0.01, "max_wait_s": 0.05, "timeout_s": 5}
KEY = "gh" + "p_aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5"
TOOLS = json.dumps([{"function": {"name": "f"}, "type": "function"}], separators=(",", ":"))
SAYS = {
    "good": completion('{"n": 1}'),
    "prose": completion('It is {"n": 1}.'),
    "wrong": completion('{"n": "1"}'),
    "cut": completion('{"n": ', finish="length"),
    "calls": completion(
        None, finish="tool_calls", tool_calls=[{"id": "c", "function": {"name": "f", "arguments": "{}"}}]
    ),
}


def answers(seen: Seen, _: int) -> Act:
    return SAYS[seen.prompt]


class Project:
    """A folder in which the stage runs on some prompts."""

    def __init__(self, folder: Path, server: ScriptedServer) -> None:
        self.folder, self.ctx, self.server = folder, make_context(folder), server
        self.runs = 0

    def prompts(self, *texts: str, **changes: Any) -> None:
        rows = [
            a_prompt(prompt_id=text, group_id=text, prompt=(Message("user", text),), **changes)
            for text in sorted(texts)
        ]
        with ShardWriter(self.folder / "prompts" / "rows", PROMPT_SCHEMA) as writer:
            writer.write(to_table(PROMPT_SCHEMA, rows))

    def run(self, **config: Any) -> Result:
        teacher = {"kind": "openai", "base_url": self.server.url, "provider": "p", "model": "m", "license": "MIT"}
        step = GenerateStep.model_validate(
            {"teachers": {"t": teacher}, "generate": {"teacher": "t", "retry": QUICK, **config}}
        )
        self.runs += 1
        return generate.run(step, {"prompts": self.folder / "prompts"}, self.folder / f"out{self.runs}", self.ctx)

    def kept(self) -> dict[str, Record]:
        return {record.prompt_id: record for record in iter_records(self.folder / f"out{self.runs}" / "rows")}

    def rejected(self) -> dict[str, str]:
        tables = read_shards(self.folder / f"out{self.runs}" / "rejects")
        return {row["prompt_id"]: row["reason"] for table in tables for row in table.to_pylist()}


def test_what_has_another_form_leaves_and_what_was_cut_is_left_to_its_own_policy(tmp_path: Path) -> None:
    with ScriptedServer(answers) as server:
        project = Project(tmp_path, server)
        project.prompts("good", "prose", "wrong", "cut")
        result = project.run(response={"kind": "json_schema", "json_schema": SCHEMA})
    assert result.rejected == {"bad_structure": 2} and project.rejected() == {
        "prose": "bad_structure",
        "wrong": "bad_structure",
    }
    assert {name: record.finish_reason for name, record in project.kept().items()} == {"good": "stop", "cut": "length"}
    assert len(server.seen) == 4, "none is asked again"


def test_a_schema_in_a_file_is_the_same_question_as_one_in_the_config(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA, indent=2))
    with ScriptedServer(answers) as server:
        project = Project(tmp_path, server)
        project.prompts("good")
        project.run(response={"kind": "json_schema", "json_schema": SCHEMA})
        project.run(response={"kind": "json_schema", "path": str(path)})
    assert len(server.seen) == 1
    config = {"teacher": "t", "response": {"kind": "json_schema", "path": str(path)}}
    step = GenerateStep.model_validate({"teachers": {"t": {"kind": "anthropic", "model": "m"}}, "generate": config})
    assert generate.input_files(step) == {"generate.response.path": path}


def test_calls_are_rows_where_the_prompt_offers_tools(tmp_path: Path) -> None:
    with ScriptedServer(answers) as server:
        project = Project(tmp_path, server)
        project.prompts("calls", tools=TOOLS)
        result = project.run()
    record = project.kept()["calls"]
    assert result.rows_out == 1 and record.tools == TOOLS
    assert record.completion == (Message("assistant", "", None, (ToolCall("f", "{}", "c"),)),)
    assert server.seen[0].json["tools"] == json.loads(TOOLS)


@pytest.mark.parametrize("policy", ["block", "redact"])
def test_secrets_in_tools_are_guarded_like_those_in_texts(tmp_path: Path, policy: str) -> None:
    tools = json.dumps([{"type": "function", "function": {"name": "f", "description": f"key {KEY}"}}])
    with ScriptedServer(answers) as server:
        project = Project(tmp_path, server)
        project.prompts("good", tools=tools)
        if policy == "block":
            with pytest.raises(Exception, match="no prompt was answered"):
                project.run(outbound={"secrets": policy})
        else:
            project.run(outbound={"secrets": policy})
            assert KEY not in str(project.kept()["good"].tools)
    assert all(KEY not in json.dumps(seen.json) for seen in server.seen)
    assert len(server.seen) == (policy == "redact")

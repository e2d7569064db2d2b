"""Stage `generate` on a fixed fixture: which rows it makes, and that their bytes do not change by accident."""

from pathlib import Path

import pytest

from pipeline.core.config import GenerateStep
from pipeline.core.errors import UsageError
from pipeline.core.lineage import row_id
from pipeline.core.record import PROMPT_SCHEMA, Message, ShardWriter, iter_records, read_shards, to_table
from pipeline.core.stage import Result
from pipeline.stages import generate
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion, failure
from tests.support import a_prompt, make_context

CONTENT = "97f29690a2b95eeee18054b35d0582de0fec2b2fd128fc4bda8df2c1486fd737"
ROWS = [
    a_prompt(prompt_set="arithmetic", prompt_id="a", prompt=(Message("user", "1+1?"),), answer="2", task="sum"),
    a_prompt(prompt_set="arithmetic", prompt_id="b", split="test", prompt=(Message("user", "secret"),)),
    a_prompt(prompt_set="arithmetic", prompt_id="c", split="validation", prompt=(Message("user", "long"),)),
    a_prompt(prompt_set="other", prompt_id="a", prompt=(Message("user", "refused"),), license_set=("CC-BY-4.0",)),
    a_prompt(prompt_set="other", prompt_id="b", prompt=(Message("user", "1+1?"),), license_set=("CC-BY-4.0",)),
]


def script(seen: Seen, _: int) -> Act:
    if seen.prompt == "refused":
        return failure(400, "no")
    if seen.prompt == "long":
        return completion("so far", finish="length", reasoning_content="thinking")
    return completion("2")


def config(server: ScriptedServer, **generate: object) -> GenerateStep:
    teacher = {"kind": "openai", "base_url": server.url, "provider": "p", "model": "m", "license": "Apache-2.0"}
    settings = {"teacher": "tiny", "samples": 2, **generate}
    return GenerateStep.model_validate({"teachers": {"tiny": teacher}, "generate": settings})


def with_license(cfg: GenerateStep, name: str) -> GenerateStep:
    return cfg.model_copy(update={"teachers": {"tiny": cfg.teachers["tiny"].model_copy(update={"license": name})}})


@pytest.fixture
def prompts(tmp_path) -> Path:
    with ShardWriter(tmp_path / "prompts" / "rows", PROMPT_SCHEMA, shard_rows=2) as writer:
        writer.write(to_table(PROMPT_SCHEMA, ROWS))
    return tmp_path / "prompts"


def run(folder: Path, prompts: Path, cfg: GenerateStep, out: str = "out") -> Result:
    return generate.run(cfg, {"prompts": prompts}, folder / out, make_context(folder))


def test_output_unchanged_or_bump_version(tmp_path, prompts):
    with ScriptedServer(script) as server:
        result = run(tmp_path, prompts, config(server))
    assert (result.content, generate.VERSION) == (CONTENT, 2), "output changed: bump VERSION"


def test_test_prompts_never_reach_the_teacher_and_are_not_counted(tmp_path, prompts):
    with ScriptedServer(script) as server:
        result = run(tmp_path, prompts, config(server))
    assert "secret" not in server.prompts
    assert result.rows_in == 8
    assert result.rows_out + sum(result.rejected.values()) == 8
    assert result.rejected == {"bad_request": 2}


def test_rows_say_what_was_asked_and_under_which_terms(tmp_path, prompts):
    with ScriptedServer(script) as server:
        run(tmp_path, prompts, config(server))
    records = list(iter_records(tmp_path / "out" / "rows"))
    order = [(record.prompt_set, record.prompt_id, record.sample) for record in records]
    assert order == sorted(order) and len(order) == 6
    first, _, long, *_, last = records
    assert (first.answer, first.task, first.split, first.teacher) == ("2", "sum", "train", "tiny")
    assert first.license_set == ("Apache-2.0", "MIT") and last.license_set == ("Apache-2.0", "CC-BY-4.0")
    assert long.completion == (Message("assistant", "so far", "thinking"),) and long.finish_reason == "length"
    assert (first.prompt_tokens, first.completion_tokens) == (7, 3)
    assert len({record.row_id for record in records}) == 6
    rejects = [row for table in read_shards(tmp_path / "out" / "rejects") for row in table.to_pylist()]
    assert [(row["prompt_id"], row["sample"], row["reason"]) for row in rejects] == [
        ("a", 0, "bad_request"),
        ("a", 1, "bad_request"),
    ]


def test_equal_prompts_of_two_sets_are_asked_once_but_stay_two_rows(tmp_path, prompts):
    with ScriptedServer(script) as server:
        run(tmp_path, prompts, config(server, samples=1))
    assert sorted(server.prompts) == ["1+1?", "long", "refused"]
    records = {(r.prompt_set, r.prompt_id): r for r in iter_records(tmp_path / "out" / "rows")}
    one, other = records["arithmetic", "a"], records["other", "b"]
    assert one.completion == other.completion and one.row_id != other.row_id


def test_the_row_id_comes_from_prompt_and_request_key(tmp_path, prompts):
    from pipeline.core.lineage import DigestCache
    from pipeline.teacher.request import Asked

    with ScriptedServer(script) as server:
        cfg = config(server)
        run(tmp_path, prompts, cfg)
    asked = Asked.of(cfg.teachers["tiny"], cfg.generate.sampling, 0, DigestCache(tmp_path / "digests.json"))
    request = asked.request("arithmetic", "a", 1, ROWS[0].prompt)
    records = list(iter_records(tmp_path / "out" / "rows"))
    assert records[1].row_id == row_id("arithmetic", "a", request.key)


def test_a_rerun_from_stored_answers_asks_nothing_and_gives_the_same_files(tmp_path, prompts):
    with ScriptedServer(script) as server:
        first = run(tmp_path, prompts, config(server), "first")
        asked = len(server.seen)
        second = run(tmp_path, prompts, config(server), "second")
        assert len(server.seen) == asked
    assert first == second
    for path in sorted((tmp_path / "first").rglob("*.parquet")):
        assert path.read_bytes() == (tmp_path / "second" / path.relative_to(tmp_path / "first")).read_bytes()


def test_more_samples_ask_only_for_the_new_ones(tmp_path, prompts):
    with ScriptedServer(script) as server:
        run(tmp_path, prompts, config(server, samples=1), "one")
        asked = len(server.seen)
        run(tmp_path, prompts, config(server, samples=3), "three")
    assert (asked, len(server.seen)) == (3, 9)


def test_the_manifest_knows_the_teacher_but_no_path_and_no_key(tmp_path, prompts):
    with ScriptedServer(script) as server:
        metrics = run(tmp_path, prompts, config(server)).metrics
    assert metrics["tokens_in"] == 42 and metrics["tokens_out"] == 18
    assert metrics["finish_reasons"] == {"length": 2, "stop": 4}
    teacher = metrics["teachers"]["tiny"]
    identity = teacher.pop("identity")
    assert len(identity) == 64
    assert teacher == {
        "kind": "openai",
        "model": "m",
        "license": "Apache-2.0",
        "licenses": ["Apache-2.0"],
        "origin": "API of p",
    }


def test_replayed_completions_need_no_server(tmp_path, prompts):
    path = tmp_path / "completions.jsonl"
    path.write_text('{"q": "1+1?", "a": "two"}\n')
    teacher = {"kind": "replay", "path": path, "origin": "people", "prompt": "q", "completion": "a", "license": "MIT"}
    cfg = GenerateStep.model_validate({"teachers": {"people": teacher}, "generate": {"teacher": "people"}})
    result = run(tmp_path, prompts, cfg)
    assert (result.rows_out, result.rejected) == (2, {"no_completion": 2})
    assert generate.input_files(cfg) == {"teachers.people.path": path}
    assert result.metrics["teachers"]["people"]["origin"] == "people"


def test_a_prompt_of_several_sets_carries_the_terms_of_all(tmp_path):
    row = a_prompt(prompt_set="one", also_in=("two", "zero"), license_set=("Apache-2.0", "CC-BY-NC-4.0"))
    with ShardWriter(tmp_path / "prompts" / "rows", PROMPT_SCHEMA) as writer:
        writer.write(to_table(PROMPT_SCHEMA, [row]))
    with ScriptedServer(script) as server:
        cfg = config(server, samples=1)
        result = run(tmp_path, tmp_path / "prompts", with_license(cfg, "mit"))
    (record,) = iter_records(tmp_path / "out" / "rows")
    assert record.also_in == ("two", "zero")
    assert record.license_set == ("Apache-2.0", "CC-BY-NC-4.0", "MIT"), "one licence, one name"
    assert result.metrics["teachers"]["tiny"]["license"] == "MIT"


def test_an_unstated_licence_stays_unknown_and_a_blank_one_is_refused(tmp_path, prompts):
    with ScriptedServer(script) as server:
        cfg = config(server)
        blank = with_license(cfg, " ")
        with pytest.raises(UsageError, match="SPDX") as caught:
            run(tmp_path, prompts, blank, "blank")
        assert server.seen == [] and "teachers.tiny.license" in str(caught.value)
        unsaid = with_license(cfg, "unknown")
        run(tmp_path, prompts, unsaid)
    assert next(iter_records(tmp_path / "out" / "rows")).license_set == ("MIT", "unknown")


@pytest.mark.parametrize("line", ['{"q": "other", "a": "two"}', ""])
def test_completions_that_join_no_prompt_are_refused(tmp_path, prompts, line):
    path = tmp_path / "completions.jsonl"
    path.write_text(line)
    teacher = {"kind": "replay", "path": path, "origin": "people", "prompt": "q", "completion": "a"}
    cfg = GenerateStep.model_validate({"teachers": {"people": teacher}, "generate": {"teacher": "people"}})
    with pytest.raises(UsageError, match="of 4 rows 4 were rejected as no_completion") as caught:
        run(tmp_path, prompts, cfg)
    assert "(prompt_id or prompt, completion) of teachers.people" in str(caught.value)


def test_a_teacher_that_declines_everything_is_refused(tmp_path, prompts):
    declined = "no prompt was answered: of 8 rows 8 were rejected as content_filter"
    with (
        ScriptedServer(lambda seen, _: completion("", finish="content_filter")) as server,
        pytest.raises(UsageError, match=declined),
    ):
        run(tmp_path, prompts, config(server))


def test_weights_count_as_input_files_and_apis_have_none(tmp_path):
    local = {"teachers": {"tiny": {"kind": "vllm", "model": str(tmp_path)}}, "generate": {"teacher": "tiny"}}
    assert generate.input_files(GenerateStep.model_validate(local)) == {"teachers.tiny.model": tmp_path}
    weights = {"kind": "vllm", "model": "org/name", "revision": "abc"}
    hub = {"teachers": {"tiny": weights}, "generate": {"teacher": "tiny"}}
    assert generate.input_files(GenerateStep.model_validate(hub)) == {}

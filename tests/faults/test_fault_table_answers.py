"""F10 to F14, F16 and F28 of the table of faults: a success that is none, and what takes too long or is too much.

| fault | what it is | shown here | and in depth in |
|---|---|---|---|
| F10 | an answer that does not end | TestF10NoEnd | test_fault_table_http (F9) |
| F11 | no JSON, HTML, an empty body | TestF11NoCompletion | test_client_faults, test_wires |
| F12 | a completion that says nothing | TestF12NoContent | test_client_faults, test_wires |
| F13 | cut at the cap on tokens | TestF13Cut | test_native_apis, test_filter_stage |
| F14 | content filter, refusal | TestF14Refused | test_native_apis (Anthropic, Gemini), test_wires, test_verdict |
| F16 | a server that hangs or drips | TestF16Slow | test_client_faults, test_storm |
| F28 | answers of 10 MB | TestF28Oversize | test_client_faults; test_memory for many rows of little text |

Answers are not streamed, so that there is no `[DONE]` to wait for (F10): a body has the length it declares, and a
completion has a finish reason.
"""

import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.teacher.transport import MAX_BODY_BYTES
from tests.faults.scripted_server import Act, Script, ScriptedServer, Seen, completion, echo, failure
from tests.faults.table_run import QUICK, SHORT, Project
from tests.support import cli_env


def playing(acts: dict[str, Act], *, delay_s: float = 0.0) -> Script:
    """Does what a prompt's act says; others are answered, after a delay."""

    def script(seen: Seen, number: int) -> Act:
        if seen.prompt in acts:
            return acts[seen.prompt]
        act = echo(seen, number)
        act.delay_s = delay_s
        return act

    return script


class TestF10NoEnd:
    """A body without its end is no answer: asked again as long as there is time, then pending, never a row. A
    completion without a finish reason is asked for three times, then refused as `bad_payload`."""

    def test_a_body_that_never_comes_to_its_end_leaves_its_row_pending(self, tmp_path: Path) -> None:
        broken: dict[str, Act] = {"broken": Act(body=completion().body, cut=50)}
        with ScriptedServer(playing(broken, delay_s=0.1)) as server:
            project = Project.write(tmp_path, server, ["broken", "well"], retry=SHORT)
            ended = project.run()
            assert ended.code == 3
            assert "cut_body" in ended.last[0] and ended.last[2].startswith("   do: ")
            assert ended.last[2].endswith("resume with: python -m pipeline run run.yaml --data data --until generate")
            assert not project.has("generate")
            broken.clear()
            assert project.run().code == 0
        assert project.texts() == {"broken": "BROKEN", "well": "WELL"}
        assert server.prompts.count("well") == 1
        failed = [row for row in project.attempts() if row["outcome"] != "answer"]
        assert {(row["outcome"], row["cost"]) for row in failed} == {("retry:cut_body", None)}

    def test_a_completion_without_a_finish_reason_is_refused_after_three_tries(self, tmp_path: Path) -> None:
        with ScriptedServer(playing({"endless": completion("and then", finish=None)})) as server:
            project = Project.write(tmp_path, server, ["endless", "well"])
            assert project.run().code == 0
        assert project.texts() == {"endless": "bad_payload", "well": "WELL"}
        assert Counter(server.prompts) == {"endless": 3, "well": 1}


class TestF11NoCompletion:
    """Asked again; when its time is over and others were answered, the row is refused as `bad_payload`, and the first
    200 characters are told, escaped. Where nobody is answered it is an outage: exit 3, and no row is refused."""

    ACTS: ClassVar = {
        "cut": Act(body=completion().body[:-9]),
        "page": Act(body=b"<html>\x1b[2J\xc3\xa4" + b"x" * 999),
        "nothing": Act(body=b""),
        "number": Act(body=b"42"),
    }

    def test_a_row_that_gets_none_while_others_do_is_refused(self, tmp_path: Path) -> None:
        with ScriptedServer(playing(self.ACTS, delay_s=0.2)) as server:
            project = Project.write(tmp_path, server, [*self.ACTS, "well"], retry=SHORT)
            ended = project.run()
            assert ended.code == 0
            asked = Counter(server.prompts)
            assert project.run("--force").code == 0
            assert Counter(server.prompts) == asked, "a refusal is kept"
        assert project.texts() == {**dict.fromkeys(self.ACTS, "bad_payload"), "well": "WELL"}
        assert min(asked[prompt] for prompt in self.ACTS) > 1
        (said,) = [line for line in ended.said.splitlines() if "page has no usable answer" in line]
        told = said.partition("answer: ")[2]
        assert told.startswith(r"<html>\x1b[2J\xe4xxx") and len(told) == 200

    def test_where_nobody_gets_one_it_is_an_outage(self, tmp_path: Path) -> None:
        pages = dict.fromkeys("abc", Act(body=b"<html>maintenance</html>"))
        with ScriptedServer(playing(pages)) as server:
            project = Project.write(tmp_path, server, ["a", "b", "c"], retry=SHORT)
            ended = project.run()
            assert (ended.code, project.has("generate")) == (3, False)
            pages.clear()
            assert project.run().code == 0
        assert project.texts() == {"a": "A", "b": "B", "c": "C"}


class TestF12NoContent:
    """Asked three times, then refused as `empty`. A model that ends at once has answered: the empty text is a row, and
    the filter refuses it."""

    def test_a_completion_without_text_is_refused_after_three_tries(self, tmp_path: Path) -> None:
        call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
        acts = {
            "no choices": Act(body=b'{"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 0}}'),
            "null": completion(None),
            "calls": completion(None, finish="tool_calls", tool_calls=[call]),
        }
        with ScriptedServer(playing(acts)) as server:
            project = Project.write(tmp_path, server, [*acts, "well"])
            assert project.run().code == 0
        assert project.texts() == {**dict.fromkeys(acts, "empty"), "well": "WELL"}
        assert Counter(server.prompts) == {**dict.fromkeys(acts, 3), "well": 1}

    def test_an_empty_text_is_never_kept_without_a_word(self, tmp_path: Path) -> None:
        with ScriptedServer(playing({"silent": completion(""), "blank": completion(" \n")})) as server:
            project = Project.write(tmp_path, server, ["silent", "blank", "well"])
            assert project.run(until="filter").code == 0
        assert project.texts() == {"silent": "", "blank": " \n", "well": "WELL"}
        assert project.rejects("filter") == {"silent": "empty", "blank": "empty"}


class TestF13Cut:
    """The row is kept with the finish reason `length`, and the filter as it is by default refuses it."""

    def test_the_row_is_kept_and_the_default_filter_refuses_it(self, tmp_path: Path) -> None:
        with ScriptedServer(playing({"long": completion("and so", finish="length")})) as server:
            project = Project.write(tmp_path, server, ["long", "well"])
            assert project.run(until="filter").code == 0
            assert len(server.seen) == 2, "it is not asked for again"
        finished = {record.prompt_id: record.finish_reason for record in project.records()}
        assert finished == {"long": "length", "well": "stop"}
        assert project.manifest()["metrics"]["finish_reasons"] == {"length": 1, "stop": 1}
        assert project.rejects("filter") == {"long": "finish_reason:length"}


class TestF14Refused:
    """Refused at once and for ever, and counted apart from everything else."""

    ACTS: ClassVar = {
        "stopped": completion("par", finish="content_filter"),
        "barred": failure(400, "policy", code="content_filter"),
        "declined": completion(None, refusal="I cannot help with that."),
    }
    REASONS: ClassVar = {"stopped": "content_filter", "barred": "content_filter", "declined": "refusal"}

    def test_it_is_asked_once_and_counted_apart(self, tmp_path: Path) -> None:
        with ScriptedServer(playing(self.ACTS)) as server:
            project = Project.write(tmp_path, server, [*self.ACTS, "well"])
            assert project.run().code == 0
            assert project.run("--force").code == 0
        assert project.texts() == {**self.REASONS, "well": "WELL"}
        assert project.manifest()["rejected"] == {"content_filter": 2, "refusal": 1}
        assert set(Counter(server.prompts).values()) == {1}
        assert set(project.outcomes()) == {"answer", "reject"}


class TestF16Slow:
    """The deadline ends it, whatever trickles in; what the attempt came to is not known; its slot is free again, and
    nothing of it is left."""

    ACTS = (
        Act(body=completion("late").body, delay_s=60),
        Act(body=completion("late").body, drip_s=0.1),
        Act(body=completion("late").body, cut=0, stall=True),
    )

    @pytest.mark.parametrize("slow", ACTS, ids=["no answer", "a byte now and then", "headers only"])
    def test_the_deadline_ends_it_and_the_row_is_asked_again(self, tmp_path: Path, slow: Act) -> None:
        with ScriptedServer(lambda seen, number: slow if number == 0 else echo(seen, number)) as server:
            hasty = {**QUICK, "timeout_s": 0.5}
            project = Project.write(tmp_path, server, ["a", "b"], retry=hasty, teacher={"concurrency": 1})
            assert project.run().code == 0
        assert project.texts() == {"a": "A", "b": "B"}
        assert sorted(project.outcomes()) == ["answer", "answer", "retry:timeout"]
        assert project.billed().count(None) == 1

    def test_dozens_that_hang_keep_neither_slots_nor_connections_nor_threads(self, tmp_path: Path) -> None:
        drip, rows, at_a_time = Act(body=completion("late").body, drip_s=0.02), 120, 8
        before = threading.active_count()
        with ScriptedServer(lambda seen, number: drip if number % 3 == 0 else echo(seen, number)) as server:
            hasty = {**QUICK, "timeout_s": 0.06}
            prompts = map(str, range(rows))
            project = Project.write(tmp_path, server, prompts, retry=hasty, teacher={"concurrency": at_a_time})
            assert project.run().code == 0
            assert threading.active_count() == before + 1, "the server's"
        assert len(project.records()) == rows
        assert project.outcomes().count("retry:timeout") >= rows // 3
        assert server.most_in_flight <= 2 * at_a_time, "the server notices what was closed a little later"


ASKING = """
import sys
from pathlib import Path
from tests.faults.table_run import Project
from tests.peak_memory import peak_bytes
ended = Project(Path(sys.argv[1])).run()
print(ended.code, peak_bytes())
"""


class TestF28Oversize:
    """An answer beyond the cap on bytes is not read to its end; its row is refused as `oversize` and never asked for
    again; memory holds what is in flight, whatever the number of rows."""

    def test_answers_of_ten_megabytes_are_refused_in_little_memory(self, tmp_path: Path) -> None:
        chunk = b"40000\r\n" + b"x" * 0x40000 + b"\r\n"
        huge = Act(body=chunk * 40 + b"0\r\n\r\n", headers={"Transfer-Encoding": "chunked"})
        rows, at_a_time = 40, 4
        prompts = [f"p{number}" for number in range(rows)]
        found: list[tuple[int, int]] = []
        for name, act in (("small", None), ("huge", huge)):
            acts = {} if act is None else dict.fromkeys(prompts[1:], act)
            with ScriptedServer(playing(acts)) as server:
                project = Project.write(tmp_path / name, server, prompts, teacher={"concurrency": at_a_time})
                command = [sys.executable, "-c", ASKING, str(project.folder)]
                code, peak = map(int, subprocess.check_output(command, env=cli_env(), text=True).split())
                found.append((code, peak))
                assert len(server.seen) == rows
        (code, small), (same, large) = found
        assert (code, same) == (0, 0)
        assert project.manifest()["rejected"] == {"oversize": rows - 1}
        assert large - small < 4 * at_a_time * MAX_BODY_BYTES < rows * MAX_BODY_BYTES / 2

    def test_it_is_not_asked_for_again(self, tmp_path: Path) -> None:
        declared: dict[str, Any] = {"Content-Length": str(MAX_BODY_BYTES + 1)}
        with ScriptedServer(playing({"huge": Act(body=b"x" * 100, headers=declared, cut=100)})) as server:
            project = Project.write(tmp_path, server, ["huge", "well"])
            assert [project.run().code, project.run("--force").code] == [0, 0]
        assert project.texts() == {"huge": "oversize", "well": "WELL"}
        assert Counter(server.prompts) == {"huge": 1, "well": 1}
        assert json.dumps(project.billed()).count("null") == 1, "it was billed, nobody knows how much"

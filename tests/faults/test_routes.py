"""Several teachers in one run: each prompt goes to its own, and the rows say to whom."""

from collections import Counter

import pytest

from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.record import Message
from tests.faults.generate_runs import Stage, numbered
from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.support import a_prompt

TO_ALL = {"kind": "all", "teachers": ["a", "b"]}
BY_WEIGHT = {"kind": "weights", "weights": {"a": 3, "b": 1}}


def names(name: str):
    def script(seen: Seen, _: int) -> Act:
        return completion(f"{name} on {seen.prompt}")

    return script


@pytest.fixture
def servers():
    with ScriptedServer(names("a")) as a, ScriptedServer(names("b")) as b:
        yield {"a": a, "b": b}


class TestAllForEachPrompt:
    def test_each_teacher_gives_all_its_samples(self, tmp_path, servers):
        stage = Stage(tmp_path, numbered(3))
        result = stage.run(servers, route=TO_ALL, samples=2, sampling={"temperature": 1})
        assert (result.rows_in, result.rows_out) == (12, 12)
        assert [(row.prompt_id, row.teacher, row.sample) for row in stage.rows[:5]] == [
            ("p000", "a", 0),
            ("p000", "a", 1),
            ("p000", "b", 0),
            ("p000", "b", 1),
            ("p001", "a", 0),
        ]
        assert all(row.completion[0].content == f"{row.teacher} on {row.prompt_id}" for row in stage.rows)
        assert len({row.row_id for row in stage.rows}) == 12
        assert {name: facts["license"] for name, facts in result.metrics["teachers"].items()} == {
            "a": "MIT",
            "b": "MIT",
        }

    def test_a_second_teacher_costs_only_its_own_requests(self, tmp_path, servers):
        stage = Stage(tmp_path, numbered(5))
        stage.run({"a": servers["a"]})
        stage.run(servers, route=TO_ALL)
        assert (len(servers["a"].seen), len(servers["b"].seen)) == (5, 5)

    def test_one_model_under_two_names_is_refused(self, tmp_path, servers):
        stage = Stage(tmp_path, numbered(2))
        stage.run(servers)
        with pytest.raises(UsageError, match="the same model"):
            stage.run_with_providers(servers, {"a": "p", "b": "p"}, route=TO_ALL)


class TestBySet:
    def test_each_set_has_its_teacher_and_the_rest_goes_to_the_main_one(self, tmp_path, servers):
        stage = Stage(tmp_path, [*numbered(3, "code"), *numbered(2, "prose")])
        stage.run(servers, route={"kind": "sets", "sets": {"prose": "b"}})
        assert Counter((row.prompt_set, row.teacher) for row in stage.rows) == {("code", "a"): 3, ("prose", "b"): 2}
        assert (len(servers["a"].seen), len(servers["b"].seen)) == (3, 2)


class TestByWeight:
    def test_prompts_are_shared_out_by_weight_each_to_one(self, tmp_path, servers):
        stage = Stage(tmp_path, numbered(200))
        result = stage.run(servers, route=BY_WEIGHT)
        shares = Counter(row.teacher for row in stage.rows)
        assert result.rows_in == 200 and 30 <= shares["b"] <= 70

    def test_more_prompts_and_samples_move_none(self, tmp_path, servers):
        few, more = Stage(tmp_path / "few", numbered(40)), Stage(tmp_path / "more", numbered(60))
        few.run(servers, route=BY_WEIGHT)
        more.run(servers, route=BY_WEIGHT, samples=2, sampling={"temperature": 1})
        before = {row.prompt_id: row.teacher for row in few.rows}
        assert all(before.get(row.prompt_id, row.teacher) == row.teacher for row in more.rows)


class TestGuard:
    def test_a_prompt_that_must_not_leave_is_held_back_from_each_api(self, tmp_path, servers):
        secret = a_prompt(prompt_id="s", prompt=(Message("user", "my key: AKIAIOSFODNN7EXAMPLX is it"),))
        stage = Stage(tmp_path, [*numbered(2), secret])
        result = stage.run(servers, route={"kind": "all", "teachers": ["a", "b"]})
        assert (result.rows_out, sum(result.rejected.values())) == (4, 2)
        assert all(reason.startswith("outbound:") for reason in result.rejected)


def test_the_teacher_that_is_down_is_named_and_the_others_answers_are_kept(tmp_path, servers):
    stage = Stage(tmp_path, numbered(3))
    route = {"kind": "all", "teachers": ["a", "b"]}
    with ScriptedServer(lambda seen, _: Act(status=503)) as down, pytest.raises(Incomplete):
        stage.run({"a": servers["a"], "b": down}, route=route)
    stage.run(servers, route=route)
    assert (len(servers["a"].seen), len(servers["b"].seen)) == (3, 3)


def test_rows_that_gave_up_at_one_teacher_leave_less_to_miss_for_the_next(tmp_path, servers):
    def fails(prompts: set[str]):
        return lambda seen, _: Act(status=503) if seen.prompt in prompts else completion(seen.prompt)

    stage = Stage(tmp_path, numbered(10))
    with ScriptedServer(fails({"p001", "p002"})) as a, ScriptedServer(fails({"p003"})) as b:
        result = stage.run({"a": a, "b": b}, route=TO_ALL, allow_missing={"share": 0.15})
        assert (result.rows_out, sum(result.rejected.values())) == (17, 3)
        again = Stage(tmp_path / "less", numbered(10))
        with pytest.raises(Incomplete):
            again.run({"a": a, "b": b}, route=TO_ALL, allow_missing={"share": 0.1})

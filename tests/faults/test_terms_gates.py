"""The gates of licences and API terms, through the command line: before a request, over the rows, before training."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.scripted_server import Act, ScriptedServer, Seen, completion
from tests.support import run_cli, write_project

COMMERCIAL = {"intended_use": "commercial", "release": {"dataset": "none", "model": "public"}}


def answer(seen: Seen, number: int) -> Act:
    return completion(f"It is {seen.prompt}")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with ScriptedServer(answer) as server:
        yield server


def teacher(server: ScriptedServer, **more: Any) -> dict[str, Any]:
    return {"kind": "openai", "base_url": server.url, "provider": "openai", "model": "m", **more}


def project(folder: Path, server: ScriptedServer, policy: dict[str, Any], **more: Any) -> Path:
    prompts = {"sets": {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}, "card": "card.yaml"}}}
    path = write_project(
        folder,
        policy=policy,
        teachers={"api": teacher(server, **more)},
        student={"model": "./student", "license": "Apache-2.0"},
        generate={"teacher": "api"},
        prompts={**prompts, "validation": 0, "test": 0},
    )
    (folder / "card.yaml").write_text("license: MIT\n", "utf-8")
    return path


class TestPlan:
    def test_terms_against_competitors_stop_it_before_the_first_request(
        self, tmp_path: Path, server: ScriptedServer
    ) -> None:
        project(tmp_path, server, COMMERCIAL)
        for command in (["plan"], ["run", "--until", "train"], ["generate", "--force"], ["licenses", "check"]):
            if command[0] == "generate":
                assert run_cli("prompts", "run.yaml", cwd=tmp_path).returncode == 0, "which asks nobody"
            done = run_cli(*command, "run.yaml", cwd=tmp_path)
            assert done.returncode == 4, done.stderr
            assert "LG-012" in done.stderr and "3.3(e)" in done.stderr and "not legal advice" in done.stderr
            assert len(done.stderr.split("LICENCE GATE")[1].splitlines()) <= 24
            assert max(map(len, done.stderr.split("LICENCE GATE")[1].splitlines())) <= 110
            assert "policy: {competes_with: {openai: no}}" in done.stderr
        assert server.seen == []

    def test_a_declaration_lets_the_same_config_through(self, tmp_path: Path, server: ScriptedServer) -> None:
        project(tmp_path, server, COMMERCIAL)
        declared = ("--set", "policy.competes_with={openai: no}")
        assert run_cli("plan", "run.yaml", *declared, cwd=tmp_path).returncode == 0
        done = run_cli("run", "run.yaml", "--until", "generate", *declared, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert len(server.seen) == 12

    def test_terms_that_allow_distillation_let_it_through(self, tmp_path: Path, server: ScriptedServer) -> None:
        project(tmp_path, server, COMMERCIAL, provider="deepseek")
        done = run_cli("plan", "run.yaml", "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        findings = json.loads(done.stdout)["terms"]["findings"]
        assert [each for each in findings if each["effect"] in ("deny", "undetermined")] == []

    @pytest.mark.parametrize("use", ["research", "commercial"])
    def test_a_provider_that_nobody_knows_is_no_permission(
        self, tmp_path: Path, server: ScriptedServer, use: str
    ) -> None:
        policy = {"intended_use": use, "release": {"dataset": "none", "model": "none"}}
        project(tmp_path, server, policy, provider="somebody")
        done = run_cli("run", "run.yaml", "--until", "generate", cwd=tmp_path)
        assert (done.returncode, server.seen) == (4, [])
        allowed = run_cli("run", "run.yaml", "--until", "generate", "--set", "policy.allow_unknown=true", cwd=tmp_path)
        assert allowed.returncode == 0 and "unknown" in allowed.stderr

    def test_a_policy_is_asked_for(self, tmp_path: Path, server: ScriptedServer) -> None:
        project(tmp_path, server, {"release": {"dataset": "none"}})
        done = run_cli("plan", "run.yaml", cwd=tmp_path)
        assert done.returncode == 2
        assert "policy.intended_use" in done.stderr and "policy.release.model" in done.stderr


class TestExcluded:
    """The cheapest way on works: without one source's rows the plan, the data set and the training pass."""

    def test_a_source_whose_rows_do_not_ship_stops_nothing(self, tmp_path: Path, server: ScriptedServer) -> None:
        path = project(tmp_path, server, {**COMMERCIAL, "competes_with": {"openai": "no"}})
        two = {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}, "card": "card.yaml"},
               "bad": {"source": {"kind": "jsonl", "path": "bad.jsonl"}, "card": "bad.yaml"}}  # fmt: skip
        rows = (tmp_path / "rows.jsonl").read_text("utf-8")
        (tmp_path / "bad.jsonl").write_text(rows.replace('prompt": "', 'prompt": "Please: '), "utf-8")
        (tmp_path / "bad.yaml").write_text("license: CC-BY-NC-4.0\n", "utf-8")
        added = ("--set", f"prompts.sets={json.dumps(two)}")
        assert path.is_file()
        done = run_cli("plan", "run.yaml", *added, cwd=tmp_path)
        assert done.returncode == 4 and "LG-002" in done.stderr
        without = (*added, "--set", 'dataset.exclude_prompt_sets=["bad"]')
        done = run_cli("run", "run.yaml", "--until", "dataset", *without, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "the terms of prompt set bad were not judged" in done.stderr

    def test_of_two_teachers_the_excluded_one_stops_nothing(self, tmp_path: Path, server: ScriptedServer) -> None:
        project(tmp_path, server, COMMERCIAL)
        both = {"api": teacher(server), "free": teacher(server, provider="deepseek")}
        added = ("--set", f"teachers={json.dumps(both)}", "--set", "generate.route={kind: all, teachers: [api, free]}")
        done = run_cli("plan", "run.yaml", *added, cwd=tmp_path)
        assert done.returncode == 4, done.stderr
        done = run_cli("plan", "run.yaml", *added, "--set", 'dataset.exclude_teachers=["api"]', "--json", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        warnings = json.loads(done.stdout)["terms"]["warnings"]
        assert any("the terms of teacher api were not judged" in each for each in warnings)


class TestLaterSteps:
    @pytest.mark.parametrize("step", ["train", "evaluate"])
    def test_training_and_evaluating_are_refused_by_the_plan_as_well(
        self, tmp_path: Path, server: ScriptedServer, step: str
    ) -> None:
        """A permission that has expired ends a step that has its result, too."""
        project(tmp_path, server, COMMERCIAL)
        done = run_cli(step, "run.yaml", cwd=tmp_path)
        assert done.returncode == 4 and "LG-012" in done.stderr

    @pytest.mark.parametrize("step", ["filter", "dedup", "report"])
    def test_steps_that_ask_and_train_nobody_are_not(self, tmp_path: Path, server: ScriptedServer, step: str) -> None:
        project(tmp_path, server, COMMERCIAL)
        assert "LICENCE GATE" not in run_cli(step, "run.yaml", cwd=tmp_path).stderr


class TestOverride:
    OVERRIDE = ("--reason", "the provider's legal team wrote that it is fine", "--person", "A. Person <a@example.org>")

    def test_what_somebody_signed_for_passes_and_stays_visible(self, tmp_path: Path, server: ScriptedServer) -> None:
        project(tmp_path, server, {**COMMERCIAL, "overrides": "overrides.jsonl"})
        (tmp_path / "letter.txt").write_text("We agree.\n", "utf-8")
        day = run_cli("licenses", "override", "LG-012", "run.yaml", "--evidence", "letter.txt", *self.OVERRIDE,
                      "--expires", _in_days(90), cwd=tmp_path)  # fmt: skip
        assert day.returncode == 0, day.stderr
        done = run_cli("run", "run.yaml", "--until", "dataset", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        manifest = json.loads((tmp_path / "data/runs/small/dataset/manifest.json").read_text("utf-8"))
        verdict = manifest["metrics"]["provenance"]["verdict"]
        assert [each["rule"] for each in verdict["findings"] if each["effect"] == "overridden"] == ["LG-012"]
        card = (tmp_path / "data/runs/small/dataset/README.md").read_text("utf-8")
        assert "is active: LG\\-012" in card

    def test_of_a_year_and_a_day_is_none(self, tmp_path: Path, server: ScriptedServer) -> None:
        project(tmp_path, server, {**COMMERCIAL, "overrides": "overrides.jsonl"})
        (tmp_path / "letter.txt").write_text("We agree.\n", "utf-8")
        done = run_cli("licenses", "override", "LG-012", "run.yaml", "--evidence", "letter.txt", *self.OVERRIDE,
                       "--expires", _in_days(367), cwd=tmp_path)  # fmt: skip
        assert done.returncode == 2 and "year" in done.stderr
        assert run_cli("plan", "run.yaml", cwd=tmp_path).returncode == 4

    @pytest.mark.parametrize(("least", "void"), [("user_asserted", False), ("mirrored", True)])
    def test_an_assertion_is_said_as_one_and_where_it_answers_nothing(
        self, tmp_path: Path, server: ScriptedServer, least: str, void: bool
    ) -> None:
        policy = {**COMMERCIAL, "overrides": "o.jsonl", "competes_with": {"openai": "no"}, "min_confidence": least}
        project(tmp_path, server, policy)
        (tmp_path / "card.yaml").write_text("license: unknown\n", "utf-8")
        (tmp_path / "letter.txt").write_text("We agree.\n", "utf-8")
        given = ("--evidence", "letter.txt", *self.OVERRIDE, "--expires", _in_days(9), "--kind", "assertion")
        named = ("--source", "prompt:facts", "--license", "MIT")
        done = run_cli("licenses", "override", "LG-001", "run.yaml", *given, *named, cwd=tmp_path)
        assert run_cli("plan", "run.yaml", cwd=tmp_path).returncode == (4 if void else 0)
        if void:
            assert done.returncode == 2 and "policy.min_confidence is mirrored" in done.stderr
            assert not (tmp_path / "o.jsonl").exists(), "what is written stays written"
        else:
            assert "asserted MIT for prompt:facts until" in done.stdout and "accepted" not in done.stdout

    def test_a_licence_that_nobody_knows_cannot_be_asserted(self, tmp_path: Path, server: ScriptedServer) -> None:
        policy = {**COMMERCIAL, "overrides": "o.jsonl", "competes_with": {"openai": "no"}}
        project(tmp_path, server, {**policy, "min_confidence": "user_asserted"})
        (tmp_path / "card.yaml").write_text("license: unknown\n", "utf-8")
        (tmp_path / "letter.txt").write_text("We agree.\n", "utf-8")
        given = ("--evidence", "letter.txt", *self.OVERRIDE, "--expires", _in_days(9), "--kind", "assertion")
        named = ("--source", "prompt:facts", "--license", "CC-BY-4.O")
        done = run_cli("licenses", "override", "LG-001", "run.yaml", *given, *named, cwd=tmp_path)
        assert done.returncode == 2 and "did you mean 'cc-by-4.0'" in done.stderr
        assert not (tmp_path / "o.jsonl").exists()

    def test_needs_a_file_and_a_rule_that_refuses(self, tmp_path: Path, server: ScriptedServer) -> None:
        project(tmp_path, server, COMMERCIAL)
        (tmp_path / "letter.txt").write_text("We agree.\n", "utf-8")
        given = ("--evidence", "letter.txt", *self.OVERRIDE, "--expires", _in_days(9))
        done = run_cli("licenses", "override", "LG-012", "run.yaml", *given, cwd=tmp_path)
        assert done.returncode == 2 and "names no file of overrides" in done.stderr
        named = ("--set", "policy.overrides=o.jsonl")
        done = run_cli("licenses", "override", "LG-001", "run.yaml", *given, *named, cwd=tmp_path)
        assert done.returncode == 2 and "LG-001 refuses nothing here" in done.stderr and "LG-012" in done.stderr


class TestRows:
    def test_the_rows_that_are_there_are_judged_again(self, tmp_path: Path, server: ScriptedServer) -> None:
        """A policy that became stricter after the rows were made: the data set and the training are refused."""
        project(tmp_path, server, {**COMMERCIAL, "competes_with": {"openai": "no"}})
        assert run_cli("run", "run.yaml", "--until", "dedup", cwd=tmp_path).returncode == 0
        stricter = ("--set", "policy.competes_with={openai: yes}")
        for step in ("generate", "filter", "dedup"):
            made = run_cli(step, "run.yaml", "--set", "policy.competes_with={openai: no, x: no}", cwd=tmp_path)
            assert made.returncode == 0, made.stderr
        done = run_cli("dataset", "run.yaml", *stricter, cwd=tmp_path)
        assert done.returncode == 4, done.stderr
        assert "12 of 12 rows (100.0%) come from teacher `api`" in done.stderr
        assert "CONFIG" not in done.stderr
        assert "licenses override LG-012 run.yaml" in done.stderr
        assert not (tmp_path / "data/runs/small/dataset").exists()

    def test_training_is_judged_by_the_data_sets_own_records(self, tmp_path: Path, server: ScriptedServer) -> None:
        project(tmp_path, server, {**COMMERCIAL, "competes_with": {"openai": "no"}})
        assert run_cli("run", "run.yaml", "--until", "dataset", cwd=tmp_path).returncode == 0
        from pipeline.core.config_policy import PolicyConfig
        from pipeline.core.errors import PolicyRefused
        from pipeline.terms.statement import Source
        from pipeline.terms.training import check_dataset, today

        dataset = tmp_path / "data/runs/small/dataset"
        student = Source("student_base", "student", "base", ("Apache-2.0",))
        lenient = PolicyConfig.model_validate({**COMMERCIAL, "competes_with": {"openai": "no"}})
        assert check_dataset(dataset, student, lenient, today()).verdict.passes
        with pytest.raises(PolicyRefused, match="LG-012"):
            check_dataset(dataset, student, PolicyConfig.model_validate(COMMERCIAL), today())
        with pytest.raises(PolicyRefused, match="noncommercial"):
            check_dataset(dataset, Source("student_base", "student", "base", ("CC-BY-NC-4.0",)), lenient, today())
        foreign = tmp_path / "foreign"
        (foreign / "data").mkdir(parents=True)
        with pytest.raises(PolicyRefused, match="unknown"):
            check_dataset(foreign, student, lenient, today())


def _in_days(days: int) -> str:
    from datetime import timedelta

    from pipeline.terms.training import today

    return (today() + timedelta(days=days)).isoformat()

"""Reading a config: strict YAML, every mistake at once with the nearest valid name, overrides, no literal secrets."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from pipeline.core.config import RunConfig
from pipeline.core.errors import UsageError
from pipeline.core.load import Loaded, load_config, read_yaml, require_test_answers
from pipeline.core.mistakes import mistakes_in
from tests.support import minimal_config, write_project

ANSWERED = {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}, "columns": {"answer": "completion"}}}
SILENT = {"facts": {"source": {"kind": "jsonl", "path": "rows.jsonl"}}}
LITERAL_KEY = "sk-LITERAL-0123456789abcdef"


def load(folder: Path, *overrides: str, **sections: Any) -> Loaded:
    return load_config(write_project(folder, **sections), overrides)


def refusal(folder: Path, *overrides: str, **sections: Any) -> UsageError:
    """The error that a config is refused with."""
    with pytest.raises(UsageError) as caught:
        load(folder, *overrides, **sections)
    return caught.value


def yaml_refusal(folder: Path, content: str | bytes) -> UsageError:
    path = folder / "x.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert str(path) in caught.value.where
    return caught.value


def openai(**changes: Any) -> dict[str, Any]:
    teacher = {"kind": "openai", "base_url": "https://api.example/v1", "provider": "example", "model": "m", **changes}
    return {"teachers": {"api": teacher}, "generate": {"teacher": "api"}}


def field_paths(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Path of each field of a config model, sections opened."""
    for name, field in model.model_fields.items():
        yield (name,)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from ((name, *rest) for rest in field_paths(field.annotation))


class TestYaml:
    def test_a_duplicate_key_is_refused_where_it_stands(self, tmp_path: Path) -> None:
        error = yaml_refusal(tmp_path, "a: 1\nb: 2\na: 3\n")
        assert error.what == "not valid YAML: duplicate key 'a'"
        assert error.where.endswith("x.yaml:3:1")

    def test_a_duplicate_key_deep_inside_is_refused_too(self, tmp_path: Path) -> None:
        assert "duplicate key 'c'" in yaml_refusal(tmp_path, "a:\n  - b: {c: 1, d: 2, c: 1}\n").what

    def test_aliases_are_refused_so_that_no_file_can_grow_without_bound(self, tmp_path: Path) -> None:
        error = yaml_refusal(tmp_path, "a: &x [1, 2]\nb: *x\n")
        assert "aliases" in error.what
        assert error.where.endswith("x.yaml:2:4")

    def test_a_merge_key_is_refused(self, tmp_path: Path) -> None:
        yaml_refusal(tmp_path, "<<: {a: 1}\n")

    def test_a_file_over_one_megabyte_is_refused(self, tmp_path: Path) -> None:
        assert "1 MB" in yaml_refusal(tmp_path, "a: 1\n" + "#" * 1_000_000).what

    def test_a_file_of_exactly_one_megabyte_is_read(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_text("a: 1\n" + "#" * (1_000_000 - 5), "utf-8")
        assert read_yaml(path) == {"a": 1}

    def test_text_that_is_not_utf8_is_refused(self, tmp_path: Path) -> None:
        assert "UTF-8" in yaml_refusal(tmp_path, "name: café".encode("latin-1")).what

    def test_a_byte_order_mark_is_read_over(self, tmp_path: Path) -> None:
        path = tmp_path / "x.yaml"
        path.write_text("\ufeffa: 1\n", "utf-8")
        assert read_yaml(path) == {"a": 1}

    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="No such file") as caught:
            read_yaml(tmp_path / "none.yaml")
        assert caught.value.where == str(tmp_path / "none.yaml")

    def test_a_file_of_a_similar_name_is_suggested(self, tmp_path: Path) -> None:
        (tmp_path / "quickstart.yaml").touch()
        with pytest.raises(UsageError) as caught:
            read_yaml(tmp_path / "quikstart.yaml")
        assert caught.value.todo == f"did you mean {tmp_path / 'quickstart.yaml'}?"

    @pytest.mark.parametrize("name", ["-", "/dev/stdin", "/proc/self/fd/0"])
    def test_a_stream_is_no_config_since_a_lock_is_written_beside_it(self, name: str) -> None:
        with pytest.raises(UsageError, match="not from a stream"):
            read_yaml(Path(name))

    def test_a_pipe_is_refused_and_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "x.yaml")
        with pytest.raises(UsageError, match="not from a stream"):
            read_yaml(tmp_path / "x.yaml")

    @pytest.mark.parametrize("name", ["a" * 300 + ".yaml", "nul\0.yaml", "file/x.yaml"])
    def test_a_path_that_cannot_be_is_an_error_for_people(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(UsageError, match="cannot read the file"):
            read_yaml(tmp_path / name)

    def test_a_control_character_is_named_with_its_line(self, tmp_path: Path) -> None:
        error = yaml_refusal(tmp_path, "a: 1\nb: \x00\n")
        assert error.what == "not valid YAML: a control character (#x0000)"
        assert error.where.endswith("x.yaml:2")

    def test_a_folder_is_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="cannot read the file"):
            read_yaml(tmp_path)

    @pytest.mark.parametrize(
        "text",
        [
            "a: !!python/object/apply:os.system [echo]",
            "a: 2024-13-45",
            f"a: {'1' * 5000}",
            "[" * 5000,
            "a: [1, 2",
            "a: b: c",
            "a: \x00",
            "a: 1\n---\nb: 2\n",
        ],
        ids=[
            "python tag",
            "no such date",
            "huge number",
            "deep nesting",
            "unclosed",
            "two colons",
            "NUL",
            "two documents",
        ],
    )
    def test_what_is_not_plain_yaml_is_an_error_for_people(self, tmp_path: Path, text: str) -> None:
        assert yaml_refusal(tmp_path, text).what.startswith("not valid YAML")

    @pytest.mark.parametrize("text", ["", "- a\n- b\n", "just text\n"])
    def test_a_config_is_a_mapping(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "x.yaml"
        path.write_text(text, "utf-8")
        with pytest.raises(UsageError, match="not a mapping"):
            load_config(path)


class TestMistakes:
    def test_all_are_named_at_once_each_with_its_real_path(self, tmp_path: Path) -> None:
        error = refusal(
            tmp_path,
            teachers={"humans": {"kind": "replay", "pth": "rows.jsonl", "origin": "us"}},
            student={"modle": "./student"},
            generate={"teacher": "humans", "sampling": {"temprature": 0.5, "top_p": 7}},
            filter={"min_chars": 0, "verifier": "fuzzy"},
        )
        lines = [line.strip() for line in error.what.splitlines()]
        assert lines[0] == "8 mistakes:"
        assert sorted(line.split(":")[0] for line in lines[1:]) == [
            "filter.min_chars",
            "filter.verifier",
            "generate.sampling.temprature",
            "generate.sampling.top_p",
            "student.model",
            "student.modle",
            "teachers.humans.path",
            "teachers.humans.pth",
        ]

    @pytest.mark.parametrize(
        ("sections", "expected"),
        [
            ({"filtre": {}}, "filtre: unknown key; did you mean 'filter'?"),
            ({"filter": {"min_char": 3}}, "filter.min_char: unknown key; did you mean 'min_chars'?"),
            (
                {"train": {"tuning": {"kind": "lora", "alfa": 3}}},
                "train.tuning.alfa: unknown key; did you mean 'alpha'?",
            ),
            (openai(api_keys="${env:KEY}"), "teachers.api.api_keys: unknown key; did you mean 'api_key'?"),
            (
                {"prompts": {"sets": {"facts": {"source": {"kind": "jsonl", "paht": "x", "path": "rows.jsonl"}}}}},
                "prompts.sets.facts.source.paht: unknown key; did you mean 'path'?",
            ),
        ],
    )
    def test_an_unknown_key_comes_with_the_nearest_valid_one(
        self, tmp_path: Path, sections: dict[str, Any], expected: str
    ) -> None:
        assert expected in refusal(tmp_path, **sections).what

    def test_a_key_far_from_all_valid_ones_lists_them(self, tmp_path: Path) -> None:
        what = refusal(tmp_path, dedup={"zzz": 1}).what
        assert "dedup.zzz: unknown key; valid here: " in what
        assert "normalise" in what

    def test_names_of_another_kind_of_teacher_are_not_suggested(self, tmp_path: Path) -> None:
        sections = {"teachers": {"humans": {"kind": "replay", "path": "rows.jsonl", "origin": "us", "api_key": "x"}}}
        assert "did you mean 'api_key'" not in refusal(tmp_path, **sections).what

    def test_a_teacher_whose_name_is_its_kind_keeps_its_path(self, tmp_path: Path) -> None:
        sections = {"teachers": {"replay": {"kind": "replay", "path": "rows.jsonl", "origin": "us", "orign": "us"}}}
        error = refusal(tmp_path, generate={"teacher": "replay"}, **sections)
        assert "teachers.replay.orign: unknown key; did you mean 'origin'?" in error.what

    def test_a_union_of_plain_types_adds_nothing_to_the_path(self, tmp_path: Path) -> None:
        what = refusal(tmp_path, train={"tuning": {"kind": "lora", "target_modules": 7}}).what
        assert what.startswith("train.tuning.target_modules: give a text (")
        assert what.endswith(" or a list, such as [a, b]")

    def test_each_stands_with_its_line_and_the_last_one_at_the_file(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, dedup={"zzz": 1}, filter={"min_chars": "many"})
        lines = (tmp_path / "run.yaml").read_text("utf-8").splitlines()
        assert lines.index("  zzz: 1") + 1 == int(error.what.split("run.yaml:")[2].rstrip(")"))
        assert error.where == str(tmp_path / "run.yaml")

    def test_a_single_one_stands_alone_with_the_line_it_is_on(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, filter={"min_chars": "many", "max_chars": 3})
        lines = (tmp_path / "run.yaml").read_text("utf-8").splitlines()
        assert error.what == "filter.min_chars: give a whole number"
        assert error.where == f"{tmp_path / 'run.yaml'}:{lines.index('  min_chars: many') + 1}"

    def test_what_is_missing_is_looked_for_in_the_section_that_lacks_it(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, student={"license": "MIT"})
        lines = (tmp_path / "run.yaml").read_text("utf-8").splitlines()
        assert error.what == "student.model: is required"
        assert error.where == f"{tmp_path / 'run.yaml'}:{lines.index('student:') + 1}"

    @pytest.mark.parametrize(
        ("override", "what"),
        [
            ("filter.min_char=3", "filter.min_char: unknown key"),
            ("filtre.min_chars=3", "filtre: unknown key"),
            ("filter.verifier=exat", "filter.verifier: 'exat' is not a valid value; did you mean 'exact'?"),
            ("generate.sampling=3", "generate.sampling: give lines of `key: value`"),
            ("prompts.sets.other.system=x", "prompts.sets.other.source: is required"),
            ("generate.samples=true", "generate.samples: give a number, not yes or no"),
        ],
    )
    def test_one_that_an_override_brought_is_placed_there(self, tmp_path: Path, override: str, what: str) -> None:
        error = refusal(tmp_path, "dataset.seed=1", override, "train.seed=2")
        assert error.what.startswith(what)
        assert error.where == f"--set {override.partition('=')[0]}=…"

    def test_one_of_the_file_is_not_blamed_on_an_override(self, tmp_path: Path) -> None:
        assert "run.yaml:" in refusal(tmp_path, "filter.max_chars=3", filter={"min_chars": "many"}).where

    @pytest.mark.parametrize(
        ("sections", "expected"),
        [
            ({"teachers": {"humans": {"kind": "repaly"}}}, "teachers.humans.kind: 'repaly' is not a valid value; did"),
            ({"filter": {"verifier": "exat"}}, "filter.verifier: 'exat' is not a valid value; did you mean 'exact'?"),
            ({"filter": {"verifier": "zzz"}}, "'zzz' is not a valid value; valid here: none, exact, numeric"),
            ({"train": {"tuning": {"kind": "lorra"}}}, "train.tuning.kind: 'lorra' is not a valid value; did you mean"),
            ({"filter": {"verifier": True}}, "filter.verifier: not a valid value; valid here: none, exact, numeric"),
        ],
    )
    def test_a_wrong_value_comes_with_the_nearest_valid_one(
        self, tmp_path: Path, sections: dict[str, Any], expected: str
    ) -> None:
        assert expected in refusal(tmp_path, **sections).what

    def test_a_long_value_is_not_repeated_since_it_may_be_a_secret(self, tmp_path: Path) -> None:
        assert LITERAL_KEY * 2 not in str(refusal(tmp_path, filter={"verifier": LITERAL_KEY * 2}))

    @pytest.mark.parametrize("wrong", ["text that is no number", -7, 2.5, [{}], {"zz": 1}, None, True, "x" * 200])
    def test_no_sentence_is_pydantics_own(self, tmp_path: Path, wrong: Any) -> None:
        """A wrong value in every field of every section, one at a time."""
        refused = 0
        for path in field_paths(RunConfig):
            data: dict[str, Any] = minimal_config()
            parents: dict[str, Any] = data
            for name in path[:-1]:
                parents = parents.setdefault(name, {})
            parents[path[-1]] = wrong
            try:
                RunConfig.model_validate(data)
            except ValidationError as error:
                for mistake in mistakes_in(RunConfig, data, error):
                    refused += 1
                    assert not re.search(
                        r"[Ii]nput should|valid (dictionary|tuple|string)|instance|pars|__", str(mistake)
                    )
                    assert str(mistake)[-1].isalnum() or str(mistake)[-1] in ")]?`", mistake
        assert refused > 30

    def test_a_variant_without_its_kind_is_asked_for_it(self, tmp_path: Path) -> None:
        assert "train.tuning.kind: is required" in refusal(tmp_path, train={"tuning": {"r": 4}}).what

    def test_a_teacher_that_is_not_declared_is_named(self, tmp_path: Path) -> None:
        assert "'nobody' is not one of teachers: ['humans']" in refusal(tmp_path, generate={"teacher": "nobody"}).what

    def test_a_hub_id_needs_a_revision(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, student={"model": "org/model"})
        assert "student: 'org/model' is a hub id: give its `revision`" in error.what

    def test_a_folder_has_no_revision(self, tmp_path: Path) -> None:
        assert "`revision` belongs to hub ids" in refusal(tmp_path, student={"model": "./x", "revision": "abc"}).what

    def test_a_bare_no_is_not_taken_for_a_model_name(self, tmp_path: Path) -> None:
        path = write_project(tmp_path)
        path.write_text(path.read_text("utf-8").replace("model: ./student", "model: no"), "utf-8")
        with pytest.raises(UsageError, match=r"student\.model: give a text"):
            load_config(path)

    def test_shares_must_leave_training_rows(self, tmp_path: Path) -> None:
        prompts = minimal_config()["prompts"] | {"validation": 0.5, "test": 0.5}
        assert "leave no share for training" in refusal(tmp_path, prompts=prompts).what

    @pytest.mark.parametrize("name", ["a/b", "../x", "", ".hidden", "a+b", "x\n", "x" * 101, "é"])
    def test_a_run_name_is_safe_as_a_folder_and_free_of_the_override_sign(self, tmp_path: Path, name: str) -> None:
        assert "name:" in refusal(tmp_path, name=name).what

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_numbers_are_finite(self, tmp_path: Path, value: float) -> None:
        assert "train.learning_rate" in refusal(tmp_path, train={"learning_rate": value}).what

    @pytest.mark.parametrize(("text", "value"), [("1e-1", 0.1), ("2e-5", 2e-5), ("1E3", 1000.0), ("1.0e-2", 0.01)])
    def test_numbers_with_an_exponent_are_numbers(self, tmp_path: Path, text: str, value: float) -> None:
        path = write_project(tmp_path, train={"learning_rate": "PLACEHOLDER"})
        path.write_text(path.read_text("utf-8").replace("PLACEHOLDER", text), "utf-8")
        assert load_config(path).config.train.learning_rate == value

    @pytest.mark.parametrize("section", [{"samples": True}, {"draw": False}, {"sampling": {"temperature": True}}])
    def test_yes_and_no_are_not_numbers(self, tmp_path: Path, section: dict[str, Any]) -> None:
        assert "generate." in refusal(tmp_path, generate={"teacher": "humans", **section}).what

    def test_a_config_cannot_be_changed_after_loading(self, tmp_path: Path) -> None:
        config = load(tmp_path).config
        with pytest.raises(ValueError, match="frozen"):
            config.name = "other"


class TestSecrets:
    def test_a_reference_is_accepted_and_not_looked_up(self, tmp_path: Path) -> None:
        config = load(tmp_path, **openai(api_key="${env:SURELY_NOT_SET_ANYWHERE}")).config
        assert config.teachers["api"].api_key == "${env:SURELY_NOT_SET_ANYWHERE}"  # type: ignore[union-attr]

    def test_a_literal_key_is_refused_and_never_echoed(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, **openai(api_key=LITERAL_KEY))
        assert "teachers.api.api_key: give a reference such as ${env:API_KEY}" in error.what
        assert LITERAL_KEY not in str(error)
        assert LITERAL_KEY not in repr(error.__cause__)

    def test_not_even_the_models_themselves_echo_it(self) -> None:
        """A notebook that builds a config without the loader sees pydantic's own message."""
        with pytest.raises(ValidationError) as caught:
            RunConfig.model_validate(minimal_config(**openai(api_key=LITERAL_KEY)))
        assert LITERAL_KEY not in str(caught.value)

    @pytest.mark.parametrize(
        "place", ["teachers.api.api_key", "teachers.api.api_key.x", "teachers.api.apikey", "nowhere"]
    )
    def test_a_literal_key_on_the_command_line_is_not_echoed_either(self, tmp_path: Path, place: str) -> None:
        error = refusal(tmp_path, f"{place}={LITERAL_KEY}", **openai(api_key="${env:KEY}"))
        assert LITERAL_KEY not in str(error)

    def test_a_literal_key_under_a_wrong_name_is_not_echoed(self, tmp_path: Path) -> None:
        assert LITERAL_KEY not in str(refusal(tmp_path, **openai(apikey=LITERAL_KEY)))

    def test_a_url_with_a_password_is_refused(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, **openai(base_url=f"https://user:{LITERAL_KEY}@api.example/v1"))
        assert LITERAL_KEY not in str(error)


class TestOverrides:
    def test_they_are_applied_before_validation(self, tmp_path: Path) -> None:
        sections: dict[str, Any] = {"filter": {"min_chars": "not a number"}}
        refusal(tmp_path, **sections)
        assert load(tmp_path, "filter.min_chars=7", **sections).config.filter.min_chars == 7

    def test_they_are_validated_like_the_file(self, tmp_path: Path) -> None:
        error = refusal(tmp_path, "filter.min_char=7")
        assert "filter.min_char: unknown key; did you mean 'min_chars'?" in error.what

    def test_a_section_that_the_file_leaves_out_can_be_set(self, tmp_path: Path) -> None:
        assert load(tmp_path, "evaluate.max_tokens=9").config.evaluate.max_tokens == 9

    @pytest.mark.parametrize(
        ("text", "value"), [("[stop, length]", ("stop", "length")), ("[]", ()), ('["a=b"]', ("a=b",))]
    )
    def test_the_value_is_read_as_yaml(self, tmp_path: Path, text: str, value: tuple[str, ...]) -> None:
        assert load(tmp_path, f"filter.finish_reasons={text}").config.filter.finish_reasons == value

    def test_the_last_of_two_wins(self, tmp_path: Path) -> None:
        assert load(tmp_path, "dataset.seed=1", "dataset.seed=2").config.dataset.seed == 2

    @pytest.mark.parametrize(
        "text",
        [
            "filter.min_chars",
            "=3",
            "filter.=3",
            ".a=3",
            "name.x=3",
            "filter.min_chars=[",
            "filter.min_chars=2024-13-45",
        ],
    )
    def test_a_malformed_one_is_refused(self, tmp_path: Path, text: str) -> None:
        assert refusal(tmp_path, text).where.startswith("--set")

    def test_the_run_gets_a_name_of_its_own_and_no_lock(self, tmp_path: Path) -> None:
        loaded = load(tmp_path, "dataset.seed=1")
        name, plus, suffix = loaded.run_name.partition("+")
        assert (name, plus, len(suffix)) == ("small", "+", 8)
        assert set(suffix) <= set("0123456789abcdef")
        assert loaded.lock_path is None

    def test_equal_overrides_share_a_run_and_others_do_not(self, tmp_path: Path) -> None:
        first, again, other = (load(tmp_path, f"dataset.seed={seed}").run_name for seed in (1, 1, 2))
        assert first == again
        assert first != other

    def test_without_any_the_run_has_the_configs_name_and_a_lock_beside_it(self, tmp_path: Path) -> None:
        loaded = load(tmp_path)
        assert loaded.run_name == "small"
        assert loaded.lock_path == tmp_path / "run.lock.json"


def test_the_project_that_other_tests_build_on_is_valid(tmp_path: Path) -> None:
    path = write_project(tmp_path)
    assert yaml.safe_load(path.read_text("utf-8")) == minimal_config()
    assert load_config(path).config.name == "small"


class TestRequireTestAnswers:
    """An evaluation that cannot compare anything is refused before the teacher is asked."""

    def test_reference_answers_and_a_test_split_pass(self, tmp_path: Path) -> None:
        require_test_answers(load(tmp_path, prompts={"sets": ANSWERED, "test": 0.1}))

    def test_no_reference_answers(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no prompt set has reference answers"):
            require_test_answers(load(tmp_path, prompts={"sets": SILENT, "test": 0.1}))

    def test_no_test_split(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no test split"):
            require_test_answers(load(tmp_path, prompts={"sets": ANSWERED, "test": 0}))


def test_the_order_of_overrides_does_not_name_another_run(tmp_path: Path) -> None:
    both = ("train.seed=1", "dataset.seed=2")
    assert load(tmp_path, *both).run_name == load(tmp_path, *reversed(both)).run_name
    assert load(tmp_path, *both).run_name != load(tmp_path, both[0]).run_name

"""Stage `prompts`: what it reads, what it refuses and in which words, what leaves, which split the rest is in."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline.core.config import PromptsStep
from pipeline.core.config_prompts import HubSource, PromptsConfig
from pipeline.core.errors import UsageError
from pipeline.core.record import Message, Prompt, prompts_of, read_shards
from pipeline.core.stage import Result
from pipeline.stages import prompts as stage
from pipeline.stages.prompts import order, settlement, sources
from pipeline.text.split import split_of
from tests.support import a_prompt, make_context


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def one_set(path: Path, **changes: Any) -> dict[str, Any]:
    return {"one": {"source": {"kind": path.suffix.removeprefix("."), "path": path}, **changes}}


def run(tmp_path: Path, sets: dict[str, Any], **config: Any) -> tuple[Result, list[Prompt], dict[str, str]]:
    """Result, kept prompts, reason by id of the rejected ones."""
    out = tmp_path / "out"
    out.mkdir()
    cfg = PromptsStep(prompts=PromptsConfig.model_validate({"sets": sets, "test": 0, "validation": 0, **config}))
    result = stage.run(cfg, {}, out, make_context(tmp_path))
    kept = [prompt for table in read_shards(out / "rows") for prompt in prompts_of(table)]
    reasons: dict[str, str] = {}
    for table in read_shards(out / "rejects"):
        reasons.update(zip(table["prompt_id"].to_pylist(), table["reason"].to_pylist(), strict=True))
    return result, kept, reasons


def refusal(tmp_path: Path, sets: dict[str, Any], **config: Any) -> str:
    with pytest.raises(UsageError) as caught:
        run(tmp_path, sets, **config)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- reading

ROWS = [{"id": "b", "prompt": 'Say "1,\n2"', "n": "7"}, {"id": "a", "prompt": "Z\u00fcrich \U0001f40d", "n": "8"}]


def write_csv(path: Path) -> None:
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["id", "prompt", "n"])
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_all_kinds_of_sources_read_alike(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    path = folder / f"rows.{kind}"
    source: dict[str, Any] = {"kind": kind, "path": path}
    if kind == "csv":
        write_csv(path)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\n".join(json.dumps(row).encode() for row in ROWS))
    result, kept, _ = run(tmp_path, {"one": {"source": source, "columns": {"answer": "n"}}})
    assert [(prompt.prompt_id, prompt.prompt[0].content, prompt.answer) for prompt in kept] == [
        ("a", "Z\u00fcrich \U0001f40d", "8"),
        ("b", 'Say "1,\n2"', "7"),
    ]
    assert result.rows_in == result.rows_out == 2


def test_a_hub_data_set_reads_like_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets: the extra `train` installs it")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "rows.jsonl", ROWS)
    # The library reads a folder as it reads the hub; a config may not name one.
    source = HubSource.model_construct(kind="hub", dataset=str(folder), revision="main", config=None, split="train")
    found = list(sources._load_hub(source, "the set"))
    assert [(row.place, row.values) for row in found] == [("the set, row 1", ROWS[0]), ("the set, row 2", ROWS[1])]


@pytest.mark.parametrize("name", ["./set", "../set", "/set", "~/set"])
def test_a_local_folder_is_no_hub_data_set(name: str) -> None:
    with pytest.raises(ValidationError, match="read with kind jsonl, csv or parquet"):
        HubSource(kind="hub", dataset=name, revision="main")


def test_a_folder_of_the_data_sets_name_is_not_read_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("datasets", reason="needs the package datasets: the extra `train` installs it")
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "org" / "name" / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    source = {"kind": "hub", "dataset": "org/name", "revision": "main"}
    assert "holds something of this name" in refusal(tmp_path, {"one": {"source": source}})


def test_numbers_and_booleans_are_answers(tmp_path: Path) -> None:
    answers = [True, False, 7, 2.5, "yes", None]
    rows = [{"id": str(at), "prompt": f"q {at}", "answer": answer} for at, answer in enumerate(answers)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    _, kept, _ = run(tmp_path, one_set(path, columns={"answer": "answer"}))
    assert [prompt.answer for prompt in kept] == ["true", "false", "7", "2.5", "yes", None]


def test_messages_template_and_system(tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": "2?"},
    ]
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"id": 1, "prompt": turns}])
    facts = write_jsonl(tmp_path / "facts.jsonl", [{"id": 1, "a": 2, "b": [3, 4]}])
    template = tmp_path / "t.jinja"
    template.write_text("What is {{ a }} + {{ b[1] }}?\n", "utf-8")
    sets = {
        "chat": {"source": {"kind": "jsonl", "path": chat}},
        "facts": {"source": {"kind": "jsonl", "path": facts}, "template": template, "system": "Be brief."},
    }
    _, kept, _ = run(tmp_path, sets)
    assert [prompt.prompt for prompt in kept] == [
        (Message("user", "Hi"), Message("assistant", "?"), Message("user", "2?")),
        (Message("system", "Be brief."), Message("user", "What is 2 + 4?")),
    ]


def test_ids_from_the_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "x"}, {"prompt": "y"}, {"prompt": "x"}])
    result, kept, reasons = run(tmp_path, one_set(path, columns={"id": None}))
    assert len(kept) == 2 and all(len(prompt.prompt_id) == 64 for prompt in kept)
    assert dict(result.rejected) == {"duplicate_of": 1}
    assert all(reason == f"duplicate_of:one/{name}" for name, reason in reasons.items())


def test_lone_surrogates_are_replaced_and_nul_survives(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a\\ud800", "prompt": "x\\udfff\\u0000y \\ud83d\\ude00", "answer": "\\udc00"}\n', "utf-8")
    _, kept, _ = run(tmp_path, one_set(path, columns={"answer": "answer"}))
    prompt = kept[0]
    assert (prompt.prompt_id, prompt.prompt[0].content) == ("a\ufffd", "x\ufffd\0y \U0001f600")
    assert prompt.answer == "\ufffd"


def test_sources_say_what_the_card_says_and_unknown_elsewhere(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}])
    card = tmp_path / "card.yaml"
    card.write_text("source: https://example.org/x\nlicense: mit\n", "utf-8")
    sets = {"said": one_set(path, card=card)["one"], "silent": one_set(path)["one"]}
    result, kept, _ = run(tmp_path, sets)
    told = json.loads((tmp_path / "out" / "sources.json").read_text("utf-8"))
    assert told == result.metrics["sources"]
    assert (told["said"]["source"], told["said"]["revision"]) == ("https://example.org/x", "unknown")
    assert (told["said"]["license"], told["said"]["license_is_spdx"]) == ("MIT", True)
    assert (told["silent"]["license"], told["silent"]["license_is_spdx"]) == ("unknown", False)
    assert str(tmp_path) not in json.dumps(told)
    assert [(prompt.prompt_set, prompt.also_in, prompt.license_set) for prompt in kept] == [
        ("said", ("silent",), ("MIT", "unknown"))
    ]


def test_files_whose_bytes_count(tmp_path: Path) -> None:
    files = one_set(tmp_path / "p.jsonl", card=tmp_path / "c.yaml", template=tmp_path / "t.jinja")
    files["hub"] = {"source": {"kind": "hub", "dataset": "a/b", "revision": "1"}}
    cfg = PromptsStep(prompts=PromptsConfig.model_validate({"sets": files}))
    assert {name: path.name for name, path in stage.input_files(cfg).items()} == {
        "prompts.sets.one.source.path": "p.jsonl",
        "prompts.sets.one.card": "c.yaml",
        "prompts.sets.one.template": "t.jinja",
    }


def test_more_rows_than_one_run_holds_are_sorted(tmp_path: Path) -> None:
    names = [f"{number * 7919 % 100:03d}" for number in range(100)]
    prompts = [a_prompt(prompt_id=name, answer=str(at)) for at, name in enumerate([*names, *names])]
    found = list(order.sorted_by_id(prompts, tmp_path, run_rows=16))
    assert found == sorted(prompts, key=lambda prompt: prompt.prompt_id)


# -------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"id": "a", "prompt": "x"}\n{"id": \n', ("p.jsonl:2", "not JSON")),
        ('{"id": "a", "prompt": "x"}\n["x"]\n', ("p.jsonl:2", "not an object")),
        ("[" * 100_000, ("p.jsonl:1", "not JSON")),
        ("\n \n", ("no rows", "sets.one")),
        ('{"id": "a", "promt": "x"}\n', ("p.jsonl:1", "did you mean 'promt'?")),
        ('{"prompt": "x"}\n', ("p.jsonl:1", "'id'", "id: null")),
        ('{"id": null, "prompt": "x"}\n', ("p.jsonl:1", "no id")),
        ('{"id": "a", "prompt": 7}\n', ("p.jsonl:1", "a number where a text")),
        ('{"id": "a", "prompt": []}\n', ("p.jsonl:1", "list of messages")),
        ('{"id": "a", "prompt": [{"role": "user"}]}\n', ("p.jsonl:1", "has 'role'")),
        ('{"id": "a", "prompt": [{"role": "wizard", "content": "x"}]}\n', ("p.jsonl:1", "'wizard'")),
        ('{"id": "a", "prompt": [{"role": "assistant", "content": "x"}]}\n', ("p.jsonl:1", "last message")),
        ('{"id": "a", "prompt": [{"role": "user", "content": "x", "nick": "y"}]}\n', ("p.jsonl:1", "'nick'")),
    ],
)
def test_unreadable_rows_name_their_place(tmp_path: Path, text: str, said: tuple[str, ...]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(text, "utf-8")
    message = refusal(tmp_path, one_set(path))
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.jsonl", b'{"id": "a", "prompt": "x"}\n{"id": "\xff"}', ("p.jsonl:2", "UTF-8")),
        ("p.csv", b"id,prompt\na,x,y\n", ("p.csv:2", "3 cells under a header of 2")),
        ("p.csv", b'id,prompt\na,"x"y\n', ("p.csv:2", "not CSV")),
        ("p.csv", b"id,id\n", ("p.csv:1", "['id'] twice")),
        ("p.csv", b"", ("no rows",)),
        ("p.parquet", b"PAR1 no", ("p.parquet", "not readable as parquet")),
    ],
)
def test_unreadable_files_name_their_place(tmp_path: Path, name: str, content: bytes, said: tuple[str, ...]) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path, one_set(tmp_path / name))
    assert all(part in message for part in said), message


def test_a_missing_file(tmp_path: Path) -> None:
    assert "cannot read the prompts" in refusal(tmp_path, one_set(tmp_path / "p.jsonl"))


def test_duplicate_ids_are_listed(tmp_path: Path) -> None:
    rows = [{"id": f"p{number % 12:02d}", "prompt": str(number)} for number in range(24)]
    message = refusal(tmp_path, one_set(write_jsonl(tmp_path / "p.jsonl", rows)))
    assert all(repr(f"p{number:02d}") in message for number in range(10))
    assert "'p10'" not in message and "…" in message


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ a }} {{ c }}", ("t.jinja", "p.jsonl:1", "'c' is undefined", "id, a, b")),
        ("{{ b }}", ("t.jinja", "p.jsonl:1", "null: b")),
        ("{{ a", ("t.jinja:1", "not a Jinja template")),
        ("{{ a / 0 }}", ("t.jinja", "p.jsonl:1", "ZeroDivisionError")),
        ("{{ ''.__class__.__mro__ }}", ("t.jinja", "SecurityError")),
    ],
)
def test_templates_that_fail(tmp_path: Path, template: str, said: tuple[str, ...]) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": "1", "a": 2, "b": None}])
    (tmp_path / "t.jinja").write_text(template, "utf-8")
    message = refusal(tmp_path, one_set(path, template=tmp_path / "t.jinja"))
    assert all(part in message for part in said), message


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("licence: MIT\n", ("card.yaml", "licence: unknown key", "source, revision, license, description")),
        ("revision: 2024\n", ("card.yaml", "revision", "quote")),
        ("license: ''\n", ("card.yaml", "SPDX")),
        ("- MIT\n", ("card.yaml",)),
    ],
)
def test_cards_that_are_wrong(tmp_path: Path, card: str, said: tuple[str, ...]) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}])
    (tmp_path / "card.yaml").write_text(card, "utf-8")
    message = refusal(tmp_path, one_set(path, card=tmp_path / "card.yaml"))
    assert all(part in message for part in said), message


def test_two_system_messages_are_one_too_many(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": turns}])
    assert "both give a system message" in refusal(tmp_path, one_set(path, system="c"))


# ------------------------------------------------------------------------------------------ what leaves, splits


def test_duplicates_name_the_first_in_canonical_order(tmp_path: Path) -> None:
    late = write_jsonl(tmp_path / "late.jsonl", [{"id": "a", "prompt": "What  IS 1?"}, {"id": "b", "prompt": "2?"}])
    early = write_jsonl(tmp_path / "early.jsonl", [{"id": "z", "prompt": "what is 1?"}, {"id": "y", "prompt": "2?"}])
    sets = {
        "b-late": {"source": {"kind": "jsonl", "path": late}},
        "a-early": {"source": {"kind": "jsonl", "path": early}},
        "c-other": {"source": {"kind": "jsonl", "path": late}, "system": "Be brief."},
    }
    result, kept, _ = run(tmp_path, sets)
    assert [(prompt.prompt_set, prompt.prompt_id) for prompt in kept] == [
        ("a-early", "y"),
        ("a-early", "z"),
        ("c-other", "a"),
        ("c-other", "b"),
    ]
    rejects = pa.concat_tables(read_shards(tmp_path / "out" / "rejects"))
    assert rejects["reason"].to_pylist() == ["duplicate_of:a-early/z", "duplicate_of:a-early/y"]
    assert dict(result.rejected) == {"duplicate_of": 2}


def test_blank_prompts_leave(tmp_path: Path) -> None:
    rows = [{"id": "a", "prompt": " \n"}, {"id": "b", "prompt": None}, {"id": "c", "prompt": "x"}]
    _, kept, reasons = run(tmp_path, one_set(write_jsonl(tmp_path / "p.jsonl", rows)))
    assert [prompt.prompt_id for prompt in kept] == ["c"]
    assert reasons == {"a": "empty", "b": "empty"}


def test_the_split_is_the_groups(tmp_path: Path) -> None:
    rows = [{"id": f"{number:03d}", "prompt": f"question {number}", "g": number // 4 or None} for number in range(400)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    _, kept, _ = run(tmp_path, one_set(path, columns={"group_id": "g"}), test=0.2, validation=0.2)
    assert len(kept) == 400
    assert all(prompt.split == split_of(prompt.group_id, validation=0.2, test=0.2) for prompt in kept)
    groups = {prompt.group_id: prompt.split for prompt in kept}
    assert all(groups[prompt.group_id] == prompt.split for prompt in kept)
    assert {prompt.split for prompt in kept} == {"train", "validation", "test"}
    assert len({prompt.group_id for prompt in kept[:4]}) == 4  # without a group each text is its own


def test_equal_texts_share_a_split_whatever_their_system_message(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": str(number), "prompt": f"q {number}"} for number in range(60)])
    sets = {"a": one_set(path)["one"], "b": one_set(path, system="Be brief.")["one"]}
    _, kept, _ = run(tmp_path, sets, test=0.3, validation=0.3)
    splits = {(prompt.prompt_set, prompt.prompt_id): prompt.split for prompt in kept}
    # Those near a test prompt (equal ones are) have left, unless they are test prompts themselves.
    assert all(splits["a", name] == splits["b", name] for _, name in splits)


def test_prompts_near_a_test_prompt_leave(tmp_path: Path) -> None:
    text = "Natalia sold clips to {} of her friends in April and then she sold half as many clips in May how many"
    rows = [{"id": f"{number:02d}", "prompt": text.format("48") + "!" * number} for number in range(1, 30)]
    rows.append({"id": "99", "prompt": "Something else altogether is asked for here, as anyone can see."})
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    result, kept, reasons = run(tmp_path, one_set(path), test=0.3, validation=0.2, near_test={"threshold": 0.5})
    tests = [prompt for prompt in kept if prompt.split == "test"]
    assert tests and set(reasons.values()) == {"near_test"}
    assert {prompt.prompt_id for prompt in kept if prompt.split != "test"} <= {"99"}
    assert result.rejected["near_test"] == 30 - len(kept)


@pytest.mark.parametrize(
    ("splits", "stays"),
    [
        (("train", "test"), 1),
        (("test", "train"), 0),
        (("train", "validation"), 1),
        (("validation", "test"), 1),
        (("train", "train"), 0),
        (("train", "validation", "test", "test"), 2),
    ],
)
@pytest.mark.parametrize("shard_rows", [8192, 1])
def test_of_a_duplicate_in_two_splits_the_copy_further_from_training_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, splits: Sequence[str], stays: int, shard_rows: int
) -> None:
    monkeypatch.setattr(settlement, "SHARD_ROWS", shard_rows)
    groups = {split_of(str(number), validation=0.3, test=0.3): str(number) for number in range(40)}
    rows = [{"id": f"p{at}", "prompt": "x", "g": groups[split]} for at, split in enumerate(splits)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    result, kept, reasons = run(tmp_path, one_set(path, columns={"group_id": "g"}), test=0.3, validation=0.3)
    assert [(prompt.prompt_id, prompt.split) for prompt in kept] == [(f"p{stays}", splits[stays])]
    assert reasons == {f"p{at}": f"duplicate_of:one/p{stays}" for at in range(len(splits)) if at != stays}
    assert result.rows_in == result.rows_out + sum(result.rejected.values())


def test_what_a_test_group_holds_is_not_trained_through_a_duplicate(tmp_path: Path) -> None:
    groups = {split_of(str(number), validation=0, test=0.5): str(number) for number in range(20)}
    text = "Which of the towns on the river has the older bridge, the one"
    ours = [{"id": "a1", "prompt": f"{text} {{}} upstream?", "g": groups["train"]}]
    theirs = [
        {"id": "b1", "prompt": f"{text} {{}} upstream?", "g": groups["test"]},
        {"id": "c1", "prompt": f"{text} {{}} upstream!", "g": groups["train"]},
    ]
    sets = {
        name: one_set(write_jsonl(tmp_path / f"{name}.jsonl", rows), columns={"group_id": "g"})["one"]
        for name, rows in (("one", ours), ("two", theirs))
    }
    _, kept, reasons = run(tmp_path, sets, test=0.5)
    assert [(prompt.prompt_id, prompt.split, prompt.also_in) for prompt in kept] == [("b1", "test", ("one",))]
    assert reasons == {"a1": "duplicate_of:two/b1", "c1": "near_test"}


def test_a_duplicate_leaves_its_set_and_licence_with_the_prompt_that_stays(tmp_path: Path) -> None:
    sets = {}
    for name, terms in (("one", "Apache-2.0"), ("three", "apache-2.0"), ("two", "CC-BY-NC-4.0")):
        path = write_jsonl(tmp_path / f"{name}.jsonl", [{"id": "a", "prompt": "same"}, {"id": "b", "prompt": name}])
        card = tmp_path / f"{name}.yaml"
        card.write_text(f"license: {terms}\n", "utf-8")
        sets[name] = one_set(path, card=card)["one"]
    _, kept, _ = run(tmp_path, sets)
    assert [(f"{prompt.prompt_set}/{prompt.prompt_id}", prompt.also_in, prompt.license_set) for prompt in kept] == [
        ("one/a", ("three", "two"), ("Apache-2.0", "CC-BY-NC-4.0")),
        ("one/b", (), ("Apache-2.0",)),
        ("three/b", (), ("Apache-2.0",)),
        ("two/b", (), ("CC-BY-NC-4.0",)),
    ]


def test_the_same_bytes_under_another_name_are_the_same_content(tmp_path: Path) -> None:
    contents = []
    for name in ("questions", "copy"):
        (tmp_path / name).mkdir()
        path = write_jsonl(tmp_path / name / f"{name}.jsonl", [{"id": "a", "prompt": "x"}])
        contents.append(run(tmp_path / name, one_set(path))[0].content)
    assert contents[0] == contents[1]


def test_the_system_message_does_not_make_prompts_near(tmp_path: Path) -> None:
    rows = [{"id": str(number), "prompt": f"{number} apples, {number * 7} pears?"} for number in range(50)]
    path = write_jsonl(tmp_path / "p.jsonl", rows)
    system = " ".join(f"Rule {number} is {number * 3}." for number in range(60))
    _, kept, _ = run(tmp_path, one_set(path, system=system), test=0.3)
    assert len(kept) == 50


def test_a_corrected_card_changes_the_content(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "p.jsonl", [{"id": "a", "prompt": "x"}])
    contents = []
    for number, description in enumerate(["right", "right", "wrong"]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "card.yaml").write_text(f"description: {description}\n", "utf-8")
        contents.append(run(folder, one_set(path, card=folder / "card.yaml"))[0].content)
    assert contents[0] == contents[1] != contents[2]

"""Names for contents: canonical JSON, keys and why they move, model folders, remembered digests, manifests."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import CorruptArtefact
from pipeline.core.lineage import (
    DigestCache,
    Manifest,
    canonical_json,
    changes,
    digest_json,
    explain,
    file_sha256,
    path_digest,
    row_id,
    step_key,
)

PARTS: dict[str, Any] = {
    "stage": "filter",
    "version": 1,
    "config": {"filter": {"min_chars": 1, "finish_reasons": ["stop"], "repetition": {"ngram": 4}}},
    "inputs": {"generate": "a" * 64},
    "files": {},
}


class Colour(Enum):
    RED = 1


class TestCanonicalJson:
    def test_it_is_sorted_without_spaces_in_utf8(self) -> None:
        assert canonical_json({"b": [1, 2.5, None, True], "a": "é"}) == '{"a":"é","b":[1,2.5,null,true]}'.encode()

    @pytest.mark.parametrize("value", [object(), Path("x"), {1, 2}, b"bytes", Colour.RED, {"deep": [Path("x")]}])
    def test_what_json_does_not_know_has_no_form(self, value: Any) -> None:
        with pytest.raises(TypeError):
            canonical_json(value)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), {"deep": [float("nan")]}])
    def test_neither_has_a_number_that_is_none(self, value: Any) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            canonical_json(value)

    @pytest.mark.parametrize("key", [1, True, None, 1.5])
    def test_a_key_that_is_no_text_has_no_form_since_json_would_change_it(self, key: Any) -> None:
        with pytest.raises(TypeError):
            canonical_json({"deep": [{key: "x"}]})

    def test_one_and_true_and_one_point_zero_are_three_values(self) -> None:
        assert len({digest_json(value) for value in (1, True, 1.0, "1")}) == 4

    def test_a_lone_surrogate_has_a_form(self) -> None:
        assert canonical_json("\ud800") == b'"\xed\xa0\x80"'


class TestRowId:
    def test_each_of_its_three_parts_counts(self) -> None:
        ids = {row_id(*parts) for parts in [("a", "b", "c"), ("x", "b", "c"), ("a", "x", "c"), ("a", "b", "x")]}
        assert len(ids) == 4
        assert all(len(each) == 32 and int(each, 16) >= 0 for each in ids)

    def test_parts_cannot_flow_into_each_other(self) -> None:
        assert row_id("a", "bc", "d") != row_id("ab", "c", "d")


class TestKeysAndReasons:
    @pytest.mark.parametrize("part", list(PARTS))
    def test_every_part_moves_the_key(self, part: str) -> None:
        assert step_key({**PARTS, part: "other"}) != step_key(PARTS)

    def test_a_changed_field_is_named_with_both_values(self) -> None:
        new = {**PARTS, "config": {"filter": {**PARTS["config"]["filter"], "min_chars": 5}}}
        assert explain(PARTS, new) == ["filter.min_chars: 1 -> 5"]

    def test_so_are_nested_fields_lists_versions_inputs_and_files(self) -> None:
        new: dict[str, Any] = {
            "stage": "filter",
            "version": 2,
            "config": {"filter": {"min_chars": 1, "finish_reasons": [], "repetition": {"ngram": 5}}},
            "inputs": {"generate": "b" * 64},
            "files": {"filter.words": "c" * 64},
        }
        assert explain(PARTS, new) == [
            'filter.finish_reasons: ["stop"] -> []',
            "filter.repetition.ngram: 4 -> 5",
            "file filter.words changed: absent -> cccccccccccc",
            "rows of generate changed: aaaaaaaaaaaa -> bbbbbbbbbbbb",
            "version: 1 -> 2",
        ]

    def test_a_new_field_whose_value_is_none_is_a_reason(self) -> None:
        new = {**PARTS, "config": {"filter": {**PARTS["config"]["filter"], "language": None}}}
        assert explain(PARTS, new) == ["filter.language: absent -> null"]

    def test_of_long_texts_the_place_where_they_differ_is_shown(self) -> None:
        old, new = ({**PARTS, "config": {"system": "You are " + "very " * 50 + word}} for word in ("kind", "curt"))
        (line,) = explain(old, new)
        assert "kind" in line.split(" -> ")[0] and "curt" in line.split(" -> ")[1]
        assert len(line) < 160

    def test_a_mapping_that_becomes_empty_is_a_reason(self) -> None:
        old = {**PARTS, "config": {"teacher": {"env": {}}}}
        new = {**PARTS, "config": {"teacher": {"env": {"A": "b"}}}}
        assert explain(old, new) == ["teacher.env: {} -> absent", 'teacher.env.A: absent -> "b"']

    def test_an_upstream_step_of_equal_rows_and_another_key_is_named_by_its_key(self) -> None:
        old = {**PARTS, "inputs": {"filter": f"{'a' * 64} {'1' * 64}"}}
        new = {**PARTS, "inputs": {"filter": f"{'a' * 64} {'2' * 64}"}}
        assert explain(old, new) == ["rows of filter changed: 111111111111 -> 222222222222"]

    @pytest.mark.parametrize("damaged", [{}, {"config": 3}, {"config": None, "files": [1], "inputs": "x"}])
    def test_parts_of_a_damaged_lock_file_are_compared_too(self, damaged: dict[str, Any]) -> None:
        assert "version: 1 -> absent" in explain(PARTS, damaged)

    def test_equal_parts_mean_that_the_artefact_is_gone(self) -> None:
        assert explain(PARTS, PARTS) == ["its artefact is not in the store"]

    def test_without_a_lock_the_step_never_ran(self) -> None:
        assert explain(None, PARTS) == ["never ran"]


def make_model(folder: Path) -> Path:
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text('{"layers": 2}', "utf-8")
    (folder / "tokenizer" / "vocab.json").write_text("[]", "utf-8")
    (folder / "README.md").write_text("# A model", "utf-8")
    return folder


def digest(path: Path) -> str:
    return path_digest(path, DigestCache(path / "no" / "cache.json"))


class TestOrderOfKeys:
    def test_lists_of_objects_differ_by_their_values_alone(self) -> None:
        """The parts of an older key were read from a file whose keys are sorted."""
        one: dict[str, Any] = {"config": {"declared": [{"role": "teacher", "name": "t"}]}}
        other: dict[str, Any] = {"config": {"declared": [{"name": "t", "role": "teacher"}]}}
        assert changes(one, other) == []


class TestModelFolders:
    def test_the_place_does_not_count(self, tmp_path: Path) -> None:
        assert digest(make_model(tmp_path / "a")) == digest(make_model(tmp_path / "elsewhere" / "b"))

    def test_neither_does_a_place_below_a_hidden_folder(self, tmp_path: Path) -> None:
        hidden = make_model(tmp_path / ".git" / ".cache" / "model")
        assert digest(hidden) == digest(make_model(tmp_path / "a"))
        (hidden / "config.json").write_text('{"layers": 3}', "utf-8")
        assert digest(hidden) != digest(tmp_path / "a")

    @pytest.mark.parametrize(
        "name", ["README.md", ".gitattributes", ".cache/huggingface/download/config.json.metadata"]
    )
    def test_cards_and_hidden_files_do_not_count(self, tmp_path: Path, name: str) -> None:
        model = make_model(tmp_path / "a")
        before = digest(model)
        (model / name).parent.mkdir(parents=True, exist_ok=True)
        (model / name).write_text("another text", "utf-8")
        assert digest(model) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: (model / "config.json").write_text('{"layers": 3}', "utf-8"),
            lambda model: (model / "tokenizer" / "vocab.json").rename(model / "tokenizer" / "words.json"),
            lambda model: (model / "tokenizer" / "vocab.json").rename(model / "vocab.json"),
            lambda model: (model / "new.safetensors").write_bytes(b""),
            lambda model: (model / "config.json").unlink(),
        ],
        ids=["byte", "name", "folder", "new file", "missing file"],
    )
    def test_what_a_loader_reads_counts(self, tmp_path: Path, change: Callable[[Path], object]) -> None:
        model = make_model(tmp_path / "a")
        before = digest(model)
        change(model)
        assert digest(model) != before

    def test_links_into_a_cache_count_by_what_they_point_at(self, tmp_path: Path) -> None:
        """The hub's cache keeps snapshots as links to blobs."""
        model, linked = make_model(tmp_path / "blobs"), tmp_path / "snapshot"
        (linked / "tokenizer").mkdir(parents=True)
        for name in ("config.json", "tokenizer/vocab.json"):
            (linked / name).symlink_to(model / name)
        assert digest(linked) == digest(model)

    def test_a_file_counts_by_its_bytes_alone(self, tmp_path: Path) -> None:
        one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
        one.write_text("x", "utf-8")
        other.write_text("x", "utf-8")
        assert digest(one) == digest(other) == file_sha256(one)


class TestDigestCache:
    def test_an_unchanged_file_is_read_once(self, tmp_path: Path) -> None:
        file, cache = tmp_path / "weights", DigestCache(tmp_path / "cache.json")
        file.write_bytes(b"one")
        expected = cache.sha256(file)
        stat = file.stat()
        file.write_bytes(b"two")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert cache.sha256(file) == expected, "equal inode, size and time: not read again"

    @pytest.mark.parametrize("content", [b"two", b"longer"])
    def test_a_changed_file_is_noticed(self, tmp_path: Path, content: bytes) -> None:
        file, cache = tmp_path / "weights", DigestCache(tmp_path / "cache.json")
        file.write_bytes(b"one")
        os.utime(file, ns=(1, 1))
        before = cache.sha256(file)
        file.write_bytes(content)
        assert cache.sha256(file) == file_sha256(file) != before

    def test_a_file_moved_over_another_is_noticed(self, tmp_path: Path) -> None:
        file, other, cache = tmp_path / "a", tmp_path / "b", DigestCache(tmp_path / "cache.json")
        file.write_bytes(b"one")
        other.write_bytes(b"two")
        for each in (file, other):
            os.utime(each, ns=(1, 1))
        cache.sha256(file)
        other.replace(file)
        assert cache.sha256(file) == file_sha256(file)

    def test_it_is_remembered_over_processes(self, tmp_path: Path) -> None:
        file, path = tmp_path / "weights", tmp_path / "deep" / "cache.json"
        file.write_bytes(b"one")
        cache = DigestCache(path)
        expected = cache.sha256(file)
        cache.save()
        (name,) = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps({name: "f" * 64}), "utf-8")
        assert DigestCache(path).sha256(file) == "f" * 64 != expected

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"7", b'{"a": 5}', b"\xff\xfe"])
    def test_a_damaged_one_only_costs_time(self, tmp_path: Path, content: bytes) -> None:
        file, path = tmp_path / "weights", tmp_path / "cache.json"
        file.write_bytes(b"one")
        path.write_bytes(content)
        cache = DigestCache(path)
        assert cache.sha256(file) == file_sha256(file)
        cache.save()
        assert list(json.loads(path.read_text("utf-8")).values()) == [file_sha256(file)]

    def test_one_that_cannot_be_written_is_no_error(self, tmp_path: Path) -> None:
        file, blocked = tmp_path / "weights", tmp_path / "blocked"
        file.write_bytes(b"one")
        blocked.write_bytes(b"a file where a folder should be")
        cache = DigestCache(blocked / "cache.json")
        cache.sha256(file)
        cache.save()
        assert blocked.read_bytes() == b"a file where a folder should be"


def a_manifest(**changes: Any) -> Manifest:
    manifest = Manifest(
        key=step_key(PARTS),
        stage="filter",
        parts=PARTS,
        content="c" * 64,
        files={"rows/part-00000.parquet": {"sha256": "d" * 64, "bytes": 3}},
        rows_in=3,
        rows_out=2,
        rejected={"too_short": 1},
        metrics={"share": 0.1, "text": "é\u2028", "list": [1, None]},
        versions={"python": "3.11"},
    )
    return replace(manifest, **changes)


class TestManifest:
    def test_it_is_read_as_it_was_written(self, tmp_path: Path) -> None:
        path = tmp_path / "manifest.json"
        path.write_text(a_manifest().to_json(), "utf-8")
        assert Manifest.read(path) == a_manifest()

    def test_metrics_that_json_would_change_are_still_sealed(self, tmp_path: Path) -> None:
        path = tmp_path / "manifest.json"
        metrics = {"histogram": {2: 1, 10: 3}, "pair": (1, 2)}
        path.write_text(a_manifest(metrics=metrics).to_json(), "utf-8")
        assert Manifest.read(path).metrics == {"histogram": {"2": 1, "10": 3}, "pair": [1, 2]}

    def test_a_number_that_is_none_is_refused_when_writing(self) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            a_manifest(metrics={"loss": float("nan")}).to_json()

    @pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", '{"key": "x"}', "\ufeff{}"])
    def test_what_is_no_manifest_is_corrupt(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "manifest.json"
        path.write_text(text, "utf-8")
        with pytest.raises(CorruptArtefact) as caught:
            Manifest.read(path)
        assert caught.value.where == str(path)

    @pytest.mark.parametrize(
        ("old", "new"),
        [('"rows_out": 2', '"rows_out": 3'), ("c" * 64, "e" * 64), ("d" * 64, "e" * 64), ('"too_short"', '"too_long"')],
    )
    def test_one_that_was_changed_afterwards_is_corrupt(self, tmp_path: Path, old: str, new: str) -> None:
        path = tmp_path / "manifest.json"
        text = a_manifest().to_json()
        assert old in text
        path.write_text(text.replace(old, new), "utf-8")
        with pytest.raises(CorruptArtefact, match="changed"):
            Manifest.read(path)

    def test_one_of_another_format_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "manifest.json"
        path.write_text(a_manifest(format=99).to_json(), "utf-8")
        with pytest.raises(CorruptArtefact):
            Manifest.read(path)

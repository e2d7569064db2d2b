"""The hashes of a local model tell its weights, its tokenizer and its chat template apart."""

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.core.config_teacher import VllmTeacher
from pipeline.teacher.hashes import chat_template, hashes_of

ROOT = Path(__file__).resolve().parents[2]


def a_folder(folder: Path, **files: str) -> Path:
    folder.mkdir()
    said = {
        "model.safetensors": "w",
        "tokenizer.json": "{}",
        "tokenizer_config.json": json.dumps({"chat_template": "t"}),
    }
    for name, text in {**said, **{name.replace("__", "."): text for name, text in files.items()}}.items():
        (folder / name).write_text(text, "utf-8")
    return folder


def hashed(folder: Path, data: Path) -> dict[str, object]:
    return dict(hashes_of(VllmTeacher(kind="vllm", model=str(folder)), data))


@pytest.mark.parametrize(
    ("files", "changed"),
    [
        ({"model__safetensors": "other"}, "weights"),
        ({"tokenizer__json": '{"a": 1}'}, "tokenizer"),
        ({"tokenizer_config__json": '{"chat_template": "other"}'}, "chat_template"),
        ({"chat_template__jinja": "other"}, "chat_template"),
    ],
)
def test_each_changes_with_its_own_files_alone(tmp_path: Path, files: dict[str, str], changed: str) -> None:
    before = hashed(a_folder(tmp_path / "a"), tmp_path)
    after = hashed(a_folder(tmp_path / "b", **files), tmp_path)
    assert {name for name in before if before[name] != after[name]} == {changed}


def test_a_template_counts_by_its_text_wherever_it_stands(tmp_path: Path) -> None:
    inside = hashed(a_folder(tmp_path / "a"), tmp_path)
    beside = hashed(a_folder(tmp_path / "b", chat_template__jinja="t", tokenizer_config__json="{}"), tmp_path)
    assert inside["chat_template"] == beside["chat_template"] == hashlib.sha256(b"t").hexdigest()


def test_what_is_not_there_has_no_hash(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = hashed(tmp_path / "empty", tmp_path)
    assert found == {"weights": None, "tokenizer": None, "chat_template": None}


def test_the_teacher_that_comes_along_has_all_three(tmp_path: Path) -> None:
    folder = ROOT / "data" / "models" / "tiny-teacher"
    assert chat_template(folder) is not None
    assert None not in hashed(folder, tmp_path).values()

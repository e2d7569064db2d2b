"""`croissant.json` is valid by mlcroissant, reads back as the rows, and is the same for equal rows."""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.record import Message, Record, ToolCall
from pipeline.stages.dataset.croissant import CONTEXT, FILE
from tests.dataset_stage import SOURCES, a_model, a_step, a_student, people, read_rows, run_stage
from tests.support import a_record

NASTY = 'x" }, "license": "mit"\n--- \u202e <script>\u2028'
TOOL = ToolCall("f", '{"a": 1}', "c1")


def rows_with_everything() -> list[Record]:
    messages = [
        (Message("assistant", "1"),),
        (Message("assistant", "2", "I think"),),
        (Message("assistant", "3", None, (TOOL,)), Message("tool", "4", None, (), "c1", "f")),
    ]
    return [
        a_record(
            row_id=f"{at:032x}",
            prompt_id=f"p{at}",
            split="validation" if at % 4 == 3 else "train",
            completion=messages[at % 3],
            also_in=("other",) if at % 2 else (),
            verified=[None, True][at % 2],
            tools='[{"type":"function"}]',
            returned_model="m",
        )
        for at in range(10)
    ]


def described(folder: Path, *declared: dict[str, Any], rows: list[Record] | None = None, **config: Any) -> Path:
    cfg = a_step(*(declared or (a_model("tiny", "MIT"), a_student())), **config)
    return run_stage(folder, rows_with_everything() if rows is None else rows, cfg)[0]


def read(out: Path) -> Any:
    return json.loads((out / FILE).read_text("utf-8"))


class TestTheValidator:
    @pytest.mark.parametrize("title", ["Sums", NASTY])
    def test_it_finds_no_error_and_misses_only_what_we_cannot_know(
        self, tmp_path: Path, title: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        mlcroissant = pytest.importorskip("mlcroissant", reason="needs mlcroissant: the extra `dev` installs it")
        out = described(tmp_path, title=title, shard_rows=3)
        with caplog.at_level(logging.WARNING):
            found = mlcroissant.Dataset(str(out / FILE)).metadata
        assert found.ctx.issues.errors == set()
        missing = {warning.split('"')[-2].rpartition("/")[2] for warning in found.ctx.issues.warnings}
        assert missing == {"citeAs", "datePublished", "version"}
        assert "`@context` is not standard" not in caplog.text

    def test_it_reads_every_row_of_every_shard(self, tmp_path: Path) -> None:
        mlcroissant = pytest.importorskip("mlcroissant", reason="needs mlcroissant: the extra `dev` installs it")
        out = described(tmp_path, shard_rows=3)
        for split, count in (("train", 8), ("validation", 2)):
            expected = {row["row_id"]: row for row in read_rows(out / "data", split)}
            found = {
                record[f"{split}/row_id"].decode(): record
                for record in mlcroissant.Dataset(str(out / FILE)).records(split)
            }
            assert found.keys() == expected.keys() and len(found) == count
            for row_id, record in found.items():
                said = [turn[f"{split}/completion/content"].decode() for turn in record[f"{split}/completion"]]
                assert said == [turn["content"] for turn in expected[row_id]["completion"]]
                assert record[f"{split}/verified"] == expected[row_id]["verified"]


class TestWhatItSays:
    def test_each_shard_has_the_hash_of_its_bytes(self, tmp_path: Path) -> None:
        out = described(tmp_path, shard_rows=3)
        files = {each["@id"]: each for each in read(out)["distribution"] if each["@type"] == "cr:FileObject"}
        shards = {path.relative_to(out).as_posix(): path.read_bytes() for path in (out / "data").glob("*")}
        assert {name: each["sha256"] for name, each in files.items()} == {
            name: hashlib.sha256(data).hexdigest() for name, data in shards.items()
        }
        assert all(files[name]["contentSize"] == f"{len(data)} B" for name, data in shards.items())

    def test_models_are_agents_and_texts_that_existed_are_what_it_derives_from(self, tmp_path: Path) -> None:
        rows = [a_record(), a_record(row_id="1" * 32, teacher="people")]
        described_as = read(described(tmp_path, a_model("tiny", "MIT"), people("people", "MIT"), rows=rows))
        derived = [each["@id"] for each in described_as["prov:wasDerivedFrom"]]
        agents = described_as["prov:wasGeneratedBy"]["prov:wasAssociatedWith"]
        assert derived == ["#prompt/set", "#teacher/people"]
        assert [each["@id"] for each in agents] == ["#teacher/tiny"] and agents[0]["dct:license"] == ["MIT"]
        assert described_as["rai:hasSyntheticData"] is True

    def test_without_a_model_nothing_is_called_synthetic(self, tmp_path: Path) -> None:
        described_as = read(described(tmp_path, people("tiny", "MIT"), rows=[a_record()]))
        assert described_as["rai:hasSyntheticData"] is False and "rai:machineAnnotationTools" not in described_as

    @pytest.mark.parametrize(
        ("licenses", "said"),
        [
            (("MIT",), ["https://spdx.org/licenses/MIT"]),
            (("unknown",), [{"@type": "sc:CreativeWork", "name": "unknown", "url": "LICENSES.md"}]),
            (("llama3.3",), [{"@type": "sc:CreativeWork", "name": "llama3.3", "url": "LICENSES.md"}]),
        ],
    )
    def test_only_a_licence_of_spdx_has_an_address_there(
        self, tmp_path: Path, licenses: tuple[str, ...], said: list[Any]
    ) -> None:
        assert read(described(tmp_path, rows=[a_record(license_set=licenses)]))["license"] == said

    def test_the_context_names_every_term_that_is_used(self, tmp_path: Path) -> None:
        known = {*CONTEXT, "@context", "@id", "@type"}
        schema_org = {
            *("name", "description", "identifier", "license", "usageInfo", "url", "distribution", "contentUrl"),
            *("contentSize", "encodingFormat", "sha256"),
        }
        used = set(_keys({name: value for name, value in read(described(tmp_path)).items() if name != "@context"}))
        assert {name for name in used - known - schema_org if name.partition(":")[0] not in CONTEXT} == set()

    def test_no_clock_is_in_it(self, tmp_path: Path) -> None:
        assert not [name for name in _keys(read(described(tmp_path))) if name.startswith("date")]

    def test_the_description_of_prompts_holds_no_other_source(self, tmp_path: Path) -> None:
        """A source without rows is none of this data set's."""
        out = described(tmp_path, rows=[a_record()])
        assert "other" in SOURCES and "#prompt/other" not in (out / FILE).read_text("utf-8")


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*value, *(name for item in value.values() for name in _keys(item))]
    return [name for item in value for name in _keys(item)] if isinstance(value, list) else []

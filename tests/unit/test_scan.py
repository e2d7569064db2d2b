"""The scan before publishing: every text of every column is looked at, and what is found is said without its value."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import PolicyRefused, UsageError
from pipeline.core.fanout import map_in_process
from pipeline.core.record import RECORD_SCHEMA, Message, Record, ToolCall, to_table, write_parquet
from pipeline.runner.publish.files import Item, item_of
from pipeline.runner.publish.scan import ScanReport, read_allowed, refuse_findings, scan
from pipeline.text.scan import Finding, Scanned, scan_table, scan_text
from tests.support import RecordedProgress, a_record

KEYS = {
    "anthropic_key": "sk-ant-api03-" + "aB3dE5gH7jK9mN1pQ4sT6vW8",
    "openai_key": "sk-proj-" + "aB3dE5gH7jK9mN1pQ4sT6vW8yZ2c",
    "google_key": "AIza" + "aB3dE5gH7jK9mN1pQ4sT6vW8yZ2cF0uXr5t",
    "huggingface_token": "hf_" + "aB3dE5gH7jK9mN1pQ4sT6vW8yZ2cF0uXr5",
    "github_token": "ghp_" + "aB3dE5gH7jK9mN1pQ4sT6vW8yZ2cF0uXr5tY",
    "aws_key_id": "AKIA" + "Q3EGRXJ2L7M4P5TW",
    "private_key": "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA0Z3VS5JJcds3xfn1\n-----END RSA PRIVATE KEY-----",
    "email": "jane.roe@gmail.com",
    "phone": "+49 30 901820",
    "payment_card": "4539 1488 0343 6467",
    "iban": "DE89 3704 0044 0532 0130 00",
}
"""One of each kind that the project promises to find; all of them are made up."""
EMAIL = KEYS["email"]


def scanned(*rows: Record, allowed: tuple[str, ...] = ()) -> Scanned:
    return scan_table(to_table(RECORD_SCHEMA, rows), allowed)


def row(number: int = 0, **changes: Any) -> Record:
    return a_record(row_id=f"{number:032x}", **changes)


class TestWhatIsFound:
    @pytest.mark.parametrize("kind", KEYS)
    def test_every_promised_kind_is_found_in_a_completion(self, kind: str) -> None:
        found = scanned(row(completion=(Message("assistant", f"It is {KEYS[kind]} , I think."),)))
        assert found.kinds == {kind: 1}
        assert [(each.field, each.at) for each in found.findings] == [("completion[0].content", 6)]

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"prompt": (Message("system", "x"), Message("user", EMAIL))}, "prompt[1].content"),
            ({"completion": (Message("assistant", "x", EMAIL),)}, "completion[0].reasoning_content"),
            ({"prompt": (Message("user", "x", name=EMAIL),)}, "prompt[0].name"),
            ({"answer": EMAIL}, "answer"),
            ({"task": EMAIL}, "task"),
            ({"prompt_id": EMAIL}, "prompt_id"),
            ({"returned_model": EMAIL}, "returned_model"),
            ({"flags": ("a", EMAIL)}, "flags[1]"),
        ],
    )
    def test_every_column_is_looked_at(self, changes: dict[str, Any], field: str) -> None:
        assert [each.field for each in scanned(row(**changes)).findings] == [field]

    def test_a_call_of_a_function_is_looked_at_behind_its_escapes(self) -> None:
        hidden = json.dumps({"to": EMAIL}).replace("@", "\\u0040")
        calls = (ToolCall("a", "{}"), ToolCall("b", hidden))
        found = scanned(row(completion=(Message("assistant", "", tool_calls=calls),)))
        assert [each.field for each in found.findings] == ["completion[0].tool_calls[1].function.arguments"]
        tools = json.dumps([{"type": "function", "function": {"name": "f", "description": EMAIL}}])
        assert [each.field for each in scanned(row(tools=tools)).findings] == ["tools"]

    def test_what_was_found_is_never_shown(self) -> None:
        rows = [row(number, completion=(Message("assistant", value),)) for number, value in enumerate(KEYS.values())]
        found = scanned(*rows)
        report = ScanReport(found, (), (), ())
        with pytest.raises(PolicyRefused) as refused:
            refuse_findings(report)
        told = f"{refused.value} {found}"
        assert not [value for value in KEYS.values() if value in told or value[4:16] in told]
        assert refused.value.exit_code == 4

    def test_a_slice_of_a_table_is_scanned_like_a_table(self) -> None:
        rows = [row(number, prompt=(Message("user", EMAIL if number == 5 else "x"),)) for number in range(9)]
        table = to_table(RECORD_SCHEMA, rows)
        found = scan_table(table.slice(4, 3))
        assert [each.row_id for each in found.findings] == [f"{5:032x}"]
        assert found.rows == 3

    def test_a_text_that_occurs_in_many_rows_is_found_in_each(self) -> None:
        found = scanned(*(row(number, prompt=(Message("user", EMAIL),)) for number in range(3)))
        assert [each.row_id for each in found.findings] == [f"{number:032x}" for number in range(3)]
        assert found.dirty == 3

    def test_dictionary_columns_are_scanned(self) -> None:
        table = to_table(RECORD_SCHEMA, [row(0), row(1, task=EMAIL)])
        at = table.schema.get_field_index("task")
        table = table.set_column(at, "task", table["task"].dictionary_encode())
        assert [each.row_id for each in scan_table(table).findings] == [f"{1:032x}"]

    def test_an_address_in_a_licence_is_its_authors(self) -> None:
        assert not scan_text("LICENSES/MIT.txt", f"Copyright {EMAIL}", personal=False).kinds
        assert scan_text("LICENSES/MIT.txt", KEYS["github_token"], personal=False).kinds == {"github_token": 1}


class TestAllowedRows:
    def test_an_allowed_row_blocks_nothing_and_is_counted(self) -> None:
        found = scanned(row(0, answer=EMAIL), row(1, answer=EMAIL), allowed=(f"{0:032x}",))
        assert (found.kinds, found.allowed, found.dirty) == ({"email": 1}, {"email": 1}, 1)
        assert [each.row_id for each in found.findings] == [f"{1:032x}"]

    def test_the_file_holds_an_id_and_a_reason_a_line(self, tmp_path: Path) -> None:
        path = tmp_path / "allowed.txt"
        path.write_text("# looked at by hand\n\nabc  a public mailing list\ndef\n")
        assert read_allowed(path) == {"abc": "a public mailing list", "def": ""}
        path.write_text("abc\nabc again\n")
        with pytest.raises(UsageError, match="twice"):
            read_allowed(path)
        with pytest.raises(UsageError, match="cannot be read"):
            read_allowed(tmp_path / "missing")


class TestAllOfWhatIsPublished:
    def scan(self, *items: Item, allowed: dict[str, str] | None = None, private: tuple[str, ...] = ()) -> ScanReport:
        return scan(items, allowed or {}, private, map_in_process, RecordedProgress())

    def shard(self, folder: Path, *rows: Record) -> Item:
        path = folder / "train-00000-of-00001.parquet"
        write_parquet(to_table(RECORD_SCHEMA, rows), path)
        return Item("data/train-00000-of-00001.parquet", path, path.stat().st_size, "0" * 64)

    def test_shards_and_texts_are_looked_at_and_weights_are_named(self, tmp_path: Path) -> None:
        weights = Item("model.safetensors", tmp_path / "none", 1, "0" * 64)
        card = item_of("README.md", EMAIL)
        report = self.scan(self.shard(tmp_path, row(0, answer=EMAIL)), card, weights)
        assert [each.row_id for each in report.scanned.findings] == ["README.md", f"{0:032x}"]
        assert (report.texts, report.unscanned) == (("README.md",), ("model.safetensors",))

    def test_what_tells_of_this_machine_is_found_in_texts_but_not_in_rows(self, tmp_path: Path) -> None:
        place = "/srv/jane/distil"
        card = item_of("manifest.json", f'{{"path": "{place}/x"}}')
        report = self.scan(self.shard(tmp_path, row(0, answer=place)), card, private=(place,))
        assert report.scanned.findings == (Finding("manifest.json", "text", "this_machine", 10),)

    def test_notices_are_looked_at_like_a_card_and_licences_but_for_their_authors(self, tmp_path: Path) -> None:
        place = "/srv/jane-x"
        texts = {name: f"{EMAIL} {place}".replace("-", "\\-") for name in ("LICENSES.md", "README.md")}
        texts |= dict.fromkeys(("NOTICE", "LICENSES/MIT.txt"), f"{EMAIL} {place}")
        report = self.scan(*(item_of(name, text) for name, text in texts.items()), private=(place,))
        found = sorted((each.row_id, each.kind) for each in report.scanned.findings)
        both = [(name, kind) for name in ("LICENSES.md", "NOTICE", "README.md") for kind in ("email", "this_machine")]
        assert found == sorted([*both, ("LICENSES/MIT.txt", "this_machine")])

    def test_a_long_notice_is_looked_at_too(self) -> None:
        report = self.scan(item_of("NOTICE", " " * 2_000_001 + EMAIL))
        assert report.scanned.kinds == {"email": 1}

    def test_an_allowed_id_that_has_nothing_is_named(self, tmp_path: Path) -> None:
        report = self.scan(self.shard(tmp_path, row(0)), allowed={"f" * 32: "why"})
        assert report.unused == ("f" * 32,)
        refuse_findings(report)

    def test_batches_and_order_change_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        item = self.shard(tmp_path, *(row(number, answer=EMAIL if number % 3 else None) for number in range(10)))
        whole = self.scan(item)
        monkeypatch.setattr("pipeline.runner.publish.scan.BATCH_ROWS", 4)
        assert self.scan(item) == whole
        assert whole.scanned.dirty == 6

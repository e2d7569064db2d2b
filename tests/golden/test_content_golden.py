"""Digests, keys and ids that were published once. A change here makes every lock file and every paid answer a stranger:
if it is meant, bump `lineage.FORMAT` and say so in the changelog."""

from pathlib import Path

import pyarrow as pa

from pipeline.core.content import table_digest
from pipeline.core.lineage import DigestCache, digest_json, path_digest, row_id, step_key
from pipeline.core.record import PROMPT_SCHEMA, RECORD_SCHEMA, Message, rejects_schema, to_table
from tests.support import a_prompt, a_record

NASTY = "NUL \x00, emoji 🧪, combining e\u0301, right-to-left \u202eabc, line\u2028break"


def test_records() -> None:
    rows = [
        a_record(),
        a_record(
            row_id="f" * 32,
            sample=3,
            split="validation",
            task="sums",
            prompt=(Message("system", "Be short."), Message("user", NASTY)),
            completion=(Message("assistant", "4", "2 + 2 = 4"),),
            answer="4",
            also_in=("0" * 32, "1" * 32),
            license_set=("MIT", "Apache-2.0"),
            prompt_tokens=None,
            completion_tokens=None,
            verified=True,
            flags=("nul",),
        ),
    ]
    digest = table_digest(RECORD_SCHEMA, [to_table(RECORD_SCHEMA, rows)])
    assert digest == "2635fa143c9be0bc758a6cfb14ef43d0998a9efb3529f4f4225d9680996394d8"


def test_prompts() -> None:
    rows = [
        a_prompt(),
        a_prompt(prompt_id="p1", task="sums", answer="", also_in=("b", "c"), license_set=("CC0-1.0", "MIT")),
    ]
    assert (
        table_digest(PROMPT_SCHEMA, [to_table(PROMPT_SCHEMA, rows)])
        == "3ee04ebda93d9f2a71b5bc8c4b7f9cfd086441d359d1e314d4f7ae9a537b4860"
    )


def test_rejects() -> None:
    schema = rejects_schema(RECORD_SCHEMA)
    assert (
        table_digest(schema, [to_table(schema, [a_record()], ["too_short"])])
        == "99079d1de9372a44197099df6b473bf2be843bfc0a66ab47ac1dc8a2cb754d7c"
    )


def test_more_rows_than_a_block() -> None:
    table = pa.table(
        {"x": pa.array(range(20_000), pa.int64()), "y": [None if row % 3 else str(row) for row in range(20_000)]}
    )
    assert table_digest(table.schema, [table]) == "4ea25d39eac554834b9b77432372e44cb6b381450ff72fcdd26948c106282bf6"


def test_no_rows() -> None:
    assert table_digest(RECORD_SCHEMA, []) == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_json() -> None:
    assert (
        digest_json({"b": [1, 2.5, None, True], "a": {"é": "\ud800"}})
        == "223a7ac59e0c13a54a6119e36e8a2b33ae03e5ecf33e688a4d59a765b5853bb2"
    )


def test_step_key() -> None:
    assert (
        step_key({"stage": "filter", "version": 1, "config": {}, "inputs": {}, "files": {}})
        == "9aa696896928d54486abd7610dce0821c8a6805e9a67dd75c8da94db09724051"
    )


def test_row_id() -> None:
    assert row_id("set", "p0", "a" * 64) == "2ae48723029a6d6325f03cff79454492"


def test_model_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "sub" / "weights.safetensors").write_bytes(b"\x00\x01")
    assert (
        path_digest(tmp_path, DigestCache(tmp_path / "none.json"))
        == "91389b8238b55e7aa9651f63bb14c92322f0844db47d10dd97499a91ee07ea1e"
    )

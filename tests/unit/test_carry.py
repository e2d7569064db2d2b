"""Answers in a file: equal bytes out, nothing but sound answers in, and never one in the place of another."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import CorruptArtefact, Interrupted, UsageError
from pipeline.teacher import carried
from pipeline.teacher.carried import carried_schema, row_sha256
from pipeline.teacher.carry import every_answer, export, import_answers
from pipeline.teacher.responses import ResponseStore
from pipeline.teacher.segment import Stored
from tests.stored_answers import answer, body, by_key, key, store, stored

ANSWERS = by_key(
    [
        *(answer(str(number), body=body(f"text {number}"), room=number or None) for number in range(30)),
        answer("refused", body=body(None, finish="content_filter")),
        answer("large", status=0, rejected="oversize", body=b""),
        answer("0", stored_ms=5000, cap=128),
    ]
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    export(ANSWERS, tmp_path / "answers.parquet")
    return tmp_path / "answers.parquet"


class TestExport:
    def test_equal_answers_give_equal_bytes_however_they_are_stored(self, tmp_path: Path) -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        store(one, *ANSWERS)
        store(other, *reversed(ANSWERS[:10]))
        store(other, *ANSWERS[10:], fold=False)
        made = [export(every_answer(folder), tmp_path / f"{folder.name}.parquet") for folder in (one, other)]
        assert made[0].sha256 == made[1].sha256
        assert (made[0].answers, made[0].rejected) == (31, {"content_filter": 1, "oversize": 1})

    def test_it_holds_the_columns_of_the_answers_and_nothing_of_the_machine(self, file: Path, tmp_path: Path) -> None:
        table = pq.read_table(file)
        assert table.column_names == [*(name for name in table.column_names if name != "sha256"), "sha256"]
        assert {"key", "body", "cap", "model", "teacher"} <= {*table.column_names}
        assert str(tmp_path).encode() not in file.read_bytes()

    def test_the_footer_says_how_many(self, file: Path) -> None:
        facts = json.loads(pq.read_metadata(file).metadata[carried.FACTS.encode()])
        assert facts["format"] == "1"
        assert (facts["answers"], facts["requests"]) == (31, 32)
        assert facts["rejected"] == {"content_filter": 1, "oversize": 1}

    def test_what_is_no_answer_stays_here(self, tmp_path: Path) -> None:
        done = export([answer("a"), answer("b", status=500, body=b"")], tmp_path / "x.parquet")
        assert (done.answers, done.unreadable) == (1, 1)

    def test_an_earlier_export_is_replaced_and_nothing_else(self, file: Path, tmp_path: Path) -> None:
        export(ANSWERS[:3], file)
        assert pq.read_metadata(file).num_rows == 3
        other = tmp_path / "notes.txt"
        other.write_text("mine")
        with pytest.raises(UsageError, match="something else lies there"):
            export(ANSWERS, other)
        assert other.read_text() == "mine"

    def test_nothing_to_export_writes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="no stored answer"):
            export([], tmp_path / "x.parquet")
        assert [*tmp_path.iterdir()] == []

    def test_the_store_itself_is_no_place_for_it(self, tmp_path: Path) -> None:
        store(tmp_path / "responses", answer("a"))
        with pytest.raises(UsageError, match="belongs to the response store"):
            export(ANSWERS, tmp_path / "responses" / "answers" / "x.parquet")

    def test_many_large_answers_are_cut_into_small_row_groups(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pipeline.teacher.answer_files.GROUP_BYTES", 10_000)
        path = tmp_path / "x.parquet"
        export(by_key([answer(str(number), body=body("x" * 4000)) for number in range(30)]), path)
        assert pq.read_metadata(path).num_row_groups == 10


class TestImport:
    def test_an_empty_folder_then_holds_the_very_same(self, file: Path, data: Path) -> None:
        done = import_answers(file, data)
        assert (done.answers, done.requests, done.added) == (33, 32, 33)
        assert stored(data / "responses") == ANSWERS

    def test_the_second_time_it_adds_nothing(self, file: Path, data: Path) -> None:
        import_answers(file, data)
        before = sorted((data / "responses").rglob("*"))
        assert import_answers(file, data).added == 0
        assert sorted((data / "responses").rglob("*")) == before

    def test_what_is_there_is_never_replaced(self, file: Path, data: Path) -> None:
        ours = answer("1", stored_ms=9_000_000, body=body("ours"))
        store(data / "responses", ours, fold=False)
        assert import_answers(file, data).added == 32
        with ResponseStore(data / "responses") as responses:
            assert responses.get_many({key("1"): 64})[key("1")].reply.text == "ours"

    def test_one_that_serves_a_larger_cap_comes_beside_a_cut_one_and_changes_nothing_for_smaller_caps(
        self, tmp_path: Path, data: Path
    ) -> None:
        cut = answer("a", body=body("cu", finish="length", tokens=(7, 64)), stored_ms=2000)
        store(data / "responses", cut)
        export([answer("a", cap=128, stored_ms=1000, body=body("whole"))], tmp_path / "x.parquet")
        assert [import_answers(tmp_path / "x.parquet", data).added for _ in range(2)] == [1, 0]
        with ResponseStore(data / "responses") as responses:
            given = {cap: responses.get_many({key("a"): cap})[key("a")].reply.text for cap in (32, 64, 128)}
        assert given == {32: "cu", 64: "cu", 128: "whole"}

    def test_a_signal_leaves_nothing_behind(self, file: Path, data: Path) -> None:
        def stop() -> None:
            raise Interrupted("stopped", where="here", todo="again")

        with pytest.raises(Interrupted):
            import_answers(file, data, stop)
        assert [path for path in (data / "responses").rglob("*") if path.is_file()] == []

    def test_a_damaged_store_is_told_of_by_its_own_name(self, file: Path, data: Path) -> None:
        store(data / "responses", answer("a"))
        (folded,) = (data / "responses" / "answers").iterdir()
        folded.write_bytes(folded.read_bytes()[:-1])
        with pytest.raises(CorruptArtefact) as caught:
            import_answers(file, data)
        assert caught.value.where == str(folded)


def refused(path: Path, data: Path) -> str:
    """Why a file is damaged; nothing of it is imported."""
    with pytest.raises(CorruptArtefact) as caught:
        import_answers(path, data)
    assert caught.value.where == str(path)
    assert not (data / "responses").exists() or stored(data / "responses") == []
    return caught.value.what


class TestForeignFiles:
    def test_a_flipped_bit_is_found_or_changes_nothing(self, file: Path, tmp_path: Path) -> None:
        """Some bytes of a footer say nothing about answers, such as the name of the library that wrote it."""
        whole = file.read_bytes()
        places = range(4, len(whole), 61)
        found = 0
        for at in places:
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            folder = tmp_path / str(at) / "responses"
            try:
                import_answers(file, folder.parent)
            except (CorruptArtefact, UsageError):
                found += 1
                assert stored(folder) == []
            else:
                assert stored(folder) == ANSWERS
        assert found > len(places) // 2

    @pytest.mark.parametrize("size", [5, 11, 500, 3000])
    def test_a_file_that_ends_early_is_damaged(self, file: Path, data: Path, size: int) -> None:
        file.write_bytes(file.read_bytes()[:size])
        assert "ends in the middle" in refused(file, data)

    def test_a_footer_that_claims_to_be_huge_is_not_read(self, file: Path, data: Path) -> None:
        file.write_bytes(file.read_bytes()[:-8] + (2**31 - 1).to_bytes(4, "little") + b"PAR1")
        assert "its footer has 2,147,483,647 bytes" in refused(file, data)

    @pytest.mark.parametrize("content", [b"", b"hello\n" * 10])
    def test_what_is_no_parquet_is_foreign(self, tmp_path: Path, data: Path, content: bytes) -> None:
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UsageError):
            import_answers(tmp_path / "x", data)
        assert not data.exists()

    def test_parquet_of_something_else_is_foreign(self, tmp_path: Path, data: Path) -> None:
        pq.write_table(pa.table({"a": [1]}), tmp_path / "x.parquet")
        with pytest.raises(UsageError, match="not of answers"):
            import_answers(tmp_path / "x.parquet", data)

    def test_a_later_format_is_named(self, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(carried, "FORMAT", "2")
        export(ANSWERS, tmp_path / "x.parquet")
        monkeypatch.undo()
        with pytest.raises(UsageError, match="format 2; this version reads 1"):
            import_answers(tmp_path / "x.parquet", data)


def write(path: Path, answers: Iterable[Stored], edit: Callable[[dict], object] = lambda row: None) -> Path:
    """A file that was made by hand; `edit` changes each row after its sha256 was computed."""
    answers = [*answers]
    rows = [{name: getattr(each, name, None) for name in carried_schema().names} for each in answers]
    for row, each in zip(rows, answers, strict=True):
        row["sha256"] = row_sha256(each)
        edit(row)
    with pq.ParquetWriter(path, carried_schema(), use_dictionary=True) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=carried_schema()))
        writer.add_key_value_metadata({carried.FACTS: json.dumps({"format": "1"})})
    return path


class TestExportOfRefusals:
    def test_what_was_refused_to_this_account_stays_here(self, tmp_path: Path) -> None:
        """Its words may name the account, and the one who imports it may be answered."""
        said = b'{"error": {"message": "project proj_1 of org-1 has no access", "type": "invalid_request_error"}}'
        refused = [answer("b", status=403, rejected="forbidden", body=said), answer("c", status=400, body=said)]
        made = export(by_key([answer("a"), *refused]), tmp_path / "x.parquet")
        assert (made.answers, made.rejected) == (1, {})
        assert b"proj_1" not in b"".join(pq.read_table(tmp_path / "x.parquet")["body"].to_pylist())


class TestDamagedRows:
    @pytest.mark.parametrize(
        ("edit", "why"),
        [
            (lambda row: row.update(body=body("another text")), "row 1: its sha256 differs"),
            (lambda row: row.update(cap=65), "row 1: its sha256 differs"),
            (lambda row: row.update(rejected="refusal"), "row 1: its sha256 differs"),
            (lambda row: row.update(body=None), "row 1: a value is missing"),
            (lambda row: row.update(model="m" * 5000), "row 1: it is larger than any answer"),
        ],
    )
    def test_a_row_that_is_not_what_was_exported(
        self, tmp_path: Path, data: Path, edit: Callable[[dict], object], why: str
    ) -> None:
        assert why in refused(write(tmp_path / "x.parquet", ANSWERS[:3], edit), data)

    def test_a_body_that_is_no_answer(self, tmp_path: Path, data: Path) -> None:
        answers = [answer("a", status=200, body=b"<html>")]
        assert "not understood as an answer" in refused(write(tmp_path / "x.parquet", answers), data)

    @pytest.mark.parametrize("change", [{"stored_ms": 2**63 - 1}, {"stored_ms": -1}, {"cap": 0}, {"room": 0}])
    def test_a_time_or_a_cap_that_cannot_be(self, tmp_path: Path, data: Path, change: dict[str, int]) -> None:
        assert "its time or cap is none" in refused(write(tmp_path / "x.parquet", [answer("a", **change)]), data)

    def test_more_answers_to_one_request_than_memory_should_hold(self, tmp_path: Path, data: Path) -> None:
        answers = [answer("a", stored_ms=number) for number in range(carried.MOST_OF_A_KEY + 1)]
        assert "more than 1,000 answers to one request" in refused(write(tmp_path / "x.parquet", answers), data)

    def test_text_that_is_not_utf8(self, tmp_path: Path, data: Path) -> None:
        path = write(tmp_path / "x.parquet", [answer("a", model="zzzz")])
        path.write_bytes(path.read_bytes().replace(b"zzzz", b"\xff\xfe\xfd\xfc"))
        assert "utf-8" in refused(path, data)

    def test_rows_out_of_order(self, tmp_path: Path, data: Path) -> None:
        answers = [*reversed(ANSWERS[:2])]
        assert "row 2: it is not in the order" in refused(write(tmp_path / "x.parquet", answers), data)

    def test_rows_that_the_footer_does_not_count(self, tmp_path: Path, data: Path) -> None:
        assert "not those that its footer counts" in refused(write(tmp_path / "x.parquet", ANSWERS[:2]), data)

    def test_a_row_larger_than_any_answer(self, tmp_path: Path, data: Path) -> None:
        answers = [answer("a", body=body("x" * carried.LARGEST_BODY_BYTES))]
        assert "larger than any answer" in refused(write(tmp_path / "x.parquet", answers), data)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux: /proc tells how large a process is")
class TestBombs:
    """Files that are small and become large; what the footer says of them is not believed."""

    @pytest.fixture(autouse=True)
    def limits(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(carried, "MOST_GROUP_BYTES", 2**60)
        monkeypatch.setattr(carried, "MEMORY_BYTES", 128 * 1024 * 1024)

    def test_one_body_of_zeros_that_all_rows_share(self, tmp_path: Path, data: Path) -> None:
        answers = [answer(str(number), body=b"") for number in range(1000)]
        zeros = bytes(40_000_000)
        names = [field.name for field in carried_schema()]
        columns = {name: [getattr(each, name) for each in answers] for name in names if name not in ("sha256", "body")}
        dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * len(answers), pa.int32()), pa.array([zeros]))
        arrays = {
            **{name: pa.array(column, carried_schema().field(name).type) for name, column in columns.items()},
            "body": dictionary,
            "sha256": pa.array([bytes(32)] * len(answers), pa.binary(32)),
        }
        path = tmp_path / "bomb.parquet"
        table = pa.table([arrays[name] for name in names], names=names)
        options = {"compression": "zstd", "use_dictionary": True, "dictionary_pagesize_limit": 2**30}
        with pq.ParquetWriter(path, table.schema, store_schema=False, **options) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({carried.FACTS: json.dumps({"format": "1"})})
        assert path.stat().st_size < 1_000_000
        assert "takes more than 134,217,728 bytes of memory" in refused(path, data)

    def test_sound_answers_fit(self, file: Path, data: Path) -> None:
        assert import_answers(file, data).added == 33


def test_a_row_group_that_says_it_is_too_large_is_not_read(
    file: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(carried, "MOST_GROUP_BYTES", 1000)
    assert "row group 0 is too large" in refused(file, data)

"""Contents do not depend on how rows are cut into shards, nor files on how many processes worked on them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core import content
from pipeline.core.config import DedupStep, FilterStep, PromptsStep
from pipeline.core.config_fanout import Processes
from pipeline.core.fanout import map_in_process, open_fanout
from pipeline.core.record import RECORD_SCHEMA, SHARD_ROWS, Message, Record, ShardWriter, to_table
from pipeline.core.stage import Fanout, Result
from pipeline.stages import dataset, dedup, filter, prompts
from pipeline.stages.prompts import settlement
from tests.examples import examples
from tests.support import a_record, dataset_step, make_context

FILTER = FilterStep.model_validate({"filter": {"verifier": "numeric"}})
DEDUP = DedupStep.model_validate({"dedup": {}})

TEXTS = st.sampled_from(["it is 5", "IT IS  5", "so 6", "", "\0", "e\u0301", "\u00e9", "the end " * 20, "x" * 5000])


@st.composite
def records(draw: Callable[..., Any], least: int = 1, most: int = 25) -> list[Record]:
    """Rows with many equals among them; the first passes every filter, so that a data set comes out."""
    rows = [
        a_record(
            row_id=f"{number:032x}",
            prompt_set=draw(st.sampled_from(["one", "two"])),
            prompt_id=f"p{number}",
            split=draw(st.sampled_from(["train", "validation"])),
            completion=(Message("assistant", draw(TEXTS), draw(st.sampled_from([None, "so"]))),),
            answer=draw(st.sampled_from([None, "5"])),
            license_set=(draw(st.sampled_from(["MIT", "unknown"])),),
        )
        for number in range(1, draw(st.integers(least, most)))
    ]
    return [a_record(), *rows]


@dataclass(frozen=True)
class Layout:
    """How rows are cut.

    Attributes:
        upstream: rows a shard of the first stage's input.
        sink: rows a shard that a stage writes.
        shipped: rows a shard of the data set.
        partition: rows that `dataset` sorts at once, about.
    """

    upstream: int
    sink: int
    shipped: int
    partition: int


LAYOUTS = st.builds(Layout, *[st.integers(1, 12)] * 4)
SMALL = Layout(upstream=3, sink=4, shipped=5, partition=6)


@contextmanager
def laid_out(layout: Layout) -> Iterator[None]:
    """Stages cut their shards like this within the block."""
    defaults = ShardWriter.__init__.__kwdefaults__
    before = (defaults["shard_rows"], dataset.PARTITION_ROWS)
    defaults["shard_rows"], dataset.PARTITION_ROWS = layout.sink, layout.partition
    try:
        yield
    finally:
        defaults["shard_rows"], dataset.PARTITION_ROWS = before


def chain(rows: Sequence[Record], folder: Path, layout: Layout, fanout: Fanout = map_in_process) -> list[Result]:
    """The results of filter, dedup and dataset; their files lie in `folder/<stage>`."""
    upstream = folder / "generate"
    with ShardWriter(upstream / "rows", RECORD_SCHEMA, shard_rows=layout.upstream) as writer:
        for start in range(0, len(rows), layout.upstream):
            writer.write(to_table(RECORD_SCHEMA, rows[start : start + layout.upstream]))
    (upstream / "sources.json").write_text("{}", "utf-8")
    last = dataset_step(shard_rows=layout.shipped)
    results = []
    ctx = replace(make_context(folder), fanout=fanout)
    with laid_out(layout):
        for name, stage, cfg, before in (
            ("filter", filter, FILTER, "generate"),
            ("dedup", dedup, DEDUP, "filter"),
            ("dataset", dataset, last, "dedup"),
        ):
            (folder / name).mkdir()
            inputs = {before: folder / before, "prompts": upstream}
            results.append(stage.run(cfg, inputs, folder / name, ctx))
    return results


def files(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few rows that a digest has many blocks; the number is part of every digest, so both sides have it."""
    monkeypatch.setattr(content, "BLOCK_ROWS", 4)


@pytest.fixture(scope="module")
def fanouts() -> Iterator[dict[int, Fanout]]:
    """By number of workers; they live as long as this module's tests."""
    with ExitStack() as stack:
        yield {
            count: stack.enter_context(
                open_fanout(Processes(kind="processes", workers=count), step="s", cancel=Event(), resume_command="")
            )
            for count in (1, 2, 3)
        }


IN_A_FIXTURE = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(examples(15), suppress_health_check=IN_A_FIXTURE)
@given(rows=records(), one=LAYOUTS, other=LAYOUTS, shipped_alike=st.booleans())
def test_contents_are_free_of_the_cut_and_shards_that_ship_of_all_before_them(
    rows: list[Record], one: Layout, other: Layout, shipped_alike: bool
) -> None:
    if shipped_alike:
        other = replace(other, shipped=one.shipped)
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        assert chain(rows, Path(first), one) == chain(rows, Path(second), other)
        if other.shipped == one.shipped:
            assert files(Path(first) / "dataset") == files(Path(second) / "dataset")


@settings(examples(6), suppress_health_check=IN_A_FIXTURE)
@given(rows=records(least=7), count=st.sampled_from([1, 2, 3]))
def test_files_are_free_of_the_number_of_workers(rows: list[Record], count: int, fanouts: Mapping[int, Fanout]) -> None:
    with TemporaryDirectory() as first, TemporaryDirectory() as second:
        results = chain(rows, Path(first), SMALL), chain(rows, Path(second), SMALL, fanouts[count])
        assert results[0] == results[1]
        for stage in ("filter", "dedup", "dataset"):
            assert files(Path(first) / stage) == files(Path(second) / stage)


PROMPTS = st.lists(
    st.sampled_from(["what is one and one", "What is  one and one", "what is one and two", "", "name a town"])
    | st.text(max_size=20),
    min_size=5,
    max_size=25,
)


@settings(examples(15), suppress_health_check=IN_A_FIXTURE)
@given(texts=PROMPTS, shard_rows=st.sampled_from([1, 3, SHARD_ROWS]), count=st.sampled_from([1, 2, 3]))
def test_prompts_are_free_of_both(texts: list[str], shard_rows: int, count: int, fanouts: Mapping[int, Fanout]) -> None:
    outputs = []
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        path = Path(folder) / "p.jsonl"
        path.write_text("".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(texts)), "utf-8")
        sets = {name: {"source": {"kind": "jsonl", "path": path}} for name in ("one", "two")}
        config = {"sets": sets, "test": 0.3, "validation": 0.3, "near_test": {"ngram": 2, "threshold": 0.5}}
        for name, fanout in (("plain", map_in_process), ("spread", fanouts[count])):
            out = Path(folder) / name
            out.mkdir()
            ctx = replace(make_context(Path(folder)), fanout=fanout)
            result = prompts.run(PromptsStep.model_validate({"prompts": config}), {}, out, ctx)
            outputs.append((result, files(out)))
            patch.setattr(settlement, "SHARD_ROWS", shard_rows)
    assert outputs[0] == outputs[1]


def test_shards_of_the_usual_size_are_equal_to_the_byte_too(
    tmp_path: Path, fanouts: Mapping[int, Fanout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content, "BLOCK_ROWS", 8192)
    rows = [
        a_record(
            row_id=f"{number:032x}",
            split="validation" if number % 9 == 0 else "train",
            completion=(Message("assistant", f"it is {number // 3}"),),
        )
        for number in range(3 * SHARD_ROWS + 5)
    ]
    usual = Layout(upstream=SHARD_ROWS, sink=SHARD_ROWS, shipped=SHARD_ROWS, partition=65_536)
    for name, fanout in (("plain", map_in_process), ("spread", fanouts[2])):
        (tmp_path / name).mkdir()
        results = chain(rows, tmp_path / name, usual, fanout)
        assert [result.rows_in for result in results] == [len(rows), len(rows), SHARD_ROWS + 2]
    assert files(tmp_path / "plain") == files(tmp_path / "spread")

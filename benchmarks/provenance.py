"""What provenance costs: bytes a row of a data set's shards with and without the columns that say where rows come from.

    python -m benchmarks.provenance            200,000 rows
    python -m benchmarks.provenance --rows N   another number
    python -m benchmarks.provenance --text-ids prompts without ids of their own: the sha256 of their text is the id

Rows go through stage `dataset` itself; its shards are then written once more without the provenance columns, by the
same writer (zstd, page checksums, 8,192 rows a file). The difference is the cost. Prompts and completions are made of
the words of this repository's own texts, 40 and about 200 of them a row.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq

from pipeline.core.record import RECORD_SCHEMA, Message, Record, ShardWriter, read_shards, shard_paths, to_table
from tests.dataset_stage import SOURCES, a_model, a_step, a_student, run_on

ROOT = Path(__file__).resolve().parent.parent
CONTENT = ("prompt", "completion", "tools", "task", "answer", "verified")
"""What a row is; all other columns say where it comes from."""
LIMIT = 30
"""Bytes a row that provenance may cost."""
CHUNK = 4096
TEACHERS = (("main", ("Apache-2.0",)), ("second", ("llama3.3",)), ("third", ("MIT", "llama3.3")))
SETS = (("gsm8k", "MIT"), ("alpaca", "CC-BY-NC-4.0"), ("own", "CC-BY-4.0"), ("dolly", "CC-BY-SA-3.0"))


def words() -> list[str]:
    """The words of the repository's texts, as often as they occur there."""
    texts = [path.read_text("utf-8") for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    return re.findall(r"[A-Za-z']+[,.]?", " ".join(texts))


def rows(count: int, *, text_ids: bool, seed: int = 0) -> Iterator[list[Record]]:
    """Rows of three teachers and four prompt sets, a few of them merged duplicates, in chunks."""
    draw, vocabulary = random.Random(seed), words()
    for start in range(0, count, CHUNK):
        yield [_row(draw, vocabulary, at, text_ids) for at in range(start, min(count, start + CHUNK))]


def _row(draw: random.Random, vocabulary: list[str], at: int, text_ids: bool) -> Record:
    (prompt_set, of_prompt), (teacher, of_teacher) = draw.choice(SETS), draw.choice(TEACHERS)
    said = round(draw.lognormvariate(5.3, 0.5))
    also_in = ("own",) if draw.random() < 0.01 and prompt_set != "own" else ()
    return Record(
        row_id=f"{draw.getrandbits(128):032x}",
        prompt_set=prompt_set,
        prompt_id=f"{draw.getrandbits(256):064x}" if text_ids else f"{at:07d}",
        sample=0,
        split="validation" if draw.random() < 0.02 else "train",
        task=None,
        prompt=(Message("user", " ".join(draw.choices(vocabulary, k=40))),),
        completion=(Message("assistant", " ".join(draw.choices(vocabulary, k=said))),),
        answer=None,
        also_in=also_in,
        teacher=teacher,
        license_set=tuple(sorted({of_prompt, *of_teacher, *(("CC-BY-4.0",) if also_in else ())})),
        finish_reason="stop",
        prompt_tokens=53 + draw.randrange(20),
        completion_tokens=round(said * 1.3),
        verified=None,
        flags=(),
        returned_model=f"org/{teacher}-2026-08",
        fingerprint=f"fp_{draw.randrange(3):010x}" if teacher == "second" else None,
    )


def measure(count: int, folder: Path, *, text_ids: bool) -> float:
    """Print the sizes; bytes of provenance a row."""
    sources = {name: {**SOURCES["set"], "license": licence} for name, licence in SETS}
    declared = [a_model(name, *licenses) for name, licenses in TEACHERS]
    with ShardWriter(folder / "dedup" / "rows", RECORD_SCHEMA) as writer:
        for chunk in rows(count, text_ids=text_ids):
            writer.write(to_table(RECORD_SCHEMA, chunk))
    began = time.process_time()
    out, result = run_on(folder, a_step(*declared, a_student()), sources)
    spent = time.process_time() - began
    bare = folder / "bare"
    sizes: dict[str, int] = {}
    for split in ("train", "validation"):
        tables = [
            table.select([n for n in table.column_names if n in CONTENT]) for table in read_shards(out, stem=split)
        ]
        with ShardWriter(bare, tables[0].schema, stem=split) as plain:
            for table in tables:
                plain.write(table)
    for path in shard_paths(out):
        footer = pq.read_metadata(path)
        for group in range(footer.num_row_groups):
            for at in range(footer.num_columns):
                column = footer.row_group(group).column(at)
                name = column.path_in_schema.partition(".")[0]
                sizes[name] = sizes.get(name, 0) + column.total_compressed_size
    whole, less = (sum(path.stat().st_size for path in shard_paths(place)) for place in (out, bare))
    cost = (whole - less) / count
    print(f"{count:,} rows in {result.metrics['splits']}: {spent / count * 1e6:.0f} µs of CPU a row for the stage")
    print(f"with provenance {whole / count:8.1f} B/row\nwithout         {less / count:8.1f} B/row")
    print(f"provenance      {cost:8.1f} B/row, {(whole - less) / whole:.1%} of the shards (limit: {LIMIT})")
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"  {name:<18}{size / count:8.2f} B/row{'' if name in CONTENT else '  provenance'}")
    return cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--text-ids", action="store_true")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        cost = measure(given.rows, Path(folder), text_ids=given.text_ids)
    if cost > LIMIT:
        raise SystemExit(f"provenance costs more than {LIMIT} B/row")


if __name__ == "__main__":
    main()

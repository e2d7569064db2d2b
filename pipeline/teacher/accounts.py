"""What the attempts of a run came to, read from the response store: the budget goes on from there after any stop."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.config_budget import Budget, Caps
from pipeline.core.errors import DISK_ERRORS, CorruptArtefact, UsageError
from pipeline.core.lineage import file_sha256
from pipeline.teacher.budget import Amount
from pipeline.teacher.prices import Price
from pipeline.teacher.segment import attempt_columns, open_segment, segment_paths

NUMBERS: Final = ("id", "cap", "reserved", "reserved_tokens", "input_tokens", "output_tokens", "cost")
TEXTS: Final = ("segment", "teacher")
MEND: Final = "put a sound copy in its place, or move it away: the budget then forgets what only it held"
UNCAPPED: Final = Budget()


def spent_by(
    folder: Path, run: str | None, prices: Mapping[str, Price | None], budget: Budget = UNCAPPED
) -> dict[str | None, Amount]:
    """Teacher's name -> what the attempts of a run came to, each counted once; unknown ends at their worst case.

    Args:
        folder: the response store.
        prices: of all teachers of the run, by name: attempts that had no price when they were made count at today's.
        budget: its caps in money hold only if everything can be counted.

    Raises:
        UsageError: money is capped, and nobody knows what attempts at some teacher cost.
        CorruptArtefact: a file of attempts is damaged.
        Incomplete: the disk fails.
    """
    if run is None:
        return {}
    in_segments = [*_of_segments(folder / "segments", run)]  # first: what is folded meanwhile is found below
    live = {name for name, _ in in_segments}
    tables = [table for _, table in in_segments]
    for path in sorted((folder / "attempts").glob("*.parquet")):
        table = _of_file(path, run)
        if table is not None:
            is_read = pc.is_in(table["segment"], pa.array(sorted(live), pa.string()))
            tables.append(table.filter(pc.invert(is_read)))
    rows = _once(pa.concat_tables(tables)) if tables else None
    names = [] if rows is None else rows["teacher"].unique().to_pylist()
    return {name: _sum(rows, name, prices.get(name or ""), budget) for name in names}


def _of_segments(folder: Path, run: str) -> Iterator[tuple[str, pa.Table]]:
    names = [name for name in (*NUMBERS, *TEXTS) if name != "segment"]
    for path in segment_paths(folder):
        with open_segment(path) as db:
            if db is None:
                continue
            selected = attempt_columns(db, [*names, "run"])
            rows = db.execute(f"SELECT * FROM (SELECT {selected} FROM attempts) WHERE run = ?", (run,)).fetchall()
        columns = {name: [row[at] for row in rows] for at, name in enumerate(names)}
        yield path.stem, _table({**columns, "segment": [path.stem] * len(rows)})


def check_attempts(path: Path) -> None:
    """Compare a folded file of attempts with its name, which is its sha256.

    Raises:
        CorruptArtefact: they differ.
    """
    if file_sha256(path) != path.stem:
        what = "a file of attempts is damaged: its sha256 is not its name"
        raise CorruptArtefact(what, where=str(path), todo=MEND)


def _of_file(path: Path, run: str) -> pa.Table | None:
    """The attempts of a run in a folded file; None if it was written before attempts had runs."""
    try:
        check_attempts(path)
        if "run" not in pq.read_schema(path).names:
            return None
        found = pq.read_table(path, columns=[*NUMBERS, *TEXTS], filters=pc.field("run") == run)
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        raise CorruptArtefact(f"a file of attempts is damaged: {error}", where=str(path), todo=MEND) from error
    return _table({name: found[name] for name in (*NUMBERS, *TEXTS)})


def _table(columns: dict[str, object]) -> pa.Table:
    arrays = {}
    for name in (*NUMBERS, *TEXTS):
        kind = pa.string() if name in TEXTS else pa.int64()
        values = columns[name]
        arrays[name] = values.cast(kind) if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)
    return pa.table(arrays)


def _once(rows: pa.Table) -> pa.Table:
    """Each attempt once: a fold that was cut off may have written some twice."""
    grouped = rows.group_by(["segment", "id"], use_threads=False)
    once = grouped.aggregate([(name, "max") for name in rows.column_names if name not in ("segment", "id")])
    return once.rename_columns([name.removesuffix("_max") for name in once.column_names])


def _sum(rows: pa.Table, name: str | None, price: Price | None, budget: Budget) -> Amount:
    is_it = pc.is_null(rows["teacher"]) if name is None else pc.equal(rows["teacher"], name)
    mine = rows.filter(pc.fill_null(is_it, False))
    used = pc.add(mine["input_tokens"], mine["output_tokens"])
    tokens = pc.coalesce(used, mine["reserved_tokens"], pa.scalar(0, pa.int64()))
    money = pc.coalesce(mine["cost"], mine["reserved"])
    nano = _total(money)
    unpriced = mine.filter(pc.is_null(money))
    outputs = _total(pc.coalesce(unpriced["output_tokens"], unpriced["cap"]))
    worst_inputs = pc.subtract(unpriced["reserved_tokens"], unpriced["cap"])
    inputs = _total(pc.coalesce(unpriced["input_tokens"], worst_inputs))
    if price is not None:
        nano += price.cost(inputs, outputs)
    elif inputs + outputs > 0:
        _check_uncapped(name, unpriced.num_rows, budget)
    return Amount(nano, _total(tokens), mine.num_rows)


def _check_uncapped(name: str | None, count: int, budget: Budget) -> None:
    """Refuse a cap in money that attempts count in whose cost nobody knows."""
    scopes: tuple[tuple[str, Caps], ...] = (("budget", budget),)
    if name in budget.teachers:
        scopes += ((f"budget.teachers.{name}", budget.teachers[name]),)
    capped = next((field for field, caps in scopes if caps.usd is not None), None)
    if capped is not None:
        what = f"{capped}.usd is set, but {count:,} earlier requests of this run to teacher {name} had no price"
        todo = "give it there, in USD per million tokens: `price: {input: 2.5, output: 10}`"
        raise UsageError(what, where=f"teachers.{name}.price", todo=todo)


def _total(values: pa.ChunkedArray) -> int:
    return int(pc.sum(values).as_py() or 0)

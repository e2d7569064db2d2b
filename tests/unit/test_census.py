"""What is counted in the rows does not depend on how they arrive."""

from collections.abc import Sequence

import pytest

from pipeline.core.record import RECORD_SCHEMA, Record, to_table
from pipeline.stages.dataset.census import Census
from pipeline.terms.statement import RowSet
from tests.support import a_record

ROWS = [
    a_record(row_id="1" * 32, teacher="big", license_set=("Apache-2.0", "MIT"), returned_model="m", fingerprint="f"),
    a_record(row_id="2" * 32, teacher="big", prompt_set="b", license_set=("Apache-2.0",), returned_model="m"),
    a_record(row_id="3" * 32, also_in=("b", "c")),
    a_record(row_id="4" * 32, also_in=("b", "c")),
]


def counted(*parts: Sequence[Record]) -> Census:
    census = Census()
    for part in parts:
        census.add(to_table(RECORD_SCHEMA, part))
    return census


@pytest.mark.parametrize("parts", [[ROWS], [ROWS[:1], ROWS[1:]], [ROWS[::-1]], [[row] for row in ROWS[::-1]]])
def test_rows_are_grouped_by_where_they_come_from(parts: list[list[Record]]) -> None:
    census = counted(*parts)
    assert census.row_sets == (
        RowSet(1, "big", ("b",), ("Apache-2.0",)),
        RowSet(1, "big", ("set",), ("Apache-2.0", "MIT")),
        RowSet(2, "tiny", ("set", "b", "c"), ("MIT",)),
    )
    assert census.prompt_sets == {"set", "b", "c"} and census.rows == 4
    assert census.returned == {("big", "m", "f"), ("big", "m", None)}


def test_a_provider_that_names_nothing_is_not_told() -> None:
    assert counted([a_record()]).returned == set()

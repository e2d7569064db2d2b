"""Finds secrets and personal data in rows that are to be published: in every text of every column.

What is found is said by place and kind, never by value. What is looked for, and what is not found: `secrets.py` and
`personal.py`.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.text.found import Found, merge
from pipeline.text.outbound import redact_json
from pipeline.text.personal import KINDS as PERSONAL
from pipeline.text.personal import find_personal
from pipeline.text.secrets import KINDS as SECRETS
from pipeline.text.secrets import find_secrets

KINDS: Final = (*SECRETS, *PERSONAL)
"""All kinds, the telling ones first."""
MOST_FINDINGS: Final = 10_000
"""Findings of a table, or of all, that are kept with their places; the counts are of all there are."""
JSON_FIELDS: Final = ("tools", "arguments")
"""Last names of the fields that hold JSON: there escapes could hide what is looked for."""

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that should not be published.

    Attributes:
        row_id: of the row; of something that is no row, the file's name.
        field: `completion[0].content`; of a file "text".
        kind: one of `KINDS`.
        at: where it begins in the text, in characters; None: somewhere in the JSON text.
    """

    row_id: str
    field: str
    kind: str
    at: int | None


@dataclass(frozen=True, slots=True)
class Scanned:
    """What a scan found.

    Attributes:
        rows: how many were looked at.
        dirty: rows with a finding that nobody allowed.
        kinds: kind -> findings that nobody allowed.
        allowed: kind -> findings in rows that somebody allowed.
        allowed_ids: ids of these rows.
        findings: places of those that nobody allowed, at most `MOST_FINDINGS`.
    """

    rows: int = 0
    dirty: int = 0
    kinds: Mapping[str, int] = field(default_factory=dict)
    allowed: Mapping[str, int] = field(default_factory=dict)
    allowed_ids: frozenset[str] = frozenset()
    findings: tuple[Finding, ...] = ()

    def __add__(self, other: "Scanned") -> "Scanned":
        """Both together."""
        return Scanned(
            self.rows + other.rows,
            self.dirty + other.dirty,
            _sum(self.kinds, other.kinds),
            _sum(self.allowed, other.allowed),
            self.allowed_ids | other.allowed_ids,
            (*self.findings, *other.findings)[:MOST_FINDINGS],
        )


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    total = Counter(one) + Counter(other)
    return {kind: total[kind] for kind in sorted(total)}


def find_sensitive(text: str) -> list[Found]:
    """Secrets and personal data in a text, in order; none overlap."""
    found = [*find_secrets(text), *find_personal(text)]
    return merge(found, KINDS) if found else found


def scan_text(name: str, text: str, allowed: Collection[str] = (), *, personal: bool = True) -> Scanned:
    """Scan a file's text. Without `personal` only secrets are looked for: authors of licences have addresses."""
    found = find_sensitive(text) if personal else find_secrets(text)
    return gather(0, [Finding(name, "text", one.kind, one.start) for one in found], allowed)


def scan_table(table: pa.Table, allowed: Collection[str] = ()) -> Scanned:
    """Scan all texts of a table, in the order of its rows.

    Args:
        table: has a column `row_id`; columns without texts count for nothing.
        allowed: ids of rows that may be published whatever they hold.
    """
    ids: list[str] = table["row_id"].to_pylist()
    found: list[tuple[int, Finding]] = []
    for name in table.column_names:
        for texts in _texts_of(table[name], name):
            found += [(row, Finding(ids[row], path, kind, at)) for row, path, kind, at in texts.hits()]
    found.sort(key=lambda each: each[0])  # stable: the fields of a row stay in the order of its columns
    return gather(table.num_rows, [finding for _, finding in found], allowed)


def gather(rows: int, found: Sequence[Finding], allowed: Collection[str]) -> Scanned:
    """Findings as a `Scanned`."""
    kept = [finding for finding in found if finding.row_id not in allowed]
    let_through = [finding for finding in found if finding.row_id in allowed]
    return Scanned(
        rows=rows,
        dirty=len({finding.row_id for finding in kept}),
        kinds=_sum(Counter(finding.kind for finding in kept), {}),
        allowed=_sum(Counter(finding.kind for finding in let_through), {}),
        allowed_ids=frozenset(finding.row_id for finding in let_through),
        findings=tuple(kept[:MOST_FINDINGS]),
    )


# ---------------------------------------------------------------------------------------------- texts of a column


@dataclass(frozen=True, slots=True)
class _Texts:
    """The texts of one field in all rows.

    Attributes:
        path: its name, with `{}` for each place in a list.
        values: the texts; null where there is none.
        rows: of each text its row.
        places: of each text its places in the lists around it, outermost first.
    """

    path: str
    values: pa.Array
    rows: Rows
    places: tuple[Rows, ...]

    def hits(self) -> Iterator[tuple[int, str, str, int | None]]:
        """(row, field, kind, where it begins). A text that occurs again, as prompts and tools do, is scanned once."""
        encoded = self.values.dictionary_encode()
        is_json = self.path.rpartition(".")[2] in JSON_FIELDS
        dirty = {}
        for number, text in enumerate(encoded.dictionary.to_pylist()):
            if hits := _hits_in(text, is_json=is_json):
                dirty[number] = hits
        if not dirty:
            return
        for at, number in enumerate(encoded.indices.to_pylist()):
            for kind, start in dirty.get(number, ()):
                path = self.path.format(*(int(places[at]) for places in self.places))
                yield int(self.rows[at]), path, kind, start


def _hits_in(text: str, *, is_json: bool) -> list[tuple[str, int | None]]:
    if is_json:
        return [(kind, None) for kind in redact_json(text, find_sensitive)[1]]
    return [(one.kind, one.start) for one in find_sensitive(text)]


def _texts_of(column: pa.ChunkedArray, name: str) -> Iterator[_Texts]:
    array = column.combine_chunks()
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    return _walk(array, name, np.arange(len(array)), ())


def _walk(array: pa.Array, path: str, rows: Rows, places: tuple[Rows, ...]) -> Iterator[_Texts]:
    kind = array.type
    if pa.types.is_dictionary(kind):
        yield from _walk(array.dictionary_decode(), path, rows, places)
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind):
        yield _Texts(path, array, rows, places)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = np.asarray(array.value_lengths().fill_null(0), np.int64)
        inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        outer = tuple(np.repeat(each, lengths) for each in places)
        yield from _walk(array.flatten(), path + "[{}]", np.repeat(rows, lengths), (*outer, inside))
    elif pa.types.is_struct(kind):
        for index, values in enumerate(array.flatten()):  # not `field`, which forgets nulls around it
            yield from _walk(values, f"{path}.{kind.field(index).name}", rows, places)

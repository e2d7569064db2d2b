"""`export`: the data set's rows in the forms of other trainers, each row whole or left out with a reason."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pipeline.core.errors import LostRows, UsageError, disk_errors
from pipeline.core.lineage import file_sha256
from pipeline.core.log import show_progress
from pipeline.core.stage import Progress
from pipeline.core.store import MANIFEST, Artefact
from pipeline.runner.export.forms import FORMS, INDEX, Form, Refused, entries
from pipeline.runner.publish.files import README, dataset_items, is_notice
from pipeline.runner.publish.folder import files_in, folder_of, refuse_changed, refuse_inside, replaced_folder
from pipeline.runner.publish.terms import judge_artefact, refuse_verdict
from pipeline.runner.run import committed_before
from pipeline.runner.session import Session
from pipeline.text.markdown import split_front_matter, with_front_matter

FORMAT: Final = 1
MADE: Final = "export.json"
REJECTS: Final = "rejects.jsonl"
INFO: Final = "dataset_info.json"
SPLITS: Final = ("train", "validation")


@dataclass(frozen=True, slots=True)
class Split:
    """What became of one split: `rows_in == rows_out + sum(rejected.values())`.

    Attributes:
        name: "train" or "validation".
        file: its file in the folder.
        rejected: reason -> rows that the form cannot say.
    """

    name: str
    file: str
    rows_in: int
    rows_out: int
    rejected: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        form: the form of its rows.
        splits: those that were written.
    """

    folder: Path
    form: str
    splits: tuple[Split, ...]


def export(session: Session, form: str, folder: Path, splits: Sequence[str] = ()) -> Exported:
    """Write the rows of the run's data set, its card and its notices into a folder, which appears as a whole.

    Args:
        form: one of `FORMS`.
        splits: only these; empty: all that there are.

    Raises:
        UsageError: there is no data set, none of its rows fits, or the folder holds something else.
        CorruptArtefact: the data set is not what was committed.
        PolicyRefused: its terms forbid what the policy means to do.
        Incomplete: the disk fails.
        Interrupted, Terminated: a signal asked us to stop.
    """
    where = f"--out {folder}"
    folder = folder_of(folder, where)
    refuse_inside(folder, session.data, where)
    _refuse_others(folder, where)
    with session.disk_errors():
        dataset = committed_before(session, "train", asked_by="export")["dataset"]
        refuse_verdict(session, judge_artefact(session, dataset), f"{session.loaded.run_name} -> {folder}")
        shards = _shards(dataset, splits)
        with (
            disk_errors(where, "make room or give write access, then run the same command again"),
            replaced_folder(folder, where) as out,
            show_progress("export", quiet=session.quiet) as progress,
        ):
            progress.start(sum(map(len, shards.values())), "shards")
            done = tuple(
                _write_split(session, FORMS[form], name, paths, out, progress) for name, paths in shards.items()
            )
            _refuse_none(form, done)
            _write_papers(dataset, form, done, out)
            _write_json(out / MADE, {"format": FORMAT, "form": form, **_facts(dataset, done, out)})
    return Exported(folder, form, done)


def _refuse_others(folder: Path, where: str) -> None:
    """All of the folder is replaced, so it must be new, empty or an earlier export, as it was written."""
    if not files_in(folder, where):
        return
    mark = folder / MADE
    try:
        made = {str(name): str(sha256) for name, sha256 in json.loads(mark.read_text("utf-8"))["files"].items()}
        made[MADE] = file_sha256(mark)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        made = {}
    refuse_changed(folder, made, where)


def _shards(dataset: Artefact, splits: Sequence[str]) -> dict[str, list[Path]]:
    names = [name for name in SPLITS if not splits or name in splits]
    found = {name: sorted((dataset.path / "data").glob(f"{name}-*.parquet")) for name in names}
    shards = {name: paths for name, paths in found.items() if paths}
    if not shards:
        todo = "leave out --split: then all splits that it has are written"
        raise UsageError("the data set has no such rows", where=f"--split {', '.join(names)}", todo=todo)
    return shards


def _refuse_none(form: str, done: Sequence[Split]) -> None:
    if any(split.rows_out for split in done):
        return
    reasons = ", ".join(sorted({reason for split in done for reason in split.rejected}))
    todo = "take another form: `jsonl` and `messages` say everything"
    raise UsageError(f"this form cannot say any of the rows: {reasons}", where=f"--format {form}", todo=todo)


def _write_split(
    session: Session, form: Form, name: str, shards: Sequence[Path], folder: Path, progress: Progress
) -> Split:
    """Write one split, a shard in memory at a time; what is left out goes into the file of rejects."""
    counts: Counter[str] = Counter()
    rows_in = rows_out = 0
    with (folder / f"{name}.jsonl").open("wb") as out, (folder / REJECTS).open("ab") as rejects:
        for path in shards:
            for row_id, entry in entries(path, form):
                session.stop.check("export")
                rows_in += 1
                if isinstance(entry, Refused):
                    counts[entry.reason] += 1
                    rejects.write(_line({"split": name, "row_id": row_id, "reason": entry.reason}))
                else:
                    rows_out += 1
                    out.write(_line(entry))
            progress.advance()
    rejected = {reason: counts[reason] for reason in sorted(counts)}
    if rows_in != rows_out + sum(rejected.values()):
        raise LostRows(f"export of {name}: {rows_in} in, {rows_out} out, rejected {rejected}")
    return Split(name, f"{name}.jsonl", rows_in, rows_out, rejected)


_LINE_ENDS: Final = {0x85: "\\u0085", 0x2028: "\\u2028", 0x2029: "\\u2029"}
"""Ends of lines to some readers, but not to JSON."""


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).translate(_LINE_ENDS).encode() + b"\n"


# ---------------------------------------------------------------------------------------------- what goes with the rows


def _write_papers(dataset: Artefact, form: str, done: Sequence[Split], folder: Path) -> None:
    """The data set's card, licences, notices and manifest; and what LLaMA-Factory reads of a folder."""
    for item in dataset_items(dataset):
        if is_notice(item.name):
            path = folder / item.name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"".join(item.chunks()))
        elif item.name == README:
            (folder / README).write_text(_card(item.text(), done), "utf-8", newline="\n")
        elif item.name == MANIFEST:
            (folder / "dataset-manifest.json").write_bytes(b"".join(item.chunks()))
    if form in INDEX:
        name = "".join(c if c.isalnum() else "_" for c in form)
        _write_json(folder / INFO, {f"{name}_{each.name}": {"file_name": each.file, **INDEX[form]} for each in done})


def _card(card: str, done: Sequence[Split]) -> str:
    """The data set's card, whose front matter names the files of this folder in the place of the shards."""
    meta, body = split_front_matter(card)
    files = [{"split": each.name, "path": each.file} for each in done if each.rows_out]
    return with_front_matter({**meta, "configs": [{"config_name": "default", "data_files": files}]}, body)


def _facts(dataset: Artefact, done: Sequence[Split], folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "dataset": {"key": dataset.manifest.key, "content": dataset.manifest.content},
        "splits": {
            each.name: {"rows_in": each.rows_in, "rows_out": each.rows_out, "rejected": {**each.rejected}}
            for each in done
        },
        "files": {path.relative_to(folder).as_posix(): file_sha256(path) for path in files},
    }


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")

"""Full texts of licences and terms: from one's own folder, an installed database of them, or as they come along."""

import hashlib
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml

from pipeline.core.errors import UsageError
from pipeline.terms.records import Registry

BUILT_IN: Final = Path(__file__).parent / "texts"
PACKAGE: Final = "licensedcode"
"""Import name of `scancode-toolkit-mini`, the optional extra `licenses`; only its data files are read."""
LARGEST: Final = 1 << 20
"""Bytes of one text."""


@dataclass(frozen=True, slots=True)
class Text:
    """A full text.

    Attributes:
        text: as it was found, front matter of a database removed.
        sha256: `text_hash` of it; a record's `text_sha256` is the same where the text is the one that was read for it.
        origin: where it came from, for a person; no path, which may hold a user's name.
    """

    text: str
    sha256: str
    origin: str


def text_hash(text: str) -> str:
    """sha256 (64 hex digits) over the UTF-8 of a text's words with one space between them: line ends, indentation and
    blank lines do not count, everything else does."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()


def file_name(record_id: str) -> str:
    """Name of a text's file: what is no letter, digit, `.`, `-` or `_` becomes `_`; 200 characters of it at most."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", record_id).lstrip(".")
    return f"{name[:200] or '_'}.txt"


def find_text(name: str, registry: Registry, folder: Path | None) -> Text | None:
    """The full text of a licence or of terms; None: nobody here has it.

    Args:
        name: id of a record, an alias of it, or any other name.
        folder: the user's own texts, `<id>.txt`; they go first.

    Raises:
        UsageError: there is no such folder, or a text in it is empty, larger than 1 MB or not UTF-8.
    """
    record = registry.find(name)
    known = name if record is None else record.id
    return next(_found(known, folder), None)


def _found(name: str, folder: Path | None) -> Iterator[Text]:
    if folder is not None:
        yield from _from_user(folder, name)
    yield from _from_package(name)
    ours = BUILT_IN / file_name(name)
    if ours.is_file():
        yield _text(ours.read_text("utf-8"), "ScanCode LicenseDB, as it comes along with this pipeline")


def _from_user(folder: Path, name: str) -> Iterator[Text]:
    if not folder.is_dir():
        raise UsageError("there is no such folder", where=f"policy.texts: {folder}", todo="correct the path")
    path = folder / file_name(name)
    if not path.is_file():
        return
    todo = f"put the full text of {name} there, as UTF-8"
    if path.stat().st_size > LARGEST:
        raise UsageError("the text is larger than 1 MB", where=str(path), todo=todo)
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("the text is not UTF-8", where=str(path), todo=todo) from error
    if text.strip() == "":
        raise UsageError("the text is empty", where=str(path), todo=todo)
    yield _text(text, "folder policy.texts")


def _from_package(name: str) -> Iterator[Text]:
    folder = _package_folder()
    key = name.removeprefix("LicenseRef-scancode-").lower()
    path = None if folder is None else folder / f"{key}.LICENSE"
    if path is None or re.fullmatch(r"[a-z0-9.+-]+", key) is None or not path.is_file():
        return
    facts, text = _parts(path.read_text("utf-8"))
    others = facts.get("other_spdx_license_keys")
    keys = [facts.get("spdx_license_key"), *(others if isinstance(others, list) else [])]
    if name in keys and text != "":
        yield _text(text, f"ScanCode LicenseDB, {path.name}")


def _package_folder() -> Path | None:
    spec = importlib.util.find_spec(PACKAGE)
    places = () if spec is None else spec.submodule_search_locations or ()
    return next((Path(place) / "data" / "licenses" for place in places), None)


def _parts(raw: str) -> tuple[dict[str, object], str]:
    """Front matter and text of a `.LICENSE` file."""
    head, ended, text = raw.removeprefix("---\n").partition("\n---\n")
    facts = yaml.safe_load(head) if ended else None
    return (facts, text.strip()) if isinstance(facts, dict) else ({}, raw.strip())


def _text(text: str, origin: str) -> Text:
    return Text(text, text_hash(text), origin)

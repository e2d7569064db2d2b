"""What people signed for: permissions, interpretations and assertions, in a file that is only ever appended to.

Each line is the canonical JSON of one override. It names the sha256 of the line before it and seals itself, so that a
line that was edited, moved, dropped or cut is found. Not found: a last line that was dropped (which only makes gates
stricter), and a file that was written anew as a whole: for that, keep it in git.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import IO, Annotated, Final, Literal, cast

from pydantic import AfterValidator, Field, StringConstraints, ValidationError, model_validator

from pipeline.core.config_base import ConfigModel
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.errors import CorruptArtefact, UsageError, disk_errors
from pipeline.core.lineage import canonical_json, digest_json, file_sha256
from pipeline.core.log import safe_text
from pipeline.core.stage import Json
from pipeline.core.store import sync_folder
from pipeline.core.versions import collect_versions
from pipeline.terms.licenses import parse_license
from pipeline.terms.statement import Source, Statement

FIRST: Final = "0" * 64
"""What the first line names as the one before it."""
LONGEST_YEAR: Final = timedelta(days=365)
SHORTEST_REASON: Final = 20
LONGEST_NAME: Final = 200
ASSERTED_RULE: Final = "LG-001"
"""What an assertion answers: that nobody knows the terms."""
LONGEST_LINE: Final = 1 << 16
TODO: Final = "take the file back from version control; `python -m pipeline licenses override` appends to it"

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Said = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=2000)]
Name = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_NAME)]
Kind = Literal["permission", "interpretation", "assertion"]


def _licence(name: str) -> str:
    return parse_license(name).name


class Evidence(ConfigModel):
    """What somebody looked at."""

    name: Name
    """A file's name (no folder: it may hold a user's name) or an address."""
    sha256: Digest
    """Of its bytes."""


class Override(ConfigModel):
    """One decision of a person about one atom, for one set of sources."""

    id: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{12}$")]
    rule: Annotated[str, StringConstraints(pattern=r"^LG-[0-9]{3}$")]
    atom: Name
    """The atom that is accepted; the restriction stays where it is said."""
    value: Annotated[str, StringConstraints(max_length=2000)]
    """Canonical JSON of its value."""
    sources: Annotated[dict[Name, Digest], Field(min_length=1)]
    """The sources that it is for, `teacher:main`, with `scope_of` each: it holds while they stay what they are, and for
    no other source."""
    kind: Kind
    """permission: of whoever gave the terms; interpretation: of the terms, by the person; assertion: that a source is
    under a licence, where its label says nothing. An assertion ranks as `user_asserted`."""
    source: Name | None = None
    """Of an assertion: `prompt:gsm8k`."""
    license: Annotated[Name, AfterValidator(_licence)] | None = None
    """Of an assertion: the licence that the source is under."""
    person: Annotated[Said, StringConstraints(min_length=3)]
    """Name and contact of who answers for it."""
    reason: Annotated[Said, StringConstraints(min_length=SHORTEST_REASON)]
    evidence: Evidence
    created: date
    expires: date
    """The last day on which it holds: at most a year after it was made."""
    tool_version: Name
    """Commit of the code that wrote it, where there is one."""
    prev_line_sha256: Digest
    sha256: Digest = ""
    """Seal: over everything else in the line."""

    @model_validator(mode="after")
    def _holds_together(self) -> "Override":
        if not self.created <= self.expires <= self.created + LONGEST_YEAR:
            raise ValueError("it expires within a year of its making")
        if any((self.kind == "assertion") != (given is not None) for given in (self.source, self.license)):
            raise ValueError("an assertion, and nothing else, names a source and its licence")
        if self.source is not None and self.source not in self.sources:
            raise ValueError("an assertion is for its own source")
        if self.kind == "assertion" and self.rule != ASSERTED_RULE:
            raise ValueError(f"an assertion answers {ASSERTED_RULE} only: it names terms, and lifts none")
        return self

    def to_json(self) -> dict[str, Json]:
        """As plain JSON."""
        return cast(dict[str, Json], self.model_dump(mode="json"))

    def asserts(self, source: Source, policy: PolicyConfig) -> bool:
        """Whether it says what a source is under, for what the policy means to do."""
        return self.source == source.bearer and self.sources.get(source.bearer) == scope_of(source, policy)

    @property
    def seal(self) -> str:
        """What `sha256` has to be."""
        return digest_json({name: value for name, value in self.to_json().items() if name != "sha256"})


@dataclass(frozen=True, slots=True)
class Decision:
    """What a person decides, before it is written down.

    Attributes:
        rule, atom, value: of the finding that it accepts; `value` is canonical JSON.
        person: name and contact, typed by the person.
        reason: at least 20 characters.
        sources: whom the finding binds: `teacher:main`.
        source, license: of an assertion only: `prompt:gsm8k` and its licence.
    """

    rule: str
    atom: str
    value: str
    sources: tuple[str, ...]
    kind: Kind
    person: str
    reason: str
    evidence: Evidence
    expires: date
    source: str | None = None
    license: str | None = None


def scope_of(source: Source, policy: PolicyConfig) -> str:
    """What an override is bound to: 64 hex digits over what a source is, its revision and its terms, and what is meant
    to be done (use and release), whatever else is there.

    Facts that are known only later (hashes of weights, models that answered) do not count, so that a permission that
    was recorded before the first request holds at all gates.
    """
    what = [source.role, source.name, source.what, source.facts.get("revision")]
    meant: list[Json] = [policy.intended_use, policy.release.dataset, policy.release.model]
    return digest_json([*what, [*sorted(source.licenses)], source.family, meant])


def scopes_of(statement: Statement, policy: PolicyConfig) -> dict[str, str]:
    """`teacher:main` -> its scope."""
    return {source.bearer: scope_of(source, policy) for source in statement.sources}


def evidence_of(path: Path) -> Evidence:
    """A file as evidence.

    Raises:
        UsageError: it cannot be read, it is empty, or its name cannot be written down.
    """
    try:
        what = _unusable(path)
        found = None if what is not None else Evidence(name=path.name, sha256=file_sha256(path))
    except OSError as error:
        what, found = f"the evidence cannot be read: {error.strerror}", None
    if found is None:
        todo = "name a file with the permission, the contract or a note"
        raise UsageError(str(what), where=_printable(path), todo=todo)
    return found


def _printable(path: Path) -> str:
    return safe_text(str(path).encode("utf-8", "backslashreplace").decode())


def _unusable(path: Path) -> str | None:
    """Why a file is no evidence; None: it is."""
    if len(path.name) > LONGEST_NAME:
        return f"the name of the evidence has more than {LONGEST_NAME} characters"
    try:
        path.name.encode("utf-8")
    except UnicodeEncodeError:
        return "the name of the evidence is not UTF-8"
    if not path.name.strip():
        return "the name of the evidence is blank"
    return "the evidence is empty" if path.stat().st_size == 0 else None


def read_overrides(path: Path | None) -> tuple[Override, ...]:
    """All overrides of a file, in order; none where there is no file, or a policy names none.

    Raises:
        CorruptArtefact: a line was edited, moved, dropped or cut; it names the file and the line.
        UsageError: it is a folder.
    """
    if path is None:
        return ()
    _refuse_folder(path)
    if not path.exists():
        return ()
    with disk_errors(str(path), "give read access, then run the same command again"):
        data = path.read_bytes()
    return _checked(data, path)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        todo = "name a file that is kept in version control: policy: {overrides: configs/overrides.jsonl}"
        raise UsageError("policy.overrides is a folder", where=str(path), todo=todo)


def append_override(
    path: Path, decision: Decision, statement: Statement, policy: PolicyConfig, *, today: date
) -> Override:
    """Write down a decision about some sources, at the end of a file, for good.

    Args:
        policy: what is meant to be done: it holds for that.

    Returns:
        It as it was written.

    Raises:
        UsageError: the reason is too short, it does not expire within a year, or the like; nothing was written.
        CorruptArtefact: the file was changed by something else.
        Incomplete: the disk is full or write-protected; nothing was written.
    """
    _refuse_folder(path)
    with disk_errors(str(path), "make room or give write access, then run the same command again"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            written = file.read()
            _checked(written, path)
            made = _made(decision, scopes_of(statement, policy), _last_digest(written), today)
            _append(file, _line(made), len(written))
        sync_folder(path.parent)
    return made


def _append(file: IO[bytes], line: bytes, before: int) -> None:
    """All of a line or nothing."""
    try:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        os.truncate(file.fileno(), before)
        raise


def _made(decision: Decision, scopes: Mapping[str, str], before: str, today: date) -> Override:
    given: dict[str, Json] = {
        "rule": decision.rule,
        "atom": decision.atom,
        "value": decision.value,
        "sources": {name: scope for name, scope in scopes.items() if name in decision.sources},
        "kind": decision.kind,
        "source": decision.source,
        "license": decision.license,
        "person": decision.person,
        "reason": decision.reason,
        "evidence": decision.evidence.model_dump(mode="json"),
        "created": today.isoformat(),
        "expires": decision.expires.isoformat(),
        "tool_version": collect_versions().get("commit", "unknown"),
        "prev_line_sha256": before,
    }
    try:
        made = Override.model_validate({**given, "id": digest_json(given)[:12], "sha256": FIRST})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"])) or "it"
        what = f"this override cannot be recorded: {field}: {first['msg'].removeprefix('Value error, ')}"
        todo = f"give a person, a reason of at least {SHORTEST_REASON} characters, and a date within a year"
        raise UsageError(what, where=f"override of {decision.rule}", todo=todo) from None
    return made.model_copy(update={"sha256": made.seal})


# ------------------------------------------------------------------------------------------------------------ the chain


def _line(override: Override) -> bytes:
    return canonical_json(override.to_json()) + b"\n"


def _last_digest(data: bytes) -> str:
    lines = data.splitlines()
    return hashlib.sha256(lines[-1]).hexdigest() if lines else FIRST


def _checked(data: bytes, path: Path) -> tuple[Override, ...]:
    found: list[Override] = []
    before = FIRST
    lines = data.split(b"\n")
    if lines.pop() != b"":
        raise _damaged("its end is cut off", path, len(lines) + 1)
    for number, line in enumerate(lines, 1):
        override = _read_line(line, path, number)
        if override.prev_line_sha256 != before:
            raise _damaged("it does not follow the line before it: one was edited, moved or dropped", path, number)
        before = hashlib.sha256(line).hexdigest()
        found.append(override)
    return tuple(found)


def _read_line(line: bytes, path: Path, number: int) -> Override:
    try:
        override = Override.model_validate(json.loads(line) if len(line) <= LONGEST_LINE else None)
    except (ValidationError, ValueError, RecursionError):
        raise _damaged("it is no override", path, number) from None
    if override.sha256 != override.seal or _line(override) != line + b"\n":
        raise _damaged("it was edited", path, number)
    return override


def _damaged(what: str, path: Path, number: int) -> CorruptArtefact:
    return CorruptArtefact(f"line {number} of the overrides is damaged: {what}", where=f"{path}:{number}", todo=TODO)


# ----------------------------------------------------------------------------------------------------- what still holds


@dataclass(frozen=True, slots=True)
class Active:
    """Overrides that hold today for some sources, and why others do not.

    Attributes:
        overrides: those that hold for one of the sources at least.
        warnings: one a reason why another does not.
        scopes: `teacher:main` -> what the source is, of those sources.
    """

    overrides: tuple[Override, ...]
    warnings: tuple[str, ...]
    scopes: Mapping[str, str]

    def accepting(self, rule: str, atom: str, value: str, bearers: Collection[str]) -> tuple[Override, ...]:
        """Permissions and interpretations that accept an atom for all of some sources together; else none."""
        fitting = [
            each
            for each in self.overrides
            if each.kind != "assertion" and (each.rule, each.atom, each.value) == (rule, atom, value)
        ]
        used = tuple(each for each in fitting if any(self._covers(each, bearer) for bearer in bearers))
        return used if all(any(self._covers(each, bearer) for each in used) for bearer in bearers) else ()

    def _covers(self, override: Override, bearer: str) -> bool:
        return bearer in self.scopes and override.sources.get(bearer) == self.scopes[bearer]


def active(overrides: Sequence[Override], statement: Statement, policy: PolicyConfig, today: date) -> Active:
    """Those overrides that hold today for sources of a statement and what the policy means to do."""
    scopes = scopes_of(statement, policy)
    holding, warnings = [], []
    for each in overrides:
        if not each.sources.items() & scopes.items():
            warnings.append(
                f"override {each.id} of {each.rule} is for other sources, another use or release: it does not hold"
            )
        elif not each.created <= today <= each.expires:
            warnings.append(f"override {each.id} of {each.rule} held until {each.expires} and has expired")
        else:
            holding.append(each)
    return Active(tuple(holding), tuple(warnings), scopes)

"""Jobs on disk, written before anything is sent, so that no moment of death loses one.

In `data/responses/batches/<teacher>/`:

<token>.json       what is known of a job; replaced by one rename at each step
<token>.requests   its lines as they are sent, until all of them are settled
<token>.results    the provider's results, once they are complete, until they are settled

The states of a job, each on disk before what follows it happens:

intended   its lines are written; at the provider there is at most an uploaded file, which nobody bills
creating   the call that makes it may have been sent; the job is looked for under its token
created    the provider has it, under `job_id`
ended      its results are complete on disk
settled    all of its lines are in the response store

All files are private: readable by their owner only.
"""

import base64
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Final

from pipeline.core.config_budget import usd
from pipeline.core.errors import CorruptArtefact, Incomplete, boundary
from pipeline.core.stage import Json
from pipeline.core.store import make_folder, sync_folder

FOLDER: Final = "batches"
INTENDED, CREATING, CREATED, ENDED, SETTLED = "intended", "creating", "created", "ended", "settled"
STATES: Final = (INTENDED, CREATING, CREATED, ENDED, SETTLED)
SAFE_ID: Final = re.compile(r"[A-Za-z0-9_.:\-]{1,200}")
"""Ids that providers give; they become part of URLs."""
KEY_CHARS: Final = 43
"""Characters of a request key in a custom id: base64 of 32 bytes."""
NO_LOGPROBS: Final[dict[str, Json]] = {"logprobs": None, "token_ids": False}
"""Of jobs that were recorded before logprobs could be asked for."""


@dataclass(frozen=True, slots=True)
class Job:
    """One job, as it is on disk.

    Attributes:
        token: 16 hex digits that nobody else has: in every custom id, and in the metadata of the job.
        state: one of `STATES`.
        kind: of the teacher.
        base_url: where it was sent.
        identity, model, wire: as in `segment.Stored`.
        cap, room: as in `segment.Stored`.
        run, teacher: whose budget it counts in.
        price_input, price_output: nano-dollars per million tokens, discount taken off; None: unknown.
        lines: how many requests it holds.
        worst_nano, worst_tokens: their worst case; nano-dollars are 0 where the price is unknown.
        intended_ms, created_ms: Unix times in milliseconds.
        file_id: of the uploaded requests, for providers that take files.
        job_id: the provider's name of the job.
        ended_as: in the provider's word; "lost": nobody can say what became of it.
        logprobs, token_ids: how many logprobs its lines ask for, and whether with ids; None: none.
    """

    token: str
    state: str
    kind: str
    base_url: str
    identity: str
    model: str
    wire: str
    cap: int
    room: int | None
    run: str | None
    teacher: str | None
    price_input: int | None
    price_output: int | None
    lines: int
    worst_nano: int
    worst_tokens: int
    intended_ms: int
    created_ms: int | None = None
    file_id: str | None = None
    job_id: str | None = None
    ended_as: str | None = None
    logprobs: int | None = None
    token_ids: bool = False

    @property
    def is_open(self) -> bool:
        """Whether it may still cost something or bring something."""
        return self.state != SETTLED

    @property
    def name(self) -> str:
        """What people are told."""
        return self.job_id or self.token


def new_token() -> str:
    """A token for a job."""
    return secrets.token_hex(8)


def custom_id(key: bytes, token: str) -> str:
    """The name of a request in a job: 60 characters of those that every provider takes (Anthropic: at most 64 of
    letters, digits, `_` and `-`)."""
    return f"{base64.urlsafe_b64encode(key).decode().rstrip('=')}-{token}"


def key_in(name: object, token: str) -> bytes | None:
    """The request key in a custom id of the job with this token; None: it is none of ours."""
    if not isinstance(name, str) or name[KEY_CHARS:] != f"-{token}":
        return None
    with suppress(ValueError):
        return base64.urlsafe_b64decode(name[:KEY_CHARS] + "=")
    return None


def all_open_jobs(responses: Path) -> list[Job]:
    """The jobs of all teachers in a response store that are not settled.

    Raises:
        CorruptArtefact: a file is not what was written.
    """
    return [job for job in map(_read, sorted((responses / FOLDER).glob("*/*.json"))) if job is not None and job.is_open]


def held_by_jobs(responses: Path, run: str | None) -> str:
    """What the open jobs of a run hold of its budget at most, for a person; "": there are none.

    Raises:
        CorruptArtefact: as `all_open_jobs`.
    """
    jobs = [job for job in all_open_jobs(responses) if job.run == run]
    if not jobs:
        return ""
    requests, tokens = sum(job.lines for job in jobs), sum(job.worst_tokens for job in jobs)
    price = sum(job.worst_nano for job in jobs)
    told = f"{requests:,} requests, {tokens:,} tokens" + (f", {usd(price)}" if price else "")
    return f"open batch jobs hold up to {told}"


class Tracker:
    """The jobs of one teacher in a response store. One process at a time may work with it: hold `lock`.

    Args:
        responses: folder of the response store.
        identity: the teacher's.
    """

    def __init__(self, responses: Path, identity: str) -> None:
        self.folder = responses / FOLDER / identity[:16]
        self.lock = self.folder / "batches.lock"

    def jobs(self) -> list[Job]:
        """All jobs, in the order in which they were intended.

        Raises:
            CorruptArtefact: a file is not what was written.
        """
        found = [job for job in map(_read, self.folder.glob("*.json")) if job is not None]
        return sorted(found, key=lambda job: (job.intended_ms, job.token))

    def open_jobs(self) -> list[Job]:
        """Those that are not settled."""
        return [job for job in self.jobs() if job.is_open]

    def save(self, job: Job, **changes: object) -> Job:
        """Put a job on disk; returns it with the changes. When it returns, they survive `kill -9` and power loss."""
        changed = replace(job, **changes)  # type: ignore[arg-type]
        text = json.dumps(asdict(changed), indent=1, sort_keys=True) + "\n"
        self.write(self.folder / f"{changed.token}.json", [text.encode()])
        return changed

    def write(self, path: Path, parts: Iterable[bytes]) -> None:
        """Write a private file by temp file, fsync and rename.

        Raises:
            Incomplete: the disk is full or does not take writes.
        """
        todo = "free disk space or correct the permissions, then run again; the jobs stay at the provider"
        with boundary(Incomplete, "a batch job cannot be recorded", where=str(path), todo=todo):
            make_folder(self.folder, 0o700)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(self.folder)

    def requests(self, job: Job) -> Path:
        """The job's lines as they are sent."""
        return self.folder / f"{job.token}.requests"

    def results(self, job: Job) -> Path:
        """The provider's results."""
        return self.folder / f"{job.token}.results"

    def lines(self, job: Job, prefix_chars: int) -> Iterator[tuple[bytes, bytes]]:
        """Request key and body of each line.

        Args:
            prefix_chars: bytes of a line before the body, which is followed by one brace; see `Provider.prefix`.

        Raises:
            CorruptArtefact: the file is missing or damaged.
        """
        path = self.requests(job)
        todo = "put a sound copy in its place, or move the job's files away: its requests are then asked anew"
        try:
            with path.open("rb") as file:
                for line in file:
                    name = json.loads(line)["custom_id"]
                    key = key_in(name, job.token)
                    if key is None:
                        raise ValueError(f"a foreign custom id: {name}")
                    yield key, line.rstrip(b"\n")[prefix_chars:-1]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CorruptArtefact(
                f"the requests of a batch job are damaged: {error}", where=str(path), todo=todo
            ) from error

    def finish(self, job: Job, **changes: object) -> Job:
        """Note that all lines are settled, and drop what is stored elsewhere by now."""
        job = self.save(job, state=SETTLED, **changes)
        self._drop(job)
        return job

    def discard(self, job: Job) -> None:
        """Forget a job that the provider never had."""
        (self.folder / f"{job.token}.json").unlink(missing_ok=True)
        self._drop(job)

    def sweep(self) -> None:
        """Remove what dead processes left: half-written files, lines whose job was never intended, and those of
        settled jobs. Call it while no other process works with these jobs."""
        tokens = {job.token for job in self.open_jobs()}
        for path in [*self.folder.glob("*.tmp"), *self.folder.glob("*.requests"), *self.folder.glob("*.results")]:
            if path.suffix == ".tmp" or path.stem not in tokens:
                path.unlink(missing_ok=True)

    def _drop(self, job: Job) -> None:
        for path in (self.requests(job), self.results(job)):
            path.unlink(missing_ok=True)


def _read(path: Path) -> Job | None:
    """The job of a file; None: it was discarded between our listing and our reading."""
    todo = "put a sound copy in its place, or move it away: its requests are then asked, and perhaps paid, again"
    try:
        found = json.loads(path.read_bytes())
        found = NO_LOGPROBS | found
        job = Job(**{field.name: found[field.name] for field in fields(Job)})
        ids = [one for one in (job.file_id, job.job_id) if one is not None]
        if job.state not in STATES or job.token != path.stem or not all(SAFE_ID.fullmatch(one) for one in ids):
            raise ValueError("unknown state, token or id")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptArtefact(f"the record of a batch job is damaged: {error}", where=str(path), todo=todo) from error
    return job

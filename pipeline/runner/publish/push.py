"""`push`: what would be published, shown before anything is sent; and the sending."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.core.errors import UsageError
from pipeline.core.fanout import open_fanout
from pipeline.core.log import show_progress
from pipeline.core.stage import Fanout
from pipeline.core.store import Artefact
from pipeline.runner.publish.files import Item, What, dataset_items, is_allowed, model_items
from pipeline.runner.publish.folder import refuse_inside
from pipeline.runner.publish.notices import notices_for, student_papers
from pipeline.runner.publish.scan import ScanReport, private_places, read_allowed, refuse_findings, scan
from pipeline.runner.publish.targets import Folder, Target, is_repository
from pipeline.runner.publish.terms import (
    judge_artefact,
    refuse_missing_texts,
    refuse_name,
    refuse_release,
    refuse_verdict,
)
from pipeline.runner.run import committed_before
from pipeline.runner.session import Session
from pipeline.terms.atoms import DUE

if TYPE_CHECKING:
    from pipeline.terms.training import Judged
    from pipeline.terms.verdict import Due

NEXT = {"dataset": "train", "model": "evaluate"}
"""A step that reads what is published; all that it reads is verified for it."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What somebody wants to publish.

    Attributes:
        what: the data set or the student.
        target: where to.
        public: whether everybody may read it.
        allow_rows: file with the ids of rows that may go in spite of the scan.
        hub_ids: under which the data set is published, for the student's card.
    """

    what: What
    target: Target
    public: bool = False
    allow_rows: Path | None = None
    hub_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """What would be published; nothing was sent.

    Attributes:
        items: the files, sorted by name.
        replaced: files there that get another content, or the same again.
        stale: files of an earlier push that would be removed, since readers would mix them with the new ones.
        scan: what was found in them.
        judged: the verdict.
        dues: the obligations that publishing meets.
    """

    session: Session
    wish: Wish
    items: tuple[Item, ...]
    replaced: tuple[str, ...]
    stale: tuple[str, ...]
    scan: ScanReport
    judged: "Judged"
    dues: tuple["Due", ...]

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(item.size for item in self.items)


def propose(session: Session, wish: Wish) -> Proposal:
    """Verify, choose, judge and scan.

    Raises:
        UsageError: there is nothing to publish, or the target is none.
        CorruptArtefact: it is not what was committed.
        PolicyRefused: the policy, or the target, says that it goes nowhere.
        Incomplete: the disk or the target fails; a worker process died.
        Interrupted: a signal asked us to stop.
    """
    refuse_release(session, wish.what, wish.public)
    _refuse_names(session, wish)
    allowed = read_allowed(wish.allow_rows)
    with session.disk_errors():
        found = committed_before(session, NEXT[wish.what], asked_by="push")
        judged = judge_artefact(session, found["dataset"])
        items = _items(session, wish, found["dataset"], found.get("train"), judged)
        there = wish.target.look(wish.what, wish.public)
        names = {item.name for item in items}
        stale = sorted(name for name in there - names if is_allowed(name, wish.what))
        private = private_places(session.data, Path.cwd())
        with show_progress("scan", quiet=session.quiet) as progress, _fanout(session) as fanout:
            report = scan(items, allowed, private, fanout, progress)
    dues = tuple(due for due in judged.verdict.obligations if due.trigger in DUE[wish.what])
    replaced = tuple(sorted(there & names))
    return Proposal(session, wish, tuple(items), replaced, tuple(stale), report, judged, dues)


def _refuse_names(session: Session, wish: Wish) -> None:
    """Refuse a target in the data folder, and a data set's name that the Hub would not take."""
    if isinstance(wish.target, Folder):
        refuse_inside(wish.target.path, session.data, f"--to {wish.target.where}")
    for name in wish.hub_ids:
        if not is_repository(name):
            todo = "give OWNER/NAME of the data set on the Hub"
            raise UsageError("no data set of the Hub has that name", where=f"--dataset-id {name}", todo=todo)


def _items(session: Session, wish: Wish, dataset: Artefact, train: Artefact | None, judged: "Judged") -> Sequence[Item]:
    if train is None:
        return dataset_items(dataset)
    papers = student_papers(session, train, dataset, judged, wish.target.name, wish.hub_ids)
    return sorted([*model_items(train), *papers], key=lambda item: item.name)


def _fanout(session: Session) -> AbstractContextManager[Fanout]:
    return open_fanout(
        session.loaded.config.fanout,
        step="push",
        cancel=session.stop.requested,
        resume_command=session.resume_command,
    )


def refuse(proposal: Proposal) -> None:
    """Stop what must not be published; called once it was shown.

    Raises:
        PolicyRefused: for the terms, the model's name, a text that is missing, or what the scan found.
    """
    wish = proposal.wish
    where = f"{wish.what} of {proposal.session.loaded.run_name} -> {wish.target.where}"
    refuse_verdict(proposal.session, proposal.judged, where)
    if wish.what == "model":
        refuse_name(proposal.dues, wish.target.name, f"--to {wish.target.where}")
    files = {term.name: term.file for term in notices_for(proposal.session, proposal.judged, wish.what).terms}
    refuse_missing_texts(proposal.dues, files, {item.name for item in proposal.items})
    refuse_findings(proposal.scan)


def publish(proposal: Proposal, check: Callable[[], None]) -> str:
    """Send it; returns the address.

    Args:
        check: raises when a signal has asked us to stop.

    Raises:
        Incomplete, UsageError, PolicyRefused: as the target's `put`.
        CorruptArtefact: a file changed since it was listed.
    """
    refuse(proposal)
    check()
    wish = proposal.wish
    content = proposal.judged.manifest_sha256 or ""
    message = f"{wish.what} of {proposal.session.loaded.run_name}, data set manifest {content[:12]}"
    return wish.target.put(wish.what, proposal.items, proposal.stale, message, wish.public)

"""The licence gate before anything is published: the verdict of this moment, who may get it, and under which name."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.core.errors import PolicyRefused
from pipeline.core.store import Artefact
from pipeline.runner.publish.files import What
from pipeline.runner.session import Session

if TYPE_CHECKING:
    from pipeline.terms.training import Judged
    from pipeline.terms.verdict import Due


def judge_artefact(session: Session, dataset: Artefact) -> "Judged":
    """Judge a data set, and the student that is trained on it, by the policy of this moment; what its manifest says of
    an earlier verdict is not believed.

    Raises:
        CorruptArtefact: the manifest or the file of overrides was changed.
        UsageError: a term record, or a choice in the policy, cannot be read.
    """
    from pipeline.runner.steps import declared_sources
    from pipeline.terms.declared import source_of
    from pipeline.terms.training import judge_dataset, today

    config = session.loaded.config
    (student,) = (source_of(each) for each in declared_sources(config) if each.role == "student_base")
    return judge_dataset(dataset.path, student, config.policy, "publish", today())


def refuse_verdict(session: Session, judged: "Judged", where: str) -> None:
    """Stop what terms forbid.

    Raises:
        PolicyRefused: they do, or nobody knows them.
    """
    from pipeline.terms.gate import enforce

    policy, command = session.loaded.config.policy, session.command("run")
    enforce(judged.verdict, judged.statement, policy, "publish", where, command=command)


def refuse_release(session: Session, what: What, public: bool) -> None:
    """Keep to `policy.release`.

    Raises:
        PolicyRefused: nobody else was to get it, or not everybody.
    """
    scope = getattr(session.loaded.config.policy.release, what)
    where = f"policy.release.{what}: {scope}"
    if scope == "none":
        todo = "say who gets it, `internal` or `public`; the terms are judged by that, so run the steps again"
        raise PolicyRefused(f"the policy says that nobody else gets the {what}", where=where, todo=todo)
    if public and scope != "public":
        todo = "leave out --public, or say `public` there; the terms are judged by that, so run the steps again"
        raise PolicyRefused(f"the policy says that not everybody gets the {what}", where=where, todo=todo)


@dataclass(frozen=True, slots=True)
class Prefix:
    """What the name of a model must begin with, and who asks for that."""

    value: str
    due: "Due"

    def holds(self, name: str) -> bool:
        """Whether a name begins with it. A repository's name has no blanks: `-`, `_` and `.` stand for them."""
        return _plain(name).startswith(_plain(self.value))

    def proposal(self, name: str) -> str:
        """The name with it."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.value)}-{name}"


def _plain(text: str) -> str:
    return re.sub(r"[-_. ]+", "-", text)


def required_prefix(dues: Sequence["Due"]) -> Prefix | None:
    """The longest prefix that is asked for: one that begins with another fulfils both."""
    asked = [Prefix(str(due.value), due) for due in dues if due.atom == "name_prefix" and not due.conservative]
    return max(asked, key=lambda prefix: len(prefix.value), default=None)


def refuse_name(dues: Sequence["Due"], name: str, where: str) -> None:
    """Refuse a name that a licence does not allow.

    Raises:
        PolicyRefused: it lacks a prefix; the message names the obligation and a name that fulfils it.
    """
    prefix = required_prefix(dues)
    if prefix is None or prefix.holds(name):
        return
    due = prefix.due
    clause = "" if due.clause is None else f", section {due.clause}"
    quote = "" if due.quote is None else f': "{due.quote}"'
    what = f"the model's name must begin with {prefix.value!r} and is {name!r}"
    todo = f"publish it under another name, such as {prefix.proposal(name)}"
    asks = f"  asks: obligation name_prefix of {due.title}{clause}{quote}, for {', '.join(due.sources)}"
    message = f"error: {what}\n   at: {where}\n{asks}\n   do: {todo}"
    raise PolicyRefused(what, where=where, todo=todo, message=message)


def refuse_missing_texts(dues: Sequence["Due"], files: Mapping[str, str | None], names: Collection[str]) -> None:
    """Refuse to pass on what must go with a copy of its licence, without that copy.

    Args:
        files: document -> the file with its text; None: nobody here has it.
        names: of what is published.

    Raises:
        PolicyRefused: a text is not there; it is not invented.
    """
    from pipeline.terms.texts import file_name

    asked = {due.record_id for due in dues if due.atom == "license_copy" and not due.conservative}
    missing = sorted(record_id for record_id in asked if files.get(record_id) not in names)
    if missing:
        what = f"a copy of {', '.join(missing)} must go with it, and its text is not there"
        todo = (
            f"put the full text into the folder that `policy.texts` names, as {file_name(missing[0])}; for a data set, "
            "make it again then: `python -m pipeline dataset CONFIG --force`"
        )
        raise PolicyRefused(what, where="LICENSES/", todo=todo)

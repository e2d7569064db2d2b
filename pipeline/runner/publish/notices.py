"""LICENSES/, LICENSES.md, NOTICE and README.md of a student, made from the verdict of the moment it is published."""

import os
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.core.store import MANIFEST, Artefact
from pipeline.runner.publish.files import README, Item, What, dataset_items, item_of
from pipeline.runner.session import Session
from pipeline.stages.train.card import student_card, without_paths
from pipeline.stages.train.model_card import DatasetFacts, ModelCard, render_card, training_facts
from pipeline.terms.atoms import DUE
from pipeline.text.markdown import escape_markdown

if TYPE_CHECKING:
    from pipeline.terms.notices import Notices
    from pipeline.terms.training import Judged


def student_papers(
    session: Session, train: Artefact, dataset: Artefact, judged: "Judged", name: str, hub_ids: Sequence[str]
) -> list[Item]:
    """The card and the notices of a student, sorted by name.

    Args:
        name: what it is called where it is published.
        hub_ids: under which the data set is published.
    """
    notices = notices_for(session, judged, "model")
    card = model_card(session, train, dataset, judged, name, hub_ids)
    papers = [item_of(file, text) for file, text in notices.files.items()]
    return sorted([*papers, item_of(README, render_card(card))], key=lambda item: item.name)


def notices_for(session: Session, judged: "Judged", what: What) -> "Notices":
    """What must go along with what is published.

    Raises:
        UsageError: a text in `policy.texts` cannot be used.
    """
    from pipeline.terms.notices import notices_of

    dues = [due for due in judged.verdict.obligations if due.trigger in DUE[what]]
    return notices_of(judged.statement, dues, judged.registry, session.loaded.config.policy, escape_markdown)


def model_card(
    session: Session, train: Artefact, dataset: Artefact, judged: "Judged", name: str, hub_ids: Sequence[str]
) -> ModelCard:
    """The facts of a student's card."""
    config = session.loaded.config
    facts = DatasetFacts(
        title=config.dataset.title,
        manifest_sha256=next(item.sha256 for item in dataset_items(dataset) if item.name == MANIFEST),
        content=dataset.manifest.content,
        rows=dataset.manifest.rows_out,
        hub_ids=tuple(hub_ids),
    )
    told = training_facts(config.train, train.manifest.metrics, train.manifest.rows_out)
    return student_card(name, config.student, config.policy, judged, facts, told, _command(session))


def _command(session: Session) -> str:
    """The command that trains it, as a card may say it."""
    sets = (word for override in session.loaded.overrides for word in ("--set", override))
    config = os.path.relpath(session.loaded.path)
    return without_paths(shlex.join(["python", "-m", "pipeline", "run", config, *sets]))

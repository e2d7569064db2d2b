"""The card of the student, from what was judged and what the training said of itself."""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from pipeline.core.config import TrainStep
from pipeline.core.config_base import local_folder
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_train import StudentModel
from pipeline.core.lineage import Manifest
from pipeline.core.store import MANIFEST
from pipeline.stages.train.model_card import DatasetFacts, ModelCard, render_card, training_facts
from pipeline.terms.atoms import DUE
from pipeline.terms.declared import shown
from pipeline.terms.notices import license_fields
from pipeline.terms.training import Judged

CARD = "README.md"


def student_card(
    name: str,
    student: StudentModel,
    policy: PolicyConfig,
    judged: Judged,
    dataset: DatasetFacts,
    training: Mapping[str, str | int | float],
    command: str,
) -> ModelCard:
    """What a student's card says.

    Args:
        name: its heading.
        training: see `training_facts`.
        command: that made it.
    """
    sources, verdict = judged.statement.sources, judged.verdict
    return ModelCard(
        name=name,
        base=(_base_name(student.model), *map(_ancestor_name, student.base_models or {})),
        base_revision=student.revision,
        license=license_fields({each for source in sources for each in source.licenses}),
        sources=sources,
        dataset=dataset,
        verdict=verdict,
        intended_use=policy.intended_use,
        release=policy.release.model,
        duties=tuple(due for due in verdict.obligations if due.trigger in DUE["model"]),
        command=command,
        training=training,
    )


def _base_name(model: str) -> str:
    """A hub id; of a folder its name in words that are no hub id, since the hub would link somebody else's model."""
    return model if local_folder(model) is None else f"{shown(model)} (a folder)"


def _ancestor_name(model: str) -> str:
    """The same of a model that a folder's card names: trainers write there whatever path they were given."""
    return f"{Path(model).name} (a folder)" if Path(model).is_dir() else _base_name(model)


def write_student_card(
    model: Path, cfg: TrainStep, dataset: Path, judged: Judged, metrics: Mapping[str, object], rows: int, command: str
) -> None:
    """Write the card into the student's folder. `push` writes another one, with the verdict of that moment.

    Args:
        model: the student's folder.
        dataset: the data set's artefact; one without a manifest gets no card, since nothing is known of it.
        metrics, rows: of the training.
        command: that resumes or repeats it.
    """
    if judged.manifest_sha256 is None:
        return
    manifest = Manifest.read(dataset / MANIFEST)
    config = manifest.parts.get("config")
    section = config.get("dataset") if isinstance(config, dict) else None
    title = str(section.get("title", "")) if isinstance(section, dict) else ""
    facts = DatasetFacts(title, judged.manifest_sha256, manifest.content, manifest.rows_out)
    told = training_facts(cfg.train, metrics, rows)
    card = student_card(f"Student of {title}", cfg.student, cfg.policy, judged, facts, told, without_paths(command))
    (model / CARD).write_text(render_card(card), "utf-8", newline="\n")


def without_paths(command: str) -> str:
    """A command without the data folder, and with the names of files instead of paths that are absolute or lead
    upwards: they say where things lie on one machine, and may hold a user's name."""
    words, shown_words = iter(shlex.split(command)), []
    for word in words:
        if word == "--data":
            next(words, None)
        elif not word.startswith("--data="):
            shown_words.append(_VALUE.sub(_without_path, word))
    return shlex.join(shown_words)


_VALUE = re.compile(r"[^=\"'\[\]{},]+")
"""What stands alone in a word: `--set a.b=[/x, {path: ../y}]` has several."""


def _without_path(match: re.Match[str]) -> str:
    name, colon, value = match[0].rpartition(": ")
    path = Path(value.strip())
    if not (path.is_absolute() or value.strip().startswith(("~", "file:")) or ".." in path.parts):
        return match[0]
    return f"{name}{colon}{'~' if path.name.startswith('~') else path.name}"

"""What one source touched in a data folder, and the command that makes each run again without it. Changes nothing."""

import json
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pipeline.core.errors import disk_errors
from pipeline.runner.catalogue import READ, Catalogue, Held, open_catalogue, part, texts
from pipeline.runner.meaning import Meanings, Meant
from pipeline.runner.models import Model, model_of, models_on
from pipeline.runner.steps import step_names
from pipeline.runner.touched import Touched, touched_results


@dataclass(frozen=True, slots=True)
class TouchedModel:
    """A model that was trained on touched rows, or made from a touched base.

    Attributes:
        model: with its evaluations, which are touched too.
        rows, of: touched rows of its data set, and all; rows of the validation split are among both.
        is_base: the source is the model that it was trained from.
    """

    model: Model
    rows: int
    of: int
    is_base: bool


@dataclass(frozen=True, slots=True)
class Rebuild:
    """How one run is made again without the source.

    Attributes:
        run: its name.
        rows_left: of its data set; None: it has none yet.
        setting: config values to set, as `name=value`; empty where that does not help.
        command: the whole command; None: there is no record of how the run was started, or nothing would be left.
        note: what to do besides, or instead.
    """

    run: str
    rows_left: int | None
    setting: tuple[str, ...]
    command: str | None
    note: str | None


@dataclass(frozen=True, slots=True)
class Dropped:
    """What `drop-source` tells.

    Attributes:
        source: as it was asked for.
        meaning: what that is, over all results; one name may be different things in different runs.
        results: of all stages of rows, those that are touched.
        models: that are touched.
        rebuilds: one for each run that is touched.
        clean_runs: names of the runs that are not.
    """

    source: str
    meaning: Meant
    results: tuple[Touched, ...]
    models: tuple[TouchedModel, ...]
    rebuilds: tuple[Rebuild, ...]
    clean_runs: tuple[str, ...]


def drop_source(data: Path, source: str) -> Dropped:
    """Find what a source touched in all runs of a data folder.

    Args:
        source: name of a teacher or prompt set, id of a model or of a data set on the hub, a licence as rows have it,
            or id or alias of a term record.

    Raises:
        UsageError: there is no such data folder, or nothing in it came from such a source.
        CorruptArtefact: a shard cannot be read.
        Incomplete: the disk fails.
    """
    with disk_errors(str(data), READ):
        catalogue = open_catalogue(data)
        meanings = Meanings.of(catalogue, source)
        results = tuple(touched_results(catalogue, meanings))
        models = tuple(_models(catalogue, meanings, results))
        runs = sorted({run for held in catalogue.results for run in held.runs})
        hit = {run for each in results for run in each.runs} | {run for each in models for run in each.model.runs}
        rebuilds = tuple(_rebuild(catalogue, run, meanings, results) for run in runs if run in hit)
        return Dropped(source, meanings.whole, results, models, rebuilds, tuple(run for run in runs if run not in hit))


def _models(catalogue: Catalogue, meanings: Meanings, results: Sequence[Touched]) -> Iterator[TouchedModel]:
    """Models that were trained on a touched data set, then those whose base is the source."""
    told = set()
    for touched in results:
        if touched.stage == "dataset":
            content = catalogue.at("dataset", touched.key).manifest.content
            for model in models_on(catalogue, content):
                if model.path not in told:
                    told.add(model.path)
                    yield TouchedModel(model, touched.rows, touched.of, is_base=False)
    for train in catalogue.of_stage("train"):
        if train.place in meanings.bases and train.path / "model" not in told:
            yield TouchedModel(model_of(catalogue, train), 0, train.manifest.rows_in, is_base=True)


# ------------------------------------------------------------------------------------------------------- without it


def _rebuild(catalogue: Catalogue, run: str, meanings: Meanings, results: Sequence[Touched]) -> Rebuild:
    held = {each.manifest.stage: each for each in catalogue.results if run in each.runs}
    meant = Meant.union(meanings.scope(each) for each in held.values())
    touched = next((each for each in results if each.stage == "dataset" and run in each.runs), None)
    dataset = held.get("dataset")
    left = None if dataset is None else dataset.manifest.rows_out - (0 if touched is None else touched.removable)
    excluded = {"exclude_teachers": meant.teachers, "exclude_prompt_sets": meant.prompt_sets}
    setting = tuple(_setting(dataset, name, names) for name, names in excluded.items() if names)
    notes = []
    if "train" in held and held["train"].place in meanings.bases:
        notes.append("it is the student's base: name another one in student.model")
    if setting and left == 0:
        notes.append("no row would be left: name another teacher, or other prompts")
    if touched is not None and touched.rows > touched.removable:
        count = touched.rows - touched.removable
        notes.append(
            f"{count:,} of these rows are others' into which duplicates of it were merged: they leave too, unless its "
            "licences are those of their own sources"
        )
    command = _command(catalogue.data, run, setting, held) if setting and left != 0 else None
    if setting and left != 0 and command is None:
        notes.append("events.jsonl does not say how the run was started: add the setting to its command with --set")
    return Rebuild(run, left, setting, command, "; ".join(notes) or None)


def _setting(dataset: Held | None, name: str, names: Collection[str]) -> str:
    """The field of the config with the names added to those that are excluded already."""
    already = [] if dataset is None else texts(part(dataset.manifest.parts, "config", "dataset", name))
    return f"dataset.{name}={json.dumps(sorted({*already, *names}), ensure_ascii=False)}"


def _command(data: Path, run: str, setting: Sequence[str], held: Mapping[str, Held]) -> str | None:
    """The command that the run was last started with, with the settings; None: nobody knows it."""
    words = shlex.split(_last_command(data / "runs" / run / "events.jsonl") or "")
    if words[:3] != ["python", "-m", "pipeline"] or len(words) < 5:
        return None
    config, options = words[4], words[5:]
    fields = {each.partition("=")[0] for each in setting}
    kept = [value for option, value in pairwise(options) if option == "--set" and value.partition("=")[0] not in fields]
    last = max((step for step in step_names() if step in held), key=step_names().index)
    until = [] if last == "report" else ["--until", max(last, "dataset", key=step_names().index)]
    sets = [word for value in (*kept, *setting) for word in ("--set", value)]
    return shlex.join(["python", "-m", "pipeline", "run", config, "--data", str(data), *until, *sets])


def _last_command(events: Path) -> str | None:
    found = None
    with suppress(OSError), events.open("rb") as file:
        for line in file:
            if b'"run_started"' in line:
                with suppress(ValueError):  # torn: the process was killed while it wrote
                    found = str(json.loads(line).get("command"))
    return found

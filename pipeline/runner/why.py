"""One row's whole story: the prompt it answers, who answered, what each step did with it, and where it lies."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, cast

from pipeline.core.errors import CorruptArtefact, UsageError, boundary
from pipeline.core.lineage import row_id
from pipeline.core.record import Record, prompts_of, records_of
from pipeline.core.store import REBUILD, Artefact
from pipeline.runner.catalogue import Catalogue, part
from pipeline.runner.links import linked_artefact
from pipeline.runner.models import models_on
from pipeline.runner.provenance import Provenance, Term
from pipeline.runner.rows import (
    Match,
    Sought,
    begins_with,
    find_rows,
    has_id,
    has_id_of_prompt,
    is_duplicate_of,
    is_prompt,
    share_before,
)
from pipeline.runner.session import Session
from pipeline.runner.story import (
    ModelAnswer,
    Passage,
    PromptStory,
    RequestStory,
    RowStory,
    Story,
    TrainedOn,
)
from pipeline.teacher.history import answers_of, attempts_of
from pipeline.teacher.request import Asked

ROW_ID = re.compile(r"[0-9a-f]{6,32}")
ID_DIGITS = 32
LISTED = 10
"""Candidates of an ambiguous id that are listed at most."""
MOST_DUPLICATES = 100
VALIDATION = "validation"
"""Why a row of the validation split was not trained on."""
PATH = ("prompts", "generate", "filter", "dedup", "dataset", "train", "evaluate")
"""The steps that rows pass, in order; `evaluate` asks the prompts of the test split."""


def tell(session: Session, wanted: str) -> Story:
    """The story of a row, or of a prompt and all answers to it, in the results that the run's folder links.

    Args:
        wanted: a row id (32 hex digits, or its first six or more), or `PROMPT_SET/PROMPT_ID`.

    Raises:
        UsageError: it is neither, nothing or several rows are meant, or the step that would know has not run.
        CorruptArtefact: a file of a result cannot be read.
        Incomplete: the disk fails.
    """
    with session.disk_errors():
        results = Results.of(session)
        if ROW_ID.fullmatch(wanted):
            found = [results.one_row(wanted)]
            prompt_set, prompt_id = found[0].table["prompt_set"][0].as_py(), found[0].table["prompt_id"][0].as_py()
            prompt = results.find_prompt(prompt_set, prompt_id, share_before(found[0].place))
        else:
            prompt_set, prompt_id = _split(wanted)
            prompt = results.find_prompt(prompt_set, prompt_id)
            if prompt is None:
                raise results.no_prompt(prompt_set, prompt_id)
            found = [*results.search("generate", is_prompt(prompt_set, prompt_id))]
        rows = tuple(_row_story(results, match) for match in found)
        told = [*(() if prompt is None else prompt.passages), *(passage for row in rows for passage in row.passages)]
        open_end = any(passage.outcome in ("missing", "outdated") for passage in told)
        return Story(
            run=session.loaded.run_name,
            prompt=prompt,
            teachers=results.teachers,
            rows=rows,
            judgement=None if results.provenance is None else results.provenance.judgement,
            next_command=session.command("run") if open_end else None,
        )


def _split(wanted: str) -> tuple[str, str]:
    prompt_set, slash, prompt_id = wanted.partition("/")
    if not slash:
        todo = "give 6 or more of the 32 hex digits of a row id, or PROMPT_SET/PROMPT_ID"
        raise UsageError("neither a row id nor a prompt", where=wanted, todo=todo)
    return prompt_set, prompt_id


@dataclass(frozen=True, slots=True)
class Results:
    """The results that a run's folder links.

    Attributes:
        session: the session.
        made: step -> its result, of the steps whose result was made of what the results before it hold.
        outdated: steps whose result was made of something else.
        catalogue: all results of the data folder.
        provenance: what the data set's manifest says of its terms; None: nothing, or there is none.
    """

    session: Session
    made: Mapping[str, Artefact]
    outdated: frozenset[str]
    catalogue: Catalogue
    provenance: Provenance | None

    @classmethod
    def of(cls, session: Session) -> "Results":
        """The results of a run's folder, by the manifests alone."""
        made: dict[str, Artefact] = {}
        outdated = set()
        for step in PATH:
            artefact = linked_artefact(session.folder, step)
            if artefact is None:
                continue
            if _fits(artefact, made):
                made[step] = artefact
            else:
                outdated.add(step)
        provenance = Provenance.of(made["dataset"].manifest) if "dataset" in made else None
        return cls(session, made, frozenset(outdated), Catalogue.of(session.data), provenance)

    @property
    def teachers(self) -> Mapping[str, Mapping[str, Any]]:
        """What `generate` recorded of its teachers, by name."""
        facts = self.made["generate"].manifest.metrics.get("teachers") if "generate" in self.made else None
        return cast(dict[str, dict[str, Any]], facts) if isinstance(facts, dict) else {}

    def search(self, step: str, sought: Sought, near: float | None = None) -> Iterator[Match]:
        """Rows of a step, kept ones first, then rejected; none where it has not run. `near`: as in `find_rows`."""
        if step in self.made:
            for name in ("data" if step == "dataset" else "rows", "rejects"):
                yield from find_rows(self.made[step].path / name, sought, near)

    def unmade(self, step: str) -> Passage | None:
        """What to say of a step without a usable result; None if it has one."""
        if step in self.made:
            return None
        return Passage(step, "outdated" if step in self.outdated else "missing")

    def one_row(self, prefix: str) -> Match:
        """The one row of `generate` whose id begins so.

        Raises:
            UsageError: there is none, or more than one.
        """
        if "generate" not in self.made:
            todo = f"run it first: {self.session.command('run', '--until', 'generate')}"
            which = "for the prompts that are here" if "generate" in self.outdated else "here"
            raise UsageError(f"generate has no result {which}, so there are no row ids", where=self._where, todo=todo)
        if len(prefix) == ID_DIGITS:
            found = [*islice(self.search("generate", has_id(prefix)), 1)]
        else:
            found = [*self.search("generate", begins_with(prefix))]
        if not found:
            todo = "row ids are in the column row_id of every shard; or give PROMPT_SET/PROMPT_ID"
            raise UsageError(f"no row id begins with {prefix}", where=self._where, todo=todo)
        if len(found) > 1:
            ids = [match.table["row_id"][0].as_py() for match in found]
            listed = "\n       ".join(ids[:LISTED]) + (f"\n       and {len(ids) - LISTED}" if len(ids) > LISTED else "")
            what = f"{len(ids)} row ids begin with {prefix}:\n       {listed}"
            raise UsageError(what, where=self._where, todo="give more digits")
        return found[0]

    def find_prompt(self, prompt_set: str, prompt_id: str, near: float | None = None) -> PromptStory | None:
        """The story of a prompt; None if `prompts` has no result here, or no such prompt. `near`: as in `find_rows`."""
        match = next(self.search("prompts", is_prompt(prompt_set, prompt_id), near), None)
        if match is None:
            return None
        prompt = prompts_of(match.table.select([name for name in match.table.column_names if name != "reason"]))[0]
        passages = [_passage("prompts", match)]
        answers: tuple[ModelAnswer, ...] = ()
        if passages[0].outcome == "kept" and prompt.split == "test":
            evaluated, answers = _evaluated(self, prompt_set, prompt_id)
            passages.append(evaluated)
        elif passages[0].outcome == "kept" and (unmade := self.unmade("generate")) is not None:
            passages.append(unmade)
        facts = _source(self.made["prompts"], prompt_set)
        known = {name: str(facts.get(name, "unknown")) for name in ("source", "revision", "license", "description")}
        return PromptStory(prompt=prompt, passages=tuple(passages), answers=answers, **known)

    def no_prompt(self, prompt_set: str, prompt_id: str) -> UsageError:
        """What to say when a prompt is not there."""
        if "prompts" not in self.made:
            todo = f"run it first: {self.session.command('run', '--until', 'prompts')}"
            return UsageError("prompts has no result here", where=self._where, todo=todo)
        sets = ", ".join(sorted(self.session.loaded.config.prompts.sets))
        what = f"no prompt {prompt_id!r} in the set {prompt_set!r}"
        return UsageError(what, where=self._where, todo=f"give PROMPT_SET/PROMPT_ID; the sets are: {sets}")

    @property
    def _where(self) -> str:
        return str(self.session.folder)


def _fits(artefact: Artefact, before: Mapping[str, Artefact]) -> bool:
    """Whether a result was made of the results before it: not so after a run that stopped half-way."""
    inputs = artefact.manifest.parts.get("inputs")
    if not isinstance(inputs, dict):
        return False
    return all(name in before and content == before[name].manifest.content for name, content in inputs.items())


def _source(prompts: Artefact, prompt_set: str) -> Mapping[str, Any]:
    path = prompts.path / "sources.json"
    with boundary(CorruptArtefact, "unreadable facts about the sources", where=str(path), todo=REBUILD):
        found: Mapping[str, Any] = json.loads(path.read_text("utf-8")).get(prompt_set, {})
    return found


def _passage(step: str, match: Match) -> Passage:
    reason = match.table["reason"][0].as_py() if "reason" in match.table.column_names else None
    return Passage(step, "kept" if reason is None else "rejected", reason, match.place)


def _evaluated(results: Results, prompt_set: str, prompt_id: str) -> tuple[Passage, tuple[ModelAnswer, ...]]:
    """What `evaluate` did with a test prompt."""
    unmade = results.unmade("evaluate")
    if unmade is not None:
        return unmade, ()
    folder, sought = results.made["evaluate"].path, is_prompt(prompt_set, prompt_id)
    rejected = next(find_rows(folder / "rejects", sought), None)
    if rejected is not None:
        return _passage("evaluate", rejected), ()
    found = [*find_rows(folder / "answers", sought)]
    names = ("model", "answer", "correct", "finish_reason")
    answers = tuple(ModelAnswer(**match.table.select(names).to_pylist()[0]) for match in found)
    return (_passage("evaluate", found[0]) if found else Passage("evaluate", "lost")), answers


# ------------------------------------------------------------------------------------------------------------ a row


def _row_story(results: Results, generated: Match) -> RowStory:
    (row,) = records_of(generated.table)
    passages = [_passage("generate", generated)]
    for step in ("filter", "dedup", "dataset", "train"):
        if passages[-1].outcome != "kept":
            break
        match = None if step == "train" else next(results.search(step, *_sought(results, step, row, generated)), None)
        if step in ("filter", "dedup") and match is not None:
            (row,) = records_of(match.table)
        passages.append(_step_passage(results, step, row, match))
    reason, colon, kept = (passages[-1].reason or "").partition(":")
    left_for = kept if colon and reason == "duplicate_of" else None
    duplicates = _duplicates(results, row.row_id if left_for is None else left_for)
    return RowStory(
        row=row,
        passages=tuple(passages),
        duplicates=duplicates if left_for is None else (),
        cluster=() if left_for is None else (left_for, *duplicates),
        terms=_terms(results, row),
        models=_models(results, row) if ("dataset", "kept") in {(each.step, each.outcome) for each in passages} else (),
        request=_request(results, row),
    )


def _sought(results: Results, step: str, row: Record, generated: Match) -> tuple[Sought, float | None]:
    """The row in a step's shards, and about where: the data set alone has an order of its own, which it decides by a
    digest of seed and row id (stages/dataset)."""
    if step == "dataset":
        seed = part(results.made[step].manifest.parts, "config", "dataset", "seed") if step in results.made else None
        digest = hashlib.sha256(f"{seed}\0{row.row_id}".encode()).digest()
        return has_id(row.row_id), int.from_bytes(digest[:8], "big") / 2**64
    return has_id_of_prompt(row.row_id, row.prompt_set, row.prompt_id), share_before(generated.place)


def _step_passage(results: Results, step: str, row: Record, match: Match | None) -> Passage:
    unmade = results.unmade(step)
    if unmade is not None:
        return unmade
    if step == "train":
        return _trained(results.made[step].path, row)
    return Passage(step, "lost") if match is None else _passage(step, match)


def _trained(train: Path, row: Record) -> Passage:
    if row.split != "train":
        return Passage("train", "not concerned")
    rejected = next(find_rows(train / "rejects", has_id(row.row_id)), None)
    return Passage("train", "kept") if rejected is None else _passage("train", rejected)


def _duplicates(results: Results, name: str) -> tuple[str, ...]:
    if "dedup" not in results.made:
        return ()
    found = find_rows(results.made["dedup"].path / "rejects", is_duplicate_of(name))
    return tuple(match.table["row_id"][0].as_py() for match in islice(found, MOST_DUPLICATES))


def _terms(results: Results, row: Record) -> tuple[Term, ...]:
    known = results.provenance
    return tuple(Term(name) if known is None else known.term(name) for name in row.license_set)


def _models(results: Results, row: Record) -> tuple[TrainedOn, ...]:
    """The models of all runs that were trained on the data set that holds the row."""
    found = models_on(results.catalogue, results.made["dataset"].manifest.content)
    passed = [(model, _trained(model.path.parent, row)) for model in found]
    return tuple(
        TrainedOn(model, VALIDATION if each.outcome == "not concerned" else each.reason) for model, each in passed
    )


def _request(results: Results, row: Record) -> RequestStory | None:
    """The request behind a row, made anew from the config and compared with the row's id, which is made of it."""
    config = results.session.loaded.config
    teacher, facts = config.teachers.get(row.teacher), results.teachers.get(row.teacher, {})
    if teacher is None:
        return None
    asked = Asked.known(str(facts.get("identity")), teacher, config.generate.sampling, config.generate.draw)
    key = asked.request(row.prompt_set, row.prompt_id, row.sample, row.prompt, row.tools).key
    if row_id(row.prompt_set, row.prompt_id, key) != row.row_id:
        return None
    folder = results.session.data / "responses"
    return RequestStory(key, attempts_of(folder, bytes.fromhex(key)), answers_of(folder, bytes.fromhex(key)))

"""One row's whole story: the prompt it answers, who answered, what each step did with it, and where it lies."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from pipeline.core.errors import CorruptArtefact, UsageError, boundary
from pipeline.core.lineage import row_id
from pipeline.core.record import Prompt, Record, prompts_of, records_of
from pipeline.core.store import REBUILD, Artefact
from pipeline.runner.links import linked_artefact
from pipeline.runner.rows import (
    Mask,
    Match,
    Place,
    begins_with,
    find_rows,
    has_id,
    is_duplicate_of,
    is_prompt,
)
from pipeline.runner.session import Session
from pipeline.teacher.history import Received, Sent, answers_of, attempts_of
from pipeline.teacher.request import Asked

ROW_ID = re.compile(r"[0-9a-f]{6,32}")
LISTED = 10
"""Candidates of an ambiguous id that are listed at most."""
MOST_DUPLICATES = 100
PATH = ("prompts", "generate", "filter", "dedup", "dataset", "train", "evaluate")
"""The steps that rows pass, in order; `evaluate` asks the prompts of the test split."""


@dataclass(frozen=True, slots=True)
class Passage:
    """What a step did with a row.

    Attributes:
        step: its name.
        outcome: "kept"; "rejected" (it left here, see `reason`); "not concerned" (a row of another split); "missing"
            (the run has no result of the step); "outdated" (the result it has was made of other rows); "lost" (the
            result holds no trace of the row, which `verify` may explain).
        reason: why it was rejected.
        place: where the row lies in the step's result; None where it only passed through.
    """

    step: str
    outcome: Literal["kept", "rejected", "not concerned", "missing", "outdated", "lost"]
    reason: str | None = None
    place: Place | None = None


@dataclass(frozen=True, slots=True)
class RequestStory:
    """What was asked of the teacher for a row.

    Attributes:
        key: request key, 64 hex digits.
        attempts: when it was sent and how that ended; none for completions that existed already.
        answers: what is stored under the key.
    """

    key: str
    attempts: tuple[Sent, ...]
    answers: tuple[Received, ...]


@dataclass(frozen=True, slots=True)
class RowStory:
    """One answer of the teacher.

    Attributes:
        row: the row as the last step that held it in full wrote it.
        passages: what each step did, from `generate` to where the row left or the run ends.
        duplicates: ids of the rows that left as duplicates of this one, a hundred at most.
        request: None where it cannot be told: the settings that made the row are not the config's any more.
    """

    row: Record
    passages: tuple[Passage, ...]
    duplicates: tuple[str, ...]
    request: RequestStory | None


@dataclass(frozen=True, slots=True)
class ModelAnswer:
    """What a model answered to a test prompt: "teacher", "base" or "student"."""

    model: str
    answer: str
    correct: bool
    finish_reason: str


@dataclass(frozen=True, slots=True)
class PromptStory:
    """The prompt behind the rows.

    Attributes:
        prompt: the prompt.
        passages: what `prompts` did with it, and for the test split `evaluate`.
        source, revision, license, description: what the card of its prompt set says; "unknown" where it says nothing.
        answers: of the models, for a test prompt that was evaluated.
    """

    prompt: Prompt
    passages: tuple[Passage, ...]
    source: str
    revision: str
    license: str
    description: str
    answers: tuple[ModelAnswer, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """What `why` tells.

    Attributes:
        run: the run's name.
        prompt: None if the run has no result of `prompts` any more.
        teachers: facts about who answers, by name, as `generate` recorded them; empty before it ran.
        rows: one row, or all answers to a prompt.
        next_command: makes the steps that are missing or outdated; None: there are none.
    """

    run: str
    prompt: PromptStory | None
    teachers: Mapping[str, Mapping[str, Any]]
    rows: tuple[RowStory, ...]
    next_command: str | None


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
            prompt = results.find_prompt(prompt_set, prompt_id)
        else:
            prompt_set, prompt_id = _split(wanted)
            prompt = results.find_prompt(prompt_set, prompt_id)
            if prompt is None:
                raise results.no_prompt(prompt_set, prompt_id)
            found = [*results.search("generate", is_prompt(prompt_set, prompt_id), ("prompt_set", "prompt_id"))]
        rows = tuple(_row_story(results, match) for match in found)
        told = [*(() if prompt is None else prompt.passages), *(passage for row in rows for passage in row.passages)]
        open_end = any(passage.outcome in ("missing", "outdated") for passage in told)
        return Story(
            run=session.loaded.run_name,
            prompt=prompt,
            teachers=results.teachers,
            rows=rows,
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
    """

    session: Session
    made: Mapping[str, Artefact]
    outdated: frozenset[str]

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
        return cls(session, made, frozenset(outdated))

    @property
    def teachers(self) -> Mapping[str, Mapping[str, Any]]:
        """What `generate` recorded of its teachers, by name."""
        facts = self.made["generate"].manifest.metrics.get("teachers") if "generate" in self.made else None
        return cast(dict[str, dict[str, Any]], facts) if isinstance(facts, dict) else {}

    def search(self, step: str, mask: Mask, columns: Sequence[str] = ("row_id",)) -> list[Match]:
        """Rows of a step, kept or rejected; none where it has not run."""
        if step not in self.made:
            return []
        folder = self.made[step].path
        names = ("data",) if step == "dataset" else ("rows", "rejects")
        return [match for name in names for match in find_rows(folder / name, columns, mask)]

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
        found = self.search("generate", begins_with(prefix))
        if not found:
            todo = "row ids are in the column row_id of every shard; or give PROMPT_SET/PROMPT_ID"
            raise UsageError(f"no row id begins with {prefix}", where=self._where, todo=todo)
        if len(found) > 1:
            ids = [match.table["row_id"][0].as_py() for match in found]
            listed = "\n       ".join(ids[:LISTED]) + (f"\n       and {len(ids) - LISTED}" if len(ids) > LISTED else "")
            what = f"{len(ids)} row ids begin with {prefix}:\n       {listed}"
            raise UsageError(what, where=self._where, todo="give more digits")
        return found[0]

    def find_prompt(self, prompt_set: str, prompt_id: str) -> PromptStory | None:
        """The story of a prompt; None if `prompts` has no result here, or no such prompt."""
        matches = self.search("prompts", is_prompt(prompt_set, prompt_id), ("prompt_set", "prompt_id"))
        if not matches:
            return None
        prompt = prompts_of(matches[0].table.select([n for n in matches[0].table.column_names if n != "reason"]))[0]
        passages = [_passage("prompts", matches[0])]
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
    folder, mask = results.made["evaluate"].path, is_prompt(prompt_set, prompt_id)
    columns = ("prompt_set", "prompt_id")
    rejected = next(find_rows(folder / "rejects", columns, mask), None)
    if rejected is not None:
        return _passage("evaluate", rejected), ()
    found = [*find_rows(folder / "answers", columns, mask)]
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
        matches = [] if step == "train" else results.search(step, has_id([row.row_id]))
        if step in ("filter", "dedup") and matches:
            (row,) = records_of(matches[0].table)
        passages.append(_step_passage(results, step, row, matches))
    return RowStory(row, tuple(passages), _duplicates(results, row.row_id), _request(results, row))


def _step_passage(results: Results, step: str, row: Record, matches: Sequence[Match]) -> Passage:
    unmade = results.unmade(step)
    if unmade is not None:
        return unmade
    if step == "train":
        return _trained(results.made[step], row)
    return _passage(step, matches[0]) if matches else Passage(step, "lost")


def _trained(train: Artefact, row: Record) -> Passage:
    if row.split != "train":
        return Passage("train", "not concerned")
    rejected = next(find_rows(train.path / "rejects", ("row_id",), has_id([row.row_id])), None)
    return Passage("train", "kept") if rejected is None else _passage("train", rejected)


def _duplicates(results: Results, name: str) -> tuple[str, ...]:
    if "dedup" not in results.made:
        return ()
    found = find_rows(results.made["dedup"].path / "rejects", ("reason",), is_duplicate_of(name))
    return tuple(match.table["row_id"][0].as_py() for match, _ in zip(found, range(MOST_DUPLICATES), strict=False))


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

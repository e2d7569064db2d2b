"""A row's story as a terminal shows it and as scripts read it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from pipeline.cli.lines import evaluation_line, fact, judgement_line, model_line, term_text
from pipeline.cli.show import say, say_json
from pipeline.core.log import safe_text
from pipeline.core.record import Message
from pipeline.runner.story import Passage, PromptStory, RequestStory, RowStory, Story, TrainedOn
from pipeline.teacher.history import Sent

LINES, CHARS = 4, 200
"""Of a text so many lines of so many characters are shown; --json holds all of it."""
LISTED = 5


def say_story(story: Story, *, as_json: bool) -> None:
    """A prompt's story, then those of its rows."""
    if as_json:
        say_json(asdict(story))
        return
    for line in _story(story):
        say(safe_text(line.rstrip()))


def _story(story: Story) -> Iterator[str]:
    if story.prompt is not None:
        yield from _prompt(story.prompt)
    for row in story.rows:
        yield ""
        yield from _row(row, story)
    if story.next_command is not None:
        yield f"next: {story.next_command}"


def _prompt(told: PromptStory) -> Iterator[str]:
    prompt = told.prompt
    yield f"prompt {prompt.prompt_set}/{prompt.prompt_id}"
    yield from _texts(prompt.prompt)
    if prompt.answer is not None:
        yield from _text("reference", prompt.answer)
    yield fact("split", f"{prompt.split}, group {prompt.group_id[:40]}" + _with("task", prompt.task))
    yield fact("source", f"{told.source}, revision {told.revision}")
    yield fact("licence", f"{', '.join(prompt.license_set)} (of the set: {told.license})")
    yield from _also_in(prompt.also_in)
    yield from map(_passage, told.passages)
    for answer in told.answers:
        verdict = "right" if answer.correct else "wrong"
        yield from _text(answer.model, f"{verdict} ({answer.finish_reason}): {answer.answer}")


def _row(told: RowStory, story: Story) -> Iterator[str]:
    row = told.row
    yield f"row {row.row_id}, sample {row.sample} of {row.prompt_set}/{row.prompt_id}"
    if story.prompt is None:
        yield from _texts(row.prompt)
    yield from _texts(row.completion)
    facts = story.teachers.get(row.teacher, {})
    who = f"{row.teacher} ({facts.get('origin', 'unknown')})"
    yield fact("teacher", who + _with("model", facts.get("model")) + _with("licence", facts.get("license")))
    if facts.get("identity") is not None:
        yield fact("", f"identity {facts['identity']}")
    if row.returned_model is not None:
        yield fact("", f"answered as {row.returned_model}{_with('fingerprint', row.fingerprint)}")
    tokens = f"{_count(row.prompt_tokens)} + {_count(row.completion_tokens)} tokens"
    flags = f", flags: {', '.join(row.flags)}" if row.flags else ""
    yield fact("answer", f"finish reason {row.finish_reason}, {tokens}{flags}")
    if row.verified is not None:
        yield fact("verified", "right" if row.verified else "wrong")
    yield fact("licence", ", ".join(row.license_set))
    yield from (fact("", term_text(term)) for term in told.terms)
    if story.judgement is not None:
        yield fact("verdict", judgement_line(story.judgement))
    yield from _also_in(row.also_in)
    if told.request is not None:
        yield from _request(told.request)
    yield from map(_passage, told.passages)
    if told.duplicates:
        yield fact("", f"rows that left as duplicates of it: {_some(told.duplicates)}")
    if told.cluster:
        yield fact("", f"{told.cluster[0]} stayed for it, and for {len(told.cluster) - 1:,} in all that left")
    for each in told.models:
        yield from _trained_on(each)


def _trained_on(told: TrainedOn) -> Iterator[str]:
    left_out = "" if told.left_out is None else f"; not on this row: {told.left_out}"
    yield fact("model", model_line(told.model) + left_out)
    for evaluation in told.model.evaluations:
        yield fact("", evaluation_line(evaluation))


def _request(request: RequestStory) -> Iterator[str]:
    yield fact("request", request.key)
    for sent in request.attempts[-LISTED:]:
        yield fact("", f"sent {sent.time}, at most {sent.cap} tokens: {_ended(sent)}")
    for stored in request.answers[-LISTED:]:
        served = f"{stored.model} {stored.engine}".rstrip()
        yield fact("", f"stored {stored.time}, HTTP {stored.status}, {served}{_with('rejected', stored.rejected)}")


def _ended(sent: Sent) -> str:
    told = sent.outcome or "the end is not known"
    if sent.status is not None:
        told += f", HTTP {sent.status}"
    if sent.input_tokens is not None or sent.output_tokens is not None:
        told += f", {_count(sent.input_tokens)} + {_count(sent.output_tokens)} tokens"
    return told if sent.cost is None else f"{told}, ${sent.cost / 1e9:.6f}"


def _passage(passage: Passage) -> str:
    told = f"  {passage.step:10} {passage.outcome}{_with('', passage.reason, ': ')}"
    place = passage.place
    return told if place is None else f"{told:40} {place.file} row {place.row} (row group {place.row_group})"


def _also_in(sets: Sequence[str]) -> Iterator[str]:
    if sets:
        yield fact("also in", ", ".join(sets))


def _texts(messages: Sequence[Message]) -> Iterator[str]:
    for message in messages:
        if message.reasoning_content is not None:
            yield from _text("reasoning", message.reasoning_content)
        yield from _text(message.role, message.content)


def _text(name: str, text: str) -> Iterator[str]:
    """The first lines of a text; what is left out is counted."""
    lines = text.splitlines() or [""]
    shown = [line[:CHARS] for line in lines[:LINES]]
    for number, line in enumerate(shown):
        yield fact(name if number == 0 else "", line)
    left = len(text) - sum(map(len, shown)) - len(shown) + 1
    if left > 0 and (len(lines) > LINES or any(len(line) > CHARS for line in lines[:LINES])):
        yield fact("", f"… {left:,} more characters")


def _with(name: str, value: object, before: str = ", ") -> str:
    return "" if value is None else f"{before}{name} {value}".replace("  ", " ")


def _count(tokens: int | None) -> str:
    return "?" if tokens is None else f"{tokens:,}"


def _some(ids: Sequence[str]) -> str:
    rest = f" and {len(ids) - LISTED} more" if len(ids) > LISTED else ""
    return f"{', '.join(ids[:LISTED])}{rest}"

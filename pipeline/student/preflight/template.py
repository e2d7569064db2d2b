"""Checks of the chat template: what it writes behind an answer, before one, and what it leaves out."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from jinja2 import TemplateError

from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.findings import Finding, fine, flawed, skipped
from pipeline.student.preflight.sample import SampleRow
from pipeline.student.preflight.seen import Seen
from pipeline.student.tokenise import encode_texts, read_json, render, special_texts, template_source
from pipeline.student.turns import Adapter, Turn

ANSWER: Final = "Preflight answer"
"""Stands for an answer whose end is looked for: two words that no template writes."""
STRIPPED: Final = ("think", "reason", "analysis", "channel", "tool", "function", "call", "python")
"""Parts of the names of tokens that carry reasoning or tool calls, in the chat formats in use."""
READ_ROWS: Final = 8
"""Conversations that are rendered with another template than the tokenizer's own."""


def check_template(seen: Seen) -> list[Finding]:
    """PF02, PF08, PF09 and PF10."""
    return [check_stops(seen), check_prefix(seen), check_reasoning(seen), check_round_trip(seen)]


# ------------------------------------------------------------------------------------------------------------- ends


def end_token(tokenizer: Any) -> int | None:
    """The first special or added token that the template writes behind an assistant's answer; None: it writes none."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
    text = render(tokenizer, turns, add_generation_prompt=False)
    known = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    (ids,) = encode_texts(tokenizer, [text.rpartition(ANSWER)[2]])
    return next((id_ for id_ in ids if id_ in known), None)


def check_stops(seen: Seen) -> Finding:
    """PF02: the token that ends a turn is one at which generation stops, and the tokenizer's EOS."""
    tokenizer, stops = seen.tokenizer, seen.tokens.stops
    end = end_token(tokenizer)
    named = json.dumps(tokenizer.convert_ids_to_tokens(list(stops)), ensure_ascii=False)
    fix = "set eos_token_id in generation_config.json, and eos_token in tokenizer_config.json, to what ends a turn"
    if end is None:
        message = f"the chat template writes no token behind an answer, and generation stops at {named}"
        return flawed("PF02", "error", "no end token", message, fix=fix)
    text = tokenizer.convert_ids_to_tokens(end)
    figure = f"a turn ends with {text}, generation at {named}"
    if end not in stops:
        message = f"the chat template ends a turn with {text}, and generation stops at {named}"
        return flawed("PF02", "error", figure, message, fix=fix)
    if tokenizer.eos_token_id not in stops:
        message = f"the tokenizer's EOS is {tokenizer.eos_token!r}, and generation stops at {named}"
        return flawed("PF02", "warning", figure, message, fix=fix)
    left = seen.tokens.checks.get("end_tokens_left", 0)
    if left > 0:
        message = f"{left:,} completions end with the text of an end token that was not cut, and teach to write it"
        fix = "name it in train.end_tokens if it is the teacher's; an answer may also quote one"
        return flawed("PF02", "warning", figure, message, fix=fix)
    return fine("PF02", figure)


# ----------------------------------------------------------------------------------------------------------- prefix


def check_prefix(seen: Seen) -> Finding:
    """PF08: a row begins with the very text that the student is served, whichever template a server takes."""
    left = seen.tokens.rejected.get("prompt_not_prefix", 0)
    figure = f"{left:,} rows left out, {len(seen.sample):,} compared"
    fix = "take a chat template whose generation prompt begins an answer as the template itself writes one"
    for name, template in _other_templates(seen):
        told = {row.row_id: flaw for row in seen.sample[:READ_ROWS] if (flaw := _unlike(seen, template, row))}
        if told:
            message = f"{name} {next(iter(told.values()))}: a server may take either"
            return flawed("PF08", "error", figure, message, fix=f"remove one of them from {_folder(seen)}", rows=told)
    unlike = [row.row_id for row in seen.sample if (own := served(seen, row)) and row.ids[: len(own)] != own]
    if unlike:
        message = f"{len(unlike)} of {len(seen.sample)} rows do not begin with the prompt as it is served"
        return flawed("PF08", "error", figure, message, fix=fix, rows=unlike)
    if left > 0:
        message = f"of {left:,} rows the prompt is not the beginning of prompt and completion; they are left out"
        return flawed("PF08", "warning", figure, message, fix=fix)
    return fine("PF08", figure)


def asked(job: TrainJob, tokenizer: Any, row: SampleRow) -> Sequence[Turn]:
    """The row's prompt as its template takes it: with the thinking of earlier turns in the fields that it reads."""
    adapter = Adapter(job.train.reasoning, (), template_source(tokenizer))
    prompt, completion = ([dict(turn) for turn in turns] for turns in (row.prompt, row.completion))
    return next(adapter.forms(prompt, completion)).prompt


def served(seen: Seen, row: SampleRow) -> tuple[int, ...] | None:
    """The ids that a server makes of the row's prompt; None where it holds the text of a special token, which a server
    takes for the token and the training does not, and where tools are offered or were called, which templates take in
    forms of their own."""
    if row.tools is not None or any("tool_calls" in turn for turn in row.prompt):
        return None
    if special_texts(seen.tokenizer).search(" ".join(_texts(row.prompt))):
        return None
    prompt = render(seen.tokenizer, asked(seen.job, seen.tokenizer, row), add_generation_prompt=True)
    (ids,) = encode_texts(seen.tokenizer, [prompt])
    return tuple(ids)


def _texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(turn.get(name) or "") for turn in messages for name in ("content", "reasoning_content")]


def _other_templates(seen: Seen) -> list[tuple[str, str]]:
    """(file, template) of those in the student's folder that are not the one its tokenizer takes."""
    folder, own = seen.job.student.folder, seen.tokenizer.chat_template
    found = []
    if folder is not None and (path := folder / "tokenizer_config.json").is_file():
        template = read_json(path).get("chat_template")
        if isinstance(template, str) and template != own:
            found.append((path.name, template))
    if folder is not None and (path := folder / "chat_template.json").is_file():
        template = read_json(path).get("chat_template")
        if isinstance(template, str) and template != own:
            found.append((path.name, template))
    return found


def _unlike(seen: Seen, template: str, row: SampleRow) -> str | None:
    """What another template does otherwise with the row's prompt, after the template's name; None: nothing."""
    messages = [dict(turn) for turn in asked(seen.job, seen.tokenizer, row)]
    write = seen.tokenizer.apply_chat_template
    try:
        other = write(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"refuses this conversation ({reason}), which the template that is trained takes"
    if other == render(seen.tokenizer, messages, add_generation_prompt=True):
        return None
    return "writes another prompt than the template that is trained"


def _folder(seen: Seen) -> Path | str:
    return seen.job.student.folder or seen.job.student.model


# -------------------------------------------------------------------------------------------------------- reasoning


def check_reasoning(seen: Seen) -> Finding:
    """PF09: the teacher's reasoning is in what is trained, word for word."""
    if seen.job.train.reasoning == "drop":
        count = seen.tokens.checks.get("reasoning_left_out", 0)
        return skipped("PF09", f"train.reasoning is drop: the reasoning of {count:,} rows is left out")
    left = seen.tokens.rejected.get("reasoning_dropped", 0)
    with_reasoning = [row for row in seen.sample if _reasoning(row.completion)]
    figure = f"{left:,} rows left out, {len(with_reasoning):,} compared"
    fix = "take a chat template that writes reasoning_content, or set train.reasoning: inline"
    lost = [row.row_id for row in with_reasoning if not _is_kept(seen.tokenizer, row)]
    if lost:
        message = f"the reasoning of {len(lost)} of {len(with_reasoning)} rows is not in what is trained"
        return flawed("PF09", "error", figure, message, fix=fix, rows=lost)
    if left > 0:
        message = f"the template leaves out the reasoning of {left:,} rows; they are not trained"
        return flawed("PF09", "warning", figure, message, fix=fix)
    return fine("PF09", figure) if with_reasoning else skipped("PF09", "no row of the sample has reasoning")


def _reasoning(completion: Sequence[Mapping[str, Any]]) -> list[str]:
    """Its texts: fields, and what stands between think tags in an answer."""
    fields = [str(turn.get("reasoning_content") or "").strip() for turn in completion]
    inline = [
        text.partition("<think>")[2].partition("</think>")[0].strip()
        for turn in completion
        if "</think>" in (text := str(turn.get("content") or ""))
    ]
    return [text for text in (*fields, *inline) if text]


def _is_kept(tokenizer: Any, row: SampleRow) -> bool:
    text = _decode(tokenizer, row.trained)
    return all(reasoning in text for reasoning in _reasoning(row.completion))


# ------------------------------------------------------------------------------------------------------- round trip


def check_round_trip(seen: Seen) -> Finding:
    """PF10: decoding and encoding again gives the same ids, and no trained token vanishes when a server decodes."""
    tokenizer = seen.tokenizer
    texts = [_decode(tokenizer, row.ids) for row in seen.sample]
    again = encode_texts(tokenizer, texts)
    drifted = [row.row_id for row, ids in zip(seen.sample, again, strict=True) if list(row.ids) != ids]
    share = len(drifted) / len(seen.sample) if seen.sample else 0.0
    figure = f"{share:.1%} of {len(seen.sample):,} rows drift"
    lost = _stripped(seen)
    if lost:
        names = ", ".join(lost)
        message = f"{names} are special tokens: a server that skips special tokens strips them from the answer"
        fix = 'serve with skip_special_tokens off, or set "special": false for them in tokenizer.json'
        return flawed("PF10", "warning", f"{figure}, {len(lost)} trained tokens stripped", message, fix=fix)
    if drifted:
        message = f"encoding the decoded text gives other ids in {len(drifted)} of {len(seen.sample)} rows"
        fix = "texts that spell special tokens do that, and decoders that clean up spaces; compare ids, not texts"
        return flawed("PF10", "warning", figure, message, fix=fix, rows=drifted)
    return fine("PF10", figure)


def _stripped(seen: Seen) -> list[str]:
    """Texts of the trained special tokens that carry reasoning or tool calls."""
    special = {id_: token.content for id_, token in seen.tokenizer.added_tokens_decoder.items() if token.special}
    used = {id_ for row in seen.sample for id_ in row.trained if id_ in special} - {*seen.tokens.stops}
    return sorted(special[id_] for id_ in used if any(part in special[id_].lower() for part in STRIPPED))


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

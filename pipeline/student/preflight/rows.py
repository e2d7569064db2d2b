"""Checks of the encoded rows, right after the encoding: no weight is loaded for them."""

import json
from pathlib import Path
from typing import Final

import pyarrow.compute as pc

from pipeline.core.columns import text_array
from pipeline.core.record import read_shards
from pipeline.student.jobs import TrainJob
from pipeline.student.order import count_steps
from pipeline.student.preflight.columns import check_columns
from pipeline.student.preflight.findings import Finding, fine, flawed, skipped
from pipeline.student.preflight.leak import check_leak
from pipeline.student.preflight.seen import Seen, look_at
from pipeline.student.preflight.survey import Flagged, read_blocks
from pipeline.student.preflight.targets import Captured, check_targets
from pipeline.student.preflight.template import check_template, served
from pipeline.student.shards import Tokens, train_file

ALL_TRAINED: Final = 0.9
"""Share of trained tokens from which on prompts are hardly masked, or hardly there."""
MANY_REJECTED: Final = 0.05
SYSTEM_ROLES: Final = ("system", "developer")


def check_rows(job: TrainJob, tokens: Tokens, captured: Captured | None = None) -> list[Finding]:
    """The checks that need no weights, in their order.

    Args:
        captured: soft targets of the rows; None: there are none to read.

    Raises:
        UsageError: tokenizer or template cannot be used.
        CorruptArtefact: a shard is damaged.
    """
    seen = look_at(job, tokens)
    found = [check_columns(job.data), check_counts(seen)]
    if seen.survey.rows > 0:
        found += [
            check_end(seen),
            check_whole(seen),
            check_bos(seen),
            check_masks(seen),
            check_system(job.data),
            check_leak(job.workdir),
            *check_template(seen),
            *check_targets(seen, captured),
        ]
    return sorted(found, key=lambda finding: finding.id)


def check_end(seen: Seen) -> Finding:
    """PF01: the last label of each row is a token at which generation stops."""
    flagged, rows = seen.survey.without_stop, seen.survey.rows
    figure = f"{flagged.count:,} of {rows:,} rows without"
    if flagged.count == 0:
        return fine("PF01", figure)
    names = json.dumps(seen.tokenizer.convert_ids_to_tokens(list(seen.tokens.stops)), ensure_ascii=False)
    message = f"the student would never learn to stop: {flagged.count} of {rows} rows do not end with {names}"
    fix = "add the token that ends a turn in its chat template to eos_token_id in generation_config.json"
    return flawed("PF01", "error", figure, message, fix=fix, rows=flagged.rows)


def check_whole(seen: Seen) -> Finding:
    """PF03: completions that the teacher's cap cut are not among the trained rows."""
    trained = _cut_and_trained(seen.job)
    left = seen.tokens.rejected.get("unfinished", 0)
    figure = f"{trained.count:,} trained, {left:,} left out"
    if trained.count == 0:
        return fine("PF03", figure)
    message = f"{trained.count:,} completions were cut at the teacher's cap and would be taught as whole"
    fix = "leave out rows of finish_reason length, or answer them again: generate.on_length"
    return flawed("PF03", "error", figure, message, fix=fix, rows=trained.rows)


def _cut_and_trained(job: TrainJob) -> Flagged:
    cut = [
        str(row_id)
        for table in read_shards(job.data, ["row_id", "finish_reason"], stem="train-")
        for row_id in table.filter(pc.equal(table["finish_reason"], "length"))["row_id"].to_pylist()
    ]
    found = Flagged()
    if cut:
        wanted = text_array(cut)
        for batch in read_blocks(train_file(job)):
            ids = batch["row_id"]
            found.add(pc.is_in(ids, value_set=wanted).to_numpy(zero_copy_only=False), ids)
    return found


def check_bos(seen: Seen) -> Finding:
    """PF04: no row begins with two BOS tokens."""
    if seen.tokenizer.bos_token_id is None:
        return skipped("PF04", "the tokenizer has no BOS token")
    flagged, rows = seen.survey.double_bos, seen.survey.rows
    figure = f"{flagged.count:,} of {rows:,} rows with two"
    if flagged.count == 0:
        return fine("PF04", figure)
    message = f"{flagged.count} of {rows} rows begin with two BOS tokens"
    fix = "take the BOS token out of the prompts, or out of the chat template"
    return flawed("PF04", "error", figure, message, fix=fix, rows=flagged.rows)


def check_masks(seen: Seen) -> Finding:
    """PF06: of each row a prompt comes first, which is not trained; then all is, and the labels are the tokens."""
    found = seen.survey
    figure = f"{found.trained_share:.1%} of the tokens trained"
    flaws = (
        (found.unmasked, "train their prompt: their first token has a label"),
        (found.holes, "have tokens without a label behind trained ones"),
        (found.altered, "have labels that are not the tokens at their places"),
        (_begins_early(seen), "train tokens of the prompt as it is served"),
    )
    for flagged, what in flaws:
        if flagged.count > 0:
            fix = "make the token shards anew; labels are -100 for the prompt and the token itself behind it"
            return flawed("PF06", "error", figure, f"{flagged.count:,} rows {what}", fix=fix, rows=flagged.rows)
    if found.trained_share > ALL_TRAINED:
        fix = "look at the sample: `preflight` prints one; prompts of a word or two need no mending"
        return flawed("PF06", "warning", figure, f"{found.trained_share:.1%} of all tokens are trained", fix=fix)
    return fine("PF06", figure)


def _begins_early(seen: Seen) -> Flagged:
    early = [row.row_id for row in seen.sample if row.start < len(served(seen, row) or ())]
    return Flagged(len(early), early)


def check_system(data: Path) -> Finding:
    """PF20: whether rows bring a system message, with which the student is to be served too."""
    with_system = shots = rows = 0
    for table in read_shards(data, ["prompt"], stem="train-"):
        column = table["prompt"].combine_chunks()
        first = pc.list_element(column.filter(pc.greater(pc.list_value_length(column), 0)), 0)
        with_system += pc.sum(pc.is_in(pc.struct_field(first, "role"), value_set=text_array(SYSTEM_ROLES))).as_py() or 0
        roles = pc.struct_field(column.flatten(), "role")
        parents = pc.list_parent_indices(column).filter(pc.equal(roles, "assistant"))
        shots += len(parents.unique())
        rows += len(column)
    share = with_system / rows if rows else 0.0
    figure = f"{share:.1%} of {rows:,} rows with a system message, {shots:,} with earlier answers"
    if with_system in (0, rows):
        told = "serve the student with the system messages it was trained with" if with_system else ""
        return fine("PF20", figure, told)
    message = f"{with_system:,} of {rows:,} rows have a system message and the others have none"
    fix = "meant so? accept it; else give all prompt sets the same prompts.sets.NAME.system, and serve with it"
    return flawed("PF20", "warning", figure, message, fix=fix)


def check_counts(seen: Seen) -> Finding:
    """PF23: where each row went, and what the trained ones come to."""
    tokens, found, cfg = seen.tokens, seen.survey, seen.job.train
    rejected = dict(tokens.rejected)
    left = sum(rejected.values())
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in rejected.items()) or "none"
    steps = 0
    if found.rows > 0:
        steps = count_steps(found.rows, epochs=cfg.epochs, batch_size=cfg.batch_size, max_steps=cfg.max_steps)
    figure = (
        f"{tokens.rows_in:,} rows in, {found.rows:,} trained, rejected: {reasons}; {found.trained:,} of "
        f"{found.tokens:,} tokens trained, {steps:,} steps"
    )
    limit = tokens.checks.get("length_limit")
    fix = (
        f"over_length (above {limit} tokens): raise train.max_length, or take a student with more positions; other "
        "reasons: another chat template, or see rejects/"
    )
    if found.rows == 0:
        return flawed("PF23", "error", figure, f"no row is left to train on: rejected: {reasons}", fix=fix)
    if found.rows + left != tokens.rows_in:
        message = f"{tokens.rows_in:,} rows came in, and {found.rows:,} trained and {left:,} rejected are not as many"
        return flawed("PF23", "error", figure, message, fix="remove the step's work folder and train again")
    if left > MANY_REJECTED * tokens.rows_in:
        share = left / tokens.rows_in
        return flawed("PF23", "warning", figure, f"{share:.1%} of the rows are not trained: {reasons}", fix=fix)
    return fine("PF23", figure)

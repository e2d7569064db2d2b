"""Checks of the soft targets that were captured beside the rows: whether they are of the tokens that are trained."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.columns import text_array
from pipeline.core.record import read_shard, shard_paths
from pipeline.core.targets import TokenLogprobs, targets_of, tokenizer_digest
from pipeline.student.preflight.findings import Finding, fine, flawed, skipped
from pipeline.student.preflight.sample import SampleRow
from pipeline.student.preflight.seen import Seen

MOST_MASS: Final = 1 + 1e-3
"""Probabilities of one position add up to no more; logprobs are float32."""
FEW: Final = 0.05
"""Share of rows with other ids than the sampled ones, which a teacher that samples unusual splits of a word causes."""

KNOWN_SCALES: Final = ("raw", "scaled", "untold")
"""See teacher/temperature.py."""


@dataclass(frozen=True, slots=True)
class Captured:
    """Soft targets of a run.

    Attributes:
        folder: `targets/` of its generate step.
        temperature: at which the answers were sampled; None: nobody knows.
    """

    folder: Path
    temperature: float | None


@dataclass(frozen=True, slots=True)
class Told:
    """A sampled row with its soft targets."""

    row: SampleRow
    targets: TokenLogprobs


def check_targets(seen: Seen, captured: Captured | None, vocabulary: int | None = None) -> list[Finding]:
    """PF11 and PF19.

    Args:
        vocabulary: embeddings of the student; None: those of its tokenizer.
    """
    if captured is None:
        return [skipped(id_, "no soft targets are read") for id_ in ("PF11", "PF19")]
    paths = shard_paths(captured.folder)
    if not paths:
        return [skipped(id_, "the run captured no soft targets") for id_ in ("PF11", "PF19")]
    facts = facts_of(paths[0])
    size = len(seen.tokenizer) if vocabulary is None else vocabulary
    return [
        _check_aligned(told_of(seen, captured), size),
        check_temperature(captured, facts.get("scales", {})),
    ]


def facts_of(path: Path) -> dict[str, Any]:
    """What a shard says of all its rows: see `TargetFacts`."""
    return {name.decode(): json.loads(value) for name, value in (pq.read_schema(path).metadata or {}).items()}


# -------------------------------------------------------------------------------------------------------- alignment


def told_of(seen: Seen, captured: Captured) -> list[Told]:
    """The sampled rows with soft targets over the student's ids."""
    paths = shard_paths(captured.folder)
    teachers = teachers_alike(seen, facts_of(paths[0]).get("tokenizers", {})) if paths else set()
    return read_told(captured.folder, [row for row in seen.sample if row.teacher in teachers])


def teachers_alike(seen: Seen, tokenizers: Mapping[str, str | None]) -> set[str]:
    """Teachers with the student's tokenizer, byte for byte."""
    folder = seen.job.student.folder
    own = None if folder is None else tokenizer_digest(folder)
    return {name for name, digest in tokenizers.items() if own is not None and digest == own}


def read_told(folder: Path, rows: Sequence[SampleRow]) -> list[Told]:
    """Those of the rows that have soft targets with ids, with them; of each shard the ids are looked at first."""
    wanted, found = text_array([row.row_id for row in rows]), dict[str, TokenLogprobs]()
    for path in shard_paths(folder):
        if len(found) == len(rows):
            break
        if pc.any(pc.is_in(read_shard(path, ["row_id"])["row_id"], value_set=wanted)).as_py():
            table = read_shard(path)
            found |= dict(targets_of(table.filter(pc.is_in(table["row_id"], value_set=wanted))))
    return [Told(row, found[row.row_id]) for row in rows if row.row_id in found and found[row.row_id].ids is not None]


def _check_aligned(told: Sequence[Told], vocabulary: int) -> Finding:
    """PF11: a distribution for each label, of the token that is the label, with probabilities, over our ids."""
    if not told:
        return skipped("PF11", "no teacher of the sampled rows gave ids of the student's tokenizer")
    positions = sum(len(each.targets) for each in told)
    figure = f"{len(told):,} rows, {positions:,} positions"
    for flaw, what in ((_is_no_distribution, "are no probabilities"), (_foreign(vocabulary), "have unknown ids")):
        bad = [each.row.row_id for each in told if flaw(each.targets)]
        if bad:
            fix = "answer these rows again: their soft targets cannot be what the teacher computed"
            return flawed("PF11", "error", figure, f"soft targets of {len(bad):,} rows {what}", fix=fix, rows=bad)
    unlike = [each.row.row_id for each in told if not is_aligned(each)]
    if unlike:
        level = "error" if len(unlike) > FEW * len(told) else "warning"
        message = f"soft targets of {len(unlike):,} of {len(told):,} rows are of other tokens than their labels"
        fix = "train on the sampled ids, or leave these rows out of what learns from soft targets"
        return flawed("PF11", "error" if level == "error" else "warning", figure, message, fix=fix, rows=unlike)
    return fine("PF11", figure)


def is_aligned(told: Told) -> bool:
    """Whether the sampled tokens are the labels, and their logprobs those of the same tokens among the best."""
    targets, labels = told.targets, told.row.trained
    if len(targets) != len(labels) or targets.ids is None or targets.ids.tolist() != list(labels):
        return False
    own = logprobs_of(targets, labels)
    known = np.isfinite(own) & np.isfinite(targets.logprobs)
    return bool(np.allclose(own[known], targets.logprobs[known], atol=1e-4))


def logprobs_of(targets: TokenLogprobs, ids: Sequence[int]) -> npt.NDArray[np.float64]:
    """At each position the logprob of an id, -inf where it is not among the best; float64[n]."""
    assert targets.top_ids is not None
    ends = np.cumsum(targets.sizes)
    found = np.full(len(ids), -np.inf)
    for at, (id_, end, size) in enumerate(zip(ids, ends, targets.sizes, strict=True)):
        hits = np.flatnonzero(targets.top_ids[end - size : end] == id_)
        if len(hits) > 0:
            found[at] = targets.top_logprobs[end - size + hits[0]]
    return found


def _is_no_distribution(targets: TokenLogprobs) -> bool:
    ends = np.cumsum(targets.sizes)
    masses = [
        float(np.exp(targets.top_logprobs[end - size : end].astype(np.float64)).sum())
        for end, size in zip(ends, targets.sizes, strict=True)
    ]
    return not all(mass <= MOST_MASS for mass in masses)  # also where one is no number


def _foreign(vocabulary: int) -> Callable[[TokenLogprobs], bool]:
    def has_foreign(targets: TokenLogprobs) -> bool:
        ids = targets.top_ids
        return ids is None or (len(ids) > 0 and (int(ids.min()) < 0 or int(ids.max()) >= vocabulary))

    return has_foreign


# ------------------------------------------------------------------------------------------------------ temperature


def check_temperature(captured: Captured, scales: Mapping[str, str | None]) -> Finding:
    """PF19: soft targets are the model's own probabilities, of temperature 1, and somebody tried it."""
    sampled = "unknown" if captured.temperature is None else f"{captured.temperature:g}"
    figure = f"sampled at temperature {sampled}, logprobs: {', '.join(f'{k} {v}' for k, v in scales.items())}"
    if any(scale == "scaled" for scale in scales.values()) and captured.temperature != 1:
        message = f"the soft targets were divided by the temperature {sampled}, and would be taken for those at 1"
        fix = "capture them at generate.sampling.temperature 1, or from a server that gives raw logprobs"
        return flawed("PF19", "error", figure, message, fix=fix)
    is_known = bool(scales) and all(scale in KNOWN_SCALES for scale in scales.values())
    if captured.temperature is None or not is_known:
        message = "nobody knows at which temperature the soft targets are probabilities"
        return flawed("PF19", "warning", figure, message, fix="generate them again: the temperature is tried first")
    return fine("PF19", figure)

"""Pinned digests of what `train` feeds to the student and of how `evaluate` scores answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.core.lineage import digest_json
from pipeline.core.record import Message
from pipeline.stages import evaluate, train
from pipeline.stages.evaluate.answers import Answered, write_answers
from pipeline.student.order import training_order
from pipeline.student.text_path import TextPath
from pipeline.student.tokenise import load_tokenizer, stop_ids
from pipeline.text.scoring import score
from tests.support import a_prompt
from tests.tiny_models import make_tiny_model

# name -> (VERSION of its stage, digest)
ROWS = (2, "1ca2cd5eb03ccf41fd798a245f01f920b890d3b1662eb04fd052fabd8353ac7e")
ORDER = (2, "1ed24e49015b9336a498715c7b520d28bf0f1a37faf76feaa2704b250bdf89a2")
SCORES = (1, "869f5c81aa55cfc67976d8a66d74e1f169bb93ff23e4f1df4f149e2ed3f63568")
ANSWERS = (1, "49ca57944e151ebe270a407b5f609cd90fd0bd85eaaa7232f08f6d4b7e9e4805")


def check(pinned: tuple[int, str], version: int, digest: str) -> None:
    assert (version, digest) == pinned, "output changed: bump VERSION"


def test_rows(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path)
    tokenizer = load_tokenizer(str(model), None)
    asked = [[{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{n} + 1?"}] for n in range(9)]
    told = [[{"role": "assistant", "content": f"It is {n + 1}.\n"}] for n in range(9)]
    rows = TextPath.of(tokenizer, stop_ids(str(model), None, tokenizer)).encode(asked, told)
    kept = [row for row in rows if not isinstance(row, str)]
    assert len(kept) == 9
    check(ROWS, train.VERSION, digest_json([[[*row.ids], [*row.labels]] for row in kept]))


def test_order() -> None:
    lengths = (np.arange(1000) * 7919) % 613
    grouped = training_order(lengths, steps=100, batch_size=16, seed=5, group_by_length=True)
    plain = training_order(lengths, steps=100, batch_size=16, seed=5, group_by_length=False)
    check(ORDER, train.VERSION, digest_json([grouped.tolist(), plain.tolist()]))


def test_scores() -> None:
    right = {name: [(n * step) % 10 < 10 - step for n in range(500)] for name, step in (("t", 1), ("b", 7), ("s", 3))}
    found = score(right["t"], right["b"], right["s"], resamples=300, seed=2)
    estimates = [*found.accuracies.values(), found.retained, found.gap_closed]
    facts = [[one.value, *(one.ci95 or ())] for one in estimates]
    check(SCORES, evaluate.VERSION, digest_json([[round(value or 0.0, 9) for value in fact] for fact in facts]))


def test_answers(tmp_path: Path) -> None:
    prompts = [a_prompt(prompt_id=f"p{n}", prompt=(Message("user", "?"),), task=[None, "a"][n % 2]) for n in range(5)]
    answered = {
        name: Answered(tuple(f"{name} {n}" for n in range(5)), ("stop",) * 5) for name in ("teacher", "base", "student")
    }
    right = {name: [n % 2 == 0 for n in range(5)] for name in answered}
    digest = write_answers(tmp_path, prompts, answered, right)
    assert sum(pq.read_metadata(path).num_rows for path in tmp_path.glob("*.parquet")) == 15
    check(ANSWERS, evaluate.VERSION, digest)

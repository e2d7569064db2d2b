"""What the licence join of a large data set costs: a column `license_set` of 1 M rows to a verdict.

`python -m benchmarks.terms` makes 1 M rows with 200 distinct sets of licences over 8 teachers and 20 prompt sets
(dictionary-encoded, as they ship), counts them to row sets and judges them; it prints the median of several rounds and
writes benchmarks/results/terms.json. It exits 1 where the median is a second or more.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.core.config_policy import PolicyConfig
from pipeline.terms.policy import judge
from pipeline.terms.records import Registry, load_registry
from pipeline.terms.statement import RowSet, Source, Statement
from pipeline.terms.verdict import Verdict

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
SETS, TEACHERS, PROMPT_SETS = 200, 8, 20
LIMIT_S = 1.0


def make_rows(rows: int, registry: Registry) -> pa.Table:
    """Columns `teacher`, `prompt_set` and `license_set` (the last a dictionary over lists), drawn with one seed."""
    random = np.random.default_rng(7)
    names = np.array(sorted(registry.records))
    sets = [sorted(random.choice(names, size=random.integers(1, 5), replace=False).tolist()) for _ in range(SETS)]
    of_set = random.integers(0, SETS, rows).astype(np.int32)
    teachers = pa.array([f"teacher-{number}" for number in range(TEACHERS)])
    prompts = pa.array([f"prompts-{number}" for number in range(PROMPT_SETS)])
    return pa.table(
        {
            "teacher": pa.DictionaryArray.from_arrays(pa.array(of_set % TEACHERS), teachers),
            "prompt_set": pa.DictionaryArray.from_arrays(pa.array(of_set % PROMPT_SETS), prompts),
            "license_set": pa.DictionaryArray.from_arrays(pa.array(of_set), pa.array(sets, pa.list_(pa.string()))),
        }
    )


def row_sets(table: pa.Table) -> tuple[RowSet, ...]:
    """Rows by teacher, prompt set and licences: counted by their codes, so that only distinct sets are looked at."""
    columns = [table[name].combine_chunks() for name in ("teacher", "prompt_set", "license_set")]
    sizes = [len(column.dictionary) for column in columns]
    codes = np.ravel_multi_index([column.indices.to_numpy() for column in columns], sizes)
    counts = np.bincount(codes, minlength=int(np.prod(sizes)))
    found = np.flatnonzero(counts)
    places = np.unravel_index(found, sizes)
    teachers, prompts, licenses = (column.dictionary.to_pylist() for column in columns)
    return tuple(
        RowSet(int(counts[code]), teachers[teacher], (prompts[prompt],), tuple(licenses[license_set]))
        for code, teacher, prompt, license_set in zip(found, *places, strict=True)
    )


def sources() -> tuple[Source, ...]:
    """The teachers, the prompt sets and the student; licences of rows that they do not declare bind as well."""
    teachers = [Source("teacher", f"teacher-{number}", "x", ("MIT",)) for number in range(TEACHERS)]
    prompts = [Source("prompt", f"prompts-{number}", "x", ("CC-BY-4.0",)) for number in range(PROMPT_SETS)]
    return (*teachers, *prompts, Source("student_base", "student", "x", ("Apache-2.0",), "qwen"))


def timed(work: Callable[[], Verdict]) -> tuple[float, Verdict]:
    """Seconds that something took, and what came of it."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    registry = load_registry()
    policy = PolicyConfig.model_validate(
        {"intended_use": "commercial", "release": {"dataset": "public", "model": "public"}}
    )
    table = make_rows(asked.rows, registry)

    def work() -> Verdict:
        statement = Statement(sources(), row_sets(table))
        return judge(statement, policy, registry, gate="dataset", today=date(2026, 11, 23))

    measured = [timed(work) for _ in range(asked.rounds)]
    seconds, verdict = statistics.median(each for each, _ in measured), measured[0][1]
    result = {
        "rows": asked.rows,
        "distinct_sets": SETS,
        "rounds": asked.rounds,
        "median_s": round(seconds, 4),
        "slowest_s": round(max(each for each, _ in measured), 4),
        "outcome": verdict.outcome,
        "findings": len(verdict.findings),
        "python": platform.python_version(),
        "machine": platform.machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "terms.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0 if seconds < LIMIT_S else 1


if __name__ == "__main__":
    sys.exit(main())

"""What the stage found of validation rows among the training rows, read by the checks: see stages/train/leakage.py."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from pipeline.student.preflight.findings import Finding, fine, flawed, skipped
from pipeline.student.process import write_json
from pipeline.student.tokenise import read_json

FILE: Final = "leakage.json"
MANY: Final = 0.1
"""Share of validation rows among the training rows from which on a validation loss says nothing."""


@dataclass(frozen=True, slots=True)
class Leak:
    """How much of the validation split the training split holds.

    Attributes:
        validation_rows: of the data set.
        same: validation rows whose prompt, normalised, is a training row's.
        near: validation rows whose prompt and completion are near a training row's.
        compared: training rows that were compared for `near`.
        rows: ids of some of the validation rows.
        of: which files were compared.
    """

    validation_rows: int
    same: int
    near: int
    compared: int
    rows: tuple[str, ...]
    of: str = ""

    def write(self, workdir: Path) -> None:
        """Keep it where `check_leak` looks for it."""
        write_json(workdir / FILE, {**asdict(self), "rows": [*self.rows]})


def read_leak(workdir: Path) -> Leak | None:
    """What was found; None if nothing was looked for."""
    path = workdir / FILE
    if not path.is_file():
        return None
    value = read_json(path)
    return Leak(**{**value, "rows": tuple(value["rows"])})


def check_leak(workdir: Path) -> Finding:
    """PF21: validation rows are not trained on."""
    leak = read_leak(workdir)
    if leak is None:
        return skipped("PF21", "the splits were not compared")
    if leak.validation_rows == 0:
        return skipped("PF21", "the data set has no validation rows")
    figure = (
        f"of {leak.validation_rows:,} validation rows {leak.same:,} share a prompt with training rows, {leak.near:,} "
        f"are near one of {leak.compared:,}"
    )
    if leak.same == leak.near == 0:
        return fine("PF21", figure)
    level = "error" if leak.same > MANY * leak.validation_rows else "warning"
    message = f"{leak.same:,} validation prompts are trained on and {leak.near:,} rows are near trained ones"
    fix = "give rows that belong together one group_id (prompts.sets.NAME.columns), so that they share a split"
    return flawed("PF21", "error" if level == "error" else "warning", figure, message, fix=fix, rows=leak.rows)

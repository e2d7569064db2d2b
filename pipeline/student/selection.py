"""Which measurement of a training is the best one, and whether it is time to stop early."""

from dataclasses import dataclass
from typing import Any

from pipeline.core.config_train import CourseEvaluation
from pipeline.core.stage import Json


def undecided(config: CourseEvaluation, why: str) -> str:
    """What is said where nothing can be measured that the config lets decide."""
    what = "which weights are the best" if config.keep == "best" else "when to stop early"
    return f"nothing tells {what}: {why}"


def asked_to_decide(config: CourseEvaluation) -> str:
    """The options that let a measurement decide, as a message names them."""
    asked = {"keep": config.keep == "best", "patience": config.patience is not None}
    return " and ".join(name for name, is_asked in asked.items() if is_asked)


@dataclass(slots=True)
class Selection:
    """The best measurement so far. One is better if it is by more than `min_delta`, so the first of equal ones stays.

    Attributes:
        config: what decides.
        best_step, best_value: of the best measurement; None before the first one.
        since: measurements in a row that were not better.
    """

    config: CourseEvaluation
    best_step: int | None = None
    best_value: float | None = None
    since: int = 0

    def take(self, step: int, values: dict[str, float]) -> bool:
        """Count a measurement in; returns whether it is the best one so far.

        Args:
            values: finite figures by name, `config.by` among them.
        """
        value = values[self.config.by]
        if self.best_value is not None and self._gain(value, self.best_value) <= self.config.min_delta:
            self.since += 1
            return False
        self.best_step, self.best_value, self.since = step, value, 0
        return True

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.config.patience is not None and self.since >= self.config.patience

    def facts(self) -> dict[str, Json]:
        """What a checkpoint keeps of it."""
        return {"best_step": self.best_step, "best_value": self.best_value, "since": self.since}

    def restore(self, facts: dict[str, Any]) -> None:
        """Go on from what `facts` gave."""
        self.best_step, self.best_value, self.since = facts["best_step"], facts["best_value"], facts["since"]

    def _gain(self, value: float, best: float) -> float:
        return best - value if self.config.by == "eval_loss" else value - best

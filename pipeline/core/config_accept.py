"""Config of when enough is enough, and of rows that may stay without an answer."""

from typing import Annotated

from pydantic import Field, model_validator

from pipeline.core.config_base import ConfigModel


class Accept(ConfigModel):
    """Ask until so many rows pass the checks of `filter`, one candidate after the other: first the first sample of all
    prompts in the order of their row ids, then the second, and so on. What is taken is the shortest beginning of that
    list with enough good rows, so that it does not depend on who answered first."""

    rows: Annotated[int, Field(ge=1)]
    """Rows that are to pass the checks of `filter` (its verifier included)."""
    max_candidates: Annotated[int, Field(ge=1)]
    """Most candidates that are asked for; with fewer good rows among them the step ends with what there is."""

    @model_validator(mode="after")
    def _candidates_suffice(self) -> "Accept":
        if self.max_candidates < self.rows:
            raise ValueError(f"max_candidates {self.max_candidates} is less than the {self.rows} rows that are wanted")
        return self


class AllowMissing(ConfigModel):
    """How many rows may stay without an answer although they were tried for the whole `retry.budget_s`."""

    share: Annotated[float, Field(gt=0, lt=1)]
    """Share of the rows. They leave as `gave_up:<class of the last failure>`; one more, and the step waits for a
    resume. A later run of the same step does not ask for them again unless it is forced."""

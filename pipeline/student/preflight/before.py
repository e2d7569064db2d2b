"""The checks of one training, in the process that leads it: of the rows first, then with the model."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.core.stage import Json
from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.findings import FILE, Finding, accept, errors_of, in_order, merged, refuse, summary
from pipeline.student.process import Report, write_json

if TYPE_CHECKING:  # they load Arrow and torch
    from pipeline.student.memory import MemoryEstimate
    from pipeline.student.shards import Tokens

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Before:
    """Makes the checks before the first step, or before the first one after a checkpoint.

    Attributes:
        job: the training.
        report: told what was found.
        found: so far, before anything is accepted.
    """

    job: TrainJob
    report: Callable[[Report], None]
    found: list[Finding] = field(default_factory=list)

    def columns(self) -> None:
        """Before the rows are encoded: they can be read.

        Raises:
            UsageError: they cannot.
        """
        from pipeline.student.preflight.columns import check_columns

        columns = check_columns(self.job.data)
        if columns.level == "error":
            self.found = [columns]
            self._tell("the rows cannot be read: see PF07")
            refuse(self.found)

    def rows(self, tokens: "Tokens") -> None:
        """When the rows are encoded, and before any weight is loaded.

        Raises:
            UsageError: a check failed that nobody accepted.
        """
        from pipeline.student.preflight.deciding import require_measurable
        from pipeline.student.preflight.rows import check_rows

        require_measurable(self.job, tokens)
        self.found = check_rows(self.job, tokens)
        self._refuse("the rows were refused first")

    def memory(self, memory: "MemoryEstimate") -> None:
        """When it is known what the training needs, and before any weight is loaded.

        Raises:
            UsageError: as `rows`.
        """
        from pipeline.student.preflight.memory import check_memory

        self.found = merged(self.found, [check_memory(memory)])
        self._refuse("the memory was refused first")

    def model(self, trainer: Any, tokens: "Tokens", memory: "MemoryEstimate") -> None:
        """When the student is loaded, and before it is trained.

        Raises:
            UsageError: as `rows`.
        """
        from pipeline.student.preflight.model import check_model, loaded_of

        self.found = merged(self.found, check_model(loaded_of(trainer, self.job, tokens, memory)))
        self._tell("not made")
        refuse(self.found, self.job.train.accept_findings)

    def summary(self) -> dict[str, Json]:
        """For the stage's metrics; empty in processes that make no checks."""
        return summary(self.found, self.job.train.accept_findings) if self.found else {}

    def _refuse(self, why_not: str) -> None:
        """Tell what was found if it is the end; what is still to come is told with the rest."""
        accepted = self.job.train.accept_findings
        if errors_of(accept(self.found, accepted)):
            self._tell(why_not)
        refuse(self.found, accepted)

    def _tell(self, why_not: str) -> None:
        """Keep the findings beside the model and in the work folder, which outlives a refusal, and report them."""
        accepted = self.job.train.accept_findings
        table = accept(in_order(self.found, why_not), accepted)
        findings: list[Json] = [each.to_json() for each in table]
        for folder in (self.job.out, self.job.workdir):
            write_json(folder / FILE, findings)
        for each in table:
            logger.info("pre-flight %s; %s", each, each.figure)
        told: list[Json] = [str(each) for each in table if each.level in ("warning", "error")]
        self.report({"preflight": summary(self.found, accepted), "findings": told})

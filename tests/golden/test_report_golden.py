"""The report of a fixed run has the bytes it always had."""

from pathlib import Path

from pipeline.stages import report
from tests.report_artefacts import ordinary_run, write_report

CONTENT = "7902f97d058e03cc4df9f3b50d28253c8565225bb07e2b8c9c64c6e75540f2fa"


def test_the_report_of_a_fixed_run_is_unchanged(tmp_path: Path) -> None:
    result, _ = write_report(ordinary_run(), tmp_path)
    assert report.VERSION == 1
    assert result.content == CONTENT, "output changed: bump VERSION of the stage and pin the new content here"

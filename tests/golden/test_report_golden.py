"""The report of a fixed run has the bytes it always had."""

from pathlib import Path

from pipeline.stages import report
from tests.report_artefacts import ordinary_run, write_report

CONTENT = "b7cbbcb86b40db30c8be7f5e07ba2854fde4740bdb3ecee9217c69b7bb4580d3"


def test_the_report_of_a_fixed_run_is_unchanged(tmp_path: Path) -> None:
    result, _ = write_report(ordinary_run(), tmp_path)
    assert report.VERSION == 1
    assert result.content == CONTENT, "output changed: bump VERSION of the stage and pin the new content here"

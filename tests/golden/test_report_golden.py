"""The report of a fixed run has the bytes it always had."""

from pathlib import Path

from pipeline.stages import report
from tests.report_artefacts import ordinary_run, write_report

CONTENT = "17bfebd8ed5be4b6a585073fe36cf1aa920407ef5db7ada2ae4318082ffaa84b"


def test_the_report_of_a_fixed_run_is_unchanged(tmp_path: Path) -> None:
    result, _ = write_report(ordinary_run(), tmp_path)
    assert report.VERSION == 1
    assert result.content == CONTENT, "output changed: bump VERSION of the stage and pin the new content here"

"""Stage `report`: one self-contained HTML file about a run.

Reads all upstream artefacts, one shard in memory at a time. The file loads nothing from anywhere, holds no clock and no
host, and shows text of models and prompts as text only. Equal artefacts give equal bytes.
"""

from collections.abc import Mapping
from pathlib import Path

from pipeline.core.config import ReportStep
from pipeline.core.lineage import file_sha256
from pipeline.core.stage import Context, Result
from pipeline.stages.report.artefacts import Artefacts
from pipeline.stages.report.facts import read_evaluation, read_loss, read_sources, read_splits, read_steps
from pipeline.stages.report.lengths import read_lengths
from pipeline.stages.report.page import Facts, render
from pipeline.stages.report.samples import read_samples

VERSION = 1

FILE = "report.html"


def input_files(cfg: ReportStep) -> dict[str, Path]:
    """Nothing outside the store."""
    return {}


def run(cfg: ReportStep, inputs: Mapping[str, Path], out: Path, ctx: Context) -> Result:
    """Write `report.html`; its rows are the sample rows it shows.

    Raises:
        CorruptArtefact: an upstream artefact cannot be read.
        Interrupted: a signal asked to stop.
    """
    facts = _read(cfg, Artefacts.read(inputs, ctx))
    page = out / FILE
    page.write_bytes(render(facts).encode("utf-8"))
    shown = len(facts.samples)
    ctx.events.emit("report_written", bytes=page.stat().st_size, sample_rows=shown)
    return Result(rows_in=shown, rows_out=shown, rejected={}, content=file_sha256(page))


def _read(cfg: ReportStep, artefacts: Artefacts) -> Facts:
    progress = artefacts.ctx.progress
    progress.start(3, "passes over the rows")
    sources, splits = read_sources(artefacts), read_splits(artefacts)
    progress.advance()
    lengths = read_lengths(artefacts)
    progress.advance()
    samples = read_samples(artefacts, cfg.report.sample_rows)
    progress.advance()
    return Facts(
        name=cfg.name,
        evaluation=read_evaluation(artefacts),
        steps=read_steps(artefacts),
        splits=splits,
        lengths=lengths,
        loss=read_loss(artefacts),
        samples=samples,
        sources=sources,
    )

"""`trace` and `drop-source`: what a model was made of, and what a source went into."""

from pathlib import Path

import click

from pipeline.cli.call import DATA, JSON, VERBOSE
from pipeline.cli.show_trace import say_dropped, say_trace
from pipeline.core.log import configure_logging


@click.command("trace")
@click.argument("model", type=click.Path(path_type=Path, readable=False))
@DATA
@JSON
@VERBOSE
def trace_command(model: Path, data: Path, as_json: bool, verbose: bool) -> None:
    """Tell a model's whole story: training, data set, each step before it, sources and their terms.

    MODEL is a folder with weights that a run in the data folder trained: the run's own, or a copy under any name. It is
    found by its bytes.
    """
    from pipeline.runner.trace import trace

    configure_logging((), verbose=verbose)
    say_trace(trace(Path(data), model), as_json=as_json)


@click.command("drop-source")
@click.argument("source")
@DATA
@JSON
@VERBOSE
def drop_source_command(source: str, data: Path, as_json: bool, verbose: bool) -> None:
    """Say which rows, data sets, models and evaluations a source touched, and how to make them again without it.

    SOURCE is the name of a teacher or a prompt set, a model, a data set of the hub, a licence or a term record. Nothing
    is changed.
    """
    from pipeline.runner.drop_source import drop_source  # it reads rows, and so loads Arrow

    configure_logging((), verbose=verbose)
    say_dropped(drop_source(Path(data), source), as_json=as_json)

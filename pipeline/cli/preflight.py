"""`preflight`: the checks of a training alone, and a sample of what would be trained."""

from typing import Final

import click

from pipeline.cli.call import Call, Target, on_config

SAMPLES: Final = 2


@click.command("preflight")
@on_config
@click.option("--samples", type=click.IntRange(0, 64), default=SAMPLES, show_default=True, metavar="N",
              help="Rows to show: what is trained and what is masked.")  # fmt: skip
@click.pass_obj
def preflight_command(call: Call, target: Target, samples: int) -> None:
    """Check what `train` would learn from, without training: 23 checks of the encoded rows and the student.

    It reads the committed data set and encodes it as `train` does; docs/preflight.md lists the checks. Exit 2 where
    one of them would stop a training.
    """
    from pipeline.cli.show_preflight import say_preflight  # it knows rows, and so loads Arrow
    from pipeline.runner.preflight import preflight
    from pipeline.student.preflight.findings import refuse

    session = target.open(call)
    with call.signals():
        found = preflight(session, samples)
    accepted = session.loaded.config.train.accept_findings
    say_preflight(found, accepted, as_json=target.as_json)
    refuse(found.findings, accepted)

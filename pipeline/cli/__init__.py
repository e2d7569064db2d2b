"""The commands. The only room that prints; results go to stdout, everything else to stderr."""

import sys
import traceback
from collections.abc import Sequence

import click

from pipeline.cli.call import Call
from pipeline.cli.inspect import status_command
from pipeline.cli.run import plan_command, run_command, stage_commands
from pipeline.cli.setup import schema_command
from pipeline.core.errors import ExitCode, PipelineError
from pipeline.core.log import scrub


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit code (`ExitCode`)."""
    call = Call()
    try:
        commands.main(args=arguments, prog_name="python -m pipeline", standalone_mode=False, obj=call)
    except click.ClickException as error:
        error.show()
        return int(ExitCode.USAGE)
    except PipelineError as error:
        print(scrub(str(error), call.secrets), file=sys.stderr)
        return int(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("stopped at once; what was committed is kept, the same command resumes", file=sys.stderr)
        return int(call.stop.exit_code)
    except Exception:  # noqa: BLE001 (the one place where a bug becomes exit code 1)
        print(scrub(traceback.format_exc(), call.secrets), file=sys.stderr)
        print("this is a bug; the lines above say where", file=sys.stderr)
        return int(ExitCode.BUG)
    return int(ExitCode.COMPLETE)


class InOrder(click.Group):
    """Lists the commands in the order in which they were added, which is the order in which they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def commands() -> None:
    """Distil a big language model into a small one: prompts, teacher, filter, dedup, dataset, student, evaluation."""


for _command in (run_command, plan_command, *stage_commands(), status_command, schema_command):
    commands.add_command(_command)

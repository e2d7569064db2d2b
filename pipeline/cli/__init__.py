"""The commands. The only room that prints; results go to stdout, everything else to stderr."""

import traceback
from collections.abc import Sequence

import click

from pipeline.cli.call import Call
from pipeline.cli.inspect import gc_command, status_command, verify_command, why_command
from pipeline.cli.licenses import licenses_command
from pipeline.cli.lineage import drop_source_command, trace_command
from pipeline.cli.preflight import preflight_command
from pipeline.cli.publish import export_command, push_command
from pipeline.cli.responses import responses_command
from pipeline.cli.run import plan_command, run_command, stage_commands
from pipeline.cli.setup import doctor_command, init_command, schema_command
from pipeline.cli.terms import check_command, override_command
from pipeline.cli.usage import Commands, output_error, usage_error
from pipeline.core.errors import ExitCode, PipelineError
from pipeline.core.log import open_standard_streams, scrub, tell


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the process's exit code (`ExitCode`)."""
    open_standard_streams()
    call = Call()
    try:
        commands.main(args=arguments, prog_name="python -m pipeline", standalone_mode=False, obj=call)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return int(ExitCode.USAGE)
    except click.ClickException as error:
        return _end(usage_error(error), call)
    except PipelineError as error:
        return _end(error, call)
    except (KeyboardInterrupt, click.Abort):
        tell("stopped at once; what was committed is kept, the same command resumes")
        return int(call.stop.exit_code)
    except Exception as error:  # noqa: BLE001 (the one place where a bug becomes exit code 1)
        unprinted = output_error(error) if isinstance(error, OSError) else None
        if unprinted is not None:
            return _end(unprinted, call)
        tell(scrub(traceback.format_exc(), call.secrets))
        tell("this is a bug; the lines above say where")
        return int(ExitCode.BUG)
    return int(ExitCode.COMPLETE)


def _end(error: PipelineError, call: Call) -> int:
    tell(scrub(str(error), call.secrets))
    return int(error.exit_code)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def commands() -> None:
    """Distil a big language model into a small one: prompts, teacher, filter, dedup, dataset, student, evaluation."""


for _command in (
    init_command,
    doctor_command,
    run_command,
    plan_command,
    *stage_commands(),
    status_command,
    why_command,
    trace_command,
    drop_source_command,
    verify_command,
    gc_command,
    preflight_command,
    responses_command,
    export_command,
    push_command,
    licenses_command,
    schema_command,
):
    commands.add_command(_command)
for _command in (check_command, override_command):
    licenses_command.add_command(_command)

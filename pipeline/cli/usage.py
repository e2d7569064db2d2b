"""Mistakes in the command line, and an output that cannot be written, in three lines."""

import sys
import traceback
from typing import Final

import click

from pipeline.core.errors import Incomplete, UsageError
from pipeline.core.log import drop_output
from pipeline.core.mistakes import nearest

PRINTERS: Final = frozenset({"pipeline.cli.show", "click.utils"})
"""Modules that write to stdout; `--help` is printed by click."""


class Commands(click.Group):
    """Lists the commands in the order in which they were added, which is the order in which they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, first added first."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command that the arguments begin with.

        Raises:
            UsageError: there is none of that name.
        """
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            what = f"no such command: {name}; {nearest(name, self.list_commands(ctx))}"
            raise UsageError(what, where=f"{ctx.command_path} {name}", todo=f"see {ctx.command_path} --help")
        return super().resolve_command(ctx, args)


def usage_error(error: click.ClickException) -> UsageError:
    """What click found wrong with the arguments, as an error of ours."""
    context = getattr(error, "ctx", None)
    where = "the command line" if context is None else context.command_path
    todo = f"see {'python -m pipeline' if context is None else where} --help"
    return UsageError(_what(error, context), where=where, todo=todo)


def _what(error: click.ClickException, context: click.Context | None) -> str:
    if isinstance(error, click.NoSuchOption) and context is not None:
        options = sorted(name for param in context.command.params for name in param.opts if name.startswith("--"))
        return f"no such option: {error.option_name}; {nearest(error.option_name, [*options, '--help'])}"
    if isinstance(error, click.MissingParameter) and error.param is not None:
        return f"{_name(error.param)} is missing"
    if isinstance(error, click.BadParameter) and error.param is not None:
        name = _name(error.param)
        if isinstance(error.param.type, click.Choice) and error.message.startswith("'"):
            word = error.message.split("'")[1]
            return f"{name}: no such value: {word}; {nearest(word, [*error.param.type.choices])}"
        return f"{name}: {error.message.rstrip('.')}"
    return error.format_message().rstrip(".")


def _name(param: click.Parameter) -> str:
    return param.opts[0] if isinstance(param, click.Option) else param.human_readable_name


def output_error(error: OSError) -> Incomplete | None:
    """The error about a stdout that cannot be written (a full disk behind `> file`); None if the fault lies elsewhere.

    What was to be printed is given up, or the interpreter would fail once more at its end.
    """
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_globals["__name__"] not in PRINTERS:
        return None
    drop_output(sys.stdout)
    todo = "what was committed is kept; send the output elsewhere and run the same command again"
    return Incomplete(f"the result cannot be printed: {error.strerror}", where="standard output", todo=todo)

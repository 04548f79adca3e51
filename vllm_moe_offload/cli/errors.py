"""Errors meant for users: one line on stderr, whichever command they come from."""

from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import OffloadError
from .log import LogLevel, log_to_stderr
from .renamed import with_new_names


def print_error(error: object) -> None:
    typer.echo(f"error: {error}", err=True)


class PlainErrors(TyperGroup):
    """The command: configures its log, understands options of earlier names, and ends with 2 where an error is ours."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        log_to_stderr(LogLevel.WARNING)
        return super().parse_args(ctx, with_new_names(args))

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OffloadError as error:
            print_error(error)
            raise typer.Exit(2) from None

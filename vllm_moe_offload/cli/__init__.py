"""`vllm-moe-offload …`: what can be done without serving.

Importing it must never import vLLM or torch: every offline command works on a machine that has neither.
"""

from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import OffloadError
from .daemon import daemon
from .doctor import doctor
from .history import history
from .prepare import prepare
from .replay import replay
from .store import store


class PlainErrors(TyperGroup):
    """Errors meant for users are one line on stderr and exit code 2, whichever command they come from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OffloadError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="vllm-moe-offload",
    cls=PlainErrors,
    help="Serve MoE models that are larger than fast memory with stock vLLM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(store)
app.add_typer(history)
app.add_typer(daemon)
app.command()(prepare)
app.command()(doctor)
app.command()(replay)

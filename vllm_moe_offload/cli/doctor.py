"""`vllm-moe-offload doctor`: will offloading work here, and if not, why."""

import typer
from rich.console import Console
from rich.table import Table

from .checks import BROKEN, HINT, OK, Check, all_checks

_COLOURS = {OK: "green", HINT: "yellow", BROKEN: "red"}


def doctor() -> None:
    """Look at vLLM, every part of it the plugin leans on, this machine and the store folder; exit with 1 if broken."""
    checks = list(all_checks())
    Console().print(_table(checks))
    broken = [check for check in checks if check.state == BROKEN]
    for check in broken:
        typer.echo(f"broken: {check.subject}: {check.detail}", err=True)
    if broken:
        raise typer.Exit(1)


def _table(checks: list[Check]) -> Table:
    table = Table("what", "state", "detail")
    for check in checks:
        table.add_row(check.subject, f"[{_COLOURS[check.state]}]{check.state}[/]", check.detail)
    return table

"""`vllm-moe-offload doctor`: will offloading work here, and if not, why."""

import typer
from rich.console import Console
from rich.table import Table

from .check import BROKEN, HINT, OK, WARNING, Check
from .checks import all_checks

_COLOURS = {OK: "green", HINT: "yellow", WARNING: "yellow", BROKEN: "red"}


def doctor() -> None:
    """Look at vLLM, every part of it the plugin leans on, this machine and the store folder.

    Exits with 1 if offloading will not work here; what only costs a feature is a warning.
    """
    checks = list(all_checks())
    Console().print(findings_table(checks))
    for check in checks:
        if check.state in (WARNING, BROKEN):
            typer.echo(f"{check.state}: {check.subject}: {check.detail}", err=True)
    if any(check.state == BROKEN for check in checks):
        raise typer.Exit(1)


def findings_table(checks: list[Check]) -> Table:
    """``checks`` for people."""
    table = Table("what", "state", "detail")
    for check in checks:
        table.add_row(check.subject, f"[{_COLOURS[check.state]}]{check.state}[/]", check.detail)
    return table

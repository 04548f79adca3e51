"""`vllm-moe-offload doctor`: will offloading work here, and if not, why."""

import json

import typer
from rich.console import Console
from rich.table import Table

from .check import OK, PROBLEM, WARNING, Check
from .checks import all_checks
from .options import JsonOption

_COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}


def doctor(as_json: JsonOption = False) -> None:
    """Look at vLLM, every part of it that is relied on, this machine, its disk, stores, histories and daemon.

    Exits with 1 if there is a problem, without which offloading will work here; warnings cost speed or a feature.
    Reading and copying are measured for some seconds.
    """
    checks = list(all_checks())
    if as_json:
        states = [check.state for check in checks]
        counts = {"problems": states.count(PROBLEM), "warnings": states.count(WARNING)}
        typer.echo(json.dumps(counts | {"checks": [check._asdict() for check in checks]}))
    else:
        Console().print(findings_table(checks))
        for check in checks:
            if check.state != OK:
                typer.echo(f"{check.state}: {check.subject}: {check.sentence}", err=True)
    if any(check.state == PROBLEM for check in checks):
        raise typer.Exit(1)


def findings_table(checks: list[Check]) -> Table:
    """``checks`` for people."""
    table = Table("what", "state", "detail")
    for check in checks:
        remedy = f"\n→ {check.remedy}" if check.remedy else ""
        table.add_row(check.subject, f"[{_COLOURS[check.state]}]{check.state}[/]", f"{check.detail}{remedy}")
    return table

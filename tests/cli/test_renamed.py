"""Options of earlier names do what the new ones do, with one line in the log, and are in no help text."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.cli.renamed import RENAMED, with_new_names


@pytest.mark.parametrize(
    ("arguments", "renamed"),
    [
        (["store", "ls", "--root", "/a"], ["store", "ls", "--store", "/a"]),
        (["store", "ls", "--root=/a=b"], ["store", "ls", "--store", "/a=b"]),
        (
            ["history", "prune", "ab", "--megabytes", "64", "--dir", "x"],
            ["history", "prune", "ab", "--keep", "64MiB", "--history", "x"],
        ),
        (["history", "ls", "--", "--dir", "x"], ["history", "ls", "--", "--dir", "x"]),
        (["history", "ls", "--dir"], ["history", "ls", "--history"]),
        (["prepare", "--root", "x"], ["prepare", "--root", "x"]),
        ([], []),
    ],
)
def test_arguments(arguments: list[str], renamed: list[str]) -> None:
    assert with_new_names(arguments) == renamed


@pytest.mark.parametrize(("command", "old", "new"), [("store", "--root", "--store"), ("history", "--dir", "--history")])
def test_the_old_name_of_a_folder_works_and_is_named(tmp_path: Path, command: str, old: str, new: str) -> None:
    results = [CliRunner().invoke(app, [command, "ls", name, str(tmp_path)]) for name in (old, new)]
    assert [result.exit_code for result in results] == [0, 0] and results[0].stdout == results[1].stdout
    (line,) = results[0].stderr.splitlines()
    assert line.endswith(f"WARNING {old} has been renamed: use {new}") and not results[1].stderr


@pytest.mark.parametrize("command", RENAMED)
def test_no_help_text_has_an_old_name(command: str) -> None:
    for subcommand in ("ls", "prune"):
        shown = CliRunner().invoke(app, [command, subcommand, "--help"], env={"COLUMNS": "200"}).stdout
        assert not [old for old in RENAMED[command] if f"{old} " in shown]

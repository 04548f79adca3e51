"""Every command and subcommand, found by walking the command line: its help, its JSON, and what it says to wrong input.

A new command or parameter fails here until it is in the tables below.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from tests.daemon.served_daemon import ServedDaemon
from tests.replay.replay_traces import random_trace
from tests.runtime.record_stores import ODD, build_store
from vllm_moe_offload.cli import app
from vllm_moe_offload.trace.trace_file import write_trace

ROOT = Path(__file__).parents[2]
TINY_MOE = ROOT / "examples" / "models" / "tiny-moe"
Command = tuple[str, ...]


def walk(command: Any, path: Command = ()) -> Iterator[tuple[Command, Any]]:
    yield path, command
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from walk(inner, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(app)))


def parameters(path: Command) -> Iterator[Any]:
    """Those that take a value."""
    for parameter in COMMANDS[path].params:
        ours = parameter.name not in ("help", "install_completion", "show_completion")
        if ours and not getattr(parameter, "is_flag", False):
            yield parameter


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "300", "TERM": "dumb"}).invoke(app, list(arguments))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a store, a trace, a history, and a daemon at a socket."""
    folder = tmp_path_factory.mktemp("place")
    build_store(folder / "stores", [(ODD, 4)] * 2)
    write_trace(folder / "trace.npz", random_trace(2, 8, 2, [6, 6]))
    imported = run(
        "history", "import", str(folder / "trace.npz"), "--fingerprint=abc", f"--history={folder / 'history'}"
    )
    assert imported.exit_code == 0, imported.output
    with ServedDaemon(folder / "socket"):
        yield folder


@pytest.fixture(autouse=True)
def nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither reports of other engines nor stores of this user."""
    monkeypatch.setenv("VLLM_MOE_OFFLOAD_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("VLLM_MOE_OFFLOAD_STORE_ROOT", str(tmp_path / "stores"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_says_how_it_is_used(path: Command) -> None:
    result = run(*path, "--help")
    assert result.exit_code == 0 and "Usage: " in result.stdout
    assert COMMANDS[path].help.split(".")[0].split("\n")[0][:40] in " ".join(result.stdout.split())
    for parameter in COMMANDS[path].params:
        assert getattr(parameter, "help", "x") or parameter.name == "help", f"{parameter.name} is not explained"


JSON: dict[Command, list[str]] = {
    ("store", "ls"): ["--store", "{place}/stores"],
    ("store", "verify"): ["--store", "{place}/stores"],
    ("history", "ls"): ["--history", "{place}/history"],
    ("replay",): ["{place}/trace.npz", "--slots", "8", "--predictor", "frequency"],
    ("daemon", "status"): ["--socket", "{place}/socket"],
    ("top",): ["--socket", "{place}/socket"],
    ("plan",): [str(TINY_MOE), "--hardware", "a100-pcie4"],
}
JSON_ELSEWHERE = {
    ("doctor",): "tests/cli/test_doctor.py",
    ("selftest",): "tests/cli/test_selftest.py",
    ("bench",): "tests/bench/test_bench.py",
}
"""Commands that start engines or import vLLM, and the file that runs them with --json."""

WITH_JSON = [path for path, command in COMMANDS.items() if any("--json" in each.opts for each in command.params)]


@pytest.mark.parametrize("path", WITH_JSON, ids=" ".join)
def test_json_is_one_object(path: Command, place: Path) -> None:
    if path in JSON_ELSEWHERE:
        assert '"--json"' in (ROOT / JSON_ELSEWHERE[path]).read_text().replace("'", '"')
        return
    result = run(*path, *(each.format(place=place) for each in JSON[path]), "--json")
    assert result.exit_code == 0, result.stderr
    assert isinstance(json.loads(result.stdout), dict) and len(result.stdout.splitlines()) == 1


class Wrong(NamedTuple):
    """An input that is refused, and what the refusal says besides it; empty where typer words it."""

    value: str
    words: str = ""


SIZE = Wrong("12 parsecs", "a size like '4GiB'")
MODEL = Wrong("/no/such/model", "/no/such/model")
NO_FILE = Wrong("/no/such/file.npz", "/no/such/file.npz")
NUMBER = Wrong("many")
NO_FOLDER = Wrong("/proc/version", "/proc/version")
SOCKET = Wrong("/no/such/socket", "/no/such/socket")
NO_NAME = Wrong("abacus", "abacus")

WRONG: dict[tuple[Command, str], Wrong] = {
    (("bench",), "model"): MODEL,
    (("bench",), "engine_arguments"): Wrong("--moe-offload-cache=1%", "give --budgets instead"),
    (("bench",), "budgets"): Wrong("25%,150%", "must be above 0% and at most 100%"),
    (("bench",), "batch"): Wrong("1,none", "give numbers of requests from 1 on, like 1,8"),
    (("bench",), "tokens"): Wrong("1"),
    (("bench",), "rounds"): Wrong("0"),
    (("bench",), "plot"): Wrong("picture.doc", "must end in one of .png, .svg, .pdf"),
    (("prepare",), "model"): MODEL,
    (("plan",), "model"): MODEL,
    (("plan",), "memory"): SIZE,
    (("plan",), "host_memory"): SIZE,
    (("plan",), "concurrency"): NUMBER,
    (("plan",), "context"): Wrong("endless", "endless"),
    (("plan",), "hardware"): NO_NAME,
    (("plan",), "trace"): NO_FILE,
    (("replay",), "trace"): NO_FILE,
    (("replay",), "history"): NO_FILE,
    (("replay",), "slots"): Wrong("0%", "0%"),
    (("replay",), "predictor"): NO_NAME,
    (("replay",), "policy"): NO_NAME,
    (("replay",), "batch"): NUMBER,
    (("replay",), "threshold"): Wrong("high"),
    (("replay",), "hardware"): NO_NAME,
    (("replay",), "record_bytes"): NUMBER,
    (("replay",), "tokens"): Wrong("0"),
    (("replay",), "plot"): Wrong("picture.doc", "must end in one of .png, .svg, .pdf"),
    (("selftest",), "model"): MODEL,
    (("store", "ls"), "folder"): NO_FOLDER,
    (("store", "verify"), "folder"): NO_FOLDER,
    (("store", "verify"), "fingerprint"): Wrong("nothing", "see `store ls`"),
    (("store", "prune"), "folder"): NO_FOLDER,
    (("store", "prune"), "unused_for"): Wrong("long"),
    (("store", "prune"), "keep"): SIZE,
    (("history", "ls"), "folder"): NO_FOLDER,
    (("history", "export"), "fingerprint"): Wrong("nothing", "names 0 histories"),
    (("history", "export"), "folder"): NO_FOLDER,
    (("history", "import"), "file"): NO_FILE,
    (("history", "import"), "fingerprint"): Wrong("../x", "letters, digits"),
    (("history", "import"), "folder"): NO_FOLDER,
    (("history", "prune"), "fingerprint"): Wrong("nothing", "names 0 histories"),
    (("history", "prune"), "keep"): SIZE,
    (("history", "prune"), "folder"): NO_FOLDER,
    (("daemon",), "cache"): SIZE,
    (("daemon",), "metrics_port"): Wrong("0"),
    (("daemon",), "policy"): NO_NAME,
    (("daemon",), "share"): Wrong("half", "give STORE=SIZE"),
    (("daemon",), "group"): NO_NAME,
    (("daemon",), "leave_after"): Wrong("-1"),
    (("daemon",), "log_level"): Wrong("LOUD"),
    (("daemon", "status"), "socket"): SOCKET,
    (("daemon", "stop"), "socket"): SOCKET,
    (("daemon", "top"), "socket"): SOCKET,
    (("daemon", "top"), "interval"): Wrong("0"),
    (("top",), "socket"): SOCKET,
    (("top",), "interval"): Wrong("0"),
}
TAKEN_AS_GIVEN = {
    (("bench",), "store"),
    (("prepare",), "store"),
    (("prepare",), "engine_arguments"),
    (("plan",), "store"),
    (("history", "export"), "file"),
    (("daemon",), "socket"),
    (("daemon",), "store"),
    (("daemon",), "history"),
}
"""A folder or file that is made if it is not there, and what only vLLM can judge."""

REST: dict[Command, dict[str, str]] = {
    ("bench",): {"model": str(TINY_MOE)},
    ("plan",): {"model": str(TINY_MOE)},
    ("replay",): {"trace": "{place}/trace.npz"},
    ("history", "export"): {"fingerprint": "abc", "file": "{place}/out.npz", "folder": "{place}/history"},
    ("history", "import"): {"file": "{place}/trace.npz"},
    ("history", "prune"): {"fingerprint": "abc", "keep": "1MiB", "folder": "{place}/history"},
    ("daemon",): {"cache": "1MiB", "socket": "{place}/other"},
}
"""What else a command is given."""


def test_every_parameter_that_takes_a_value_is_tried() -> None:
    taking = {(path, parameter.name) for path in COMMANDS for parameter in parameters(path)}
    assert taking == WRONG.keys() | TAKEN_AS_GIVEN


@pytest.mark.parametrize(("path", "name"), WRONG, ids=lambda part: part if isinstance(part, str) else " ".join(part))
def test_wrong_input_is_refused_with_a_sentence(path: Command, name: str, place: Path) -> None:
    wrong = WRONG[path, name]
    given = {key: value.format(place=place) for key, value in REST.get(path, {}).items()} | {name: wrong.value}
    options, positional = [], []
    for parameter in COMMANDS[path].params:
        if parameter.name in given and parameter.param_type_name == "argument":
            separator = ["--"] if given[parameter.name].startswith("-") else []
            positional += [*separator, given[parameter.name]]
        elif parameter.name in given:
            options.append(f"{parameter.opts[0]}={given[parameter.name]}")
    result = run(*path, *options, *positional)
    assert result.exit_code == 2, (result.exit_code, result.output)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == "" and "Traceback" not in result.stderr
    if result.stderr.startswith("error: "):
        assert len(result.stderr.splitlines()) == 1
        assert wrong.words and wrong.words in result.stderr and wrong.value.split(",")[-1] in result.stderr
    else:
        (parameter,) = (each for each in COMMANDS[path].params if each.name == name)
        said = " ".join(result.stderr.replace("│", " ").split())
        assert f"Invalid value for '{parameter.opts[0]}" in said and wrong.words in said


REQUIRED = [path for path in COMMANDS if any(each.required for each in parameters(path))]


@pytest.mark.parametrize("path", REQUIRED, ids=" ".join)
def test_what_is_missing_is_named(path: Command) -> None:
    result = run(*path)
    assert result.exit_code == 2 and "Missing " in result.stderr


@pytest.mark.parametrize(
    "arguments", [("replay", "/no/such.npz"), ("store", "verify", "--store", "/proc/version"), ("no-such-command",)]
)
def test_the_process_ends_as_the_command_does(arguments: tuple[str, ...]) -> None:
    ended = subprocess.run([sys.executable, "-m", "vllm_moe_offload", *arguments], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "") and "Traceback" not in ended.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completions_are_offered(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    result = CliRunner().invoke(app, ["--show-completion", shell], prog_name="vllm-moe-offload")
    assert result.exit_code == 0 and "complete" in result.stdout and "vllm-moe-offload" in result.stdout

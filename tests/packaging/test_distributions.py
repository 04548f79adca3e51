"""What is published: the same bytes from the same files, everything that runs, nothing that does not."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import vllm_moe_offload

ROOT = Path(__file__).parents[2]
MOST_BYTES = 2 << 20
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def build(folder: Path) -> dict[str, Path]:
    """Wheel and sdist of this checkout, by the ends of their names."""
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], cwd=ROOT, check=True)
    return {path.suffix: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return build(tmp_path_factory.mktemp("first"))


def source_files() -> set[str]:
    """What the package is made of, as git has it or would have it."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "vllm_moe_offload"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return {name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()}


def test_two_builds_are_byte_for_byte_the_same(
    built: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    again = build(tmp_path)
    assert again.keys() == built.keys() == {".whl", ".gz"}
    for kind, path in built.items():
        assert again[kind].read_bytes() == path.read_bytes()


def test_a_wheel_has_the_whole_package_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built[".whl"]) as wheel:
        names = {name for name in wheel.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    assert names == source_files()
    assert "vllm_moe_offload/py.typed" in names
    assert built[".whl"].stat().st_size < MOST_BYTES


def test_an_sdist_has_what_the_wheel_and_the_tests_are_made_of(built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert source_files() <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/packaging/test_distributions.py"} <= names
    assert not [name for name in names if name.startswith("examples/models/")]
    assert built[".gz"].stat().st_size < MOST_BYTES


def test_there_is_one_version() -> None:
    assert PROJECT["version"] == vllm_moe_offload.__version__


def test_every_requirement_has_a_lower_bound() -> None:
    extras = [name for names in PROJECT["optional-dependencies"].values() for name in names]
    without = [name for name in (*PROJECT["dependencies"], *extras) if ">=" not in name]
    assert not [name for name in without if not name.startswith("types-")]

"""Several processes, one store: one builds, the others wait; a killed builder leaves nothing that is believed."""

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_moe_offload.store import StoreRoot

Spawn = Callable[..., "subprocess.Popen[str]"]
LAYERS, RECORD_BYTES = 6, 5000
BIG_LAYERS, BIG_RECORD_BYTES = 4, 1_500_000
BIG_TOTAL = BIG_LAYERS * 8 * 1_503_232


def expect_line(process: "subprocess.Popen[str]", start: str) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(start):
            return line.strip()
    pytest.fail(f"no line {start!r}: {process.communicate()}")


def test_of_two_processes_one_builds_and_the_other_waits(root: StoreRoot, spawn: Spawn) -> None:
    first = spawn(root.path, LAYERS, RECORD_BYTES, "hold")
    expect_line(first, "building")
    second = spawn(root.path, LAYERS, RECORD_BYTES)
    assert f"is being built by process {first.pid} on" in expect_line(second, "say")
    assert [info.state for info in root.ls()] == ["building"]
    assert root.prunable(everything=True) == []

    told, _ = first.communicate("go\n")
    seen, _ = second.communicate()
    built, opened = told.splitlines()[-1].split(), seen.splitlines()
    assert built[0] == "built"
    assert opened == [f"opened {built[1]}"]


def test_processes_started_together_build_once(root: StoreRoot, spawn: Spawn) -> None:
    outputs = [process.communicate()[0] for process in [spawn(root.path, LAYERS, RECORD_BYTES) for _ in range(4)]]
    last = [output.splitlines()[-1].split() for output in outputs]
    assert sorted(how for how, _ in last) == ["built", "opened", "opened", "opened"]
    assert len({digest for _, digest in last}) == 1


def test_the_next_in_line_builds_when_the_builder_is_killed(root: StoreRoot, spawn: Spawn) -> None:
    first = spawn(root.path, LAYERS, RECORD_BYTES, "hold")
    expect_line(first, "building")
    second = spawn(root.path, LAYERS, RECORD_BYTES)
    expect_line(second, "say")
    first.kill()
    assert second.communicate()[0].splitlines()[-1].startswith("built ")
    assert [info.state for info in root.ls()] == ["complete"]


@pytest.fixture(scope="module")
def big_digest(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of an undisturbed build."""
    folder = tmp_path_factory.mktemp("undisturbed")
    command = [sys.executable, str(Path(__file__).parent / "builder.py"), folder, BIG_LAYERS, BIG_RECORD_BYTES]
    return subprocess.check_output(list(map(str, command)), text=True).split()[-1]


@pytest.mark.parametrize("seed", range(6))
def test_a_builder_killed_anywhere_leaves_nothing_believed(
    root: StoreRoot, spawn: Spawn, seed: int, big_digest: str
) -> None:
    builder = spawn(root.path, BIG_LAYERS, BIG_RECORD_BYTES)
    stop_at = random.Random(seed).randrange(BIG_TOTAL)
    while int(expect_line(builder, "written").split()[1]) < stop_at:
        pass
    builder.kill()
    builder.wait()
    states = [info.state for info in root.ls()]
    assert states in (["leftover"], ["complete"])

    again, _ = spawn(root.path, BIG_LAYERS, BIG_RECORD_BYTES).communicate()
    assert again.split()[-2:] == ["opened" if states == ["complete"] else "built", big_digest]
    assert [info.state for info in root.ls()] == ["complete"]
    assert {path.suffix for path in root.path.iterdir()} == {"", ".lock"}


@pytest.mark.parametrize("stop_before", ["fsync", "write_synced", "sync_folder", "rename", "last_sync"])
def test_a_builder_killed_at_the_end_leaves_all_or_nothing(root: StoreRoot, spawn: Spawn, stop_before: str) -> None:
    builder = spawn(root.path, LAYERS, RECORD_BYTES, env={**os.environ, "DIE_BEFORE": stop_before})
    builder.communicate()
    assert builder.returncode == -signal.SIGKILL
    assert [info.state for info in root.ls()] == ["complete" if stop_before == "last_sync" else "leftover"]
    again, _ = spawn(root.path, LAYERS, RECORD_BYTES).communicate()
    assert again.splitlines()[-1].startswith("opened" if stop_before == "last_sync" else "built")
    assert [info.state for info in root.ls()] == ["complete"]

"""All processes of one engine start know one id, and no other engine has it."""

import os
import subprocess
import sys

import pytest

from vllm_moe_offload.report.engine import VARIABLE, begin_engine, engine_id

CHILD = "from vllm_moe_offload.report.engine import begin_engine, engine_id; print({})"


def in_child(expression: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", CHILD.format(expression)], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")


def test_servers_that_were_launched_take_the_engine_of_the_process_that_launched_them() -> None:
    engine = begin_engine(launches=True)
    assert engine == engine_id() == os.environ[VARIABLE]
    assert in_child("begin_engine(launches=False)") == engine
    assert in_child("engine_id()") == engine, "a worker"


def test_each_engine_that_a_process_configures_is_another() -> None:
    first, second = begin_engine(launches=False), begin_engine(launches=False)
    assert first != second == engine_id()
    assert in_child("engine_id()") == second, "a worker"
    assert in_child("begin_engine(launches=False)") != second, "an engine that a child of this process starts"

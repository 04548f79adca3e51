"""`vllm-moe-offload top`, and `doctor`'s look at running engines, over real report files and a real daemon."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from typer.testing import CliRunner

from tests.daemon.served_daemon import STORE, ServedDaemon
from tests.page.workers import Worker
from vllm_moe_offload.cli import app
from vllm_moe_offload.cli.check import OK, WARNING
from vllm_moe_offload.cli.engines_check import check_engines
from vllm_moe_offload.cli.top import Watch
from vllm_moe_offload.cli.top_view import model_view
from vllm_moe_offload.report import Role, read_reports


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of the reports of this user; no daemon runs at the usual place."""
    monkeypatch.setenv("VLLM_MOE_OFFLOAD_REPORTS", str(tmp_path / "reports"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    return tmp_path / "reports"


@pytest.fixture
def worker(folder: Path) -> Iterator[Worker]:
    made = Worker(folder)
    made.write()
    yield made
    made.close()


def shown(what: RenderableType) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(what)
    return captured.get().replace("\N{NO-BREAK SPACE}", " ")


def run(*arguments: str) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["top", *arguments])


def test_an_engine_is_shown_as_it_works(worker: Worker) -> None:
    watch = Watch(None)
    watch.look()
    for _ in range(30):
        worker.step()
    worker.write(worker.report.time + 10)
    (model,) = watch.look().models
    text = shown(model_view(model))
    stats = worker.stats
    assert text.startswith("model-moe: ") and model.summary.sentence.replace("\N{NO-BREAK SPACE}", " ") in text
    assert "3.0/s" in text, "30 tokens in 10 seconds"
    assert f"{stats.prefetch_useful} / {stats.prefetch_late} / {stats.prefetch_wasted}" in text
    assert "24 slots for 96 experts" in text and "predictor history: on; 412 requests remembered" in text
    assert "cmpl-7a51" in text and "running" in text and "cmpl-19fe" in text and "ended" in text


def test_every_worker_of_an_engine_has_a_line(worker: Worker, folder: Path) -> None:
    other, drafter = Worker(folder, rank=1), Worker(folder, role=Role.DRAFTER)
    other.write()
    drafter.write()
    target, drafting = Watch(None).look().models
    assert all(str(each.report.pid) in shown(model_view(target)) for each in (worker, other))
    assert "drafts for model-moe" in shown(model_view(drafting))
    other.close()
    drafter.close()


def test_once_and_json_say_the_same_and_end(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[Watch.__module__], "_SECOND_SAMPLE_SECONDS", 0.0)
    found = json.loads(run("--json").stdout)
    assert found["models"][0]["name"] == "model-moe" and found["daemon"] is None
    assert found["models"][0]["totals"]["slots"] == worker.stats.slots
    text = run("--once").stdout
    assert "model-moe" in text and "24 slots for 96 experts" in text


def test_without_engines_the_daemon_is_shown(folder: Path) -> None:
    assert "no engine that offloads runs for this user" in run("--once").stdout
    with ServedDaemon(folder.parent / "socket"):
        result = run("--once", "--socket", str(folder.parent / "socket"))
    assert result.exit_code == 0 and "pid " in result.stdout and STORE[:12] in result.stdout


def test_doctor_finds_workers_that_have_lost_threads_or_do_not_report(worker: Worker) -> None:
    (none,) = check_engines([])
    assert none.state == OK and "none" in none.detail
    (well,) = check_engines(read_reports())
    assert well.state == OK and "1, with 1 workers" in well.detail
    worker.stats.failed_threads = 2
    worker.write(time.time() - 60)
    lost, silent = check_engines(read_reports())
    assert lost.state == silent.state == WARNING
    assert "2 of its threads have ended" in lost.detail and "not reported for 60 s" in silent.detail
    assert "pid 4000" in lost.detail and lost.remedy and silent.remedy

"""A report is there while its writer lives, whole, and gone when it does not, however it ended."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from tests.log_lines import log_lines
from tests.report.reports import a_report
from vllm_moe_offload.report import ReportFile, read_reports, reports_folder


def write_and_wait(folder: Path, engine: str, connection: Connection) -> None:
    file = ReportFile(folder, engine)
    file.write(a_report(engine=engine, pid=os.getpid()))
    file.write(a_report(engine=engine, pid=os.getpid(), rank=1))
    connection.send("written")
    connection.recv()
    file.close()
    connection.send("closed")
    connection.recv()


class Writer:
    def __init__(self, folder: Path, engine: str):
        processes = multiprocessing.get_context("fork")
        self._connection, theirs = processes.Pipe()
        self.process = processes.Process(target=write_and_wait, args=(folder, engine, theirs), daemon=True)
        self.process.start()
        theirs.close()
        assert self._connection.recv() == "written"

    def close(self) -> None:
        self._connection.send("close")
        assert self._connection.recv() == "closed"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def test_reports_of_living_processes_are_found_and_those_of_killed_ones_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    assert read_reports(folder) == []
    killed, lives, closed = (Writer(folder, engine) for engine in ("killed", "lives", "closed"))
    assert [report.engine for report in read_reports(folder)] == ["closed", "killed", "lives"]
    closed.close()
    killed.kill()
    assert len(list(folder.iterdir())) == 2
    (report,) = read_reports(folder)
    assert report == a_report(engine="lives", pid=lives.process.pid, rank=1), "written last, and whole"
    assert len(list(folder.iterdir())) == 1, "what was killed has left nothing"
    assert folder.stat().st_mode & 0o777 == 0o700
    for writer in (lives, closed):
        writer.kill()


def test_what_another_version_has_written_is_passed_over_and_named_once(tmp_path: Path) -> None:
    mine = ReportFile(tmp_path, "mine")
    mine.write(a_report())
    other = ReportFile(tmp_path, "other")
    other.write({"engine": 1})  # type: ignore[arg-type]
    with log_lines() as lines:
        assert read_reports(tmp_path) == [a_report()]
        assert read_reports(tmp_path) == [a_report()]
    (line,) = [line for line in lines if "not a report" in line]
    assert str(tmp_path / "other.report") in line
    mine.close()
    other.close()
    other.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="not a folder of this user alone"):
        ReportFile(folder, "name")


def test_the_folder_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VLLM_MOE_OFFLOAD_REPORTS", raising=False)
    assert str(os.geteuid()) in reports_folder().name
    monkeypatch.setenv("VLLM_MOE_OFFLOAD_REPORTS", str(tmp_path))
    assert reports_folder() == tmp_path

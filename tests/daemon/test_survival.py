"""kill -9 at any moment: workers go on with the right records, come back, and leave nothing behind."""

from pathlib import Path

from tests.daemon.killing import run


def test_whoever_dies_nobody_computes_on_a_wrong_record(tmp_path: Path) -> None:
    host = run(tmp_path, kills=12, workers=2, seed=1)
    assert host.failovers > 0 and host.comebacks > 0

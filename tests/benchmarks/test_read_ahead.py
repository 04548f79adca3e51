"""read_ahead.py: the kernel's setting is changed for a while and comes back."""

import os
from pathlib import Path

import pytest
from read_ahead import ReadAhead


def test_what_was_set_before_comes_back(tmp_path: Path) -> None:
    device = tmp_path.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    if not os.access(setting, os.W_OK):
        pytest.skip(f"{setting} cannot be written here")
    before = setting.read_text()
    read_ahead = ReadAhead(tmp_path, int(before) + 64)
    read_ahead.set()
    try:
        assert int(setting.read_text()) == int(before) + 64
    finally:
        read_ahead.restore()
    assert setting.read_text() == before

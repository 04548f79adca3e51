"""memory.py: a process tree's peak is seen, and a memory limit kills and says so."""

import subprocess
import sys
from pathlib import Path

import pytest
from memory import MemoryLimit, mapped_file_bytes

from vllm_moe_offload.bench.memory import PeakSampler

MIB = 1 << 20
# A child of the sampled process holds the memory until it is told to end.
ALLOCATE = "import sys; held = bytearray(b'x') * (200 << 20); print('ready', flush=True); sys.stdin.read()"
PARENT = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {ALLOCATE!r}]))"


def test_the_peak_includes_descendants() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        with PeakSampler(process.pid) as sampler:
            while sampler.peak_bytes < 200 * MIB and process.poll() is None:
                pass
            process.stdin.close()
    assert 200 * MIB <= sampler.peak_bytes < 300 * MIB


def test_a_process_over_the_limit_is_killed_and_counted() -> None:
    try:
        limit = MemoryLimit("test", 64 * MIB)
    except OSError as error:
        pytest.skip(f"no memory cgroups here: {error}")
    try:
        enter = f"import os, pathlib; pathlib.Path({str(limit.enter_file())!r}).write_text(str(os.getpid()))\n"
        done = subprocess.run([sys.executable, "-c", enter + ALLOCATE], stdin=subprocess.DEVNULL, capture_output=True)
        assert done.returncode == -9
        assert limit.kills() == 1
    finally:
        limit.remove()
    assert not Path(limit.path).exists()


def test_mapped_files_count_but_for_those_in_folders_left_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 8 * MIB)
    code = (
        f"import mmap, sys; file = open({str(tmp_path / 'file')!r}, 'rb'); "
        "view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ); view.read(); print('ready', flush=True); "
        "sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdout.readline()
        everything, besides = mapped_file_bytes(process.pid, []), mapped_file_bytes(process.pid, [tmp_path])
        process.stdin.close()
    assert everything - besides == 8 * MIB
    assert besides > 0

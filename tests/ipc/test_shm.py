"""Shared memory: one memory for all who map it, of a size nobody can change, remapped in place under living arrays."""

import fcntl
import gc
import mmap
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from vllm_moe_offload.errors import ConfigError
from vllm_moe_offload.ipc.shm import Mapping, PeerMemoryError, whole_pages

PAGE = mmap.PAGESIZE
MIB = 2**20


@pytest.fixture
def shared() -> Iterator[Mapping]:
    mapping = Mapping.create("test", 8 * PAGE)
    yield mapping
    mapping.close()


def attach(mapping: Mapping, writable: bool = False) -> Mapping:
    return Mapping.attach(os.dup(mapping.fd), mapping.size, writable)


def everything(mapping: Mapping) -> np.ndarray:
    return mapping.array(0, np.uint8, (mapping.size,))


def pages_taken(mapping: Mapping) -> int:
    return os.fstat(mapping.fd).st_blocks * 512 // PAGE


def in_other_process(code: str, *arguments: int, fds: tuple[int, ...]) -> subprocess.CompletedProcess[str]:
    prelude = "import os, sys, numpy as np\nfrom vllm_moe_offload.ipc.shm import Mapping\n"
    command = [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, pass_fds=fds, capture_output=True, text=True, timeout=60)


def test_what_one_process_writes_the_other_reads(shared: Mapping) -> None:
    everything(shared)[:3] = (1, 2, 3)
    code = """
        fd, size = map(int, sys.argv[1:])
        words = Mapping.attach(fd, size, writable=True).array(0, np.uint8, (size,))
        print(words[:3].tolist())
        words[-1] = 9
    """
    ran = in_other_process(code, shared.fd, shared.size, fds=(shared.fd,))
    assert ran.stdout == "[1, 2, 3]\n", ran.stderr
    assert everything(shared)[-1] == 9


def test_a_reader_of_shared_memory_cannot_write_it(shared: Mapping) -> None:
    code = """
        fd, size = map(int, sys.argv[1:])
        words = Mapping.attach(fd, size, writable=False).array(0, np.uint8, (size,))
        print(words[0], flush=True)
        words[0] = 1
    """
    ran = in_other_process(code, shared.fd, shared.size, fds=(shared.fd,))
    assert (ran.stdout, ran.returncode) == ("0\n", -signal.SIGSEGV)
    assert everything(shared)[0] == 0


def test_a_reader_descriptor_gives_no_way_to_write(shared: Mapping) -> None:
    everything(shared)[:] = 7
    assert (everything(Mapping.attach(shared.reader_descriptor(), shared.size, writable=False)) == 7).all()
    with pytest.raises(PeerMemoryError, match="not open for writing"):
        Mapping.attach(shared.reader_descriptor(), shared.size, writable=True)


def test_memory_has_a_name_that_operators_can_find(shared: Mapping) -> None:
    assert any("/memfd:moe-offload:test" in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_sizes_are_whole_pages() -> None:
    assert [whole_pages(n) for n in (0, 1, PAGE, PAGE + 1)] == [PAGE, PAGE, PAGE, 2 * PAGE]


def test_nobody_changes_the_size(shared: Mapping) -> None:
    for size in (0, shared.size - 1, shared.size + PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(shared.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def unsealed(size: int) -> int:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd


def half_sealed(size: int) -> int:
    fd = unsealed(size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    return fd


def of_size(size: int) -> int:
    mapping = Mapping.create("other", size)
    return mapping.fd


def ordinary_file(size: int) -> int:
    fd = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    os.ftruncate(fd, size)
    return fd


@pytest.mark.parametrize(
    ("fd", "reason"),
    [
        (lambda: unsealed(8 * PAGE), "lacks the seals"),
        (lambda: half_sealed(8 * PAGE), "lacks the seals"),
        (lambda: of_size(7 * PAGE), f"{7 * PAGE} bytes where {8 * PAGE}"),
        (lambda: of_size(9 * PAGE), f"{9 * PAGE} bytes where {8 * PAGE}"),
        (lambda: ordinary_file(8 * PAGE), "no memfd"),
        (lambda: os.open("/dev/zero", os.O_RDWR), "no memfd"),
        (lambda: os.pipe2(os.O_CLOEXEC)[0], "no memfd"),
    ],
)
def test_memory_a_peer_could_take_away_is_not_mapped(shared: Mapping, fd, reason: str) -> None:
    everything(shared)[:] = 5
    reader = attach(shared)
    for take in (lambda number: Mapping.attach(number, shared.size, False), reader.replace):
        number = fd()
        with pytest.raises(PeerMemoryError, match=reason):
            take(number)
        with pytest.raises(OSError):
            os.fstat(number)
    assert (everything(reader) == 5).all()


def test_private_memory_keeps_contents_and_arrays_and_hides_what_is_written(shared: Mapping) -> None:
    everything(shared)[:] = 1
    reader = attach(shared)
    seen = everything(reader)
    address = seen.ctypes.data
    reader.become_private()
    assert (seen == 1).all() and seen.ctypes.data == address
    seen[:PAGE] = 2
    assert (seen[:PAGE] == 2).all() and (everything(shared) == 1).all()


def test_memory_larger_than_the_machine_becomes_private() -> None:
    mapping = Mapping.create("large", 4 * (psutil.virtual_memory().total + psutil.swap_memory().total))
    reader = attach(mapping)
    reader.become_private()
    last = reader.array(reader.size - PAGE, np.uint8, (PAGE,))
    last[:] = 3
    assert (last == 3).all() and pages_taken(mapping) <= 1
    mapping.close()


def test_other_memory_appears_at_the_same_address(shared: Mapping) -> None:
    everything(shared)[:] = 1
    reader = attach(shared)
    seen = everything(reader)
    reader.become_private()
    seen[:] = 2
    other = Mapping.create("other", shared.size)
    everything(other)[:] = 3
    old = reader.fd
    reader.replace(other.reader_descriptor())
    assert (seen == 3).all() and not reader.writable
    everything(other)[0] = 4
    assert seen[0] == 4 and (everything(shared) == 1).all()
    with pytest.raises(OSError):
        os.fstat(old)
    other.close()


def test_a_punched_hole_gives_back_pages_and_spares_neighbours(shared: Mapping) -> None:
    everything(shared)[:] = 1
    reader = attach(shared)
    assert pages_taken(shared) == 8
    shared.punch(PAGE - 100, 2 * PAGE)
    assert pages_taken(shared) == 7
    seen = everything(reader)
    assert not seen[PAGE - 100 : 3 * PAGE - 100].any()
    assert seen[: PAGE - 100].all() and seen[3 * PAGE - 100 :].all()
    with pytest.raises(OSError):
        Mapping.attach(shared.reader_descriptor(), shared.size, False).punch(0, PAGE)


def test_pages_are_taken_when_written_or_allocated(shared: Mapping) -> None:
    assert pages_taken(shared) == 0
    shared.allocate(0, PAGE + 1)
    assert pages_taken(shared) == 2
    everything(shared)[4 * PAGE] = 1
    assert pages_taken(shared) == 3


def test_no_room_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match=r"no room for shared memory huge of .* smaller --cache"):
        Mapping.create("huge", 1 << 60)


def test_memory_that_is_not_there_is_an_error_before_it_is_a_crash() -> None:
    """With overcommitment by the group's limit and no killing, what a page fault would not survive, allocate does."""
    root = Path("/sys/fs/cgroup/memory")
    group = root / f"moe-offload-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.oom_control").write_text("1")
        (group / "memory.limit_in_bytes").write_text(str(128 * MIB))
    except OSError:
        if group.exists():
            group.rmdir()
        pytest.skip("no memory control groups with memory.oom_control to make here")
    try:
        code = """
            from vllm_moe_offload.errors import ConfigError
            mapping = Mapping.create("test", 512 << 20)
            mapping.allocate(0, 16 << 20)
            try:
                mapping.allocate(0, 512 << 20)
            except ConfigError as error:
                print(error)
            mapping.allocate(16 << 20, 16 << 20)
        """
        join = f"open('{group}/cgroup.procs', 'w').write(str(__import__('os').getpid()))"
        ran = in_other_process(f"{join}\n{textwrap.dedent(code)}", fds=())
    finally:
        group.rmdir()
    assert "512.0 MiB (Cannot allocate memory)" in ran.stdout or "512.0 MiB (No space left" in ran.stdout, ran.stderr
    assert ran.returncode == 0


def mapped(name: str) -> bool:
    return f"/memfd:moe-offload:{name}" in Path("/proc/self/maps").read_text()


def test_memory_stays_as_long_as_an_array_over_it() -> None:
    mapping = Mapping.create("lasting", PAGE)
    words = mapping.array(0, np.uint8, (PAGE,))[3:5]
    words[:] = 6
    mapping.close()
    del mapping
    gc.collect()
    assert (words == 6).all() and mapped("lasting")
    del words
    gc.collect()
    assert not mapped("lasting")


def test_arrays_lie_inside(shared: Mapping) -> None:
    for offset, shape in ((-1, (1,)), (0, (shared.size + 1,)), (shared.size, (1,)), (8, (shared.size // 8, 8))):
        with pytest.raises(ValueError, match="not inside"):
            shared.array(offset, np.uint8, shape)

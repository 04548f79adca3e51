"""What `doctor` says of a GPU, with a driver that answers as a test has it. No GPU is asked."""

import ctypes
import mmap
from pathlib import Path

import pytest

from vllm_moe_offload.cli.check import OK, WARNING
from vllm_moe_offload.cli.gpu_check import Driver, DriverError, check_gpu, check_link

BUS = "0000:01:00.0"


class Library:
    """The part of NVIDIA's C interface that `doctor` calls. ``refusing`` maps a function to the code it answers."""

    def __init__(self, gpus: int = 1, capability: tuple[int, int] = (8, 9), refusing: dict[str, int] | None = None):
        self.gpus, self.capability, self.refusing = gpus, capability, refusing or {}
        self.contexts = 0
        self.registered: list[int] = []

    def __getattribute__(self, name: str):
        code = object.__getattribute__(self, "refusing").get(name) if name.startswith("cu") else None
        return object.__getattribute__(self, name) if code is None else lambda *arguments: code

    def cuInit(self, flags):  # noqa: N802
        return 0

    def cuGetErrorName(self, code, name):  # noqa: N802
        name._obj.value = {1: b"CUDA_ERROR_INVALID_VALUE", 801: b"CUDA_ERROR_NOT_SUPPORTED"}.get(code)
        return 0

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.gpus
        return 0

    def cuDriverGetVersion(self, number):  # noqa: N802
        number._obj.value = 12080
        return 0

    def cuDeviceGet(self, device, number):  # noqa: N802
        device._obj.value = 7 + number
        return 0

    def cuDeviceGetName(self, name, size, device):  # noqa: N802
        name.value = b"Some GPU %d" % device
        return 0

    def cuDeviceGetPCIBusId(self, bus, size, device):  # noqa: N802
        bus.value = BUS.upper().encode()
        return 0

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802
        memory._obj.value = 24 << 30
        return 0

    def cuDeviceGetAttribute(self, value, which, device):  # noqa: N802
        value._obj.value = self.capability[which - 75]
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):  # noqa: N802
        self.contexts += 1
        return 0

    def cuCtxSetCurrent(self, context):  # noqa: N802
        return 0

    def cuMemHostRegister_v2(self, address, size, flags):  # noqa: N802
        ctypes.memset(address, 1, size.value)
        self.registered.append(address.value)
        return 0

    def cuMemHostUnregister(self, address):  # noqa: N802
        self.registered.remove(address.value)
        return 0

    def cuDevicePrimaryCtxRelease_v2(self, device):  # noqa: N802
        self.contexts -= 1
        return 0


def link(folder: Path, width: str = "16", speed: str = "16.0 GT/s PCIe") -> Path:
    place = folder / BUS
    place.mkdir()
    for name, value in (("max_link_speed", speed), ("current_link_width", width), ("max_link_width", "16")):
        (place / name).write_text(value + "\n")
    return place


def findings(library: Library, sysfs: Path) -> dict[str, tuple[str, str]]:
    return {check.subject: (check.state, check.sentence) for check in check_gpu(Driver(library), sysfs)}


def test_a_gpu_that_all_is_well_with_is_described(tmp_path: Path) -> None:
    link(tmp_path)
    library = Library()
    found = findings(library, tmp_path)
    assert found["GPU"] == (OK, "Some GPU 7, 24.0 GiB, compute capability 8.9")
    assert found["GPU link"] == (OK, "up to 16.0 GT/s, 16 lanes")
    state, detail = found["host memory for the GPU"]
    assert state == OK and "locked memory" in detail
    assert "runs CUDA 12.8" in found["GPU driver"][1]
    assert library.contexts == 0 and library.registered == []


def test_every_gpu_is_described(tmp_path: Path) -> None:
    names = [check.detail[:10] for check in check_gpu(Driver(Library(gpus=2)), tmp_path) if check.subject == "GPU"]
    assert names == ["Some GPU 7", "Some GPU 8"]


def test_a_torch_without_cuda_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_moe_offload.cli.gpu_check.version", lambda name: "2.13.0+cpu")
    state, detail = findings(Library(), tmp_path)["GPU driver"]
    assert state == WARNING and "is built for the CPU" in detail and "pip install" in detail
    monkeypatch.setattr("vllm_moe_offload.cli.gpu_check.version", lambda name: "2.13.0")
    assert findings(Library(), tmp_path)["GPU driver"] == (OK, "runs CUDA 12.8")


def test_an_old_gpu_is_a_warning(tmp_path: Path) -> None:
    state, detail = findings(Library(capability=(7, 5)), tmp_path)["GPU"]
    assert state == WARNING and "compute capability 7.5" in detail and "8.0 and newer" in detail


@pytest.mark.parametrize(("lanes", "state", "slower"), [("8", WARNING, "2 x"), ("4", WARNING, "4 x"), ("16", OK, "")])
def test_a_narrow_link_is_told_with_what_it_costs(tmp_path: Path, lanes: str, state: str, slower: str) -> None:
    check = check_link(link(tmp_path, lanes))
    assert check.state == state and slower in check.detail


def test_a_link_that_is_not_in_sysfs_is_unknown(tmp_path: Path) -> None:
    assert check_link(tmp_path / "absent").state == OK
    assert check_link(link(tmp_path, width="Unknown")).detail == "unknown: not in sysfs"


def test_refused_registration_names_the_reason_and_leaves_no_context(tmp_path: Path) -> None:
    library = Library(refusing={"cuMemHostRegister_v2": 801})
    state, detail = findings(library, tmp_path)["host memory for the GPU"]
    assert state == WARNING and "CUDA_ERROR_NOT_SUPPORTED" in detail and "ulimit -l" in detail
    assert library.contexts == 0


def test_a_driver_that_fails_is_a_warning_and_one_that_finds_nothing_is_quiet(tmp_path: Path) -> None:
    (check,) = check_gpu(Driver(Library(refusing={"cuDeviceGetName": 999})), tmp_path)
    assert check.state == WARNING and "error 999" in check.detail and "nvidia-smi" in check.remedy
    with pytest.raises(DriverError, match="CUDA_ERROR_INVALID_VALUE"):
        Driver(Library(refusing={"cuInit": 1}))
    (check,) = check_gpu(None, tmp_path)
    assert check.state == OK


def test_memory_that_was_tried_can_be_given_back() -> None:
    with mmap.mmap(-1, 1 << 16) as memory:
        Driver(Library()).try_to_register(memory)
    assert memory.closed

"""What `doctor` says of a GPU, asked of its driver without torch. It must never raise, and gives back what it tries."""

import ctypes
import mmap
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from ..sizes import size_text
from .check import OK, WARNING, Check
from .process_check import lock_limit

_TRIED_BYTES = 4 << 20
_OLDEST = (8, 0)
"""Compute capability: the oldest that the plugin's kernels are compiled for."""
_MAJOR, _MINOR = 75, 76
"""Numbers of attributes in the driver's interface."""
_PORTABLE_AND_MAPPED = 3
_SYSFS = Path("/sys/bus/pci/devices")


class Gpu(NamedTuple):
    """What the driver says of one GPU."""

    name: str
    capability: tuple[int, int]
    memory: int
    """Bytes."""
    bus: str
    """Its place on the PCI bus, as sysfs names it."""


class DriverError(Exception):
    """The driver answered with an error, whose name this is."""


class Driver:
    """NVIDIA's driver, through its C interface.

    Args:
        library: ``libcuda``, loaded.
    """

    def __init__(self, library: Any):
        self._library = library
        self._call("cuInit", 0)

    @classmethod
    def load(cls) -> "Driver | None":
        """The driver of this machine; None if there is none, or it finds no GPU."""
        try:
            driver = cls(ctypes.CDLL("libcuda.so.1"))
            return driver if driver.count() else None
        except (OSError, DriverError):
            return None

    def count(self) -> int:
        """GPUs this process may use."""
        return self._integer("cuDeviceGetCount")

    def cuda(self) -> tuple[int, int]:
        """The newest CUDA that the driver runs."""
        number = self._integer("cuDriverGetVersion")
        return number // 1000, number % 1000 // 10

    def gpu(self, number: int) -> Gpu:
        device = self._integer("cuDeviceGet", number)
        name, bus = ctypes.create_string_buffer(128), ctypes.create_string_buffer(32)
        memory = ctypes.c_size_t()
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDeviceGetPCIBusId", bus, len(bus), device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        major, minor = (self._integer("cuDeviceGetAttribute", which, device) for which in (_MAJOR, _MINOR))
        return Gpu(name.value.decode(), (major, minor), memory.value, bus.value.decode().lower())

    def try_to_register(self, memory: mmap.mmap) -> None:
        """Make ``memory`` readable for the first GPU, and take it back.

        Raises:
            DriverError: the driver refuses.
        """
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        device, context = self._integer("cuDeviceGet", 0), ctypes.c_void_p()
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        try:
            self._call("cuCtxSetCurrent", context)
            self._call("cuMemHostRegister_v2", address, ctypes.c_size_t(len(memory)), _PORTABLE_AND_MAPPED)
            self._call("cuMemHostUnregister", address)
        finally:
            self._call("cuDevicePrimaryCtxRelease_v2", device)

    def _integer(self, function: str, *arguments: Any) -> int:
        answer = ctypes.c_int()
        self._call(function, ctypes.byref(answer), *arguments)
        return answer.value

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(name))
            raise DriverError((name.value or b"").decode() or f"error {code}")


def check_gpu(driver: Driver | None, sysfs: Path = _SYSFS) -> Iterator[Check]:
    """Findings about each GPU, its link, and host memory that it is to read; one quiet line where there is none."""
    if driver is None:
        yield Check("GPU", OK, "none that NVIDIA's driver knows of")
        return
    try:
        gpus = [driver.gpu(number) for number in range(driver.count())]
        major, minor = driver.cuda()
    except DriverError as error:
        yield Check("GPU", WARNING, f"its driver answers {error}", "see nvidia-smi, and install the driver anew")
        return
    for gpu in gpus:
        yield _check_model(gpu)
        yield check_link(sysfs / gpu.bus)
    yield _check_driver(major, minor)
    yield _check_registration(driver)
    if _in_wsl():
        detail = "pins host memory only on request, without which every load is copied once more"
        yield Check("WSL", WARNING, detail, "set VLLM_WSL2_ENABLE_PIN_MEMORY=1")


def _check_model(gpu: Gpu) -> Check:
    capability = ".".join(map(str, gpu.capability))
    what = f"{gpu.name}, {size_text(gpu.memory)}, compute capability {capability}"
    if gpu.capability < _OLDEST:
        oldest = ".".join(map(str, _OLDEST))
        return Check("GPU", WARNING, f"{what}; kernels are made for {oldest} and newer", "offload on the CPU instead")
    return Check("GPU", OK, what)


def check_link(place: Path) -> Check:
    """The link of the GPU whose folder in sysfs is ``place``. It is slower while idle, but not narrower."""
    subject = "GPU link"
    try:
        speed, width, most = (
            (place / name).read_text().strip() for name in ("max_link_speed", "current_link_width", "max_link_width")
        )
        lanes, possible = int(width), int(most)
    except (OSError, ValueError):
        return Check(subject, OK, "unknown: not in sysfs")
    what = f"up to {speed.removesuffix(' PCIe')}, {lanes} lanes"
    if lanes < possible:
        slower = f"of {possible}: loads take {possible / lanes:.0f} x as long"
        return Check(subject, WARNING, f"{what} {slower}", "put the GPU into a slot with all lanes")
    return Check(subject, OK, what)


def _check_driver(major: int, minor: int) -> Check:
    subject, what = "GPU driver", f"runs CUDA {major}.{minor}"
    try:
        torch = version("torch")
    except PackageNotFoundError:
        return Check(subject, OK, what)
    if "+cpu" in torch:
        detail = f"{what}, but torch {torch} is built for the CPU, and uses no GPU"
        return Check(subject, WARNING, detail, "pip install 'vllm-moe-offload[gpu]' in an environment of its own")
    return Check(subject, OK, what)


def _check_registration(driver: Driver) -> Check:
    """Without it the host copies every record once more, and the device cannot load by itself."""
    subject = "host memory for the GPU"
    limit = lock_limit()
    try:
        with mmap.mmap(-1, _TRIED_BYTES) as memory:
            driver.try_to_register(memory)
    except (DriverError, OSError, BufferError) as error:
        slower = "experts are loaded at the host's pace"
        detail = f"cannot be registered ({error}): {slower}; {limit}"
        return Check(subject, WARNING, detail, "try `ulimit -l unlimited`, or LimitMEMLOCK=infinity in a service")
    return Check(subject, OK, f"can be registered; {limit}")


def _in_wsl() -> bool:
    try:
        return "microsoft" in Path("/proc/version").read_text().lower()
    except OSError:
        return False

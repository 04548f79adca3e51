"""The calls of the CUDA or HIP runtime that torch does not offer, through the library that torch has loaded.

All of them go through one library, since each loaded copy of a runtime keeps an error of its own until it is asked for.
"""

import ctypes
import re
from pathlib import Path
from typing import Protocol

from .base import DeviceError

PORTABLE, MAPPED, READ_ONLY = 1, 2, 8
"""Flags of ``host_register``, the same in CUDA and HIP."""

_BY_ADDRESS = 4
"""The kind of a copy whose direction follows from the addresses, the same in CUDA and HIP."""

_READ_ONLY_SUPPORTED = 113
"""``cudaDevAttrHostRegisterReadOnlySupported``; HIP has no such attribute."""

_ARGUMENTS: dict[str, tuple[type, ...]] = {
    "HostRegister": (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint),
    "HostUnregister": (ctypes.c_void_p,),
    "HostGetDevicePointer": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    "MemcpyAsync": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p),
    "DeviceGetAttribute": (ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
    "GetLastError": (),
}


class RuntimeCallError(Exception):
    """A call of the runtime returned an error, which has been cleared; the message is the driver's."""


class Library(Protocol):
    """A loaded shared library."""

    def __getattr__(self, name: str) -> "ctypes._NamedFuncPointer": ...


class CudaRuntime:
    """Each call raises ``RuntimeCallError`` unless it succeeds.

    Args:
        library: the runtime.
        prefix: of its functions: ``cuda`` or ``hip``.
    """

    def __init__(self, library: Library, prefix: str):
        self._prefix = prefix
        self._functions = {name: getattr(library, prefix + name) for name in _ARGUMENTS}
        for name, arguments in _ARGUMENTS.items():
            self._functions[name].argtypes = arguments
            self._functions[name].restype = ctypes.c_int
        self._error_string = getattr(library, f"{prefix}GetErrorString")
        self._error_string.argtypes, self._error_string.restype = (ctypes.c_int,), ctypes.c_char_p

    @classmethod
    def loaded(cls, hip: bool) -> "CudaRuntime":
        """The runtime that this process has loaded.

        Raises:
            DeviceError: it has loaded none as a library of its own.
        """
        name, prefix = ("libamdhip64", "hip") if hip else ("libcudart", "cuda")
        maps = Path("/proc/self/maps").read_text()
        found = re.search(rf"^(?:\S+ +){{5}}(/.*/{name}[^/]*\.so[^/]*)$", maps, re.MULTILINE)
        if found is None:
            raise DeviceError(f"no {name} is loaded in this process: torch was built in a way that is not supported")
        return cls(ctypes.CDLL(found[1]), prefix)

    def host_register(self, address: int, nbytes: int, flags: int) -> None:
        self._call("HostRegister", address, nbytes, flags)

    def host_unregister(self, address: int) -> None:
        self._call("HostUnregister", address)

    def device_address(self, address: int) -> int:
        """Where the device sees registered host memory."""
        found = ctypes.c_void_p()
        self._call("HostGetDevicePointer", ctypes.addressof(found), address, 0)
        return found.value or 0

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue a copy between any two addresses."""
        self._call("MemcpyAsync", target, source, nbytes, _BY_ADDRESS, stream)

    def registers_read_only(self, device: int) -> bool:
        """Whether ``READ_ONLY`` may be asked for."""
        if self._prefix == "hip":
            return False
        found = ctypes.c_int()
        self._call("DeviceGetAttribute", ctypes.addressof(found), _READ_ONLY_SUPPORTED, device)
        return bool(found.value)

    def _call(self, name: str, *arguments: int) -> None:
        code = self._functions[name](*arguments)
        if code != 0:
            self._functions["GetLastError"]()
            text = self._error_string(code).decode(errors="replace")
            raise RuntimeCallError(f"{self._prefix}{name}: {text} ({code})")

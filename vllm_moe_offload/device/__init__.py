"""Devices whose kernels and copies run behind the host: their memory, streams and events, and host memory they read.

It must never decide what is copied, nor let a copy that was refused pass for one that was made.
"""

from .base import Device, DeviceError, Event, OutOfDeviceMemoryError, RegistrationError, Stream
from .registered import RegisteredMemory
from .transfer import Copy, SpeculativeCopy, TransferQueue

__all__ = [
    "Copy",
    "Device",
    "DeviceError",
    "Event",
    "OutOfDeviceMemoryError",
    "RegisteredMemory",
    "RegistrationError",
    "SpeculativeCopy",
    "Stream",
    "TransferQueue",
]

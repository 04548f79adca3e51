"""The contract of a device whose kernels and copies run behind the host."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import OffloadError

if TYPE_CHECKING:
    import torch


class DeviceError(OffloadError):
    """Work of the device failed. It cannot be used any more: the process has to end."""


class OutOfDeviceMemoryError(OffloadError):
    """The device has less free memory than was asked for.

    Args:
        wanted: bytes asked for.
        free: bytes the device had.
    """

    def __init__(self, wanted: int, free: int):
        super().__init__(f"{wanted} bytes of device memory are wanted, {free} are free")
        self.wanted, self.free = wanted, free


class RegistrationError(OffloadError):
    """Host memory could not be made readable for the device; the driver's reason is in the message."""


class Stream(Protocol):
    """Work that the device does in the order in which it was enqueued."""


class Event(Protocol):
    """A place in a stream: finished when all work enqueued there before it is."""


class Device(ABC):
    """Memory, streams and events of one device.

    *Threads.* All methods are for the thread that runs the forward pass.

    *Order.* Work of one stream runs in the order enqueued; that of two streams in any order that waits allow. Nothing
    that is enqueued is done when the call returns, and nothing says that it has begun.

    *Failures.* A copy that cannot be made as asked raises at once. What fails later is raised as ``DeviceError`` by
    any later call, and by every one after it.
    """

    main: Stream
    """Where vLLM's kernels run while its forward pass does."""

    @abstractmethod
    def allocate(self, nbytes: int) -> "torch.Tensor":
        """``[nbytes]`` uint8 on the device, zero, starting on a multiple of 256.

        Raises:
            OutOfDeviceMemoryError: there is not as much.
        """

    @abstractmethod
    def allocate_pinned(self, nbytes: int) -> "torch.Tensor":
        """``[nbytes]`` uint8 on the host, zero, which copies read and write: for a few bytes, as expert numbers.

        It stays as long as the device.

        Raises:
            RegistrationError: the driver refuses.
        """

    @abstractmethod
    def register(self, memory: NDArray[np.uint8]) -> None:
        """Let kernels and copies of the device read ``memory`` (contiguous, on the host) where it lies.

        Raises:
            RegistrationError: the driver refuses; nothing is registered then.
        """

    @abstractmethod
    def unregister(self, memory: NDArray[np.uint8]) -> None:
        """Undo ``register`` of the same memory. No work that reads it may be enqueued or under way."""

    @abstractmethod
    def address(self, memory: NDArray[np.uint8]) -> int:
        """The address at which kernels of the device read ``memory``, which lies in what has been registered."""

    @abstractmethod
    def stream(self, name: str, urgent: bool = False) -> Stream:
        """A stream of its own; of two with work to do, an urgent one goes first."""

    @abstractmethod
    def copy(self, stream: Stream, target: "torch.Tensor", source: "torch.Tensor") -> None:
        """Enqueue a copy of ``source`` to ``target``: ``[nbytes]`` uint8 each, contiguous, on the host or the device.

        The caller keeps both until the copy is finished. On the host each lies in what has been registered at once, or
        in what ``allocate_pinned`` gave.

        Raises:
            ValueError: sizes differ, one is not contiguous bytes, or lies elsewhere on the host.
        """

    @abstractmethod
    def record(self, stream: Stream) -> Event:
        """An event behind everything enqueued on ``stream`` so far."""

    @abstractmethod
    def timestamp(self, stream: Stream) -> Event:
        """As ``record``, of which the device notes when it is reached."""

    @abstractmethod
    def seconds(self, begin: Event, end: Event) -> float:
        """Between two timestamps that have been reached."""

    @abstractmethod
    def wait(self, stream: Stream, event: Event) -> None:
        """Work enqueued on ``stream`` from now on starts after ``event``. The host does not wait."""

    @abstractmethod
    def finished(self, event: Event) -> bool:
        """Whether ``event`` has been reached. The host does not wait."""

    @abstractmethod
    def synchronize(self, event: Event) -> None:
        """The host waits for ``event``.

        Raises:
            DeviceError: work of the device has failed.
        """

"""The order of kernels, as events: where steps begin, and where the host is now."""

from ..device.base import Device, Event


class KernelClock:
    """Counts steps, and marks in the order of kernels where they begin."""

    def __init__(self, device: Device):
        self._device = device
        self.step = 0
        self.step_began = self.now()

    def begin_step(self) -> None:
        """Kernels enqueued from now on belong to another step."""
        self.step += 1
        self.step_began = self.now()

    def now(self) -> Event:
        """Behind all kernels enqueued so far."""
        return self._device.record(self._device.main)

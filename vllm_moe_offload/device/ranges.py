"""Which parts of the host's memory copies may use, and where the device sees them."""

from bisect import bisect_right


class AddressRanges:
    """Disjoint ranges of addresses, each at an address of the device's own."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._addresses: list[int] = []

    def add(self, start: int, nbytes: int, address: int) -> None:
        at = bisect_right(self._starts, start)
        assert at == 0 or self._ends[at - 1] <= start, "ranges are disjoint"
        assert at == len(self._starts) or start + nbytes <= self._starts[at], "ranges are disjoint"
        self._starts.insert(at, start)
        self._ends.insert(at, start + nbytes)
        self._addresses.insert(at, address)

    def remove(self, start: int, nbytes: int) -> None:
        """Forget the range that was added with these bounds."""
        at = bisect_right(self._starts, start) - 1
        assert at >= 0 and (self._starts[at], self._ends[at]) == (start, start + nbytes), "a whole range is removed"
        del self._starts[at], self._ends[at], self._addresses[at]

    def address(self, start: int, nbytes: int) -> int | None:
        """Where the device sees ``start``; None if the bytes do not lie in one range."""
        at = bisect_right(self._starts, start) - 1
        if at < 0 or start + nbytes > self._ends[at]:
            return None
        return self._addresses[at] + start - self._starts[at]

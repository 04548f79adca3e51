"""What became of loads, told at one place to the counters and to whoever looks ahead. It must never decide anything."""

from dataclasses import dataclass, field

from ..observe import Counters
from ..prefetch.anticipation import Anticipation
from ..prefetch.estimates import blend


@dataclass
class Ledger:
    """One worker's books."""

    counters: Counters = field(default_factory=Counters)
    anticipation: Anticipation | None = None
    load_seconds: float = 0.0
    """Running mean of what a record takes while others are loaded too."""

    def demanded(self, loads: int, seconds: float) -> None:
        """The pass waited ``seconds`` for ``loads`` that nobody had started."""
        self.counters.stall_seconds += seconds
        self._note_load(loads, seconds)
        if self.anticipation is not None and loads:
            self.anticipation.note_demand(loads, seconds)

    def loaded_meanwhile(self, loads: int, seconds: float) -> None:
        """``loads`` that nobody had started took the loader ``seconds``; what the pass ``waited`` is told apart."""
        self._note_load(loads, seconds)
        if self.anticipation is not None:
            self.anticipation.note_loads(loads, seconds)

    def waited(self, seconds: float) -> None:
        """The pass waited for loads that were on their way."""
        self.counters.stall_seconds += seconds
        if self.anticipation is not None:
            self.anticipation.note_stall(seconds)

    def loaded(self, records: int, record_bytes: int, failed: int = 0) -> None:
        """So many reads have ended."""
        self.counters.loads += records
        self.counters.loaded_bytes += records * record_bytes
        self.counters.failed_loads += failed

    def guesses_used(self, useful: int, late: int, waited_seconds: float) -> None:
        """A layer needed experts that had been guessed: so many were there, so many were waited for, all together."""
        if useful > 0:
            self.counters.prefetch_useful += useful
            if self.anticipation is not None:
                self.anticipation.note_useful(useful)
        if late > 0:
            self.counters.prefetch_late += late
            if self.anticipation is not None:
                self.anticipation.note_late(late, waited_seconds)

    def guesses_wasted(self, count: int) -> None:
        """So many guesses lost their slots before anyone used them."""
        if count > 0:
            self.counters.prefetch_wasted += count
            if self.anticipation is not None:
                self.anticipation.note_wasted(count)

    def _note_load(self, loads: int, seconds: float) -> None:
        if loads:
            mean = seconds / loads
            self.load_seconds = blend(self.load_seconds, mean) if self.load_seconds else mean

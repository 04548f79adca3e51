"""What loads and layers take on this machine, as measured so far. Told seconds and bytes; never reads a clock."""

from dataclasses import dataclass

_MEMORY = 0.05
"""Weight of the newest measurement in a running mean."""
_THINKING_SHARE = 0.1
"""Looking farther than one layer ahead may take this share of a layer's time."""


@dataclass
class Estimates:
    """Running means the planner decides by. The initial values are used until the first measurement."""

    load_seconds: float
    """One record through an idle link."""
    layer_seconds: float
    """One layer of a step, stalls excluded."""
    chunk_seconds: float
    """The part of a transfer that cannot be interrupted: a guess may delay a demand by this much."""
    busy: float = 0.5
    """Share of time the link moves anything."""
    demands_per_layer: float = 0.5
    """Demand loads per layer of a step."""

    def layers_worth_asking(self, ask_seconds: float) -> int:
        """How many layers ahead to ask about: as far as a load takes, if asking is cheap beside the layers."""
        layers = 1 + int(self.load_seconds / max(self.layer_seconds, 1e-6))
        affordable = int(_THINKING_SHARE * self.layer_seconds / ask_seconds) if ask_seconds else layers
        return max(1, min(layers, affordable))

    def note_load(self, seconds: float) -> None:
        """A record took ``seconds`` of the link's time."""
        share = self.chunk_seconds / self.load_seconds
        self.load_seconds = blend(self.load_seconds, seconds)
        self.chunk_seconds = self.load_seconds * share

    def note_layer(self, seconds: float, link_seconds: float, demands: int) -> None:
        """A layer computed for ``seconds`` without stalls; the link was busy for ``link_seconds`` of layer and stall.

        ``link_seconds`` may exceed ``seconds``: then demands stalled the layer and the link is the bottleneck.
        """
        self.layer_seconds = blend(self.layer_seconds, seconds)
        self.busy = blend(self.busy, min(1.0, link_seconds / seconds) if seconds > 0 else 1.0)
        self.demands_per_layer = blend(self.demands_per_layer, demands)


def blend(old: float, new: float) -> float:
    """A running mean ``old`` after the measurement ``new``."""
    return old + _MEMORY * (new - old)

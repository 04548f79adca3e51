"""What a layer and a step take on a described machine. Plain arithmetic on bytes and speeds."""

from .hardware import HardwareProfile, ModelProfile


def most_gain(computing: float, loading: float) -> float:
    """By what factor prediction could shorten steps that compute and then wait for loads, if all loads ran beside.

    At most 2, where loads take as long as computing.
    """
    longer = max(computing, loading)
    return (computing + loading) / longer if longer else 1.0


class StepTime:
    """Times of one model on one machine. Seconds.

    Args:
        layers: MoE layers of the model.
        experts: of each layer.
        top_k: experts that a token uses in each.
    """

    def __init__(self, hardware: HardwareProfile, model: ModelProfile, layers: int, experts: int, top_k: int):
        self.hardware, self.model = hardware, model
        self.layers, self.experts, self.top_k = layers, experts, top_k

    @property
    def record(self) -> float:
        """One expert through the link."""
        return self.model.record_bytes / self.hardware.bytes_per_second

    def layer(self, distinct: int, rows: int) -> float:
        """A layer reads its dense weights and its ``distinct`` experts once, or computes for longer than that."""
        model, hardware = self.model, self.hardware
        reading = (model.dense_bytes_per_layer + distinct * model.record_bytes) / hardware.memory_bytes_per_second
        flops = 2 * rows * (self.top_k * model.expert_parameters + model.dense_bytes_per_layer // 2)
        return hardware.layer_overhead_seconds + max(reading, flops / hardware.flops_per_second)

    def prefill(self, rows: int) -> float:
        """A step too wide for the windows, in which every layer's experts pass once, beside the layer before."""
        filling = self.experts * self.record
        computing = self.layer(self.experts, rows)
        return filling + (self.layers - 1) * max(filling, computing) + computing

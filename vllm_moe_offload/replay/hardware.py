"""Hardware profiles for the timeline: plain numbers, from vendors' sheets where not measured.

``bytes_per_second`` is what large transfers of records reach in practice, about 80 % of the link's nominal speed.
``benchmarks/profile_machine.py`` measures the machine it runs on and writes a profile of it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import ConfigError


@dataclass(frozen=True)
class ModelProfile:
    """A model, as far as time is concerned."""

    record_bytes: int
    """One expert."""
    dense_bytes_per_layer: int
    """Everything else a layer reads: attention, router, shared experts."""
    expert_parameters: int
    """Weights of one expert, for the arithmetic of prefill."""


@dataclass(frozen=True)
class HardwareProfile:
    """A machine, as far as loading experts is concerned."""

    name: str
    bytes_per_second: float
    """From where experts are kept into the device: all loads that are under way together."""
    load_latency_seconds: float
    """What a load takes besides moving its bytes. Loads under way together do not wait for each other's."""
    memory_bytes_per_second: float
    """Of the device: decoding reads the weights it uses once per layer."""
    flops_per_second: float
    """Of the device, as reached: prefill computes more than it reads."""
    layer_overhead_seconds: float
    """Launches and everything else a layer costs whatever its size."""
    chunk_bytes: int = 4 << 20
    """A transfer can be interrupted between chunks, where it is the only one at a time."""
    loads_at_once: int = 1
    """Loads under way together. Where there are several, the last place is kept for demands."""
    step_overhead_seconds: float = 0.0
    """What a step costs besides its layers: scheduling, sampling."""
    demand_overhead_seconds: float = 0.0
    """What a demand costs besides its load: finding it a slot."""
    predictor_seconds: float = 0.0
    """Asking a predictor about one layer, where the step waits for the answer."""
    model: ModelProfile | None = None
    """What a layer's times were measured with; stands in for a model of the same records that is not known."""

    def load_seconds(self, record_bytes: int) -> list[float]:
        """What each of 1, 2, … ``loads_at_once`` loads of a record takes if so many are under way together."""
        moving = record_bytes / self.bytes_per_second
        return [self.load_latency_seconds + count * moving for count in range(1, self.loads_at_once + 1)]


_PROFILES = {
    profile.name: profile
    for profile in (
        HardwareProfile("rtx3090-pcie4", 25e9, 20e-6, 936e9, 60e12, 30e-6),
        HardwareProfile("rtx4090-pcie4", 25e9, 20e-6, 1008e9, 130e12, 25e-6),
        HardwareProfile("rtx5090-pcie5", 50e9, 20e-6, 1792e9, 180e12, 25e-6),
        HardwareProfile("l4-pcie4", 25e9, 20e-6, 300e9, 80e12, 30e-6),
        HardwareProfile("a100-pcie4", 25e9, 20e-6, 1935e9, 220e12, 25e-6),
        HardwareProfile("h100-pcie5", 50e9, 20e-6, 2000e9, 450e12, 25e-6),
        HardwareProfile("rtx4090-nvme4", 6.5e9, 100e-6, 1008e9, 130e12, 25e-6),
        HardwareProfile("rtx5090-nvme5", 12e9, 100e-6, 1792e9, 180e12, 25e-6),
    )
}
PROFILE_NAMES = tuple(_PROFILES)

_MODELS = {
    # 24.9 M weights in MXFP4 at 4.25 bits; attention in bfloat16.
    "openai/gpt-oss-20b": ModelProfile(13_219_200, 53_084_160, 24_883_200),
}


def hardware_profile(name: str) -> HardwareProfile:
    """The built-in profile called ``name``, or the one in the JSON file of that path.

    Raises:
        ConfigError: there is neither, or the file does not hold a profile.
    """
    if name in _PROFILES:
        return _PROFILES[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"hardware: {name!r} is no profile and no file; profiles are {', '.join(PROFILE_NAMES)}")
    try:
        fields = json.loads(path.read_text())
        measured_with = fields.pop("model", None)
        return HardwareProfile(**fields, model=None if measured_with is None else ModelProfile(**measured_with))
    except (ValueError, TypeError, AttributeError) as error:
        example = json.dumps(asdict(_PROFILES["rtx4090-pcie4"]))
        raise ConfigError(f"hardware: {path} is not a profile ({error}); a profile is JSON like {example}") from error


def model_profile(model: str, record_bytes: int | None) -> ModelProfile:
    """What is known of ``model``; ``record_bytes`` overrides the size of an expert.

    Raises:
        ConfigError: the model is not known and no size was given.
    """
    known = _MODELS.get(model)
    if record_bytes is None:
        if known is None:
            raise ConfigError(
                f"record-bytes: the size of one expert of {model or 'this model'!r} is not known; give it"
            )
        return known
    if known is not None:
        return ModelProfile(record_bytes, known.dense_bytes_per_layer, known.expert_parameters)
    # A layer's attention usually weighs a few experts; at two bytes per weight.
    return ModelProfile(record_bytes, 4 * record_bytes, record_bytes // 2)

"""Hardware and model profiles for the timelines: plain numbers.

Those of GPUs are arithmetic: memory bandwidths from the vendors' data sheets, of which 80 % are taken to be reached;
links at about 80 % of their nominal speed in one direction; what a layer costs besides moving bytes, and deciding about
its slots, are estimates. None was measured by this project. ``benchmarks/profile_machine.py`` measures the CPU it
runs on and writes a profile of it.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
class ManagerCosts:
    """What deciding about one layer's slots on a GPU takes, by who decides. Nothing of the layer runs beside it."""

    host_seconds: float = 80e-6
    """Routing is copied to the host and waited for, the cache decides, and kernels are launched one by one."""
    device_seconds: float = 6e-6
    """A kernel decides, inside of the step's graph, where every expert is found in its slot."""


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
    lookup_seconds: float = 0.0
    """What a layer costs more where some experts have no slot: the host looks between router and kernel."""
    miss_overhead_seconds: float = 0.0
    """What a layer costs more once it waits for a load, however many: queueing, waking the kernel's threads, whose
    caches hold other things by then."""
    predictor_seconds: float = 0.0
    """Asking a predictor about one layer, where the step waits for the answer."""
    model: ModelProfile | None = None
    """What a layer's times were measured with; stands in for a model of the same records that is not known."""
    memory_bytes: int = 0
    """Of the device; 0 where it is not known."""
    manager: ManagerCosts | None = None
    """Of a GPU with a window of slots per layer in its memory; None where kernels read slots in host memory, or experts
    come from a disk."""

    def load_seconds(self, record_bytes: int) -> list[float]:
        """What each of 1, 2, … ``loads_at_once`` loads of a record takes if so many are under way together."""
        moving = record_bytes / self.bytes_per_second
        return [self.load_latency_seconds + count * moving for count in range(1, self.loads_at_once + 1)]


class _Card(NamedTuple):
    """A GPU. ``gib`` and ``memory``, bytes per second, are its data sheet's; ``flops`` what prefill is to reach."""

    gib: int
    memory: float
    flops: float
    layer_seconds: float
    links: tuple[str, ...]


_CARDS = {
    "rtx3090": _Card(24, 936e9, 60e12, 20e-6, ("pcie3", "pcie4")),
    "rtx4090": _Card(24, 1008e9, 130e12, 20e-6, ("pcie3", "pcie4", "nvme4")),
    "rtx5090": _Card(32, 1792e9, 180e12, 20e-6, ("pcie4", "pcie5", "nvme5")),
    "l4": _Card(24, 300e9, 80e12, 20e-6, ("pcie4",)),
    "a100": _Card(80, 1935e9, 220e12, 15e-6, ("pcie4",)),  # 80 GB, PCIe card
    "h100": _Card(80, 3350e9, 600e12, 15e-6, ("pcie5",)),  # SXM; the PCIe card has 2000e9
    "h200": _Card(141, 4800e9, 600e12, 15e-6, ("pcie5",)),
    "gh200": _Card(96, 4000e9, 600e12, 15e-6, ("c2c",)),  # 96 GB of HBM3
    "gb10": _Card(128, 273e9, 80e12, 20e-6, ("unified",)),
    "mi300x": _Card(192, 5300e9, 500e12, 20e-6, ("pcie5",)),
}
_REACHED = 0.8
"""Share of a card's memory bandwidth that decoding reaches."""
_HOST_LINKS = {
    "pcie3": 12.5e9,
    "pcie4": 25e9,
    "pcie5": 50e9,
    "c2c": 350e9,  # 450 nominal
    "unified": 109e9,  # host and device share one memory, in which a copy reads and writes every byte
}
"""Bytes per second, to a GPU with 16 lanes."""
_DISKS = {"nvme4": 6.5e9, "nvme5": 12e9}
_HOST_LATENCY = 3e-6
_DISK_LATENCY = 100e-6


def _profiles() -> Iterator[HardwareProfile]:
    costs = ManagerCosts()
    for name, card in _CARDS.items():
        memory = _REACHED * card.memory
        for link in card.links:
            if link in _DISKS:
                overhead = card.layer_seconds + costs.host_seconds
                speed, latency, manager = _DISKS[link], _DISK_LATENCY, None
            else:
                overhead, speed, latency, manager = card.layer_seconds, _HOST_LINKS[link], _HOST_LATENCY, costs
            yield HardwareProfile(
                f"{name}-{link}",
                speed,
                latency,
                memory,
                card.flops,
                overhead,
                memory_bytes=card.gib << 30,
                manager=manager,
            )


_PROFILES = {profile.name: profile for profile in _profiles()}
PROFILE_NAMES = tuple(_PROFILES)

_MODELS = {
    # Experts of 24.9 M weights in MXFP4 at 4.25 bits, attention in bfloat16.
    "openai/gpt-oss-20b": ModelProfile(13_219_200, 53_084_160, 24_883_200),
    "openai/gpt-oss-120b": ModelProfile(13_219_200, 53_821_440, 24_883_200),
    "Qwen/Qwen3-30B-A3B": ModelProfile(9_437_184, 38_273_024, 4_718_592),
    "Qwen/Qwen3-30B-A3B-FP8": ModelProfile(4_719_744, 19_136_512, 4_718_592),
    "Qwen/Qwen3-30B-A3B-GPTQ-Int4": ModelProfile(2_433_024, 9_867_264, 4_718_592),
    "deepseek-ai/DeepSeek-V2-Lite": ModelProfile(17_301_504, 62_000_000, 8_650_752),
    "mistralai/Mixtral-8x7B-v0.1": ModelProfile(352_321_536, 83_951_616, 176_160_768),
    "zai-org/GLM-4.5-Air-FP8": ModelProfile(17_305_728, 126_000_000, 17_301_504),
    "deepseek-ai/DeepSeek-V3": ModelProfile(44_050_944, 231_000_000, 44_040_192),
}
"""By the name that a trace of the model carries."""


def behind_a_disk(hardware: HardwareProfile, disk: str = "nvme4") -> HardwareProfile:
    """``hardware`` where every load comes from a disk, and the host finds the slots."""
    assert hardware.manager is not None
    return replace(
        hardware,
        name=f"{hardware.name} behind {disk}",
        bytes_per_second=_DISKS[disk],
        load_latency_seconds=_DISK_LATENCY,
        layer_overhead_seconds=hardware.layer_overhead_seconds + hardware.manager.host_seconds,
        manager=None,
    )


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
        for name, kind in (("model", ModelProfile), ("manager", ManagerCosts)):
            if fields.get(name) is not None:
                fields[name] = kind(**fields[name])
        return HardwareProfile(**fields)
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

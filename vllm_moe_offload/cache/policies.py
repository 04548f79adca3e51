"""The eviction policies, one small class each, chosen by name; one from outside is named ``package.module:Class``."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..extensions import failure, is_reference, load_class
from .base import EvictionPolicy, FloatArray, IntArray

_PREDICTION_WEIGHT = 2.0
"""A certain use ahead outweighs any rank; a probability of one half is worth the whole ranking."""


class LeastRecentlyUsed(EvictionPolicy):
    """Evicts the expert whose last use lies furthest back."""

    def __init__(self, layer_of: IntArray):
        self._last_use = np.zeros(len(layer_of))
        self._uses = 0

    def begin_step(self) -> None:
        pass

    def use(self, experts: IntArray) -> None:
        self._uses += 1
        self._last_use[experts] = self._uses

    def load(self, experts: IntArray) -> None:
        self.use(experts)

    def keep_scores(self, experts: IntArray) -> FloatArray:
        return self._last_use[experts]


class DecayedFrequency(EvictionPolicy):
    """Evicts the expert with the fewest uses, a use counting half as much every ``half_life`` steps.

    A count ``c`` at step ``t`` is kept as ``log2(c) + t / half_life``. All counts decay alike, so these keys order the
    experts at any later step without ever being touched for the decay. Counts survive eviction.
    """

    def __init__(self, layer_of: IntArray, half_life: float = 16.0):
        self._key = np.full(len(layer_of), -np.inf)
        self._half_life = half_life
        self._step = 0

    def begin_step(self) -> None:
        self._step += 1

    def use(self, experts: IntArray) -> None:
        self._key[experts] = np.logaddexp2(self._key[experts], self._step / self._half_life)

    def keep_scores(self, experts: IntArray) -> FloatArray:
        return self._key[experts]


class LeastStale(EvictionPolicy):
    """Evicts experts the running pass has not touched, in layer order; those it has touched only when none is left.

    Source: SpecMD (arXiv 2602.03921). Within a layer the expert that was loaded first goes first.
    """

    def __init__(self, layer_of: IntArray):
        self._layer_of = np.asarray(layer_of, dtype=np.float64)
        self._touched_in = np.full(len(layer_of), -1)
        self._loaded_at = np.zeros(len(layer_of))
        self._step = 0
        self._loads = 0

    def begin_step(self) -> None:
        self._step += 1

    def use(self, experts: IntArray) -> None:
        self._touched_in[experts] = self._step

    def load(self, experts: IntArray) -> None:
        self._loaded_at[experts] = np.arange(self._loads, self._loads + len(experts))
        self._loads += len(experts)
        self._touched_in[experts] = self._step

    def keep_scores(self, experts: IntArray) -> FloatArray:
        layers = self._layer_of.max(initial=0) + 1
        current = self._touched_in[experts] == self._step
        age_within_layer = self._loaded_at[experts] / (self._loads + 1)
        return current * layers + self._layer_of[experts] + age_within_layer


class PredictionAwarePolicy(EvictionPolicy):
    """Wraps any policy: what it would keep longest is kept, unless predictions of the running step say otherwise.

    Ranks experts by the wrapped policy (0 to 1) and adds what ``expected`` says of the layers ahead.
    """

    def __init__(self, policy: EvictionPolicy, num_experts: int):
        self._policy = policy
        self._ranks = np.arange(num_experts)
        self.expected: NDArray[np.float32] = np.zeros(num_experts, np.float32)
        """Per flat id, the probability that the running step will still use it. Written by whoever predicts."""

    def begin_step(self) -> None:
        self.expected[:] = 0
        self._policy.begin_step()

    def use(self, experts: IntArray) -> None:
        self._policy.use(experts)

    def load(self, experts: IntArray) -> None:
        self._policy.load(experts)

    def keep_scores(self, experts: IntArray) -> FloatArray:
        worth = self._policy.keep_scores(experts)
        if not self.expected.any():
            return worth
        scores = np.empty(len(experts))
        scores[worth.argsort(kind="stable")] = self._ranks[: len(experts)]
        scores /= max(1, len(experts))
        scores += _PREDICTION_WEIGHT * self.expected[experts]
        return scores


_POLICIES: dict[str, Callable[[IntArray], EvictionPolicy]] = {
    "lfu": DecayedFrequency,
    "lru": LeastRecentlyUsed,
    "least-stale": LeastStale,
}
POLICY_NAMES = tuple(_POLICIES)


def policy_class(name: str) -> Callable[[IntArray], EvictionPolicy]:
    """The class of a policy.

    Raises:
        ConfigError: there is none of that name, or it is from outside and cannot be imported or is no
            ``EvictionPolicy``.
    """
    if is_reference(name):
        return load_class("policy", name, EvictionPolicy)  # type: ignore[type-abstract]
    if name not in _POLICIES:
        raise ConfigError(
            f"policy: {name!r} is unknown; choose one of {', '.join(POLICY_NAMES)}, or a class of yours as "
            "package.module:Class"
        )
    return _POLICIES[name]


def create_policy(name: str, layer_of: IntArray) -> EvictionPolicy:
    """Make the policy called ``name``, or named ``package.module:Class``, for experts of layers ``layer_of`` (``[N]``).

    Raises:
        ConfigError: as ``policy_class``, or a policy from outside does not work.
    """
    cls = policy_class(name)
    if not is_reference(name):
        return cls(layer_of)
    try:
        _try_a_step(cls(layer_of), np.arange(min(len(layer_of), 2)))
        return cls(layer_of)
    except Exception as error:
        way_out = "it is made of the layers of all experts alone and must answer as in vllm_moe_offload.cache.base"
        raise failure("policy", name, "fails on a first step", error, way_out) from error


def _try_a_step(policy: EvictionPolicy, experts: IntArray) -> None:
    policy.begin_step()
    policy.load(experts)
    policy.use(experts)
    scores = np.asarray(policy.keep_scores(experts))
    if scores.shape != experts.shape or scores.dtype.kind != "f" or np.isnan(scores).any():
        raise ValueError(f"scores {scores} instead of one float for each of {len(experts)} experts")

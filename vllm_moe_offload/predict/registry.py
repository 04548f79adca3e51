"""Predictors by name. A new one needs a line in ``_BUILT_IN``; one from outside is named ``package.module:Class``.

Nothing is imported before it is used: the compiled predictors take a second.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError
from ..extensions import failure, is_reference, load_class
from ..trace.history import HistoryStore
from ..trace.trace import Trace
from .base import ModelShape, Predictor
from .token_vectors import LearnedVectors, TokenVectors

MAX_CANDIDATES = 1000
"""Of a running engine's neighbours. They bridge the time until heads are trained; more would slow the layers down."""
_FIT_TOKENS = 20_000
"""Tokens of the latest requests that a running engine's predictor is fitted to: more would only delay the start."""
_SETTING = "predictor"


class _BuiltIn(NamedTuple):
    place: str
    """``module:Class`` in this folder."""
    in_engine: bool = True
    in_replay: bool = True


_BUILT_IN = {
    "history": _BuiltIn("history:HistoryPredictor"),
    "neighbours": _BuiltIn("neighbours:NeighboursPredictor", in_engine=False),
    "finemoe": _BuiltIn("finemoe:FineMoEPredictor"),
    "moe-infinity": _BuiltIn("moe_infinity:MoEInfinityPredictor"),
    "gate": _BuiltIn("gate:GatePredictor", in_replay=False),
    "coactivation": _BuiltIn("baselines:CoactivationPredictor"),
    "frequency": _BuiltIn("baselines:FrequencyPredictor"),
    "none": _BuiltIn("baselines:NonePredictor"),
}
ENGINE_PREDICTORS = tuple(name for name, entry in _BUILT_IN.items() if entry.in_engine)
"""Predictors that a running engine can use."""
REPLAY_PREDICTORS = tuple(name for name, entry in _BUILT_IN.items() if entry.in_replay)
"""Predictors that need nothing but traces. ``gate`` is not among them: it needs an engine's hidden states."""


def predictor_class(name: str, choices: Sequence[str] = ENGINE_PREDICTORS) -> type[Predictor]:
    """The class of a predictor: one of the ``choices`` here, or one from outside.

    Raises:
        ConfigError: there is none of that name, or it is from outside and cannot be imported or is no ``Predictor``.
    """
    if is_reference(name):
        return load_class(_SETTING, name, Predictor)  # type: ignore[type-abstract]
    if name not in choices:
        raise ConfigError(
            f"{_SETTING}: {name!r} is unknown; choose one of {', '.join(choices)}, or a class of yours as "
            "package.module:Class"
        )
    return load_class(_SETTING, f"{__package__}.{_BUILT_IN[name].place}", Predictor)  # type: ignore[type-abstract]


def predictor_for_engine(
    name: str, shape: ModelShape, history: HistoryStore, vectors: TokenVectors | None
) -> Predictor:
    """The predictor of a running engine. ``gate`` is not made here: it is given the model's routers.

    Args:
        name: one of ``ENGINE_PREDICTORS``, or ``package.module:Class``.
        history: of this model. ``HistoryPredictor`` goes on filling it, the others leave that to the caller.
        vectors: the model's own token embeddings, None where they cannot be read.

    Raises:
        ConfigError: as ``predictor_class``, or a predictor from outside does not work.
    """
    if name == "history":
        from .history import HistoryPredictor

        make_vectors = (lambda: vectors) if vectors is not None else LearnedVectors
        return HistoryPredictor(shape, history, make_vectors, max_candidates=MAX_CANDIDATES)
    return _fitted(name, ENGINE_PREDICTORS, shape, _latest_requests(history, _FIT_TOKENS))


def predictor_for_replay(name: str, shape: ModelShape, history: HistoryStore) -> Predictor:
    """A predictor fitted to all of ``history``, which belongs to it from now on. Deterministic.

    Args:
        name: one of ``REPLAY_PREDICTORS``, or ``package.module:Class``.

    Raises:
        ConfigError: as ``predictor_class``, it cannot work from traces, or a predictor from outside does not work.
    """
    if name == "gate":
        raise ConfigError("predictor: 'gate' reads hidden states, which no trace holds; it works in the engine only")
    if name == "neighbours":
        from .neighbours import NeighboursPredictor

        return NeighboursPredictor(shape, history)
    if name == "history":
        from .history import HistoryPredictor

        predictor = HistoryPredictor(shape, history, learn_at_once=True)
        if predictor.training_due:
            predictor.learn_all()
        return predictor
    return _fitted(name, REPLAY_PREDICTORS, shape, [history.to_trace()])


def _fitted(name: str, choices: Sequence[str], shape: ModelShape, traces: Iterable[Trace]) -> Predictor:
    cls = predictor_class(name, choices)
    if not is_reference(name):
        return _fit(cls(shape), traces)
    try:
        _try_a_step(cls(shape))
    except Exception as error:
        way_out = "it is made of the model's shape alone and must answer as in vllm_moe_offload.predict.base"
        raise failure(_SETTING, name, "fails on a first step", error, way_out) from error
    try:
        return _fit(cls(shape), traces)
    except Exception as error:
        way_out = "its fit must take any trace, or do nothing"
        raise failure(_SETTING, name, "cannot be fitted to earlier requests", error, way_out) from error


def _fit(predictor: Predictor, traces: Iterable[Trace]) -> Predictor:
    for trace in traces:
        predictor.fit(trace)
    return predictor


def _try_a_step(predictor: Predictor) -> None:
    """Raises whatever is wrong with the answers for one token of a new request."""
    layers, experts, top_k = predictor.shape
    step = predictor.begin([predictor.start_request().context()])
    for layer in range(min(layers, 2)):
        probabilities = np.asarray(step.predict(layer))
        if probabilities.shape != (1, experts):
            raise ValueError(f"probabilities of shape {probabilities.shape} instead of {(1, experts)}")
        if not ((probabilities >= 0) & (probabilities <= 1)).all():
            raise ValueError("probabilities that are not between 0 and 1")
        step.observe(layer, np.arange(top_k)[None], np.full((1, top_k), 1 / top_k, np.float32))


def _latest_requests(history: HistoryStore, tokens: int) -> list[Trace]:
    """The latest requests that have ``tokens`` tokens together, oldest first."""
    latest: list[Trace] = []
    for past in reversed(history.requests):
        if tokens <= 0:
            break
        latest.append(past.trace)
        tokens -= past.trace.num_tokens
    return latest[::-1]

"""Making predictors ready from a history, by name: what replay starts from, and the engine where nothing is special."""

from ..errors import ConfigError
from ..history.store import HistoryStore
from .base import ModelShape, Predictor
from .coactivation import CoactivationPredictor
from .finemoe import FineMoEPredictor
from .frequency import FrequencyPredictor
from .history import HistoryPredictor
from .moe_infinity import MoEInfinityPredictor
from .names import REPLAY_PREDICTORS
from .neighbours import NeighboursPredictor
from .none import NonePredictor

FITTED = {
    "finemoe": FineMoEPredictor,
    "moe-infinity": MoEInfinityPredictor,
    "coactivation": CoactivationPredictor,
    "frequency": FrequencyPredictor,
}
"""Predictors that learn all they know from a trace."""


def fit_predictor(name: str, shape: ModelShape, history: HistoryStore) -> Predictor:
    """A predictor that has learned all that ``history`` holds, and goes on learning from requests that close.

    Deterministic. ``history`` belongs to the predictor from now on.

    Raises:
        ConfigError: there is no predictor of that name, or it cannot work from traces.
    """
    if name == "none":
        return NonePredictor(shape)
    if name == "neighbours":
        return NeighboursPredictor(shape, history)
    if name == "history":
        predictor = HistoryPredictor(shape, history, learn_at_once=True)
        if predictor.training_due:
            predictor.learn_all()
        return predictor
    if name == "gate":
        raise ConfigError("predictor: 'gate' reads hidden states, which no trace holds; it works in the engine only")
    if name not in FITTED:
        raise ConfigError(f"predictor: {name!r} is unknown; choose one of {', '.join(REPLAY_PREDICTORS)}")
    fitted = FITTED[name](shape)
    fitted.fit(history.to_trace())
    return fitted

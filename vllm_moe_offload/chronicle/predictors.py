"""Predictors for a running engine, made ready from what earlier requests left behind."""

from ..history.store import HistoryStore
from ..predict.base import ModelShape, Predictor
from ..predict.fitting import FITTED
from ..predict.history import HistoryPredictor
from ..predict.token_vectors import LearnedVectors, TokenVectors

MAX_CANDIDATES = 1000
"""Neighbours only bridge the time until heads have been learned; more of them would slow the layers down."""
_FIT_TOKENS = 20_000
"""Of the latest requests, so many tokens make a predictor ready: more would only make the start longer."""


def create_predictor(name: str, shape: ModelShape, history: HistoryStore, vectors: TokenVectors | None) -> Predictor:
    """The predictor called ``name``, which is one of ``ENGINE_PREDICTORS`` and not ``none``.

    Args:
        history: of this model. ``HistoryPredictor`` goes on filling it, the others leave that to the caller.
        vectors: the model's own token embeddings, None where they cannot be read.
    """
    if name == "history":
        make_vectors = (lambda: vectors) if vectors is not None else LearnedVectors
        return HistoryPredictor(shape, history, make_vectors, max_candidates=MAX_CANDIDATES)
    predictor = FITTED[name](shape)
    latest, tokens = [], 0
    for past in reversed(history.requests):
        if tokens >= _FIT_TOKENS:
            break
        latest.append(past)
        tokens += past.trace.num_tokens
    for past in reversed(latest):
        predictor.fit(past.trace)
    return predictor

"""Routing for a model without a trace: as that of another, as far as it can be carried over.

Router scores are taken to be correlated normal numbers: an expert's score at one token tells something about its score
at the next, at later tokens of the request, and in other requests. How much is read off a trace, from how many experts
two tokens share; that does not depend on how many experts there are. A trace of any other shape is then drawn.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..trace.trace import Trace

LAGS = (1, 4, 16)
"""Tokens apart, within a request."""
_HALF_LIVES = (1, 4, 16)
_GRID = np.linspace(0, 1, 21)
_PAIRS = 2000


def correlations(trace: Trace) -> NDArray[np.float64]:
    """How scores of a layer's experts are correlated, ``[L, len(LAGS) + 2]``: between tokens ``LAGS`` apart, anywhere
    in a request, and in different requests. Never rising from left to right."""
    layers, experts, top_k = trace.shape
    used = np.zeros((trace.num_tokens, layers, experts), bool)
    np.put_along_axis(used, trace.experts.astype(np.int64), True, axis=2)
    shared = np.zeros((layers, len(LAGS) + 2))
    for place, lag in enumerate(LAGS):
        pairs = [
            used[start : stop - lag] & used[start + lag : stop] for start, stop in _spans(trace) if stop > start + lag
        ]
        together = np.concatenate(pairs) if pairs else used[:0]
        shared[:, place] = together.sum(axis=(0, 2)) / max(1, len(together)) / top_k
    counts = np.array([used[start:stop].sum(axis=0) for start, stop in _spans(trace)], np.float64)
    lengths = np.diff(trace.offsets).astype(np.float64)
    shared[:, -2] = _shared_by_pairs(counts, lengths, top_k)
    shared[:, -1] = _shared_across(counts, lengths, top_k)
    overlaps = _overlaps(experts, top_k)
    found = np.interp(shared, overlaps, _GRID)
    return np.minimum.accumulate(found, axis=1)


def drawn(
    statistics: NDArray[np.float64], shape: tuple[int, int, int], requests: int, tokens: int, seed: int = 0
) -> Trace:
    """A trace of ``requests`` of ``tokens`` each, of a model of ``shape``, routed with such correlations.

    Args:
        statistics: as ``correlations`` gives them, of a model with any number of layers.
    """
    layers, experts, top_k = shape
    draw = np.random.default_rng(seed)
    chosen = np.empty((requests * tokens, layers, top_k), np.uint16 if experts > 256 else np.uint8)
    for layer in range(layers):
        shares, everywhere, of_request = _shares(statistics[layer * len(statistics) // layers])
        always = draw.standard_normal(experts) * np.sqrt(everywhere)
        for request in range(requests):
            fixed = always + draw.standard_normal(experts) * np.sqrt(of_request)
            scores = fixed + sum(
                np.sqrt(share) * _wandering(draw, tokens, experts, half_life)
                for share, half_life in zip(shares, (*_HALF_LIVES, 0), strict=True)
            )
            rows = slice(request * tokens, (request + 1) * tokens)
            chosen[rows, layer] = np.argpartition(-scores, top_k - 1, axis=1)[:, :top_k]
    weights = np.full(chosen.shape, 1 / top_k, np.float16)
    return Trace(chosen, weights, np.arange(requests + 1, dtype=np.int64) * tokens, experts)


def _spans(trace: Trace) -> Sequence[tuple[int, int]]:
    return list(zip(trace.offsets[:-1].tolist(), trace.offsets[1:].tolist(), strict=True))


def _shared_by_pairs(counts: NDArray[np.float64], lengths: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Share of experts that two different tokens of one request have in common, per layer; ``counts [R, L, E]``."""
    pairs = (lengths * (lengths - 1)).sum()
    return (counts * (counts - 1)).sum(axis=(0, 2)) / max(1.0, pairs) / top_k


def _shared_across(counts: NDArray[np.float64], lengths: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """The same of two tokens of different requests."""
    pairs = lengths.sum() ** 2 - (lengths**2).sum()
    together = (counts.sum(axis=0) ** 2 - (counts**2).sum(axis=0)).sum(axis=1)
    return together / max(1.0, pairs) / top_k


def _overlaps(experts: int, top_k: int) -> NDArray[np.float64]:
    """Share of chosen experts that two tokens have in common, for each correlation of ``_GRID``; rising."""
    draw = np.random.default_rng(0)
    one, other = (draw.standard_normal((_PAIRS, experts)) for _ in range(2))
    first = np.zeros(one.shape, bool)
    np.put_along_axis(first, np.argpartition(-one, top_k - 1, axis=1)[:, :top_k], True, axis=1)
    found = []
    for correlation in _GRID:
        mixed = correlation * one + np.sqrt(1 - correlation**2) * other
        found.append(np.take_along_axis(first, np.argpartition(-mixed, top_k - 1, axis=1)[:, :top_k], axis=1).mean())
    return np.maximum.accumulate(found)


def _shares(row: NDArray[np.float64]) -> tuple[NDArray[np.float64], float, float]:
    """Variances of what wanders with each half-life and of what is new at every token, of an expert, of a request.

    Nonnegative, 1 together, and near the correlations of one layer.
    """
    *lagged, of_request, everywhere = row
    decays = 0.5 ** (np.array(LAGS)[:, None] / np.array(_HALF_LIVES))
    wandering = np.clip(np.linalg.lstsq(decays, np.array(lagged) - of_request, rcond=None)[0], 0, None)
    left = 1 - of_request
    if wandering.sum() > left:
        wandering *= left / wandering.sum()
    shares = np.append(wandering, max(0.0, left - wandering.sum()))
    return shares, float(everywhere), max(0.0, float(of_request - everywhere))


def _wandering(draw: np.random.Generator, tokens: int, experts: int, half_life: float) -> NDArray[np.float64]:
    """Normal numbers ``[tokens, experts]`` of variance 1 whose correlation over time halves every ``half_life``."""
    steps = draw.standard_normal((tokens, experts))
    if half_life:
        kept = 0.5 ** (1 / half_life)
        for token in range(1, tokens):
            steps[token] = kept * steps[token - 1] + np.sqrt(1 - kept**2) * steps[token]
    return steps

"""What predictors do between two layers of a step, compiled: a layer takes a millisecond, so microseconds count.

In numpy each of these is a dozen calls, which the model's own work pushes out of the processor's caches between one
layer and the next. All arrays are C-contiguous, of int64 or float32. Results go into the last arguments.
"""

from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from numpy.typing import NDArray

_FAST = {"reassoc", "contract", "nsz"}
"""Sums may be taken in any order; infinities and NaN stay what they are."""
_UNKNOWN_EXPERT = "an expert's number is not one of the layer's"
_FARTHEST = np.float32(-16.0)
"""A candidate whose share would be less than e to this of the best one's counts as nothing."""


# When vLLM 0.32's CPU worker starts, it looks into the ``__dict__`` of all it finds in any module. llvmlite's library
# takes that name, like any other, for one of its functions, and the next engine of this process would not start.
getattr(llvmlite.binding.ffi.lib, "_fntab", {}).setdefault("__dict__", {})


def as_map(
    experts: NDArray[np.integer], weights: NDArray[np.floating]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """A layer's choices ``[B, K]`` as the functions below read them."""
    return np.ascontiguousarray(experts, np.int64), np.ascontiguousarray(weights, np.float32)


def _compiled(signature: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Compile at import, once for all processes if there is a place to keep the result."""

    def compile_function(function: Callable[..., None]) -> Callable[..., None]:
        options: dict[str, Any] = {"fastmath": _FAST, "error_model": "numpy", "boundscheck": False}
        try:
            return numba.njit(signature, cache=True, **options)(function)
        except RuntimeError:  # neither the package's folder nor the user's cache can be written
            return numba.njit(signature, **options)(function)

    return compile_function


@_compiled("void(i8[:,:,::1], f4[:,:,::1], i8[::1], i8[:,:,::1], f4[:,:,::1])")
def lay_out(maps, roots, places, experts, columns):  # type: ignore[no-untyped-def]
    """Put candidates with ``maps`` ``[n, L, K]`` and ``roots`` of their weights into ``experts`` ``[L, C, K]`` and
    ``columns`` ``[L, E, C]`` at ``places`` ``[n]``, instead of those before.
    """
    top_k = maps.shape[2]
    for n in range(maps.shape[0]):
        for layer in range(maps.shape[1]):
            for k in range(top_k):
                columns[layer, experts[layer, places[n], k], places[n]] = 0
                if not 0 <= maps[n, layer, k] < columns.shape[1]:
                    raise IndexError(_UNKNOWN_EXPERT)
            for k in range(top_k):
                experts[layer, places[n], k] = maps[n, layer, k]
                columns[layer, maps[n, layer, k], places[n]] = roots[n, layer, k]


@_compiled("void(i8[:,::1], f4[:,::1], f4[:,::1], f4[:,::1])")
def add_map(experts, weights, rows, state):  # type: ignore[no-untyped-def]
    """Add a layer's map ``[B, K]`` to the running ``state`` ``[B, S]``.

    ``rows`` ``[E, 2S]``: for each expert what its presence adds, then what its weight, times K, adds.
    """
    top_k, width = experts.shape[1], state.shape[1]
    for b in range(state.shape[0]):
        for k in range(top_k):
            expert = experts[b, k]
            if not 0 <= expert < rows.shape[0]:
                raise IndexError(_UNKNOWN_EXPERT)
            row, weight = rows[expert], weights[b, k] * np.float32(top_k)
            for i in range(width):
                state[b, i] += row[i] + weight * row[width + i]


@_compiled(
    "void(i8, i8[:,:,::1], f4[:,:,::1], i8[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,:,::1], f4[:,::1], f4[:,::1])"
)
def add_context(  # type: ignore[no-untyped-def]
    layer, previous, previous_weights, same, same_weights, frequency, rows, frequency_rows, hidden
):
    """Add to ``hidden`` ``[B, H]`` what the head of ``layer`` is given before the step.

    Maps ``[B, L, K]`` of the previous token, read at the layer and those beside it, and of the same token's last time;
    a map that begins with a negative number is none. ``frequency`` ``[B, L, E]``. ``rows`` ``[4, E, 2H]`` as in
    ``add_map``: for the previous token's map a layer before, here and a layer after, then for the same token's.
    ``frequency_rows`` ``[E, H]``.
    """
    layers, top_k, width = previous.shape[1], previous.shape[2], hidden.shape[1]
    for b in range(hidden.shape[0]):
        for place in range(4):
            at = layer if place == 3 else layer + place - 1
            maps, weights = (same, same_weights) if place == 3 else (previous, previous_weights)
            if at < 0 or at >= layers or maps[b, 0, 0] < 0:
                continue
            for k in range(top_k):
                expert = maps[b, at, k]
                if not 0 <= expert < rows.shape[1]:
                    raise IndexError(_UNKNOWN_EXPERT)
                row, weight = rows[place, expert], weights[b, at, k] * np.float32(top_k)
                for i in range(width):
                    hidden[b, i] += row[i] + weight * row[width + i]
        for e in range(frequency.shape[2]):
            share = frequency[b, layer, e]
            if share > 0:
                row = frequency_rows[e]
                for i in range(width):
                    hidden[b, i] += share * row[i]


@_compiled("void(f4[:,::1], f4[:,::1], f4[:,::1], f4[:,::1], f4[::1], f4[:,::1])")
def evaluate_head(state, context, inner, outer, bias, probabilities):  # type: ignore[no-untyped-def]
    """``sigmoid(relu(state @ inner.T + context) @ outer.T + bias)``: ``[B, E]``.

    ``state`` ``[B, S]``, ``context`` ``[B, H]``, ``inner`` ``[H, S]``, ``outer`` ``[E, H]``, ``bias`` ``[E]``.
    """
    rows, width = state.shape
    hidden = np.empty_like(context)
    for h in range(hidden.shape[1]):
        for b in range(rows):
            total = context[b, h]
            for i in range(width):
                total += state[b, i] * inner[h, i]
            hidden[b, h] = max(total, np.float32(0))
    for e in range(len(bias)):
        for b in range(rows):
            total = bias[e]
            for h in range(hidden.shape[1]):
                total += hidden[b, h] * outer[e, h]
            probabilities[b, e] = np.float32(0.5) * np.tanh(np.float32(0.5) * total) + np.float32(0.5)


@_compiled("void(i8[:,::1], f4[:,::1], f4[:,::1], f4, f4[:,::1])")
def follow(experts, roots, columns, fading, matches):  # type: ignore[no-untyped-def]
    """Fade the running ``matches`` ``[B, C]`` of rows with candidates and add a layer's: roots of weights ``[B, K]``,
    and of the candidates' ``columns`` ``[E, C or more]``. A root that is NaN adds nothing."""
    count = matches.shape[1]
    for b in range(matches.shape[0]):
        for c in range(count):
            matches[b, c] *= fading
        for k in range(experts.shape[1]):
            expert = experts[b, k]
            if not 0 <= expert < columns.shape[0]:
                raise IndexError(_UNKNOWN_EXPERT)
            column, root = columns[expert], roots[b, k]
            if root > 0:
                for c in range(count):
                    matches[b, c] += root * column[c]


@_compiled("void(f4[:,::1], f4, f4[::1], f4[:,::1])")
def weigh(matches, sharpness, best, shares):  # type: ignore[no-untyped-def]
    """Each row's ``best`` match ``[B]``, and the candidates' ``shares`` ``[B, C]``: ``exp(sharpness * match)``, summing
    to 1.
    """
    for b in range(matches.shape[0]):
        most = matches[b].max()
        total = np.float32(0)
        for c in range(matches.shape[1]):
            nearness = sharpness * (matches[b, c] - most)
            shares[b, c] = np.exp(nearness) if nearness > _FARTHEST else np.float32(0)
            total += shares[b, c]
        for c in range(matches.shape[1]):
            shares[b, c] /= total
        best[b] = most


@_compiled("void(f4[:,::1], i8[:,::1], f4[:,::1], f4[::1], f4[::1], f4[:,::1], f4[:,::1])")
def vote(shares, experts, own, own_shares, curve, averages, probabilities):  # type: ignore[no-untyped-def]
    """The votes of candidates that chose ``experts`` ``[C or more, K]``, weighted by their ``shares`` ``[B, C]``.

    They are mixed with the row's ``own`` ``[B, E]`` by ``own_shares`` ``[B]`` into ``averages`` ``[B, E]``, and bent
    by ``curve``, given at the squares of equal steps from 0 to 1, into ``probabilities`` ``[B, E]``.
    """
    averages[:] = 0
    last = len(curve) - 1
    for b in range(shares.shape[0]):
        for c in range(shares.shape[1]):
            share = shares[b, c]
            if share > 0:
                for k in range(experts.shape[1]):
                    averages[b, experts[c, k]] += share
        for e in range(own.shape[1]):
            averages[b, e] += own_shares[b] * (own[b, e] - averages[b, e])
            place = np.sqrt(min(max(averages[b, e], np.float32(0)), np.float32(1))) * np.float32(last)
            below = min(int(place), last - 1)
            probabilities[b, e] = curve[below] + (place - np.float32(below)) * (curve[below + 1] - curve[below])

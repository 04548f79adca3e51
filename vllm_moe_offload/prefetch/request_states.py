"""The past of running requests, as predictors read it."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..predict.base import Predictor, RequestState, TokenContext, TokenMap
from ..trace.recorder import RequestMaps, ScheduledTokens

_REMEMBERED_PREFILL = 64
"""Of a prefill chunk, the last tokens count towards the request's frequency: earlier ones have decayed to nothing."""


class RequestStates:
    """Starts, advances and ends the states that one predictor keeps of requests."""

    def __init__(self, predictor: Predictor):
        self._predictor = predictor
        self._states: dict[str, RequestState] = {}

    def start(self, rows: Sequence[ScheduledTokens], embeddings: Mapping[str, NDArray[np.float32]]) -> None:
        """Begin those requests among ``rows`` that are new. ``embeddings``: of requests, where known."""
        for part in rows:
            if part.request not in self._states:
                self._states[part.request] = self._predictor.start_request(embeddings.get(part.request))

    def contexts(self, rows: Sequence[ScheduledTokens]) -> list[TokenContext]:
        """One for each token of ``rows``, whose requests have started."""
        return [row for part in rows for row in self._contexts_of(part)]

    def remember(self, maps: Sequence[RequestMaps]) -> None:
        """What the rows of a step have been through; those of requests that have ended are left out."""
        for part in maps:
            state = self._states.get(part.rows.request)
            if state is not None and len(part.tokens):
                self._advance(state, part)

    def end(self, request: str) -> RequestState | None:
        """A request has ended. Returns what was known of it."""
        return self._states.pop(request, None)

    def _contexts_of(self, part: ScheduledTokens) -> Sequence[TokenContext]:
        state = self._states[part.request]
        if len(part.tokens) == 1:
            return [state.context(int(part.tokens[0]))]
        return state.contexts_side_by_side(part.tokens)

    def _advance(self, state: RequestState, part: RequestMaps) -> None:
        tokens, predictor = part.tokens.tolist(), self._predictor
        maps = [TokenMap(*one) for one in zip(part.experts, part.weights, strict=True)]
        if len(maps) > 1:
            # what is kept of one token must not keep the whole step
            maps = [TokenMap(experts.copy(), weights.copy()) for experts, weights in maps]
        early = max(0, len(maps) - _REMEMBERED_PREFILL)
        for token, token_map in zip(tokens[:early], maps[:early], strict=True):
            predictor.memory.remember(token, token_map)
        for token, token_map in zip(tokens[early:], maps[early:], strict=True):
            state.advance(token, token_map)
        if predictor.learns_from_each_token:
            for token, token_map in zip(tokens, maps, strict=True):
                predictor.learn(state, token, token_map)

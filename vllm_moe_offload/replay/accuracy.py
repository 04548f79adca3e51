"""How good probabilities are: recall of the true experts, and whether p means p."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_BINS = 50
FIRST_LAYER_OF_MEAN = 6
"""Recall is averaged over the layers from this one on; earlier ones have seen too little to compare."""


class Accuracy:
    """Recall@n per layer and distance, and calibration per distance, summed over everything noted."""

    def __init__(self, layers: int, top_k: int, distances: Sequence[int] = (0, 1, 2, 3), counts: Sequence[int] = ()):
        """``counts``: the n of recall@n; top_k and twice that when empty."""
        self.distances = tuple(distances)
        self.counts = tuple(counts) or (top_k, 2 * top_k)
        self._found = np.zeros((len(self.distances), len(self.counts), layers))
        self._true = np.zeros((len(self.distances), layers))
        self._binned = np.zeros((len(self.distances), 3, _BINS))

    def note(self, distance: int, layer: int, probabilities: NDArray[np.float32], experts: NDArray[np.int64]) -> None:
        """``probabilities [B, E]`` were given for rows that then used ``experts [B, K]``."""
        which = self.distances.index(distance)
        order = np.argsort(-probabilities, axis=1, kind="stable")
        used = np.zeros(probabilities.shape, bool)
        np.put_along_axis(used, experts, True, axis=1)
        ranked = np.take_along_axis(used, order, axis=1)
        for index, count in enumerate(self.counts):
            self._found[which, index, layer] += ranked[:, :count].sum()
        self._true[which, layer] += experts.size
        bins = np.minimum((probabilities * _BINS).astype(np.int64), _BINS - 1).ravel()
        for index, values in enumerate((None, probabilities.ravel(), used.ravel())):
            self._binned[which, index] += np.bincount(bins, values, minlength=_BINS)

    def recall(self, distance: int, count: int) -> NDArray[np.float64]:
        """Share of the true experts among the ``count`` most probable, per layer; NaN where nothing was noted."""
        which = self.distances.index(distance)
        with np.errstate(invalid="ignore"):
            return self._found[which, self.counts.index(count)] / self._true[which]

    def calibration(self, distance: int) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Per bin of probability: share of all predictions, mean probability, share that was used."""
        number, said, used = self._binned[self.distances.index(distance)]
        filled = np.maximum(number, 1)
        return number / max(1.0, number.sum()), said / filled, used / filled

    def calibration_error(self, distance: int) -> float:
        """Expected calibration error: |said - used| averaged over predictions."""
        share, said, used = self.calibration(distance)
        return float((share * np.abs(said - used)).sum())

    def calibration_to_json(self) -> dict[str, list[dict[str, float]]]:
        """``{distance: [{share, said, used}]}``: the bins of ``calibration`` that hold anything."""
        return {
            str(distance): [
                {"share": float(share), "said": float(said), "used": float(used)}
                for share, said, used in zip(*self.calibration(distance), strict=True)
                if share
            ]
            for distance in self.distances
        }

    def to_json(self) -> dict[str, dict[str, dict[str, object]]]:
        """``{distance: {n: {mean, layers}}}`` with string keys."""
        report: dict[str, dict[str, dict[str, object]]] = {}
        for distance in self.distances:
            by_count = report[str(distance)] = {}
            for count in self.counts:
                layers = self.recall(distance, count)
                averaged = layers[FIRST_LAYER_OF_MEAN:] if len(layers) > FIRST_LAYER_OF_MEAN else layers
                by_count[str(count)] = {"mean": float(averaged.mean()), "layers": layers.round(6).tolist()}
        return report

"""An eviction policy that takes account of what the running steps of all workers of a pool are expected to use."""

from collections.abc import Sequence

import numpy as np

from ..cache import EvictionPolicy
from ..cache.base import FloatArray, IntArray
from ..cache.policies import PredictionAwarePolicy
from ..ipc.table import ResidencyTable


class SharedPredictions(PredictionAwarePolicy):
    """Takes for each expert the most that any of ``workers`` has written to its row of the table."""

    def __init__(self, policy: EvictionPolicy, table: ResidencyTable):
        super().__init__(policy, table.experts)
        self._table = table
        self.workers: Sequence[int] = ()
        """Entries of those attached."""

    def begin_step(self) -> None:
        self._policy.begin_step()

    def keep_scores(self, experts: IntArray) -> FloatArray:
        self.expected[:] = 0
        for worker in self.workers:
            # fmax and minimum make numbers of whatever a worker has written
            np.fmax(self.expected, self._table.expected[worker], out=self.expected)
        np.minimum(self.expected, 1, out=self.expected)
        return super().keep_scores(experts)

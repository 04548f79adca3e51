"""``python -m vllm_moe_offload.learning.process JOB``: trains heads on a history, in a process of its own.

Training beside a serving engine must not take its interpreter lock, its processors or its BLAS threads. This process
runs at the lowest priority, sleeps most of the time, and ends with the process that started it.
"""

import os
import sys
import time
from pathlib import Path

import msgspec
import numpy as np

from ..predict.network import NetworkSize, Parameters
from ..predict.token_vectors import LearnedVectors, ModelVectors, TokenVectors
from ..predict.trainer import HeadsTrainer
from ..trace.trace_file import read_trace
from .heads_file import write_heads


class TrainingJob(msgspec.Struct, frozen=True):
    """What to learn from, and where the result goes."""

    history: str
    heads: str
    fingerprint: str
    vectors: str | None
    """File of the model's own embeddings: ``tokens`` ascending and ``rows``. None: learn some."""
    cpu_share: float
    """Of one core."""
    parent: int
    """Process whose end is the end of this one."""


def train(job: TrainingJob) -> None:
    """Train on the whole history and write the heads."""
    trace = read_trace(job.history)
    vectors = _vectors(job.vectors)
    size = NetworkSize(trace.num_layers, trace.num_experts, vectors.width)
    trainer = HeadsTrainer(Parameters.random(size, np.random.default_rng(0)), vectors, trace)
    while not trainer.finished:
        began = time.process_time()
        trainer.step()
        used = time.process_time() - began
        time.sleep(used * (1 / job.cpu_share - 1))
        if os.getppid() != job.parent:
            return
    write_heads(Path(job.heads), job.fingerprint, trainer.parameters, trainer.vectors, trace.requests())


def _vectors(path: str | None) -> TokenVectors:
    if path is None:
        return LearnedVectors()
    with np.load(path, allow_pickle=False) as archive:
        tokens, rows = archive["tokens"], archive["rows"].astype(np.float32)
    return ModelVectors(lambda wanted: rows[np.searchsorted(tokens, wanted)], rows.shape[1])


if __name__ == "__main__":
    os.nice(19)
    train(msgspec.json.decode(sys.argv[1], type=TrainingJob))

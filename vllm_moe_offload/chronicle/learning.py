"""Has heads learned from the history whenever it has grown enough, and gives them to the predictor.

The learning itself happens in another process (``training``); everything here is called from the background thread.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from ..errors import TraceError
from ..history.archive import HISTORY_FILE, HistoryArchive
from ..predict.heads import HeadsPredictor
from ..predict.history import HistoryPredictor
from ..predict.network import NetworkSize
from ..predict.token_vectors import TokenVectors
from .heads_file import HEADS_FILE, read_heads
from .training import TrainingJob

CPU_SHARE = 0.05
"""Of one core. What ``OffloadConfig`` promises."""
_VECTORS_FILE = "vectors.npz"


class Learning:
    """The training of one engine's predictor.

    Args:
        predictor: whose history is learned from, and who is given the heads.
        folder: where heads are kept between starts; None for nowhere.
        fingerprint: of the model.
        vectors: the model's own token embeddings; None to learn some.
        cpus: where the training may run; None leaves it where this process runs.
        say: told in a sentence what happens.
    """

    def __init__(
        self,
        predictor: HistoryPredictor,
        folder: Path | None,
        fingerprint: str,
        vectors: TokenVectors | None,
        cpus: set[int] | None,
        say: Callable[[str], None],
    ):
        self._predictor, self._fingerprint, self._vectors = predictor, fingerprint, vectors
        self._cpus, self._say = cpus, say
        self._work = tempfile.TemporaryDirectory(prefix="moe-offload-learning-")
        self._heads_file = (folder or Path(self._work.name)) / HEADS_FILE
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up = False
        if self._heads_file.exists():
            self._adopt()

    def attend(self) -> None:
        """Take over what a training has finished, or start one where the history has grown enough.

        Raises:
            RuntimeError: a training failed; there will be no other.
        """
        if self._process is not None:
            if self._process.poll() is None:
                return
            code, self._process = self._process.returncode, None
            if code:
                self._given_up = True
                raise RuntimeError(f"learning from the history ended with {code}")
            self._adopt()
        elif self._predictor.training_due and not self._given_up:
            self._start()

    def close(self) -> None:
        """End a training that is under way."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
        self._work.cleanup()

    def _start(self) -> None:
        archive = HistoryArchive(Path(self._work.name))
        history = archive.save(self._fingerprint, self._predictor.history)
        assert history.name == HISTORY_FILE
        self._heads_file.parent.mkdir(parents=True, exist_ok=True)
        job = TrainingJob(
            str(history), str(self._heads_file), self._fingerprint, self._save_vectors(), CPU_SHARE, os.getpid()
        )
        self._process = subprocess.Popen(
            [sys.executable, "-m", "vllm_moe_offload.chronicle.training", msgspec.json.encode(job).decode()],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        if self._cpus:
            os.sched_setaffinity(self._process.pid, self._cpus)

    def _save_vectors(self) -> str | None:
        tokens = self._predictor.history.to_trace().tokens
        if self._vectors is None or tokens is None:
            return None
        path = Path(self._work.name) / _VECTORS_FILE
        known = np.unique(tokens)
        np.savez(path, tokens=known, rows=self._vectors.look_up(known).astype(np.float16))
        return str(path)

    def _adopt(self) -> None:
        shape = self._predictor.shape
        width = 0 if self._vectors is None else self._vectors.width
        size = NetworkSize(shape.layers, shape.experts, width)
        try:
            saved = read_heads(self._heads_file, self._fingerprint, size, learned=self._vectors is None)
        except TraceError as error:
            aside = self._heads_file.with_name(f"{self._heads_file.name}.unusable-{os.getpid()}")
            self._heads_file.replace(aside)
            self._say(f"heads are learned anew: {error}; set aside as {aside}")
            return
        vectors = saved.vectors if self._vectors is None else self._vectors
        assert vectors is not None
        heads = HeadsPredictor(shape, saved.parameters, vectors)
        self._predictor.use_heads(heads, saved.trained_tokens)
        self._say(f"predicting by heads learned from {saved.trained_tokens} tokens")

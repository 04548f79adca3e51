"""Has heads trained on the history whenever it has grown enough, and loads them into the predictor.

Engines that share a folder share the heads in it: one of them trains at a time, and all load what it has written.
The training itself happens in another process (``process``); everything here is called from the background thread.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from ..errors import TraceError, TraceReadError
from ..predict.heads import HeadsPredictor
from ..predict.history import HistoryPredictor
from ..predict.network import NetworkSize
from ..predict.token_vectors import TokenVectors
from ..store.files import FileVersion, file_version, make_private_folder, set_aside
from ..store.lock import BuildLock
from ..threads import bind_to
from ..trace.persistence import PersistentHistory
from .heads_file import HEADS_FILE, LEARNED_VECTORS_HEADS_FILE, LOCK_FILE, read_heads
from .process import TrainingJob
from .temporary_folder import TemporaryFolder

logger = logging.getLogger(__name__)

CPU_SHARE = 0.05
"""Of one core. What ``OffloadConfig`` promises."""
_VECTORS_FILE = "vectors.npz"
_FIRST_DELAY = 60.0
_LONGEST_DELAY = 3600.0
"""Seconds from a failed training to the next: twice as long after every failure in a row, up to the longest."""


class LearningSupervisor:
    """The training of one engine's predictor.

    Args:
        predictor: whose history is trained on, and into which the heads are loaded.
        kept: the history, and where it is kept.
        vectors: the model's own token embeddings; None to learn some.
        cpus: where the training may run; None leaves it where this process runs.
        clock: seconds.
    """

    def __init__(
        self,
        predictor: HistoryPredictor,
        kept: PersistentHistory,
        vectors: TokenVectors | None,
        cpus: set[int] | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock = clock
        self._predictor, self._kept, self._vectors = predictor, kept, vectors
        self._cpus = cpus
        self._work = TemporaryFolder("moe-offload-learning-")
        name = LEARNED_VECTORS_HEADS_FILE if vectors is None else HEADS_FILE
        self._heads_file = (kept.folder or self._work.path) / name
        self._heads_seen: tuple[int, int] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: BuildLock | None = None
        """Held while this engine is the one that trains."""
        self._failures = 0
        """Trainings that have failed in a row."""
        self._earliest = clock()
        """When the next may start."""
        self._load_new_heads()

    def poll(self) -> None:
        """Load the heads of a training that has ended, here or in another engine, or start one where it is due.

        The heads that predict stay until there are others. After a failure the next call does nothing; the training is
        tried again some time later.

        Raises:
            RuntimeError: a training failed.
            OSError: none could be started.
            Exception: what it was to learn from could not be put together.
        """
        if self._process is not None and self._process.poll() is None:
            return
        try:
            if self._process is not None:
                self._conclude(self._process.returncode)
            self._load_new_heads()
            if self._predictor.training_due and self._clock() >= self._earliest:
                self._start_unless_locked()
        except Exception:
            self._unlock()
            self._earliest = self._clock() + min(_LONGEST_DELAY, _FIRST_DELAY * 2**self._failures)
            self._failures = min(self._failures + 1, 16)
            raise

    def _conclude(self, code: int) -> None:
        self._process = None
        if code:
            raise RuntimeError(f"learning from the history ended with {code}; it will be tried again")
        if not self._load_new_heads():
            raise RuntimeError("learning from the history left no heads that can be used; it will be tried again")
        self._failures = 0
        self._unlock()

    def close(self) -> None:
        """End a training that is under way."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._process = None
        self._unlock()
        self._work.cleanup()

    def _start_unless_locked(self) -> None:
        make_private_folder(self._heads_file.parent)
        self._lock = BuildLock.try_acquire(self._heads_file.with_name(LOCK_FILE))
        if self._lock is None:
            return
        self._load_new_heads()
        history = self._kept.snapshot(self._work.path) if self._predictor.training_due else None
        if history is None:
            self._unlock()
        else:
            self._start(history)

    def _start(self, history: Path) -> None:
        job = TrainingJob(
            str(history),
            str(self._heads_file),
            self._kept.fingerprint,
            self._save_vectors(history),
            CPU_SHARE,
            os.getpid(),
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vllm_moe_offload.learning.process", msgspec.json.encode(job).decode()],
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
        )
        bind_to(self._cpus, self._process.pid)

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _save_vectors(self, history: Path) -> str | None:
        if self._vectors is None:
            return None
        with np.load(history, allow_pickle=False) as archive:
            if "tokens" not in archive:
                return None
            known = np.unique(archive["tokens"])
        path = self._work.path / _VECTORS_FILE
        np.savez(path, tokens=known, rows=self._vectors.look_up(known).astype(np.float16))
        return str(path)

    def _load_new_heads(self) -> bool:
        """Predict by the heads in the file, if they are other ones than those looked at last. Whether that is so."""
        try:
            status = self._heads_file.stat()
        except OSError:
            return False
        if (seen := (status.st_ino, status.st_mtime_ns)) == self._heads_seen:
            return False
        self._heads_seen = seen
        return self._load_heads()

    def _load_heads(self) -> bool:
        shape = self._predictor.shape
        width = 0 if self._vectors is None else self._vectors.width
        size = NetworkSize(shape.layers, shape.experts, width)
        try:
            seen = file_version(self._heads_file)
            saved = read_heads(self._heads_file, self._kept.fingerprint, size, learned=self._vectors is None)
        except (OSError, TraceReadError) as error:
            logger.warning("predicting without the heads in %s: %s", self._heads_file, error)
            return False
        except TraceError as error:
            logger.warning("heads are learned anew: %s; %s", error, self._set_aside(seen))
            return False
        vectors = saved.vectors if self._vectors is None else self._vectors
        assert vectors is not None
        heads = HeadsPredictor(shape, saved.parameters, vectors)
        requests = [past.trace for past in list(self._predictor.history.requests)]
        self._predictor.use_heads(heads, saved.trained_tokens, saved.unseen_tokens(requests))
        logger.info("predicting by heads learned from %d tokens", saved.trained_tokens)
        return True

    def _set_aside(self, seen: FileVersion | None) -> str:
        try:
            aside = set_aside(self._heads_file, seen)
        except OSError as error:
            return f"the file cannot be set aside ({error.strerror})"
        return "another engine has replaced the file" if aside is None else f"set aside as {aside}"

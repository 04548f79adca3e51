"""What one worker keeps of its requests: the history of its model, and the trace it was asked for.

Settings and ranks decide here who reads and writes what; the files themselves are the matter of trace/. Nothing
here may end an engine that serves.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank
from vllm.logger import init_logger

from ..client.remote_history import SharedHistory
from ..config import OffloadConfig
from ..errors import OffloadError
from ..ipc.protocol import OpenHistory
from ..learning.background import Background
from ..learning.supervisor import LearningSupervisor
from ..predict.base import ModelShape, Predictor, RequestState
from ..predict.history import HistoryPredictor
from ..predict.registry import MAX_CANDIDATES
from ..prefetch.optional import Switch
from ..stats import Stats
from ..store.reader import Store
from ..store.root import default_root
from ..trace.archive import HistoryArchive
from ..trace.persistence import LocalHistory, PersistentHistory
from ..trace.recorder import Recorder
from ..trace.trace import Trace
from ..trace.trace_recording import TraceRecording
from .early_checks import named_history
from .embedding import PromptEmbedder, UserEmbedder

logger = init_logger(__name__)

SECONDS_BETWEEN_ROUNDS = 5.0


class RoutingHistory:
    """What becomes of what the requests of one worker were routed to: traced, remembered, learned from.

    All of it happens on a thread of its own, between and after the steps.

    Args:
        recorder: makes traces of running requests.
        trace: the file that every request goes to.
        kept: of the history; None where nothing is predicted.
        predictor: fed with every request.
        learning: of ``predictor``, where it learns.
        prediction: turned off by what the predictor raises.
        cpus: where the thread may run.
    """

    def __init__(
        self,
        recorder: Recorder,
        trace: TraceRecording | None,
        kept: PersistentHistory | None,
        predictor: Predictor | None,
        learning: LearningSupervisor | None,
        prediction: Switch,
        cpus: set[int],
    ):
        self.kept = kept
        self.predictor = predictor
        self._recorder, self._warned_of_unsound_tokens = recorder, False
        self._trace = trace
        self._learning = learning
        self._prediction = prediction
        self._background = Background(self._round, SECONDS_BETWEEN_ROUNDS, _complain, cpus)

    def later(self, job: Callable[[], None]) -> None:
        """Run ``job`` on the thread, after those given before."""
        self._background.soon(job)

    def request_ended(self, trace: Trace, state: RequestState | None) -> None:
        """A request is over. Called on the thread.

        Args:
            state: what prediction kept of it.
        """
        if self._trace is not None:
            self._trace.add(trace)
        if self.predictor is not None:
            self._prediction.guard(self._learn)(self.predictor, trace, state)

    def _learn(self, predictor: Predictor, trace: Trace, state: RequestState | None) -> None:
        predictor.end_request(state or predictor.start_request(), trace)
        if not isinstance(predictor, HistoryPredictor):
            assert self.kept is not None
            self.kept.history.add(trace)

    def _round(self) -> None:
        if self._recorder.unsound_tokens and not self._warned_of_unsound_tokens:
            self._warned_of_unsound_tokens = True
            logger.warning(
                "tokens are left out of history and trace, because a router gave weights that are not "
                "finite, negative or all zero, or an expert that is none (counted as unsound_tokens)"
            )
        if self.kept is not None:
            self.kept.save()
        if self._learning is not None:
            self._learning.poll()
        if self._trace is not None:
            self._trace.write()

    @property
    def has_learned(self) -> bool:
        """Whether there are learned heads."""
        return isinstance(self.predictor, HistoryPredictor) and self.predictor.heads is not None

    def measure(self, stats: Stats) -> None:
        """Bring up to date how much is remembered, and how much of it the predictor has learned from."""
        stats.unsound_tokens = self._recorder.unsound_tokens
        if self.kept is not None:
            stats.history_requests = self.kept.history.num_requests
            stats.history_tokens = self.kept.history.num_tokens
        if isinstance(self.predictor, HistoryPredictor):
            stats.learned_tokens = self.predictor.trained_tokens

    def close(self) -> None:
        """Write what is to be kept, and end the thread. What cannot be written keeps no engine from ending."""
        self._background.close()
        if self._learning is not None:
            self._learning.close()
        if self.kept is not None:
            with _complaining():
                self.kept.close()
        if self._trace is not None:
            with _complaining():
                self._trace.close()


def history_fingerprint(store: Store, embed: PromptEmbedder | None) -> str:
    """Of the checkpoint's content and configuration alone (see store/identity.py): histories outlive another vLLM,
    torch or transformers, another kernel, dtype or machine.

    Embeddings of two functions cannot be compared, so each of the user's has a history of its own.
    """
    facts = {name: store.identity.facts[name] for name in ("checkpoint", "model")}
    facts["pipeline_stage"] = get_pp_group().rank_in_group if get_pp_group().world_size > 1 else 0
    if isinstance(embed, UserEmbedder):
        facts["embedding"] = [embed.setting, embed.width]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def writes_files() -> bool:
    """Whether this worker keeps files: ranks that split the same layers all see the same routing."""
    return get_tensor_model_parallel_rank() == 0


def trace_recording(
    vllm_config: Any, config: OffloadConfig, shape: ModelShape, fingerprint: str
) -> TraceRecording | None:
    """The trace file of this worker, or None if none was asked for or another rank writes it.

    Raises:
        TraceError: it cannot be written, or holds something else.
    """
    if config.trace is None or not writes_files():
        return None
    stage, replica = get_pp_group().rank_in_group, vllm_config.parallel_config.data_parallel_rank
    suffix = "".join(f".{name}{rank}" for name, rank in (("pp", stage), ("dp", replica)) if rank)
    path = config.trace.with_name(f"{config.trace.stem}{suffix}{config.trace.suffix}")
    name = Path(vllm_config.model_config.model).name
    logger.info("recording a trace of every request in %s", path)
    return TraceRecording(path, shape, name, fingerprint)


def persistent_history(
    vllm_config: Any, config: OffloadConfig, shape: ModelShape, fingerprint: str, store: Store, daemon: Path | None
) -> PersistentHistory | None:
    """What is remembered of this model; None where nothing is to be predicted.

    Args:
        daemon: socket of the daemon that keeps the experts, and the history with them unless the settings say where
            else; None where this worker keeps its own.

    Raises:
        ConfigError: the folder that was named for histories cannot be written.
    """
    if config.predictor == "none":
        return None
    kept: PersistentHistory
    if daemon is not None and config.history is None:
        request = OpenHistory(fingerprint, shape, store.path.name)
        kept = SharedHistory(daemon, request, MAX_CANDIDATES, writes_files())
    else:
        first = vllm_config.parallel_config.data_parallel_rank == 0
        kept = LocalHistory(_archive(config), fingerprint, shape, first and writes_files())
    logger.info(
        "predicting by '%s', from %d tokens of %d earlier requests",
        config.predictor,
        kept.history.num_tokens,
        kept.history.num_requests,
    )
    return kept


def _archive(config: OffloadConfig) -> HistoryArchive | None:
    """Where histories are kept; None: off, or the default folder cannot be written.

    Raises:
        ConfigError: the folder that was named cannot be written.
    """
    if config.history == "off":
        return None
    if config.history is not None:
        return named_history(config.history)
    archive = HistoryArchive((config.store or default_root()).parent / "history")
    problem = archive.problem()
    if problem is None:
        return archive
    logger.warning("the history stays in memory and ends with this engine: %s", problem)
    return None


def _complain(error: Exception) -> None:
    logger.error("%s: %s", type(error).__name__, error)


@contextmanager
def _complaining() -> Iterator[None]:
    try:
        yield
    except (OSError, OffloadError) as error:
        _complain(error)

"""A real engine in a process of its own that a test can talk to, watch and kill.

Processes are forked from one that has imported vLLM already, so that a test can afford several.
"""

import gc
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from tests.e2e.engine_server import allow_amx

SMALL_ENGINE = {
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 16 << 20,
    "gpu_memory_utilization": 0.2,
}
PRELOADED = multiprocessing.get_context("forkserver")
"""Its processes have imported vLLM."""
_FRESH = multiprocessing.get_context("spawn")
PRELOADED.set_forkserver_preload(["vllm", "vllm.entrypoints.llm", "tests.e2e.live_engine"])


class Answer(NamedTuple):
    """What one request got."""

    tokens: list[int]
    finish_reason: str
    stop_reason: str | int | None


class EngineError(Exception):
    """What the engine process raised, as ``Type: message``."""


class LiveEngine:
    """The test's side. ``log`` collects whatever the process prints.

    Args:
        fresh: the process has not imported vLLM yet.
    """

    def __init__(self, log: Path, fresh: bool = False, **environment: str):
        self.log = log
        processes = _FRESH if fresh else PRELOADED
        self._connection, theirs = processes.Pipe()
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"} | environment
        inherited = {name: value for name, value in os.environ.items() if name.startswith(("VLLM", "HF_", "MOE_"))}
        self.process = processes.Process(target=_answer, args=(theirs, str(log), inherited | environment), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, command: str, *arguments: Any) -> None:
        """Send a command without waiting for its answer, which ``end`` returns."""
        self._connection.send((command, arguments))

    def answered(self, seconds: float) -> bool:
        """Whether an answer, or the end of the process, arrives within ``seconds``."""
        return self._connection.poll(seconds)

    def end(self) -> Any:
        succeeded, answer = self._connection.recv()
        if not succeeded:
            raise EngineError(answer)
        return answer

    def run(self, function: Callable[[], None]) -> None:
        """Run ``function``, of a module of the tests, in the engine's process."""
        self.begin("run", function)
        self.end()

    def start(self, model: Path, arguments: dict[str, Any], **offload: Any) -> None:
        """Start the engine; ``offload`` are the plugin's settings."""
        self.begin("start", str(model), arguments, offload)
        self.end()

    def generate(self, prompts: list[list[int]], tokens: int = 4) -> list[Answer]:
        """Generate greedily, all prompts in one batch."""
        self.begin("generate", prompts, tokens)
        return self.end()

    def embed(self, prompts: list[list[int]]) -> list[tuple[list[float], str | None]]:
        """Vectors, all prompts in one batch; or the message of the error that a prompt got."""
        self.begin("embed", prompts)
        return self.end()

    def routes(self) -> set[tuple[int, int]]:
        """(layer, expert) of everything chosen since this was asked for last."""
        self.begin("routes")
        return self.end()

    def stats(self) -> dict[str, Any]:
        self.begin("stats")
        return self.end()

    def call(self, function: Callable[[Any], Any]) -> Any:
        """What ``function``, of a module of the tests, returns in the engine's process, given the worker."""
        self.begin("call", function)
        return self.end()

    def stop(self) -> None:
        """End the engine but not its process, which may start another."""
        self.begin("stop")
        self.end()

    def close(self) -> None:
        self._connection.close()
        self.process.join()


class _Session:
    """The engine's side: one method per command."""

    def run(self, function: Callable[[], None]) -> None:
        function()

    def start(self, model: str, arguments: dict[str, Any], offload: dict[str, Any]) -> None:
        from vllm import LLM

        allow_amx()
        extra = {"additional_config": {"moe_offload": offload}} if offload else {}
        self._llm = LLM(model, **(SMALL_ENGINE | arguments | extra))
        self._routes: set[tuple[int, int]] = set()
        if offload:
            self._llm.collective_rpc(self._watch)

    def _watch(self, worker: Any) -> None:
        runtime = worker.model_runner.get_model().moe_offload.runtime
        serve = runtime.serve

        def watched(layer: Any, chosen: Any) -> Any:
            self._routes |= {(layer.index, expert) for expert in set(chosen.ravel().tolist())}
            return serve(layer, chosen)

        runtime.serve = watched

    def generate(self, prompts: list[list[int]], tokens: int) -> list[Answer]:
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = [request.outputs[0] for request in self._llm.generate(requests, sampling, use_tqdm=False)]
        return [Answer(list(output.token_ids), output.finish_reason, output.stop_reason) for output in outputs]

    def embed(self, prompts: list[list[int]]) -> list[tuple[list[float], str | None]]:
        requests = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self._llm.embed(requests, use_tqdm=False)
        return [(output.outputs.embedding, output.error and output.error.message) for output in outputs]

    def routes(self) -> set[tuple[int, int]]:
        routes, self._routes = self._routes, set()
        return routes

    def stats(self) -> dict[str, Any]:
        return self._llm.collective_rpc("moe_offload_stats")[0]

    def call(self, function: Callable[[Any], Any]) -> Any:
        return self._llm.collective_rpc(function)[0]

    def stop(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()


def _answer(connection: Connection, log: str, environment: dict[str, str]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    session = _Session()
    while True:
        try:
            command, arguments = connection.recv()
        except EOFError:
            sys.stdout.flush()
            os._exit(0)
        try:
            answer = True, getattr(session, command)(*arguments)
        except Exception as error:
            traceback.print_exc()
            answer = False, f"{type(error).__name__}: {error}"
        connection.send(answer)

"""The test's side of ``engine_server.py``."""

import functools
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.e2e.compiler_cache import use_compiler_cache

SERVER = Path(__file__).parent / "engine_server.py"


class EngineServer:
    """Talks to ``engine_server.py``. A job that fails raises, and the next one gets a fresh process."""

    def __init__(self, log: Path, **environment: str):
        self._log = log
        compiled = Path(os.environ["MOE_OFFLOAD_TEST_ROOT"]) / "compiled"
        compiled.mkdir(exist_ok=True)
        self._environment = (
            os.environ
            | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
            | use_compiler_cache(compiled)
            | environment
        )
        self._process: subprocess.Popen[str] | None = None

    def run(
        self,
        model: Path,
        engine: dict[str, Any],
        rounds: list[dict[str, Any]],
        every_step: bool = False,
        order: int | None = None,
        by_itself: bool = False,
    ) -> dict[str, Any]:
        """Start an engine, generate every round greedily, return tokens and logprobs (and the plugin's counters).

        Args:
            every_step: predict in every step, whatever the governor of prediction decides by the clock.
            order: slots are in the memory of a virtual device, whose copies run in this order.
            by_itself: that device manages them where it can.
        """
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, str(SERVER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log.open("a"),
                text=True,
                env=self._environment,
            )
        assert self._process.stdin and self._process.stdout
        job = {"model": str(model), "engine": engine, "rounds": rounds, "every_step": every_step}
        job |= {"order": order, "by_itself": by_itself}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"the process ended with {self._process.wait()}"}
        if "error" in answer:
            self.close()
            raise RuntimeError(f"{answer['error']}\n{self._log.read_text()[-6000:]}")
        return answer

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin
            self._process.stdin.close()
            self._process.wait()
            self._process = None


class PlainServer(EngineServer):
    """Unmodified vLLM: the plugin is not even loaded.

    What it answers depends on the job alone, so one answer serves all tests and workers of a session.
    """

    def __init__(self, log: Path, **environment: str):
        super().__init__(log, VLLM_PLUGINS="", **environment)
        self._answers = Path(os.environ["MOE_OFFLOAD_TEST_ROOT"]) / "plain-answers"
        self._answers.mkdir(exist_ok=True)

    def run(self, model: Path, engine: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
        """As ``EngineServer.run``; the files of ``model`` must not change."""
        job = json.dumps([_contents(model), engine, rounds], sort_keys=True, default=str)
        kept = self._answers / f"{hashlib.sha256(job.encode()).hexdigest()}.json"
        if not kept.exists():
            answer = super().run(model, engine, rounds)
            written = kept.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(answer))
            written.replace(kept)
        return json.loads(kept.read_text())


@functools.cache
def _contents(model: Path) -> list[str]:
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(model.iterdir()) if file.is_file()]

"""Engines to compare, each a process tree of its own, ended exactly and by number.

Must never hide a failure: an engine that does not start, dies or is killed for memory raises EngineError saying so.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import psutil

from .memory import PeakSampler, descendants
from .protocol import ANSWERS_VARIABLE

START_SECONDS = 1800
RUN_SECONDS = 1800
QUIET_SECONDS = 0.25
QUIET_WAIT_SECONDS = 20.0


class EngineError(Exception):
    """An engine could not start or did not survive; the message says why."""


class Engine:
    """A running engine, whose process serves by protocol.py. `load` returns once it serves; `stop` ends every process.

    Args:
        name: what it is called in messages.
        command: of its process; its arguments are the protocol's.
        environment: of its process.

    Raises:
        EngineError: the process cannot be started.
    """

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.loaded: dict[str, Any] = {}
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the engine
        self._answers, theirs = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=self._log,
                stderr=subprocess.STDOUT,
                pass_fds=[theirs],
                env={**environment, ANSWERS_VARIABLE: str(theirs)},
                text=True,
                start_new_session=True,
            )
        except OSError as error:
            os.close(self._answers)
            raise EngineError(f"{name}: {error}") from error
        finally:
            os.close(theirs)

    def load(self) -> Self:
        """Wait until it serves; what loading took is in `loaded` then. Raises EngineError, and the engine is gone."""
        try:
            with PeakSampler(self.pid) as sampler:
                self.loaded = self._answer(START_SECONDS)
            self.loaded["peak_bytes"] = sampler.peak_bytes
        except BaseException:
            self.stop()
            raise
        return self

    def run(
        self, prompts: list[list[str]], tokens: int, prompt_tokens: int | None = None, seed: int | None = None
    ) -> dict[str, Any]:
        """Generate for one batch (see the runner's `run`); adds `peak_bytes` of the process tree meanwhile."""
        with PeakSampler(self.pid) as sampler:
            result = self.ask("run", prompts=prompts, tokens=tokens, prompt_tokens=prompt_tokens, seed=seed)
        return result | {"peak_bytes": sampler.peak_bytes}

    def ask(self, method: str, **arguments: Any) -> Any:
        """Have the engine's process call a method of its runner. Raises EngineError if it does not survive."""
        try:
            assert self._process.stdin is not None
            print(json.dumps({"do": method} | arguments), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failure() from None
        return self._answer(RUN_SECONDS)

    @property
    def pid(self) -> int:
        """Of the process all others of the engine descend from."""
        return self._process.pid

    def cpu_seconds(self) -> float:
        """Processor time of the whole tree so far."""
        seconds = 0.0
        for pid in (self.pid, *(process.pid for process in descendants(self.pid))):
            with contextlib.suppress(psutil.NoSuchProcess):
                seconds += sum(psutil.Process(pid).cpu_times()[:2])
        return seconds

    def stop(self) -> None:
        """End the engine's processes, politely first."""
        tree = [psutil.Process(self.pid), *descendants(self.pid)] if self._process.poll() is None else []
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(tree, timeout=15)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=15)
        self._process.wait(15)
        os.close(self._answers)
        self._log.close()

    def _answer(self, seconds: float) -> Any:
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], seconds)
            if not ready:
                raise EngineError(f"{self.name}: no answer for {seconds:.0f} s")
            piece = os.read(self._answers, 1 << 16)
            if not piece:
                raise self._failure()
            line += piece
        return json.loads(line)

    def _failure(self) -> EngineError:
        try:
            code: int | None = self._process.wait(30)
        except subprocess.TimeoutExpired:
            code = None
        lines = self._log_text().splitlines()
        errors = [line for line in lines if "Error" in line or "error:" in line] or lines
        return EngineError(f"{self.name}: exit code {code}: {errors[-1].strip() if errors else 'no output'}")

    def _log_text(self) -> str:
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")


def wait_until_quiet(engines: Sequence[Engine]) -> None:
    """Return when none of them computes: vLLM's engine core goes on for about a second after its last token."""
    deadline = time.monotonic() + QUIET_WAIT_SECONDS
    used = sum(engine.cpu_seconds() for engine in engines)
    while engines and time.monotonic() < deadline:
        time.sleep(QUIET_SECONDS)
        before, used = used, sum(engine.cpu_seconds() for engine in engines)
        if used - before <= 0.02 * QUIET_SECONDS * len(engines):
            return

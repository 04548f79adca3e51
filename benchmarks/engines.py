"""Engines to compare, each a process tree of its own, ended exactly and by number.

Must never hide a failure: an engine that does not start, dies or is killed for memory raises EngineError saying so.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from memory import MemoryLimit, PeakSampler, descendants, mapped_file_bytes
from read_ahead import ReadAhead

DEFAULT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
START_SECONDS = 1800
RUN_SECONDS = 1800
QUIET_SECONDS = 0.25
QUIET_WAIT_SECONDS = 20.0


class EngineError(Exception):
    """An engine could not start or did not survive; the message says why."""


class Program(NamedTuple):
    """What an engine's process runs: a script that serves by protocol.py, the interpreter for it, its arguments."""

    worker: Path
    python: str = sys.executable
    defaults: Mapping[str, Any] = {}
    """Arguments where a variant gives none."""


VLLM = Program(Path(__file__).with_name("worker.py"), defaults={"kv_cache_memory_bytes": 1 << 30})


class Variant(NamedTuple):
    """What one arm of a comparison runs: if `offload` is None, the program without our plugin."""

    name: str
    offload: dict[str, Any] | None
    arguments: dict[str, Any]
    history: Path | None = None
    """Folder of histories (see warm.py). Every engine starts with a copy of its own, or with none."""
    program: Program = VLLM
    memory_limit: int | None = None
    """Bytes, instead of what is asked of all engines."""
    read_ahead: ReadAhead | None = None
    """While the engine lives."""
    checkout: Path | None = None
    """Another checkout of this project, whose plugin the engine loads instead of the installed one."""

    def engine_arguments(self, history: Path) -> dict[str, Any]:
        """What the program is started with: for vLLM keyword arguments of LLM; its history is kept in `history`."""
        arguments = {**self.program.defaults, **self.arguments}
        if self.offload is None:
            return arguments
        return arguments | {"additional_config": {"moe_offload": {"history": str(history)} | self.offload}}


class Engine:
    """A running engine. `start` returns once it serves; `stop` ends every process it started."""

    def __init__(self, variant: Variant, memory_limit: int | None = None, preload: str | None = None) -> None:
        self.variant = variant
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the engine
        self._limit_bytes = memory_limit if variant.memory_limit is None else variant.memory_limit
        self._limit = MemoryLimit(variant.name, self._limit_bytes) if self._limit_bytes is not None else None
        self._folder = tempfile.TemporaryDirectory(prefix="history-")
        if variant.history is not None:
            shutil.copytree(variant.history, self._folder.name, dirs_exist_ok=True)
        try:
            if variant.read_ahead is not None:
                variant.read_ahead.set()
            self._process, self._answers = self._spawn(preload)
        except OSError as error:
            self._undo()
            raise EngineError(f"{variant.name}: {error}") from error

    @classmethod
    def start(cls, variant: Variant, memory_limit: int | None = None, preload: str | None = None) -> "Engine":
        """Start an engine and wait until it serves. Its figures of loading are in `loaded`; raises EngineError."""
        engine = cls(variant, memory_limit, preload)
        try:
            with PeakSampler(engine._process.pid) as sampler:
                engine.loaded = engine._answer(START_SECONDS)
            engine.loaded["peak_bytes"] = sampler.peak_bytes
        except BaseException:
            engine.stop()
            raise
        return engine

    loaded: dict[str, Any]

    def _spawn(self, preload: str | None) -> tuple[subprocess.Popen[str], int]:
        answers, theirs = os.pipe()
        arguments = json.dumps(self.variant.engine_arguments(Path(self._folder.name)))
        program = self.variant.program
        command = [program.python, str(program.worker), str(theirs), arguments]
        if self._limit is not None:
            command.append(str(self._limit.enter_file()))
        environment = DEFAULT_ENVIRONMENT | os.environ | ({"LD_PRELOAD": preload} if preload else {})
        if self.variant.checkout is not None:
            environment["PYTHONPATH"] = str(self.variant.checkout)
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            pass_fds=[theirs],
            env=environment,
            text=True,
            start_new_session=True,
        )
        os.close(theirs)
        return process, answers

    def _log_text(self) -> str:
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def run(
        self, prompts: list[list[str]], tokens: int, prompt_tokens: int | None = None, seed: int | None = None
    ) -> dict[str, Any]:
        """Generate for one batch (see worker.Runner.run); adds `peak_bytes` of the process tree meanwhile."""
        with PeakSampler(self._process.pid) as sampler:
            result = self.ask("run", prompts=prompts, tokens=tokens, prompt_tokens=prompt_tokens, seed=seed)
        return result | {"peak_bytes": sampler.peak_bytes}

    def ask(self, method: str, **arguments: Any) -> Any:
        """Have the engine's process call a method of worker.Runner. Raises EngineError if it does not survive."""
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

    def mapped_bytes(self, besides: Sequence[Path]) -> int:
        """Of files that its processes have mapped and in memory, besides those in the folders `besides`."""
        tree = [self._process.pid, *(process.pid for process in descendants(self._process.pid))]
        return sum(mapped_file_bytes(pid, besides) for pid in tree)

    def cpu_seconds(self) -> float:
        """Processor time of the whole tree so far."""
        tree = [psutil.Process(self._process.pid), *descendants(self._process.pid)]
        return sum(sum(process.cpu_times()[:2]) for process in tree)

    def _answer(self, seconds: float) -> Any:
        line = b""
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([self._answers], [], [], seconds)
            if not ready:
                raise EngineError(f"{self.variant.name}: no answer for {seconds:.0f} s")
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
        if self._limit is not None and self._limit.kills():
            return EngineError(f"{self.variant.name}: killed, out of memory in {self._limit_bytes} bytes")
        lines = self._log_text().splitlines()
        errors = [line for line in lines if "Error" in line] or lines
        return EngineError(f"{self.variant.name}: exit code {code}: {errors[-1] if errors else 'no output'}")

    def stop(self) -> None:
        """End the engine's processes, politely first; undo its memory limit and read-ahead."""
        tree = [psutil.Process(self._process.pid), *descendants(self._process.pid)] if self._alive() else []
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
        self._undo()

    def _undo(self) -> None:
        self._folder.cleanup()
        if self.variant.read_ahead is not None:
            self.variant.read_ahead.restore()
        if self._limit is not None:
            self._limit.remove()

    def _alive(self) -> bool:
        return self._process.poll() is None


def wait_until_quiet(engines: Sequence[Engine]) -> None:
    """Return when none of them computes: vLLM's engine core goes on for about a second after its last token."""
    deadline = time.monotonic() + QUIET_WAIT_SECONDS
    used = sum(engine.cpu_seconds() for engine in engines)
    while engines and time.monotonic() < deadline:
        time.sleep(QUIET_SECONDS)
        before, used = used, sum(engine.cpu_seconds() for engine in engines)
        if used - before <= 0.02 * QUIET_SECONDS * len(engines):
            return

"""The package's engines under conditions of a benchmark: a memory limit, a read-ahead, a history, another checkout.

Must never hide a failure: an engine that does not start, dies or is killed for memory raises EngineError saying so.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from memory import MemoryLimit, mapped_file_bytes
from read_ahead import ReadAhead

from vllm_moe_offload.bench import engine
from vllm_moe_offload.bench.engine import EngineError
from vllm_moe_offload.bench.memory import descendants

DEFAULT_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


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


class Engine(engine.Engine):
    """A running engine of a variant. `start` returns once it serves; `stop` undoes its memory limit and read-ahead."""

    def __init__(self, variant: Variant, memory_limit: int | None = None, preload: str | None = None) -> None:
        self.variant = variant
        self._limit_bytes = memory_limit if variant.memory_limit is None else variant.memory_limit
        self._folder = tempfile.TemporaryDirectory(prefix="history-")
        self._limit: MemoryLimit | None = None
        try:
            if self._limit_bytes is not None:
                self._limit = MemoryLimit(variant.name, self._limit_bytes)
            if variant.history is not None:
                shutil.copytree(variant.history, self._folder.name, dirs_exist_ok=True)
            if variant.read_ahead is not None:
                variant.read_ahead.set()
            super().__init__(variant.name, self._command(), self._environment(preload))
        except (OSError, EngineError) as error:
            self._undo()
            raise error if isinstance(error, EngineError) else EngineError(f"{variant.name}: {error}") from error

    @classmethod
    def start(cls, variant: Variant, memory_limit: int | None = None, preload: str | None = None) -> "Engine":
        """Start an engine and wait until it serves. Its figures of loading are in `loaded`; raises EngineError."""
        return cls(variant, memory_limit, preload).load()

    def _command(self) -> list[str]:
        arguments = json.dumps(self.variant.engine_arguments(Path(self._folder.name)))
        command = [self.variant.program.python, str(self.variant.program.worker), arguments]
        return command if self._limit is None else [*command, str(self._limit.enter_file())]

    def _environment(self, preload: str | None) -> dict[str, str]:
        environment = DEFAULT_ENVIRONMENT | os.environ | ({"LD_PRELOAD": preload} if preload else {})
        if self.variant.checkout is not None:
            environment["PYTHONPATH"] = str(self.variant.checkout)
        return environment

    def mapped_bytes(self, besides: Sequence[Path]) -> int:
        """Of files that its processes have mapped and in memory, besides those in the folders `besides`."""
        tree = [self.pid, *(process.pid for process in descendants(self.pid))]
        return sum(mapped_file_bytes(pid, besides) for pid in tree)

    def _failure(self) -> EngineError:
        failure = super()._failure()
        if self._limit is not None and self._limit.kills():
            return EngineError(f"{self.name}: killed, out of memory in {self._limit_bytes} bytes")
        return failure

    def stop(self) -> None:
        """End the engine's processes, politely first; undo its memory limit and read-ahead."""
        super().stop()
        self._undo()

    def _undo(self) -> None:
        self._folder.cleanup()
        if self.variant.read_ahead is not None:
            self.variant.read_ahead.restore()
        if self._limit is not None:
            self._limit.remove()

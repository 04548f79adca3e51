"""Engines that take turns on the same prompts (A B C, A B C, ...): a machine that gets slower slows all of them.

They stay alive between turns: a run starts when the others are quiet, and the processor time these take meanwhile is
reported. With `restart` every run gets a fresh engine instead.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .engine import Engine, EngineError, wait_until_quiet


class Workload(NamedTuple):
    """What every engine is given to do."""

    texts: Sequence[str]
    batches: Sequence[int]
    tokens: int
    rounds: int
    prompt_tokens: int | None = None

    def prompts(self, batch: int, number: int) -> list[list[str]]:
        """The prompts of a round: each starts at another line of the list and goes on through it. -1: the warm-up's."""
        texts = list(self.texts)
        starts = [(number * batch + index) % len(texts) for index in range(batch)]
        return [texts[start:] + texts[:start] for start in starts]


class Comparison:
    """The engines of one comparison and what they did, round by round.

    Args:
        arms: names of the engines, in the order of their turns.
        start: starts one by its name, and returns once it serves; raises EngineError.
        workload: what each is given to do.
        restart: a fresh engine for every run, so that only one is alive at a time.
        report: called with what is being done, before each start and each run.
    """

    def __init__(
        self,
        arms: Sequence[str],
        start: Callable[[str], Engine],
        workload: Workload,
        restart: bool = False,
        report: Callable[[str], None] = lambda what: None,
    ) -> None:
        self.arms, self.workload, self.restart = arms, workload, restart
        self.engines: dict[str, Engine] = {}
        self.failures: dict[str, str] = {}
        self.loaded: dict[str, dict[str, Any]] = {}
        self.idle_cpu_share = 0.0
        self.rounds: dict[int, list[dict[str, dict[str, Any]]]] = {batch: [] for batch in workload.batches}
        self._start_engine, self._report = start, report

    @property
    def steps(self) -> int:
        """How often `measure` reports, if nothing fails."""
        turns = len(self.workload.batches) * self.workload.rounds
        return len(self.arms) * (2 * turns if self.restart else turns + 1)

    def measure(self) -> None:
        """Start the engines, warm them up, run all rounds, stop them."""
        try:
            if not self.restart:
                for name in self.arms:
                    self._start(name)
            for batch in self.workload.batches:
                done = len(self.rounds[batch])
                for number in range(done, done + self.workload.rounds):
                    self.rounds[batch].append(self._round(batch, number))
        finally:
            for engine in self.engines.values():
                engine.stop()

    def _round(self, batch: int, number: int) -> dict[str, dict[str, Any]]:
        results = {}
        for name in self.arms:
            if self.restart and name not in self.failures:
                self._start(name)
            if name in self.engines:
                result = self._run(name, batch, number)
                if result is not None:
                    results[name] = result
            if self.restart and name in self.engines:
                self.engines.pop(name).stop()
        return results

    def _start(self, name: str) -> None:
        self._report(f"starting {name}")
        try:
            engine = self.engines[name] = self._start_engine(name)
            self.loaded.setdefault(name, engine.loaded)
            for batch in self.workload.batches:
                engine.run(self.workload.prompts(batch, -1), self.workload.tokens, self.workload.prompt_tokens)
        except EngineError as error:
            self._failed(name, error)

    def _run(self, name: str, batch: int, number: int) -> dict[str, Any] | None:
        self._report(f"{name}, batch {batch}, round {number + 1}")
        others = [engine for other, engine in self.engines.items() if other != name]
        wait_until_quiet(others)
        before, started = sum(engine.cpu_seconds() for engine in others), time.perf_counter()
        prompts = self.workload.prompts(batch, number)
        try:
            result = self.engines[name].run(prompts, self.workload.tokens, self.workload.prompt_tokens)
        except EngineError as error:
            self._failed(name, error)
            return None
        idle = (sum(engine.cpu_seconds() for engine in others) - before) / (time.perf_counter() - started)
        self.idle_cpu_share = max(self.idle_cpu_share, idle)
        return result

    def _failed(self, name: str, error: EngineError) -> None:
        self.failures[name] = str(error)
        if name in self.engines:
            self.engines.pop(name).stop()

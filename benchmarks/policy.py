"""Whether prediction stops where it loses and goes on where it gains: the policy on simulated, adversarial steps.

Needs neither a model nor time: the steps' lengths are drawn; the policy, `prefetch/governor.py`, decides.
Every scenario says what predicting a step costs or gains, and what it costs later steps. Printed are the share of
steps predicted, what prediction lost (above zero) or gained of all time, and the largest loss over any 10,000
consecutive steps. The same seeds give the same numbers.

    python benchmarks/policy.py --steps 60000 --runs 8
"""

import argparse
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from vllm_moe_offload.prefetch.governor import PredictionGovernor

WINDOW = 10_000
STEP = 0.02
"""Seconds of a step that nothing disturbs."""
PREDICTOR_SECONDS = 0.0005
STALLS = 0.5
"""Of a step that is left alone."""

Course = Callable[[int], float]
"""Something by the number of the step."""


def always(value: float) -> Course:
    return lambda step: value


NOTHING, AS_EVER = always(0.0), always(1.0)


def switching(first: float, then: float, every: int) -> Course:
    """``first`` for ``every`` steps, then ``then`` for as many, and so on."""
    return lambda step: first if step // every % 2 == 0 else then


@dataclass
class World:
    """How long steps take."""

    effect: Course = NOTHING
    """What predicting adds to a step, prediction included, as a share of its length; below zero it gains."""
    later: Course = NOTHING
    """What predicting a step adds to later ones, all together, as a share of its length."""
    steps_later: float = 10.0
    """Over how many steps that is spread, in the mean."""
    level: Course = AS_EVER
    """Length of a step as a multiple of the usual: other topics, another disk."""
    noise: float = 0.3
    """Standard deviation of the logarithm of a step's length."""
    correlation: float = 0.0
    """Of one step's noise with the next's."""
    pause_every: float = math.inf
    """Steps from one pause of the whole process to the next, in the mean."""
    pause_seconds: float = 60.0
    pauses_in_predictor: bool = False
    """All pauses fall into the time that predicting takes; otherwise they fall anywhere."""
    kinds: int = 1
    """Kinds of steps, each twice as long as the one before, that come at random."""


class Served(NamedTuple):
    """What became of the steps, one value each."""

    predicted: np.ndarray
    lost: np.ndarray
    """Seconds that are due to prediction, in this step, whichever step caused them. Pauses are not."""
    without: np.ndarray
    """Seconds without any prediction."""

    @property
    def share_lost(self) -> float:
        return float(self.lost.sum() / self.without.sum())

    @property
    def worst_window(self) -> float:
        """Largest share lost over any ``WINDOW`` steps in a row."""
        lost, without = (np.concatenate([[0.0], np.cumsum(part)]) for part in (self.lost, self.without))
        width = min(WINDOW, len(self.lost))
        return float(((lost[width:] - lost[:-width]) / (without[width:] - without[:-width])).max())


def serve(world: World, steps: int, seed: int, governor: PredictionGovernor | None = None) -> Served:
    """Serve so many steps, predicting in those that ``governor`` says."""
    governor = PredictionGovernor(seed) if governor is None else governor
    draw = random.Random(seed)
    predicted, lost, without = np.zeros(steps, bool), np.zeros(steps), np.zeros(steps)
    state = owed = 0.0
    for step in range(steps):
        state = world.correlation * state + math.sqrt(1 - world.correlation**2) * draw.gauss(0, 1)
        kind = draw.randrange(world.kinds)
        usual = STEP * 2**kind * world.level(step)
        alone = usual * math.exp(world.noise * state - world.noise**2 / 2)
        predicts = governor.begin_step(kind)
        paid = owed / world.steps_later
        owed += (world.later(step) * usual if predicts else 0.0) - paid
        extra = paid + (world.effect(step) * usual if predicts else 0.0)
        may_pause = predicts or not world.pauses_in_predictor
        pause = world.pause_seconds if may_pause and draw.random() * world.pause_every < 1 else 0.0
        seconds = max(alone + extra, 0.1 * alone)
        predictor_seconds = PREDICTOR_SECONDS + (pause if world.pauses_in_predictor else 0.0) if predicts else None
        governor.end_step(seconds + pause, STALLS * alone, predictor_seconds)
        predicted[step], lost[step], without[step] = predicts, seconds - alone, alone
    return Served(predicted, lost, without)


SCENARIOS: dict[str, World] = {
    **{
        f"{effect:+.0%} a step, noise {noise:.0%}": World(always(effect), noise=noise)
        for noise in (0.1, 0.3, 0.5)
        for effect in (1.0, 0.2, 0.1, 0.05, 0.03, 0.02, -0.03, -0.05, -0.1, -0.2)
    },
    **{
        f"{effect:+.0%} a step, noise 30 %, correlated over 20 steps": World(always(effect), correlation=0.9)
        for effect in (0.2, 0.1, 0.05, -0.05, -0.1, -0.2)
    },
    "0 % in the step, 10 % in the next 10": World(NOTHING, always(0.1)),
    "0 % in the step, 30 % in the next 10": World(NOTHING, always(0.3)),
    "-5 % in the step, 20 % in the next 10": World(always(-0.05), always(0.2)),
    "-10 % in the step, 30 % in the next 10": World(always(-0.1), always(0.3)),
    "-10 % in the step, 30 % in the next 30": World(always(-0.1), always(0.3), 30),
    "-20 % in the step, 5 % in the next 30": World(always(-0.2), always(0.05), 30),
    "a pause of 60 s every 2,000 steps, +10 %": World(always(0.1), pause_every=2000),
    "a pause of 60 s every 2,000 steps, -10 %": World(always(-0.1), pause_every=2000),
    "the same while predicting, -10 %": World(always(-0.1), pause_every=2000, pauses_in_predictor=True),
    "a hiccup of 0.1 s every 200 steps while predicting, -10 %": World(
        always(-0.1), pause_every=200, pause_seconds=0.1, pauses_in_predictor=True
    ),
    "useless and useful, 15,000 steps each (+20 %, -20 %)": World(switching(0.2, -0.2, 15_000)),
    "useful and useless, 2,000 steps each (-20 %, +20 %)": World(switching(-0.2, 0.2, 2000)),
    "three times as slow for 15,000 steps of 30,000 (+200 %, -20 %)": World(switching(-0.2, 2.0, 15_000)),
    "another topic every 1,500 steps (+5 %, -30 %)": World(switching(0.05, -0.3, 1500)),
    "a disk ten times slower for 5,000 steps of 10,000, -20 %": World(always(-0.2), level=switching(1, 10, 5000)),
    "a disk ten times slower for 5,000 steps of 10,000, +20 %": World(always(0.2), level=switching(1, 10, 5000)),
    "the same, prediction loses on the slow one (-20 %, +20 %)": World(
        switching(-0.2, 0.2, 5000), level=switching(1, 10, 5000)
    ),
    "lengths rise and fall by half within 600 steps, +20 %": World(
        always(0.2), level=lambda step: 1 + 0.5 * math.sin(2 * math.pi * step / 600)
    ),
    "lengths rise and fall by half within 600 steps, -20 %": World(
        always(-0.2), level=lambda step: 1 + 0.5 * math.sin(2 * math.pi * step / 600)
    ),
    "batches of four sizes, +10 %": World(always(0.1), kinds=4),
    "batches of four sizes, -10 %": World(always(-0.1), kinds=4),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--runs", type=int, default=8, help="of every scenario, with other seeds")
    options = parser.parse_args(arguments)
    table = Table("scenario", "predicted", "lost", f"at most over {WINDOW:,} steps")
    for name, world in SCENARIOS.items():
        runs = [serve(world, options.steps, seed) for seed in range(options.runs)]
        lost, worst = [run.share_lost for run in runs], max(run.worst_window for run in runs)
        predicted = np.mean([run.predicted.mean() for run in runs])
        table.add_row(name, f"{predicted:.0%}", f"{np.mean(lost):+.2%}", f"{worst:+.2%}")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

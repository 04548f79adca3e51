"""The picture of a comparison. It needs matplotlib, which the extra `plot` installs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .arms import Arm


def plot_comparison(batches: Mapping[int, Mapping[str, Any]], arms: Sequence[Arm], path: Path, title: str) -> None:
    """Time per token of every arm, a panel per batch size; the whiskers are its slowest and fastest rounds.

    Args:
        batches: per batch size what ``summarize`` says of each arm.
        arms: in the order from top to bottom.
        path: of the file, whose suffix says its format.
        title: above the panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = 1.2 + 0.4 * len(arms)
    figure, panels = pyplot.subplots(
        1, len(batches), figsize=(5 * len(batches) + 2, height), squeeze=False, sharey=True
    )
    for panel, (batch, summary) in zip(panels[0], batches.items(), strict=True):
        for place, arm in enumerate(arms):
            if arm.name not in summary:
                continue
            tpot = summary[arm.name]["tpot"]
            whiskers = [[1e3 * (tpot.median - tpot.low)], [1e3 * (tpot.high - tpot.median)]]
            colour = "tab:blue" if arm.offloads else "tab:grey"
            panel.barh(place, 1e3 * tpot.median, xerr=whiskers, color=colour, capsize=3)
        panel.set_xlabel("ms per token")
        panel.set_title(f"batch {batch}")
        panel.set_yticks(range(len(arms)), [arm.name for arm in arms])
    panels[0][0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)

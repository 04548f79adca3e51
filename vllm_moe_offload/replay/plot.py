"""Pictures of a replay. The only place that needs matplotlib, which the extra ``plot`` installs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .sweep import Point


def plot_sweep(points: Sequence[Point], path: Path, title: str) -> None:
    """Stalls against bytes, one panel per cache size, one line per predictor (policy lfu), bounds as marks."""
    figures = _pyplot()
    sizes = sorted({point.slots for point in points})
    figure, panels = figures.subplots(1, len(sizes), figsize=(4 * len(sizes), 4), squeeze=False)
    for panel, slots in zip(panels[0], sizes, strict=True):
        here = [point for point in points if point.slots == slots]
        for predictor in dict.fromkeys(point.predictor for point in here):
            line = [p for p in here if p.predictor == predictor and p.policy == "lfu"]
            panel.plot(
                [p.loads_per_use for p in line],
                [p.demand_miss_rate for p in line],
                marker="o",
                markersize=3,
                label=predictor,
            )
        for point in here:
            if point.policy in ("belady", "lru per layer"):
                panel.plot(point.loads_per_use, point.demand_miss_rate, "x", label=point.policy)
        panel.set(title=f"{slots} slots", xlabel="loads per use", ylim=(0, None), xlim=(0, None))
    panels[0][0].set_ylabel("demand misses per use")
    panels[0][-1].legend(fontsize=7)
    _save(figure, path, title)


def plot_report(report: dict[str, Any], path: Path) -> None:
    """Recall by layer and distance, and the frontier beside its bounds, of one replay's report."""
    figures = _pyplot()
    figure, (left, right) = figures.subplots(1, 2, figsize=(11, 4))
    for distance, by_count in report["recall"].items():
        count = min(by_count, key=int)
        name = "step's start" if distance == "0" else f"{distance} layers ahead"
        left.plot(by_count[count]["layers"], marker=".", label=f"{name}, recall@{count}")
    left.set(xlabel="layer", ylabel="recall", ylim=(0, 1), title=f"{report['predictor']}: recall by layer")
    left.legend(fontsize=7)
    frontier = report["frontier"]
    right.plot(
        [p["loads_per_use"] for p in frontier], [p["demand_miss_rate"] for p in frontier], marker="o", label="frontier"
    )
    for point in frontier:
        right.annotate(f"{point['threshold']:g}", (point["loads_per_use"], point["demand_miss_rate"]), fontsize=7)
    for name in ("no_prefetch", "perfect_prediction"):
        right.plot(report[name]["loads_per_use"], report[name]["demand_miss_rate"], "s", label=name.replace("_", " "))
    for name in ("belady_miss_rate", "lru_per_layer_miss_rate"):
        right.plot(report[name], report[name], "x", label=name.removesuffix("_miss_rate").replace("_", " "))
    right.set(xlabel="loads per use", ylabel="demand misses per use", ylim=(0, None), xlim=(0, None))
    right.set_title(f"stalls against bytes, {report['slots']} slots, {report['policy']}")
    right.legend(fontsize=7)
    _save(figure, path, report["trace"])


def _pyplot() -> Any:
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigError("plot: matplotlib is not installed; pip install 'vllm-moe-offload[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    return pyplot


def _save(figure: Any, path: Path, title: str) -> None:
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)

"""Pictures of a replay. The only place that needs matplotlib, which the extra ``plot`` installs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .sweep import BELADY, LRU_PER_LAYER, PERFECT, Point

SUFFIXES = (".png", ".svg", ".pdf")
_BYTES_SHOWN = 2.5
"""Panels end at so many times the bytes that LRU per layer loads."""


def require_plotting(path: Path) -> None:
    """Find out before the work whether a plot can be written to ``path``.

    Raises:
        ConfigError: matplotlib is missing, the suffix is none it is asked for, or there is no such folder.
    """
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"plot: {path} must end in one of {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"plot: {path.parent} is not a folder")
    _pyplot()


def plot_sweep(points: Sequence[Point], path: Path, title: str) -> None:
    """Stalls against bytes, one panel per cache size, one line per predictor under one policy, bounds as marks."""
    figures = _pyplot()
    policies = dict.fromkeys(point.policy for point in points if point.policy not in (BELADY, LRU_PER_LAYER))
    policy = next(iter(policies))
    sizes = sorted({point.slots for point in points})
    figure, panels = figures.subplots(1, len(sizes), figsize=(max(8, 3.2 * len(sizes) + 0.5), 3.8), squeeze=False)
    for panel, slots in zip(panels[0], sizes, strict=True):
        here = [point for point in points if point.slots == slots]
        _lines(panel, [point for point in here if point.policy == policy])
        for name, colour in ((BELADY, "black"), (LRU_PER_LAYER, "grey")):
            bound = next(point for point in here if point.policy == name)
            panel.plot(bound.loads_per_use, bound.demand_miss_rate, "x", color=colour, label=name)
            if name == LRU_PER_LAYER:
                panel.axvline(bound.loads_per_use, color=colour, linewidth=0.7, linestyle=":")
                panel.set_xlim(0, _BYTES_SHOWN * bound.loads_per_use)
        panel.set(title=f"{slots} slots", xlabel="loads per use", ylim=(0, None))
    panels[0][0].set_ylabel("demand misses per use")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=(len(labels) + 1) // 2, fontsize=7, frameon=False)
    _save(figure, path, f"{title}: stalls against bytes, eviction by {policy}", room_below=0.1)


def _lines(panel: Any, points: Sequence[Point]) -> None:
    for predictor in dict.fromkeys(point.predictor for point in points):
        line = [point for point in points if point.predictor == predictor]
        style = {"none": "ks", PERFECT: "k*"}.get(predictor, "o-")
        label = {"none": "no prefetch", PERFECT: "perfect prediction"}.get(predictor, predictor)
        panel.plot(
            [p.loads_per_use for p in line], [p.demand_miss_rate for p in line], style, markersize=4, label=label
        )


def plot_report(report: dict[str, Any], path: Path) -> None:
    """One replay's report: recall by layer and distance, whether p means p, and the frontier beside its bounds."""
    figures = _pyplot()
    figure, (left, middle, right) = figures.subplots(1, 3, figsize=(14, 4))
    _plot_recall(left, report)
    _plot_calibration(middle, report)
    _plot_frontier(right, report)
    _save(figure, path, f"{report['trace']}; {report['requests']} requests, {report['tokens']} tokens")


def _plot_recall(panel: Any, report: dict[str, Any]) -> None:
    for distance, by_count in report["recall"].items():
        count = min(by_count, key=int)
        panel.plot(by_count[count]["layers"], marker=".", label=f"{_words(distance)}, recall@{count}")
    panel.set(xlabel="layer", ylabel="recall", ylim=(0, 1), title=f"{report['predictor']}: recall by layer")
    panel.legend(fontsize=7)


def _plot_calibration(panel: Any, report: dict[str, Any]) -> None:
    panel.plot([0, 1], [0, 1], color="grey", linewidth=0.7, linestyle=":")
    for distance, bins in report["calibration"].items():
        error = report["calibration_error"][distance]
        panel.plot(
            [b["said"] for b in bins],
            [b["used"] for b in bins],
            marker=".",
            label=f"{_words(distance)}, error {error:.3f}",
        )
    panel.set(xlabel="probability given", ylabel="share used", xlim=(0, 1), ylim=(0, 1), title="does p mean p?")
    panel.legend(fontsize=7)


def _plot_frontier(panel: Any, report: dict[str, Any]) -> None:
    frontier = report["frontier"]
    panel.plot(
        [p["loads_per_use"] for p in frontier], [p["demand_miss_rate"] for p in frontier], marker="o", label="frontier"
    )
    for point in frontier:
        panel.annotate(f"{point['threshold']:g}", (point["loads_per_use"], point["demand_miss_rate"]), fontsize=7)
    for name in ("no_prefetch", "perfect_prediction"):
        panel.plot(report[name]["loads_per_use"], report[name]["demand_miss_rate"], "s", label=name.replace("_", " "))
    for name in ("belady_miss_rate", "lru_per_layer_miss_rate"):
        panel.plot(report[name], report[name], "x", label=name.removesuffix("_miss_rate").replace("_", " "))
    panel.set(xlabel="loads per use", ylabel="demand misses per use", ylim=(0, None), xlim=(0, None))
    panel.set_title(f"stalls against bytes, {report['slots']} slots, {report['policy']}")
    panel.legend(fontsize=7)


def _words(distance: str) -> str:
    return "step's start" if distance == "0" else f"{distance} ahead"


def _pyplot() -> Any:
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise ConfigError("plot: matplotlib is not installed; pip install 'vllm-moe-offload[plot]'") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vllm-moe-offload"
    from matplotlib import pyplot  # type: ignore[import-not-found,unused-ignore]

    return pyplot


def _save(figure: Any, path: Path, title: str, room_below: float = 0.0) -> None:
    """Equal figures make equal files: neither dates nor random names are written."""
    figure.suptitle(title, fontsize=9)
    figure.tight_layout(rect=(0, room_below, 1, 1))
    undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
    figure.savefig(path, dpi=110, metadata=undated)
    _pyplot().close(figure)

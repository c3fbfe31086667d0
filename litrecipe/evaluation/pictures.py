"""Pictures of how rewards tell answers apart, and of what runs told. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from litrecipe.evaluation.comparing import Pair, calibration, summary

RIGHT, WRONG = "#2a7f62", "#b5482f"
BINS = 30
COLOURS = (RIGHT, WRONG, "#3b6ea5", "#8a6d3b", "#6b4c9a", "#777777")
FEW = 15
"""Points that are marked each."""


def draw_comparison(pairs: Sequence[Pair], path: Path, title: str) -> None:
    """Three panels as a PNG: rewards of better and worse answers, margins, and calibration."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(comparison(pairs, title)).print_png(str(path))


def comparison(pairs: Sequence[Pair], title: str) -> Any:
    """The same as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    rewards, margins, calibrated = figure.subplots(1, 3)
    _rewards(rewards, pairs)
    _margins(margins, pairs)
    _calibration(calibrated, pairs)
    figure.suptitle(title)
    return figure


def _rewards(axes: Any, pairs: Sequence[Pair]) -> None:
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    edges = np.histogram_bin_edges([*chosen, *rejected], BINS)
    axes.hist(chosen, edges, alpha=0.5, color=RIGHT, label="chosen")
    # An outline: two transparent fillings make a third colour where they lie over each other.
    axes.hist(rejected, edges, histtype="step", linewidth=1.5, color=WRONG, label="rejected")
    axes.set(xlabel="reward", ylabel="pairs", title="rewards")
    axes.legend(frameon=False)


def _margins(axes: Any, pairs: Sequence[Pair]) -> None:
    values = np.array([pair.margin for pair in pairs])
    edges = np.histogram_bin_edges(values, BINS)
    axes.hist(values[values > 0], edges, color=RIGHT)
    axes.hist(values[values <= 0], edges, color=WRONG)
    axes.axvline(0, color="black", linewidth=0.8)
    accuracy, error = summary(pairs)["accuracy"]
    within = f" ± {1.96 * error:.3f}" if error is not None else ""
    axes.set(xlabel="reward of chosen - reward of rejected", title=f"margins: right in {accuracy:.3f}{within}")


def _calibration(axes: Any, pairs: Sequence[Pair]) -> None:
    bins = calibration(pairs)
    share = np.array([one.weight for one in bins]) / sum(one.weight for one in bins)
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8)
    axes.scatter([one.sure for one in bins], [one.right for one in bins], s=15 + 400 * share, color=RIGHT, alpha=0.8)
    axes.set(
        xlim=(0.48, 1.02),
        ylim=(-0.02, 1.02),
        xlabel="how sure: σ(|margin|)",
        ylabel="how often right",
        title=f"calibration: off by {summary(pairs)['calibration_error'][0]:.3f}",
    )


def draw_best_of(curve: Sequence[dict[str, float]], path: Path, title: str) -> None:
    """Mean reward of the best of n as a PNG: against n, and against what the KL is at most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(best_of(curve, title)).print_png(str(path))


def best_of(curve: Sequence[dict[str, float]], title: str) -> Any:
    """The same as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_count, by_kl = figure.subplots(1, 2, sharey=True)
    rewards, errors = [one["reward"] for one in curve], [1.96 * one["stderr"] for one in curve]
    counts = [one["n"] for one in curve]
    by_count.errorbar(counts, rewards, errors, color=RIGHT, marker="o", capsize=2, label="mean, 95 % interval")
    by_count.set_xscale("log", base=2)
    by_count.set_xticks(counts, [f"{n:g}" for n in counts])
    by_count.set(xlabel="n", ylabel="mean reward of the best of n")
    by_count.legend(frameon=False)
    by_kl.errorbar([one["kl_bound"] for one in curve], rewards, errors, color=RIGHT, marker="o", capsize=2)
    by_kl.set(xlabel="log n - (n - 1) / n: the KL in nats is at most this")
    figure.suptitle(title)
    return figure


@dataclass(frozen=True)
class Panel:
    """One of the pictures of `draw_panels`."""

    ylabel: str
    lines: Mapping[str, Sequence[Sequence[float]]]
    """Name → points (x, y); a line without a name is not in the legend."""
    level: float | None = None
    """Where a dashed line lies across."""
    bands: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    """Points (x, low, high) around the line of a name."""


def draw_panels(panels: Sequence[Panel], path: Path, title: str, xlabel: str = "step") -> None:
    """What a run told, side by side as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(side_by_side(panels, title, xlabel)).print_png(str(path))


def side_by_side(panels: Sequence[Panel], title: str, xlabel: str) -> Any:
    """A matplotlib figure with one axes a panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(panels), 3.8), layout="constrained")
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for place, (name, points) in enumerate(panel.lines.items()):
            marker = "o" if len(points) < FEW else None
            label = name or None
            colour = COLOURS[place % len(COLOURS)]
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label)
            if name in panel.bands:
                axes.fill_between(*zip(*panel.bands[name], strict=True), color=colour, alpha=0.15, linewidth=0)
        if panel.level is not None:
            axes.axhline(panel.level, color="grey", linewidth=0.8, linestyle="--")
        axes.set(xlabel=xlabel, ylabel=panel.ylabel)
        if any(panel.lines):
            axes.legend(frameon=False)
    figure.suptitle(title)
    return figure

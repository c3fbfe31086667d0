"""Pictures of how rewards tell answers apart. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from litrecipe.evaluation.comparing import Pair, calibration, summary

RIGHT, WRONG = "#2a7f62", "#b5482f"
BINS = 30


def draw_comparison(pairs: Sequence[Pair], path: Path, title: str) -> None:
    """Three panels as a PNG: rewards of better and worse answers, margins, and calibration."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    rewards, margins, calibrated = figure.subplots(1, 3)
    _rewards(rewards, pairs)
    _margins(margins, pairs)
    _calibration(calibrated, pairs)
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(path))


def _rewards(axes: Any, pairs: Sequence[Pair]) -> None:
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    edges = np.histogram_bin_edges([*chosen, *rejected], BINS)
    axes.hist(chosen, edges, alpha=0.6, color=RIGHT, label="chosen")
    axes.hist(rejected, edges, alpha=0.6, color=WRONG, label="rejected")
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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), layout="constrained")
    by_count, by_kl = figure.subplots(1, 2, sharey=True)
    rewards, errors = [one["reward"] for one in curve], [1.96 * one["stderr"] for one in curve]
    counts = [one["n"] for one in curve]
    by_count.errorbar(counts, rewards, errors, color=RIGHT, marker="o", capsize=2)
    by_count.set_xscale("log", base=2)
    by_count.set_xticks(counts, [f"{n:g}" for n in counts])
    by_count.set(xlabel="n", ylabel="mean reward of the best of n")
    by_kl.errorbar([one["kl_bound"] for one in curve], rewards, errors, color=RIGHT, marker="o", capsize=2)
    by_kl.set(xlabel="log n - (n - 1) / n: the KL in nats is at most this")
    figure.suptitle(title)
    FigureCanvasAgg(figure).print_png(str(path))

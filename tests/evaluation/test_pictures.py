"""Pictures hold what they are given."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import to_rgb

from litrecipe.evaluation.comparing import Pair
from litrecipe.evaluation.pictures import FEW, RIGHT, WRONG, Panel, best_of, comparison, draw_panels, side_by_side


def test_panels_hold_their_lines(tmp_path: Path) -> None:
    many = [(step, 0.1 * step) for step in range(FEW)]
    panels = [Panel("reward", {"rollouts": many, "held out": [[0, 1.0], [4, 2.0]]}), Panel("KL", {"": many}, level=5.0)]
    reward, kl = side_by_side(panels, "a run", "step").axes
    rollouts, held_out = reward.lines
    assert [tuple(point) for point in rollouts.get_xydata()] == many
    assert held_out.get_xydata().tolist() == [[0, 1.0], [4, 2.0]]
    assert rollouts.get_color() != held_out.get_color()
    assert (rollouts.get_marker(), held_out.get_marker()) == ("None", "o")  # few points are marked each
    assert [text.get_text() for text in reward.get_legend().get_texts()] == ["rollouts", "held out"]
    assert kl.get_legend() is None and kl.lines[1].get_ydata() == [5.0, 5.0]
    assert (reward.get_xlabel(), reward.get_ylabel(), kl.get_ylabel()) == ("step", "reward", "KL")
    draw_panels(panels, tmp_path / "run.png", "a run")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_a_band_lies_around_its_line() -> None:
    line, band = [(0, 1.0), (1, 2.0)], [(0, 0.5, 1.5), (1, 1.0, 3.0)]
    (axes,) = side_by_side([Panel("success", {"a": line, "b": line}, bands={"b": band})], "runs", "step").axes
    (drawn,) = axes.collections
    corners = {tuple(point) for point in drawn.get_paths()[0].vertices.tolist()}
    assert corners == {(0, 0.5), (0, 1.5), (1, 1.0), (1, 3.0)}
    assert drawn.get_facecolor()[0, :3].tolist() == list(to_rgb(axes.lines[1].get_color()))


def test_histograms_stay_apart_where_they_overlap() -> None:
    """One is filled, one an outline, and the legend has the colours of both."""
    pairs = [Pair(str(i), str(i), i / 10, i / 10 - 0.5, 3, 3, 1.0) for i in range(20)]
    rewards, *_ = comparison(pairs, "held out").axes
    filled = {to_rgb(patch.get_facecolor()) for patch in rewards.patches if patch.get_fill()}
    outlined = {to_rgb(patch.get_edgecolor()) for patch in rewards.patches if not patch.get_fill()}
    assert (filled, outlined) == ({to_rgb(RIGHT)}, {to_rgb(WRONG)})
    assert [text.get_text() for text in rewards.get_legend().get_texts()] == ["chosen", "rejected"]


def test_error_bars_say_what_they_are() -> None:
    curve = [{"n": n, "reward": 0.1 * n, "stderr": 0.01, "kl_bound": 0.2 * n} for n in (1, 2, 4)]
    by_count, by_kl = best_of(curve, "best of n").axes
    assert [text.get_text() for text in by_count.get_legend().get_texts()] == ["mean, 95 % interval"]
    (bars,) = by_count.containers
    low, high = bars.lines[2][0].get_segments()[0][:, 1]
    assert abs(high - low - 2 * 1.96 * 0.01) < 1e-9
    assert by_kl.get_legend() is None

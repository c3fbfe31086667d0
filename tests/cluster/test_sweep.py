"""Sweeps: what is a point, and what it is called."""

from __future__ import annotations

import pytest

from litrecipe.cluster.sweep import points_of
from litrecipe.config.errors import InputError


def test_two_keys_make_a_grid() -> None:
    points = points_of(["optim.lr=1e-4,2e-4", "adapter.r=8,16"])
    assert [point.name for point in points] == ["lr=1e-4_r=8", "lr=1e-4_r=16", "lr=2e-4_r=8", "lr=2e-4_r=16"]
    assert points[1].flags == [("optim.lr", "1e-4"), ("adapter.r", "16")]
    assert points_of([]) == []


def test_lists_and_paths_are_values() -> None:
    points = points_of(["adapter.targets=[q_proj,v_proj],[q_proj]", "model=/data/a b/,org/c"])
    assert [point.flags[0][1] for point in points] == 2 * ["[q_proj,v_proj]"] + 2 * ["[q_proj]"]
    assert [point.flags[1] for point in points[:2]] == [("model.source", "/data/a b/"), ("model.source", "org/c")]
    assert [point.name for point in points[:2]] == [
        "targets=q_proj-v_proj_source=a-b",
        "targets=q_proj-v_proj_source=c",
    ]


def test_names_are_told_apart() -> None:
    """Keys with the same last word, values that differ in what no folder is called, and very long ones."""
    assert points_of(["train.seed=1", "generate.seed=2"])[0].name == "train.seed=1_generate.seed=2"
    assert [point.name for point in points_of(["model=a:b,a;b"])] == ["source=a-b_0", "source=a-b_1"]
    assert max(len(point.name) for point in points_of([f"data.train={'x' * 300},{'x' * 301}"])) < 110


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optim.lr", "write a key and its values"),
        ("optim.lr=", "write a key and its values"),
        ("optim.lr=1,,2", "write a key and its values"),
        ("=1,2", "write a key and its values"),
        ("optim.lr=1,2,1", "has a value twice"),
        ("out_dir=a,b", "each point has a folder of its own"),
        ("slurm.nodes=1,2", "all points are tasks of one job"),
        ("fabric.devices=1,2", "all points have the same machines"),
    ],
)
def test_what_is_no_sweep(text: str, said: str) -> None:
    with pytest.raises(InputError, match=f"^--sweep: .*{said}"):
        points_of([text])


def test_a_key_is_swept_once() -> None:
    with pytest.raises(InputError, match=r"optim\.lr has values already"):
        points_of(["optim.lr=1,2", "optim.lr=3"])

"""`litrecipe runs diff`: where two runs part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import finetune, runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with three runs: `a` and `b` are alike, `seed` is not."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("a", 0), ("b", 0), ("seed", 1)):
        flags = {
            "model.source": tiny_model,
            "data.train": "toy:units?n=24&seed=0",
            "data.cache_dir": folder / "cache",
            "fabric.accelerator": "cpu",
            "train.max_steps": 3,
            "train.seed": seed,
            "log.loggers": "[]",
            "out_dir": folder / name,
        }
        finetune.main(schema.load(FinetuneRecipe, [], [(key, str(value)) for key, value in flags.items()]))
    return folder


def test_the_keys_in_which_recipes_differ_are_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for where the runs are."""
    assert runs.diff(str(trained / "a"), str(trained / "seed")) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[1:4] == ["their recipes are not the same:", "  train.seed: 0 and 1", "apart from that:"]


def test_equal_runs_agree(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.diff(str(trained / "a"), str(trained / "b")) == 0
    assert "agree in every step" in capsys.readouterr().out


def test_the_first_difference_is_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs.diff(str(trained / "a"), str(trained / "seed")) == 1
    assert "step 1: samples differs" in capsys.readouterr().out


def test_a_shorter_run_is_said(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = tmp_path / "short"
    shutil.copytree(trained / "a", short)
    flight = short / "flight.jsonl"
    flight.write_text("".join(flight.read_text().splitlines(keepends=True)[:2]))
    assert runs.diff(str(trained / "a"), str(short)) == 1
    assert f"step 3: only in {trained / 'a'}" in capsys.readouterr().out


def test_a_difference_within_the_tolerance_is_none(trained: Path, tmp_path: Path) -> None:
    near = tmp_path / "near"
    near.mkdir()
    records = read_records(trained / "a" / "flight.jsonl")
    records[1]["loss"] = (float.fromhex(records[1]["loss"]) * (1 + 1e-6)).hex()
    (near / "flight.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert runs.diff(str(trained / "a"), str(near)) == 1
    assert runs.diff(str(trained / "a"), str(near), tolerance=1e-5) == 0


def test_the_stages_of_a_pipeline_are_named(trained: Path, tmp_path: Path) -> None:
    """Of one that has trained two of three, beside one that has only begun."""
    for name in ("sft", "dpo", "tested"):
        (tmp_path / "pipe" / name).mkdir(parents=True)
        (tmp_path / "pipe" / name / "stage.json").write_text("{}")
        if name != "tested":
            shutil.copy(trained / "a" / "flight.jsonl", tmp_path / "pipe" / name)
    (tmp_path / "begun" / "sft").mkdir(parents=True)
    (tmp_path / "begun" / "sft" / "stage.json").write_text("{}")
    with pytest.raises(InputError) as caught:
        runs.diff(str(tmp_path / "pipe"), str(tmp_path / "begun"))
    said = "a pipeline, not a run: compare its stages: "
    assert caught.value.mistakes == [
        f"{tmp_path}/pipe: {said}{tmp_path}/pipe/dpo, {tmp_path}/pipe/sft",
        f"{tmp_path}/begun: {said}none has trained yet",
    ]
    assert runs.diff(str(tmp_path / "pipe" / "sft"), str(trained / "a")) == 0


@pytest.mark.parametrize("tolerance", [-1.0, float("nan"), float("inf")])
def test_a_tolerance_that_is_none(tmp_path: Path, tolerance: float) -> None:
    with pytest.raises(InputError, match=r"--tolerance: .*: give a number of 0 or more"):
        runs.diff(str(tmp_path), str(tmp_path), tolerance)

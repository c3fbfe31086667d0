"""Checkpoints that are written while the training goes on, and disks that cannot hold them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import assert_equal_runs, steps_done, wait_until

from litrecipe.checkpoint import state
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, FinetuneRecipe
from litrecipe.engine.background import Background
from litrecipe.recipes import finetune

Load = Callable[..., FinetuneRecipe]
STEPS = 6


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Load:
    def load(name: str, **checkpoint: Any) -> FinetuneRecipe:
        recipe = FinetuneRecipe(out_dir=str(tmp_path / name), adapter=Adapter(method="lora", r=4, dropout=0.1))
        recipe.model.source = str(tiny_model)
        recipe.data.train, recipe.data.cache_dir = "toy:units?n=20&seed=0", str(tmp_path / "cache")
        recipe.train.max_steps, recipe.train.global_batch_size = STEPS, 3
        recipe.checkpoint = replace(recipe.checkpoint, every=2, resume="auto", **checkpoint)
        recipe.fabric.accelerator = "cpu"
        recipe.log.loggers = []
        return recipe

    return load


class Running:
    """A process that goes on."""

    def poll(self) -> None:
        return None


def test_what_is_written_meanwhile_is_what_would_have_been_written(
    recipe: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each save takes until a later step has changed all weights in place."""
    assert finetune.main(recipe("waits")) == 0
    write, out = state.finish, tmp_path / "goes on"

    def slowly(target: Path, *args: Any) -> None:
        assert threading.current_thread().name == "background"
        later = min(state.step_of(target) + 1, STEPS)
        assert wait_until(lambda: steps_done(out) >= later, Running(), seconds=20)
        write(target, *args)

    monkeypatch.setattr(state, "finish", slowly)
    assert finetune.main(recipe("goes on", asynchronous=True)) == 0
    assert_equal_runs(tmp_path / "waits", tmp_path / "goes on", STEPS)
    kept = [sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("waits", "goes on")]
    assert kept[0] == kept[1] == ["step-00000004", "step-00000006"]
    for name in ("weights-00000.safetensors", "optimizer-00000.safetensors", "state.json", "manifest.json"):
        first, second = (tmp_path / run / "checkpoints" / "step-00000004" / name for run in ("waits", "goes on"))
        assert first.read_bytes() == second.read_bytes(), name


def test_a_save_that_fails_meanwhile_is_told_by_the_next_which_ends_the_run_only_if_it_fails_too(
    recipe: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The next may be that of the same step, once more, at the end."""
    write = state._write_pieces
    failing: list[str] = []

    def fail(path: Path, pieces: Any) -> None:
        if failing and path.parent.name == f"step-0000000{failing[0]}.tmp":
            failing.pop(0)
            raise OSError(28, "No space left on device")
        write(path, pieces)

    def kept(name: str) -> list[str]:
        return sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())

    monkeypatch.setattr(state, "_write_pieces", fail)
    assert finetune.main(recipe("unbroken")) == 0
    for step, left in (("4", ["step-00000002", "step-00000006"]), ("6", ["step-00000004", "step-00000006"])):
        failing[:] = step
        assert finetune.main(recipe(step, asynchronous=True)) == 0
        assert not failing and kept(step) == left
        assert f"step-0000000{step}: could not be saved (" in capfd.readouterr().err
        assert_equal_runs(tmp_path / "unbroken", tmp_path / step, STEPS)
    failing[:] = "46"
    with pytest.raises(InputError, match=r"step-00000006: could not be saved .*step-00000002 is intact") as error:
        finetune.main(recipe("run", asynchronous=True))
    assert len(error.value.mistakes) == 1
    assert kept("run") == ["step-00000002"]
    assert finetune.main(recipe("run", asynchronous=True)) == 0
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "run", STEPS)


def test_a_save_without_room_is_told_before_anything_is_written(
    recipe: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second checkpoint does not fit; that the disk is too small was said when the run began."""
    written: list[Path] = []
    write = state._write_pieces

    def remember(path: Path, pieces: Any) -> None:
        written.append(path)
        write(path, pieces)

    monkeypatch.setattr(state, "_write_pieces", remember)
    monkeypatch.setattr(state, "free_bytes", lambda _: 100_000 if written else 1_200_000)
    # weights and optimizer of the adapter take 0.1 MB, and 1 MiB is allowed for what is beside them
    with pytest.raises(
        InputError, match=r"step-00000004: could not be saved \(.*it takes 1 MB; 0 MB free; .*00002 is in"
    ):
        finetune.main(recipe("run", keep=50))
    assert {path.parent.name for path in written} == {"step-00000002.tmp"}
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    warned = [line for line in capfd.readouterr().err.splitlines() if "warning: out_dir" in line]
    assert len(warned) == 1 and "lower checkpoint.keep" in warned[0]


def test_what_goes_wrong_in_the_background_is_raised_once() -> None:
    background = Background()
    background.start(lambda: [][1])
    with pytest.raises(IndexError):
        background.wait()
    background.wait()
    done: list[int] = []
    background.start(lambda: done.append(1))
    background.wait()
    assert done == [1]

"""What `align dpo` starts from: the reference is known by all that it computes with; no reward model is a policy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import DpoRecipe, RewardRecipe
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import dpo, reward

LORA = {"adapter.method": "lora", "adapter.r": 4}
Make = Callable[..., Any]


@pytest.fixture
def flags(tiny_model: Path, tmp_path: Path) -> Callable[..., dict[str, object]]:
    def build(out: str, **changes: object) -> dict[str, object]:
        common = {
            "model.source": tiny_model,
            "data.train": "toy:units-pairs?n=8&seed=0",
            "data.cache_dir": tmp_path / "cache",
            "train.global_batch_size": 4,
            "train.micro_batch_tokens": 400,
            "optim.lr": 1e-2,
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / out,
        }
        return common | {key.replace("__", "."): value for key, value in changes.items()}

    return build


@pytest.fixture
def train(flags: Make, tmp_path: Path) -> Make:
    """Run DPO; returns the loss of its first step."""

    def run(out: str, **changes: object) -> float:
        given = flags(out, **changes)
        assert dpo.main(schema.load(DpoRecipe, [], [(key, str(value)) for key, value in given.items()])) == 0
        return read_records(tmp_path / out / "metrics.jsonl")[0]["loss"]

    return run


def change(path: Path, **values: object) -> None:
    """Another setting in a JSON file, as one who vouches for it himself."""
    (path.parent / "manifest.json").unlink(missing_ok=True)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


LOG_2 = pytest.approx(0.693147, abs=1e-5)


def test_another_scale_of_the_starting_adapter_is_another_reference(train: Make, tmp_path: Path) -> None:
    """Its weights are the same, what it computes is not; nor does a run go on from there."""
    train("first", **LORA, optim__lr=0.1)
    start = tmp_path / "first" / "final"
    assert train("second", model__source=start) == LOG_2
    change(start / "adapter_config.json", lora_alpha=64)
    assert train("third", model__source=start) == LOG_2
    with pytest.raises(InputError, match=r"made with other adapter\.alpha \(32, now 64"):
        train("second", model__source=start, checkpoint__resume="auto", train__epochs=2)


def test_other_weights_of_the_starting_adapter_do_not_go_on(train: Make, tmp_path: Path) -> None:
    """The checkpoint holds the policy's; the reference would be another one."""
    train("first", **LORA)
    train("other", **LORA, optim__lr=0.1)
    start = tmp_path / "first" / "final"
    train("run", model__source=start, train__max_steps=1)
    shutil.copy(tmp_path / "other" / "final" / "adapter_model.safetensors", start)
    (start / "manifest.json").unlink()
    with pytest.raises(InputError, match="made with other starting adapter"):
        train("run", model__source=start, checkpoint__resume="auto", train__max_steps=2)
    assert train("new", model__source=start) == LOG_2


def test_another_config_of_the_same_weights_is_another_reference(train: Make, tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    train("one", **LORA, model__source=base, train__max_steps=1)
    change(base / "config.json", rope_theta=50.0)
    assert train("two", **LORA, model__source=base) == LOG_2
    with pytest.raises(InputError, match="made with other config"):
        train("one", **LORA, model__source=base, checkpoint__resume="auto", train__max_steps=2)


def test_an_adapter_whose_base_changed_does_not_go_on(
    train: Make, tiny_model: Path, varied_model: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    train("first", **LORA, model__source=base)
    start = tmp_path / "first" / "final"
    train("run", model__source=start, train__max_steps=1)
    shutil.copy(varied_model / "model.safetensors", base)
    with pytest.raises(InputError, match="made with other base weights"):
        train("run", model__source=start, checkpoint__resume="auto", train__max_steps=2)
    assert train("new", model__source=start) == LOG_2


@pytest.mark.parametrize("adapter", [LORA, {}])
def test_a_reward_model_is_no_policy(train: Make, flags: Make, tmp_path: Path, adapter: dict[str, object]) -> None:
    given = flags("rewards", **adapter)
    assert reward.main(schema.load(RewardRecipe, [], [(key, str(value)) for key, value in given.items()])) == 0
    with pytest.raises(InputError, match=r"^model\.source: .*rewards/final: is a reward model, .*: give a language"):
        train("run", model__source=tmp_path / "rewards" / "final")


FULL_DISK = """
import json, resource, sys
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import DpoRecipe
from litrecipe.recipes import dpo

resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))  # as if the disk were full; Python ignores the signal
try:
    dpo.main(schema.load(DpoRecipe, [], list(json.loads(sys.argv[1]).items())))
except InputError as error:
    print(error)
"""


def test_a_disk_that_is_full_before_the_reference_is_written_is_said(train: Make, flags: Make, tmp_path: Path) -> None:
    """The tokenised pairs are there already; nothing half made stays, and with room the run goes through."""
    more = {**LORA, "data.train": "toy:units-pairs?n=120&seed=0", "train.max_steps": 1}
    train("none", **more, dpo__reference="adapter_off")
    given = json.dumps({key: str(value) for key, value in flags("run", **more).items()})
    told = subprocess.run([sys.executable, "-c", FULL_DISK, given], capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"data.cache_dir: {tmp_path}/cache: File too large: make room, or name"), told
    assert told.count("\n") == 1
    assert [path.suffix for path in (tmp_path / "cache" / "reference").iterdir()] == [".lock"]
    assert train("run", **more) == LOG_2

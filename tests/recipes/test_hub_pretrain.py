"""The hub's recipes for pretraining: large ones are laid out without weights, small ones train for two steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from litrecipe.config import schema
from litrecipe.config.merge import hub_names
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import pretrain

NAMES = [name for name in hub_names() if name.startswith("pretrain/")]
SMALL = ("pretrain/books-14m", "pretrain/mixtral-tiny", "pretrain/pythia-14m")
SHORT = 64
"""Tokens of a sequence here."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": " ".join(f"the quick brown fox {n} {m}" for m in range(40))} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(name: str, text: Path, model: Path, **changes: Any) -> PretrainRecipe:
    """The recipe with this text and tokenizer, short sequences, and on a CPU."""
    written = schema.load(PretrainRecipe, [name])
    flags: dict[str, Any] = {
        "model.tokenizer": model,
        "data.cache_dir": text.parent / "cache",
        "data.workers": 1,
        "fabric.accelerator": "cpu",
        **changes,
    }
    if written.model.init == "pretrained":
        flags["model.source"] = model
    if written.distil.teacher:
        flags["distil.teacher"] = model
    places = {"": written} | {f"stages.{stage}.": part for stage, part in written.stages.items()}
    for prefix, part in places.items():
        flags[f"{prefix}data.max_length"] = SHORT
        flags |= {f"{prefix}data.sources.{source}": text for source in part.data.sources}
        if part.data.train:
            flags[f"{prefix}data.train"] = text
        flags[f"{prefix}train.micro_batch_tokens"] = 4 * SHORT
    return schema.load(PretrainRecipe, [name], [(key, str(value)) for key, value in flags.items()])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SMALL])
def test_a_large_recipe_is_laid_out_without_weights(
    name: str, text: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = asked(name, text, tiny_model, out_dir=tmp_path / "run")
    assert pretrain.main(recipe, dry_run=True) == 0
    shown = capsys.readouterr().out
    for stage in recipe.stages:
        assert f"stage {stage}" in shown
    assert "memory of one rank" in shown and "lr last" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_small_recipe_trains(name: str, text: Path, tiny_model: Path, tmp_path: Path) -> None:
    changes = {"train.max_steps": 2, "train.global_batch_size": 4, "log.loggers": "[]", "fabric.precision": "32-true"}
    assert pretrain.main(asked(name, text, tiny_model, out_dir=tmp_path / "run", **changes)) == 0
    steps = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if "grad_norm" in record]
    assert len(steps) == 2 and all(0 < step["loss"] < 20 for step in steps)
    assert ("router/load_entropy" in steps[0]) == (name == "pretrain/mixtral-tiny")
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()

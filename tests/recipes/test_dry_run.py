"""`--dry_run` shows what a run would do, and does nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.data.report import LEARNT
from litrecipe.data.source import RecordedSource
from litrecipe.data.supervised import load_supervised
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.recipes import finetune
from litrecipe.recipes.dry_run import heaviest


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path):
    def make(**flags: object) -> FinetuneRecipe:
        given = {
            "model.source": tiny_model,
            "data.train": "toy:units?n=24&seed=0",
            "data.cache_dir": tmp_path / "cache",
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / "run",
        } | {key.replace("__", "."): value for key, value in flags.items()}
        return schema.load(FinetuneRecipe, [], [(key, str(value)) for key, value in given.items()])

    return make


@pytest.fixture
def shown(recipe, capsys: pytest.CaptureFixture[str]):
    def show(**flags: object) -> str:
        assert finetune.main(recipe(**flags), dry_run=True) == 0
        return capsys.readouterr().out

    return show


def gigabytes(shown: str, line: str) -> float:
    found = re.search(rf"^\s*{line}\s+([\d.]+)", shown, re.MULTILINE)
    assert found, shown
    return float(found[1])


def test_every_section_is_shown_and_nothing_is_written(shown, tmp_path: Path) -> None:
    text = shown(train__epochs=2)
    for start in ("recipe", "memory of one rank (1 in all)", "steps 6 of 8 samples", "data\n", "one sample"):
        assert re.search(rf"^\s*{re.escape(start)}", text, re.MULTILINE), start
    assert "global_batch_size: 8" in text
    assert "⟦" in text.partition("one sample")[2]
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_is_learnt_is_coloured(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    sample = shown().partition("one sample")[2]
    green = {"green": "32", "bold green": "1;32"}[LEARNT]
    assert re.search(rf"\x1b\[{green}m⟦", sample)


def test_sharding_divides_the_weights(shown, tiny_model: Path, tmp_path: Path) -> None:
    large = json.loads((tiny_model / "config.json").read_text()) | {"hidden_size": 512, "intermediate_size": 2048}
    (tmp_path / "config.json").write_text(json.dumps(large))
    flags = {"model__source": tmp_path / "config.json", "model__init": "random", "model__tokenizer": tiny_model}
    alone = shown(**flags)
    sharded = shown(**flags, fabric__strategy="fsdp", fabric__devices=2)
    assert "memory of one rank (2 in all)" in sharded
    assert gigabytes(sharded, "weights") == pytest.approx(gigabytes(alone, "weights") / 2, abs=0.001)
    assert gigabytes(alone, "exchange") == 0 < gigabytes(sharded, "exchange")


def test_the_heaviest_step_is_found_as_it_will_be_packed(recipe, tiny_model: Path) -> None:
    made = recipe(train__micro_batch_tokens=150)
    tokenizer = Tokenizer.load(open_model(str(tiny_model)).tokenizer_dir)
    source = RecordedSource(load_supervised(made.data, tokenizer, seed=0).train, made.train)
    one, two = (heaviest(made, source, 3, world) for world in (1, 2))
    assert one.tokens == pytest.approx(sum(source.samples.lengths) / 3)
    assert 100 < len(one.row.tokens) <= 150
    assert one.rows >= one.tokens / 150
    assert one.rows / 2 <= two.rows < one.rows


def test_rows_beside_one_another_are_said(shown) -> None:
    assert "a step is one row" in shown()
    assert re.search(r"a step is up to \d+ rows", shown(train__micro_batch_tokens=150))


def test_an_adapter_as_source_trains_the_adapter(shown, recipe, tmp_path: Path) -> None:
    made = recipe(adapter__method="lora", adapter__r=4, train__max_steps=1)
    finetune.main(made)
    text = shown(model__source=tmp_path / "run" / "final", out_dir=tmp_path / "second")
    share = re.search(r"trained \(([\d.]+) %\)", text)
    assert share and float(share[1]) < 20
    assert not (tmp_path / "second").exists()


def test_a_gpu_that_is_not_there_is_wrong_input_of_a_run_only(recipe, shown) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match=r"fabric\.accelerator: cuda"):
        finetune.main(recipe(fabric__accelerator="cuda"))
    text = shown(fabric__accelerator="cuda", fabric__devices=8)
    assert "memory of one rank (8 in all)" in text
    assert "nothing is known of this GPU" in text


def test_what_ranks_exchange_and_how_long_a_step_takes(shown) -> None:
    """Two layers of 123,392 bytes each, with the padding for 64 ranks."""
    flags = {"fabric__hardware": "h100", "fabric__devices": 8, "fabric__num_nodes": 8, "fabric__strategy": "fsdp"}
    text = shown(**flags, train__global_batch_size=16)
    assert "memory of one rank (64 in all)" in text
    assert "exchange of one step (8 x 8 ranks, 64 see different data)" in text
    assert re.search(r"all-gather +layers +backward +64 +2 +0\.123", text), text
    assert re.search(r"reduce-scatter +layers +backward +64 +2 +0\.123", text)
    assert re.search(r"time of a step about [\d.e-]+ s on h100, reckoned and not measured", " ".join(text.split()))
    assert re.search(r"\d+ % of the peak \(MFU\)", " ".join(text.split()))
    shared = shown(**flags | {"fabric__tensor_parallel": 2})
    assert "32 see different data, 2 share each layer" in shared
    assert re.search(r"all-reduce +layers +forward +2 ", shared)
    alone = shown()
    assert "exchange of one step" not in alone
    assert "on this machine" in alone

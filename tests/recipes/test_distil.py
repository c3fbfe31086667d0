"""`litrecipe finetune` from a teacher, from recipe to final model, on tiny models."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.data import remembered
from litrecipe.engine.recorder import diff
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import finetune
from litrecipe.recipes.model import export

Records = list[dict[str, Any]]
TOP = {"distil.method": "top_k", "distil.top_k": 8}


@pytest.fixture
def make(tiny_model: Path, teacher_model: Path, tmp_path: Path) -> Callable[..., FinetuneRecipe]:
    def recipe(out: str = "run", **flags: object) -> FinetuneRecipe:
        given = {
            "model.source": tiny_model,
            "distil.teacher": teacher_model,
            "data.train": "toy:units?n=12&seed=0",
            "data.val": "toy:units?n=4&seed=0&split=test",
            "data.cache_dir": tmp_path / "cache",
            "train.global_batch_size": 4,
            "train.micro_batch_tokens": 120,
            "optim.lr": 1e-2,
            "schedule.name": "constant",
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / out,
        } | {key.replace("__", "."): value for key, value in flags.items()}
        return schema.load(FinetuneRecipe, [], [(key, str(value)) for key, value in given.items()])

    return recipe


@pytest.fixture
def train(make: Callable[..., FinetuneRecipe], tmp_path: Path) -> Callable[..., Records]:
    """Run it; returns all records."""

    def run(out: str = "run", **flags: object) -> Records:
        assert finetune.main(make(out, **flags)) == 0
        return read_records(tmp_path / out / "metrics.jsonl")

    return run


def column(records: Records, name: str) -> list[float]:
    return [record[name] for record in records if name in record]


@pytest.mark.parametrize(
    ("flags", "alpha"),
    [
        ({}, 0),
        ({"distil.temperature": 2, "distil.alpha": 0.1, "train.epochs": 6}, 0.1),
        (TOP, 0),
        ({"distil.method": "top_1"}, 0.1),
        ({"adapter.method": "lora", "distil.quantize": "nf4", "train.epochs": 4}, 0),
        ({"fabric.precision": "bf16-mixed"}, 0),
    ],
    ids=["full", "warm", "top_k", "top_1", "lora-nf4", "bf16"],
)
def test_the_student_comes_nearer_to_its_teacher(
    train: Callable[..., Records], flags: dict[str, object], alpha: float
) -> None:
    """And the loss is what it is said to be: α · NLL + (1 - α) τ² · cross-entropy."""
    records = train(**{"train.epochs": 3} | flags)
    assert column(records, "kl")[-1] < column(records, "kl")[0] - 0.05
    assert column(records, "eval_kl") and column(records, "eval_nll")
    warmth = float(flags.get("distil.temperature", 1)) ** 2  # type: ignore[arg-type]
    for record in records[:3]:
        expected = alpha * record["nll"] + (1 - alpha) * warmth * (record["kl"] + record["teacher_entropy"])
        assert record["loss"] == pytest.approx(expected, rel=1e-5)


def test_what_the_cut_is_does_not_matter_and_the_final_model_stands_alone(
    train: Callable[..., Records], tmp_path: Path
) -> None:
    small, large = (train(f"cut{budget}", train__micro_batch_tokens=budget) for budget in (100, 4096))
    for name in ("loss", "grad_norm", "kl", "teacher_entropy", "eval_loss"):
        assert column(small, name) == pytest.approx(column(large, name), rel=1e-5, abs=1e-6), name
    saved = tmp_path / "cut100" / "checkpoints" / "step-00000003"
    assert b"teacher." not in (saved / "weights-00000.safetensors").read_bytes()[:20_000]
    final = load_model(open_model(str(tmp_path / "cut100")))
    (tmp_path / "cut100" / "final").rename(tmp_path / "aside")
    assert export(str(tmp_path / "cut100"), str(tmp_path / "out")) == 0
    tokens = torch.arange(3, 20)
    assert torch.equal(load_model(open_model(str(tmp_path / "out"))).logits(tokens), final.logits(tokens))


@pytest.mark.parametrize("method", ["top_k", "top_1"])
def test_answers_on_disk_are_those_of_the_teacher_at_hand(
    train: Callable[..., Records], method: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And nothing is asked twice, whatever else of the recipe changes."""
    monkeypatch.setattr(remembered, "PART", 5)
    flags = {"distil.method": method, "train.epochs": 2}
    live, kept = (train(name, **flags, distil__cache=name == "kept") for name in ("live", "kept"))
    for name in ("loss", "grad_norm", "kl", "eval_kl"):
        assert column(kept, name) == pytest.approx(column(live, name), rel=1e-5, abs=1e-6), name
    assert len(list((tmp_path / "cache" / "teacher").glob("*/complete.json"))) == 4  # 12 samples, and 4 held out
    monkeypatch.setattr(remembered, "_said", None)
    again = train("again", **flags, distil__cache=True, distil__alpha=0.5)
    assert column(again, "kl")[0] == column(kept, "kl")[0]


def test_all_tokens_on_disk_are_the_whole_distribution(train: Callable[..., Records]) -> None:
    whole, kept = train("whole"), train("kept", **TOP | {"distil.top_k": 306, "distil.cache": True})
    for name in ("loss", "grad_norm", "kl", "teacher_entropy"):
        assert column(kept, name) == pytest.approx(column(whole, name), rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize("flags", [{}, TOP | {"distil.cache": True}], ids=["live", "kept"])
def test_a_resumed_run_is_the_unbroken_one(
    train: Callable[..., Records], flags: dict[str, object], tmp_path: Path
) -> None:
    train("unbroken", **flags, train__max_steps=5)
    train("broken", **flags, train__max_steps=2)
    train("broken", **flags, train__max_steps=5, checkpoint__resume="auto")
    assert diff(tmp_path / "unbroken", tmp_path / "broken") == []
    last = [tmp_path / name / "final" / "model.safetensors" for name in ("unbroken", "broken")]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_a_run_of_another_teacher_is_not_resumed(train: Callable[..., Records], varied_model: Path) -> None:
    train(**TOP, train__max_steps=1)
    for change, what in (
        ({"distil.teacher": varied_model}, r"other teacher \("),
        ({"distil.top_k": 9, "distil.cache": True}, r"other distil\.top_k \(8, now 9\)"),
    ):
        with pytest.raises(InputError, match=what):
            train(**TOP | change, checkpoint__resume="auto")


def test_teachers_that_cannot_teach(make: Callable[..., FinetuneRecipe], tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    first, last = (vocabulary["model"]["merges"][place] for place in (0, -1))
    vocabulary["model"]["merges"][0], vocabulary["model"]["merges"][-1] = last, first
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    for teacher, said in (
        (other, "has another tokenizer than the model that is trained"),
        (tiny_model / "config.json", r"is a config\.json without weights"),
        (tmp_path / "nowhere", "no such file or folder"),
    ):
        with pytest.raises(InputError, match=rf"^distil\.teacher: {re.escape(str(teacher))}: {said}"):
            finetune.main(make(distil__teacher=teacher), dry_run=True)


def test_more_tokens_than_there_are_cannot_be_asked_for(make: Callable[..., FinetuneRecipe]) -> None:
    """The teacher's table is larger than the tokenizer, which has 306."""
    with pytest.raises(InputError, match=r"^distil\.top_k: 307: the teacher knows 306 tokens: give at most that$"):
        finetune.main(make(**TOP | {"distil.top_k": 307}), dry_run=True)


def test_a_teacher_must_reach_as_far_as_the_data(
    make: Callable[..., FinetuneRecipe], teacher_model: Path, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    shutil.copytree(teacher_model, short)
    config = json.loads((short / "config.json").read_text()) | {"max_position_embeddings": 60}
    (short / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"^data\.max_length: \d+: the context of distil\.teacher .*short is 60 tokens"
    ):
        finetune.main(make(distil__teacher=short))


def test_another_chat_template_is_no_other_tokenizer(
    make: Callable[..., FinetuneRecipe], teacher_model: Path, tmp_path: Path
) -> None:
    """Nor is a teacher of other special tokens: it is given ids."""
    plain = tmp_path / "plain"
    shutil.copytree(teacher_model, plain)
    (plain / "tokenizer_config.json").write_text("{}")
    assert finetune.main(make(distil__teacher=plain, train__max_steps=1)) == 0


def test_the_memory_table_has_the_teacher(
    make: Callable[..., FinetuneRecipe], capsys: pytest.CaptureFixture[str]
) -> None:
    def gigabytes(line: str, **flags: object) -> float:
        assert finetune.main(make(**flags), dry_run=True) == 0
        found = re.search(rf"^\s*{line}\s+([\d.]+)", shown := capsys.readouterr().out, re.MULTILINE)
        assert found, shown
        return float(found[1])

    assert gigabytes("teacher") >= 0.001
    assert gigabytes("asked", **TOP, distil__cache=True) >= 0.001

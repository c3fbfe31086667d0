"""`litrecipe align reward` from recipe to a folder that transformers reads, on the tiny model and generated pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litrecipe.checkpoint.load import load_reward_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import RewardRecipe
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import evaluate, finetune, reward
from litrecipe.recipes.model import export, merge

IDS = [1, 5, 3, 90, 41, 7, 60, 2]
LORA = {"adapter.method": "lora", "adapter.r": 4}
Run = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., RewardRecipe]:
    def rows(name: str, numbers: range) -> Path:
        found = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": f"{n}? No."} for n in numbers]
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
        return path

    def recipe(out: str = "run", **flags: object) -> RewardRecipe:
        given = {
            "model.source": tiny_model,
            "data.train": rows("train.jsonl", range(32)),
            "data.val": rows("val.jsonl", range(40, 52)),
            "data.cache_dir": tmp_path / "cache",
            "optim.lr": 1e-2,
            "train.epochs": 4,
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / out,
        } | {key.replace("__", "."): value for key, value in flags.items()}
        return schema.load(RewardRecipe, [], [(key, str(value)) for key, value in given.items()])

    return recipe


@pytest.fixture
def train(make: Callable[..., RewardRecipe], tmp_path: Path) -> Run:
    def run(out: str = "run", **flags: object) -> list[dict[str, Any]]:
        assert reward.main(make(out, **flags)) == 0
        return [record for record in read_records(tmp_path / out / "metrics.jsonl") if "grad_norm" in record]

    return run


@torch.no_grad()
def theirs(folder: Path, ids: list[int] = IDS) -> float:
    """The score that transformers gives a right-padded text."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if (folder / "adapter_config.json").exists():  # transformers' own way to load it loses DoRA's magnitudes
        config = AutoConfig.from_pretrained(folder / "reward_config.json")
        base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
        model = PeftModel.from_pretrained(
            AutoModelForSequenceClassification.from_pretrained(base, config=config), folder
        )
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.eval()
    padded = torch.tensor([ids + [model.config.pad_token_id] * 3])
    return float(model(input_ids=padded, attention_mask=(padded != model.config.pad_token_id).long()).logits)


@torch.no_grad()
def ours(folder: Path, ids: list[int] = IDS) -> float:
    from litrecipe.model.row import Sample, Segment, make_row

    model = load_reward_model(open_model(str(folder))).eval()
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[-1] = 1
    return float(model(make_row([Sample("text", (Segment(np.array(ids), weights),))])))


@pytest.mark.parametrize("flags", [{"optim.lr": 1e-3}, LORA, {**LORA, "adapter.method": "dora"}])
def test_a_run_learns_and_transformers_reads_what_it_leaves(
    train: Run, tmp_path: Path, flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    records = train(**flags)
    assert records[-1]["accuracy"] > 0.8 > 0.69 > records[-1]["loss"]
    final = tmp_path / "run" / "final"
    assert ours(final) == pytest.approx(theirs(final), abs=1e-5)
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    [evaluation] = [r for r in read_records(tmp_path / "run" / "metrics.jsonl") if "eval_loss" in r]
    assert held_out["accuracy"]["value"] == evaluation["eval_accuracy"]
    assert held_out["log_loss"]["value"] == evaluation["eval_loss"]
    assert (tmp_path / "run" / "held_out.png").read_bytes()[:4] == b"\x89PNG"
    assert "evaluation at step 16: eval_loss " in capsys.readouterr().err


def test_the_rewards_of_good_answers_are_kept_beside_the_weights(train: Run, tmp_path: Path) -> None:
    """The chosen answers of the data, scored one by one by the saved model, have the mean and spread it tells."""
    from litrecipe.data.comparisons import load_comparisons
    from litrecipe.data.tokenizer import Tokenizer

    train(optim__lr=1e-3)
    files = open_model(str(tmp_path / "run" / "final"))
    schema_of_run = schema.load_run(tmp_path / "run")
    assert schema_of_run is not None
    samples = load_comparisons(schema_of_run.data, Tokenizer.load(files.tokenizer_dir), seed=0).train
    best = [
        [*one.segments[0].tokens.tolist(), *one.segments[1].tokens.tolist()]
        for one in map(samples.__getitem__, range(32))
    ]
    rewards = [ours(tmp_path / "run" / "final", ids) for ids in best]
    assert files.reward_statistics == pytest.approx((np.mean(rewards), np.std(rewards, ddof=1)), rel=1e-4)
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert (config["reward_mean"], config["reward_std"]) == files.reward_statistics


def test_demonstrations_of_ones_own(train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(reward__demonstrations="toy:units?n=20", reward__measured=8)
    assert "reward of 8 demonstrations" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"reward\.demonstrations"):
        train("other", reward__demonstrations=tmp_path / "none.jsonl")


def test_a_checkpoint_is_exported_and_an_adapter_merged(train: Run, tmp_path: Path) -> None:
    train(**LORA)
    final = tmp_path / "run" / "final"
    merge(str(tmp_path / "run"), str(tmp_path / "merged"))
    assert theirs(tmp_path / "merged") == pytest.approx(ours(final), abs=1e-5)
    told = open_model(str(final)).reward_statistics
    assert open_model(str(tmp_path / "merged")).reward_statistics == told
    final.rename(tmp_path / "final")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert ours(tmp_path / "out") == ours(tmp_path / "final")
    assert open_model(str(tmp_path / "out")).reward_statistics == told


def test_it_goes_on_from_a_classifier_and_from_a_tuned_model(train: Run, tmp_path: Path, tiny_model: Path) -> None:
    first = train("first", optim__lr=1e-3)
    second = train("second", model__source=tmp_path / "first" / "final", optim__lr=1e-3, train__epochs=1)
    assert second[0]["loss"] < first[0]["loss"]
    tuned = schema.load(
        finetune.FinetuneRecipe,
        [],
        [
            ("model.source", str(tiny_model)),
            ("data.train", "toy:units?n=8"),
            ("adapter.method", "lora"),
            ("out_dir", str(tmp_path / "sft")),
            ("fabric.accelerator", "cpu"),
        ],
    )
    finetune.main(tuned)
    train("third", model__source=tmp_path / "sft")
    assert ours(tmp_path / "third" / "final") == pytest.approx(theirs(tmp_path / "third" / "final"), abs=1e-5)


def test_margins_and_soft_labels_are_taken_from_the_rows(train: Run, tmp_path: Path) -> None:
    """The first step's loss is one of the start, where chosen and rejected get r: -log σ(r_w - r_l - m)."""
    rows = [{"prompt": f"Say {n}.", "chosen": f"It is {n}.", "rejected": "No.", "margin": 0.5} for n in range(8)]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"data__train": path, "train__epochs": 1, "optim__lr": 1e-9}
    plain, margin, soft = (
        train(str(number), **keys, **flags)[0]
        for number, flags in enumerate([{}, {"reward__margin": "true"}, {"reward__soft_labels": "true"}])
    )
    pairs = train("pairs", **keys, train__global_batch_size=1)
    gaps = np.array([one["margin"] for one in pairs])
    nls = np.logaddexp(0, -gaps)
    assert plain["loss"] == pytest.approx(nls.mean(), rel=1e-5)
    assert margin["loss"] == pytest.approx(np.logaddexp(0, 0.5 - gaps).mean(), rel=1e-5)
    assert soft["loss"] == pytest.approx((0.75 * nls + 0.25 * np.logaddexp(0, gaps)).mean(), rel=1e-5)


def test_what_cannot_be_a_reward_model_is_refused(train: Run, tmp_path: Path, tiny_model: Path) -> None:
    labelled = tmp_path / "l.jsonl"
    labelled.write_text(json.dumps({"prompt": "Say.", "completion": "It.", "label": True}) + "\n")
    with pytest.raises(InputError, match=r"single answers with a label: a reward model learns from pairs"):
        train(data__train=labelled, data__val=labelled)
    train("reward", optim__lr=1e-3, train__max_steps=1)
    config = tmp_path / "reward" / "final" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"id2label": {"0": "a", "1": "b"}, "num_labels": 2}))
    (tmp_path / "reward" / "final" / "manifest.json").unlink()
    with pytest.raises(InputError, match=r"2 labels: a reward model has one"):
        train("again", model__source=tmp_path / "reward" / "final")


def test_the_dry_run_counts_the_score_and_no_logits(
    make: Callable[..., RewardRecipe], capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    assert reward.main(make(**LORA), dry_run=True) == 0
    shown = capsys.readouterr().out
    trained = sum(
        p.numel()
        for p in load_reward_model(open_model(str(tiny_model)), adapter=make(**LORA).adapter).parameters()
        if p.requires_grad
    )
    assert f"{trained:,} trained" in shown and "rejected" in shown


def test_evaluate_scores_it_and_nothing_else_does(
    train: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(**LORA)
    held_out = json.loads((tmp_path / "run" / "held_out.json").read_text())
    task = f"preference:{tmp_path / 'val.jsonl'}"
    recipe = schema.load(
        evaluate.EvaluateRecipe,
        [],
        [
            ("model.source", str(tmp_path / "run")),
            ("tasks", task),
            ("out", str(tmp_path / "r.json")),
            ("log_samples", "true"),
        ],
    )
    assert evaluate.main(recipe) == 0
    [found] = json.loads((tmp_path / "r.json").read_text())["results"].values()
    for name, told in held_out.items():
        if name != "pairs":
            assert found[f"{name},none"] == pytest.approx(told["value"], rel=1e-4)
    assert len(list(tmp_path.glob("r.preference*.png"))) == 1
    recipe.tasks = ["exact_match:toy:units?n=4"]
    with pytest.raises(
        InputError, match=r"tasks: exact_match.*: a reward model says no words: give preference:FILE only"
    ):
        evaluate.main(recipe)
    with pytest.raises(InputError, match="is a reward model"):
        finetune.main(
            schema.load(
                finetune.FinetuneRecipe,
                [],
                [
                    ("model.source", str(tmp_path / "run")),
                    ("data.train", "toy:units"),
                    ("out_dir", str(tmp_path / "x")),
                ],
            )
        )

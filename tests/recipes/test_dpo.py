"""`litrecipe align dpo` from recipe to final model, on the tiny model and generated pairs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import DpoLoss, DpoRecipe
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import dpo
from litrecipe.recipes.model import export

TOKENS = torch.tensor([5, 3, 90, 41, 2, 7, 60])
LORA = {"adapter.method": "lora", "adapter.r": 4}
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def make(tiny_model: Path, tmp_path: Path) -> Callable[..., DpoRecipe]:
    def recipe(out: str = "run", **flags: object) -> DpoRecipe:
        given = {
            "model.source": tiny_model,
            "data.train": "toy:units-pairs?n=16&seed=0",
            "data.cache_dir": tmp_path / "cache",
            "train.global_batch_size": 4,
            "train.micro_batch_tokens": 400,
            "optim.lr": 1e-2,
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / out,
        } | {key.replace("__", "."): value for key, value in flags.items()}
        return schema.load(DpoRecipe, [], [(key, str(value)) for key, value in given.items()])

    return recipe


@pytest.fixture
def train(make: Callable[..., DpoRecipe], tmp_path: Path) -> Train:
    """Run it; returns the records of its steps."""

    def run(out: str = "run", **flags: object) -> list[dict[str, Any]]:
        assert dpo.main(make(out, **flags)) == 0
        return [record for record in read_records(tmp_path / out / "metrics.jsonl") if "grad_norm" in record]

    return run


def column(records: list[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records]


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load_model(open_model(str(folder))).logits(TOKENS)


def test_every_reference_is_the_model_that_training_starts_from(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a fresh adapter the base, the frozen copy and the log-probabilities on disk are one and the same."""
    runs = {name: train(name, **LORA, dpo__reference=name) for name in ("cache", "adapter_off", "copy")}
    assert capsys.readouterr().err.count("0.6931 = log 2") == 3
    for records in runs.values():
        assert column(records, "loss") == pytest.approx(column(runs["cache"], "loss"), rel=1e-5)
        assert column(records, "rewards/margins") == pytest.approx(column(runs["cache"], "rewards/margins"), rel=1e-4)
    assert runs["cache"][-1]["loss"] < 0.69
    assert torch.allclose(logits(tmp_path / "cache" / "final"), logits(tmp_path / "copy" / "final"), atol=1e-5)


@pytest.mark.parametrize("flags", [{}, {"fabric.activation_checkpointing": "true"}, {"fabric.precision": "bf16-mixed"}])
def test_all_weights_are_trained_against_a_copy_or_what_is_on_disk(train: Train, flags: dict[str, str]) -> None:
    copied, kept = (train(name, dpo__reference=name, optim__lr=1e-3, **flags) for name in ("copy", "cache"))
    exact = 1e-5 if "fabric.precision" not in flags else 1e-2
    assert column(copied, "loss") == pytest.approx(column(kept, "loss"), rel=exact)
    assert copied[0]["rewards/margins"] == pytest.approx(0, abs=1e-6 if exact == 1e-5 else 0.01)
    assert copied[-1]["loss"] < copied[0]["loss"]


@pytest.mark.parametrize("reference", ["auto", "copy"])
def test_a_trained_adapter_is_its_own_reference(train: Train, tmp_path: Path, reference: str) -> None:
    train("first", **LORA)
    second = train("second", model__source=tmp_path / "first" / "final", dpo__reference=reference)
    assert second[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert second[0]["rewards/chosen"] == pytest.approx(0, abs=1e-5)


def test_a_trained_adapter_cannot_be_switched_off_for_the_reference(train: Train, tmp_path: Path) -> None:
    train("first", **LORA)
    with pytest.raises(InputError, match=r"dpo\.reference: adapter_off: .*first/final is a trained adapter.*cache or"):
        train("second", model__source=tmp_path / "first" / "final", dpo__reference="adapter_off")
    with pytest.raises(InputError, match=r"dpo\.reference: adapter_off: there is no adapter"):
        train("third", dpo__reference="adapter_off")


def test_a_run_of_another_model_does_not_take_its_log_probabilities(
    train: Train, tiny_model: Path, varied_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("a", **LORA)
    records = train("b", **LORA, model__source=varied_model)
    assert records[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    train("c", **LORA, adapter__alpha=8)  # the same reference: nothing is computed again
    monkeypatch.setattr("litrecipe.data.remembered._said", None)
    train("d", **LORA, model__source=varied_model)
    with pytest.raises(TypeError):
        train("e", **LORA, data__train="toy:units-pairs?n=16&seed=1")


def test_a_cache_of_other_weights_is_refused(train: Train, tmp_path: Path) -> None:
    train("a", **LORA)
    [marker] = (tmp_path / "cache" / "reference").glob("*/complete.json")
    about = json.loads(marker.read_text())
    del about["seal"]
    about["about"]["model"][0] = "another model"
    marker.write_text(json.dumps(about))
    with pytest.raises(InputError, match=r"of another model: remove this folder"):
        train("b", **LORA)


def test_another_run_is_refused_before_the_reference_is_computed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    train(**LORA, train__max_steps=1)
    monkeypatch.setattr("litrecipe.recipes.dpo.remembering", None)
    with pytest.raises(InputError, match=r"made with other dpo\.beta \(0\.1, now 0\.2\): resume with the same"):
        train(**LORA, checkpoint__resume="auto", dpo__beta=0.2)


def test_the_moving_reference_follows(train: Train, tmp_path: Path) -> None:
    """With α 1 in every step it is the policy before the step: rewards are 0 whenever they are looked at."""
    for records in (
        train("hard", **LORA, dpo__reference="moving", dpo__ref_alpha=1, dpo__ref_every=1),
        train("full", dpo__reference="moving", dpo__ref_alpha=1, optim__lr=1e-3),
    ):
        assert column(records, "rewards/margins") == pytest.approx([0] * 4, abs=1e-5)
    still = train("still", **LORA, dpo__reference="moving", dpo__ref_every=100)
    fixed = train("fixed", **LORA)
    assert column(still, "loss") == pytest.approx(column(fixed, "loss"), rel=1e-5)
    soft = train("soft", **LORA, dpo__reference="moving", dpo__ref_alpha=0.5)
    assert 0 < soft[-1]["rewards/margins"] < fixed[-1]["rewards/margins"]


def test_a_checkpoint_of_a_moving_reference_is_exported(train: Train, tmp_path: Path) -> None:
    train("run", **LORA, dpo__reference="moving")
    (tmp_path / "run" / "final").rename(tmp_path / "final")
    assert export(str(tmp_path / "run"), str(tmp_path / "out")) == 0
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "final"))


EXTRA = {
    "cdpo": {"dpo.label_smoothing": 0.1},
    "robust": {"dpo.label_smoothing": 0.1},
    "exo": {"dpo.label_smoothing": 1e-3},
}


@pytest.mark.parametrize("loss", get_args(DpoLoss))
def test_every_loss_learns(train: Train, loss: str) -> None:
    """Two epochs with all weights raise the chosen answers above the rejected ones."""
    extra = EXTRA.get(loss, {})
    records = train(
        dpo__loss=loss, train__epochs=2, optim__lr=1e-3, data__val="toy:units-pairs?n=4&split=test", **extra
    )
    gap = [record["logps/chosen"] - record["logps/rejected"] for record in records]
    assert gap[-1] > gap[0]


def test_variants_and_mixtures_run(train: Train) -> None:
    plain = train("plain", **LORA)
    for number, flags in enumerate(
        [
            {"dpo.mix": "{sigmoid: 0.8, bco: 0.2}"},
            {"dpo.nll_coef": 0.2},
            {"dpo.mask_format_tokens": "true"},
            {"dpo.weighting": "true"},
            {"dpo.ld_alpha": 0.5},
            {"dpo.divergence": "js"},
            {"dpo.label_smoothing": 0.1},
        ]
    ):
        records = train(f"run{number}", **LORA, **flags)
        assert column(records, "loss") != column(plain, "loss"), flags


@pytest.mark.parametrize("flags", [{"quantize.method": "nf4"}, {"quantize.method": "nf4", "adapter.method": "dora"}])
def test_adapters_on_quantised_weights(train: Train, flags: dict[str, str]) -> None:
    records = train(**LORA | flags)
    assert records[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert records[-1]["loss"] < 0.69


def rows(path: Path, *found: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


LABELLED = [{"prompt": f"Say {n}.", "completion": f"It is {n}.", "label": n % 2 == 0} for n in range(8)]


def test_kto_learns_from_labels(train: Train, tmp_path: Path) -> None:
    records = train(dpo__loss="kto", data__train=rows(tmp_path / "l.jsonl", *LABELLED), train__epochs=4, optim__lr=1e-3)
    assert records[0]["rewards/margins"] == 0 == records[0]["kl"]
    assert records[-1]["rewards/margins"] > 0.05
    assert records[-1]["kl"] > 0  # of mismatched answers, which all rose


def test_good_and_bad_labels_are_counted_apart(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dpo__loss="kto", data__train=rows(tmp_path / "l.jsonl", *LABELLED), train__max_steps=1)
    [counted] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train ")]
    assert counted.endswith("8 samples, 184 tokens of prompts, 32 chosen, 32 rejected")


@pytest.mark.parametrize(("loss", "beta", "said"), [("simpo", 0.1, True), ("simpo", 2, False), ("sigmoid", 0.1, False)])
def test_a_beta_of_sums_is_told_of_with_losses_per_token(
    make: Callable[..., DpoRecipe], capsys: pytest.CaptureFixture[str], loss: str, beta: float, said: bool
) -> None:
    dpo.main(make(dpo__loss=loss, dpo__beta=beta), dry_run=True)
    assert ("compares log-probabilities per token" in capsys.readouterr().err) == said


def test_labels_are_nothing_to_compare(train: Train, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dpo\.loss: sigmoid: data\.train has single answers with a label: use kto"):
        train(data__train=rows(tmp_path / "l.jsonl", *LABELLED))


def test_bad_pairs_are_dropped_and_said(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt": "Say it.", "chosen": "Yes.", "rejected": "No."}
    found = [
        good,
        {**good, "rejected": "Yes."},
        {**good, "rejected": " "},
        {**good, "prompt": "Say it. " * 200},
        {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"},
    ]
    train(data__train=rows(tmp_path / "p.jsonl", *found), data__max_length=100, **LORA)
    said = capsys.readouterr().err
    for words in ("1 sample of 5 rows", "the same answer twice: 1 (p.jsonl:2)", "as empty: 1 (p.jsonl:3)"):
        assert words in said
    assert "the prompt fills data.max_length: 1 (p.jsonl:4)" in said
    assert "answers to different prompts: 1 (p.jsonl:5)" in said


def test_nothing_left_to_learn_is_an_error(train: Train, tmp_path: Path) -> None:
    same = {"prompt": "Say it.", "chosen": "Yes.", "rejected": "Yes."}
    with pytest.raises(InputError, match=r"data\.train: nothing in it can be learnt .*the same answer twice: 2"):
        train(data__train=rows(tmp_path / "p.jsonl", same, same))


@pytest.mark.parametrize("reference", ["copy", "cache"])
def test_a_start_from_another_place_is_told_in_plain_words(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: str
) -> None:
    """Dropout in a trained adapter makes the policy differ from itself: the loss of the first step is not log 2."""
    train("first", **LORA, adapter__dropout=0.5, optim__lr=0.1)
    assert "start: policy and reference say the same" in capsys.readouterr().err  # a fresh adapter is silent
    train("second", model__source=tmp_path / "first" / "final", dpo__reference=reference)
    said = capsys.readouterr().err
    assert "start: policy and reference are the same model and yet differ by" in said
    assert "dropout" in said


def test_the_dry_run_shows_a_pair_and_the_copy(
    make: Callable[..., DpoRecipe], capsys: pytest.CaptureFixture[str]
) -> None:
    assert dpo.main(make(), dry_run=True) == 0
    plain = capsys.readouterr().out
    assert "chosen" in plain and "rejected" in plain and plain.count("⟦") >= 2
    assert "frozen copy" not in plain
    assert dpo.main(make(dpo__reference="copy"), dry_run=True) == 0
    assert "a frozen copy of what is trained" in capsys.readouterr().out

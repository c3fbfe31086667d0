"""A step of preference learning gives the same numbers however its samples are cut into rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litrecipe.config import schema
from litrecipe.config.groups import DpoRecipe, RewardRecipe
from litrecipe.data.samples import SampleSet
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import dpo, reward

LORA = {"adapter.method": "lora", "adapter.r": 4}
WORDS = ("alpha", "beta", "gamma", "delta")
BUDGETS = {"lists": 150, "pairs": 120}
CASES: dict[str, dict[str, Any]] = {
    "reward": {"reward.centering_coef": 0.1},
    "reward-margins": {**LORA, "reward.margin": "true", "reward.label_smoothing": 0.1},
    "dpo": {"dpo.reference": "copy"},
    "dpo-nll": {**LORA, "dpo.nll_coef": 0.2, "dpo.mask_format_tokens": "true", "dpo.weighting": "true"},
    "dpo-simpo": {"dpo.loss": "simpo", "dpo.ld_alpha": 0.5},
    "dpo-aot": {**LORA, "dpo.loss": "aot"},
    "dpo-kto": {"dpo.loss": "kto", "dpo.desirable_weight": 4, "optim.lr": 2e-3},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranked lists of two to four answers, and pairs, of prompts and answers that are long or short: any sample fits
    into the smaller budget, the longest prompt with another's answers does not."""
    folder = tmp_path_factory.mktemp("data")
    for name, counts in (("lists", (2, 3, 4)), ("pairs", (2,))):
        with (folder / f"{name}.jsonl").open("w") as file:
            for n in range(12):
                prompt = f"Say {n} " + "please " * (7 if n % 4 == 0 else 1)
                ends = ("x" * (place + n % 5 + (9 if n % 4 else 0)) for place in range(counts[n % len(counts)]))
                answers = [f"It is {n} {word} {end}" for word, end in zip(WORDS, ends, strict=False)]
                scores = list(range(len(answers), 0, -1))
                file.write(json.dumps({"prompt": prompt, "completions": answers, "scores": scores}) + "\n")
    return folder


@pytest.fixture(scope="module")
def train(tiny_model: Path, data: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(case: str, file: str, budget: int) -> list[dict[str, Any]]:
        kind, recipe = (DpoRecipe, dpo) if case.startswith("dpo") else (RewardRecipe, reward)
        out = data / f"{case}-{file}-{budget}"
        given = {
            "model.source": tiny_model,
            "data.train": data / f"{file}.jsonl",
            "data.val": data / f"{file}.jsonl",
            "data.cache_dir": data / "cache",
            "train.global_batch_size": 5,
            "train.max_steps": 4,
            "train.micro_batch_tokens": budget,
            "optim.lr": 1e-3,
            "schedule.name": "constant",
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": out,
        } | CASES[case]
        assert recipe.main(schema.load(kind, [], [(key, str(value)) for key, value in given.items()])) == 0
        return read_records(out / "metrics.jsonl")

    return run


@pytest.mark.parametrize(
    ("case", "file"),
    [(case, file) for case in CASES for file in ("lists", "pairs") if (case, file) != ("dpo-aot", "lists")],
)
def test_losses_and_gradients_do_not_depend_on_the_cut(
    train: Callable[..., list[dict[str, Any]]], case: str, file: str
) -> None:
    small, large = (train(case, file, budget) for budget in (BUDGETS[file], 4096))
    assert len(small) == len(large) == 5
    for ours, theirs in zip(small, large, strict=True):
        for name in ours.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5), (ours["step"], name)
        for name in ours.keys() & {"kl", "eval_kl", "rewards/chosen", "margin"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-3, abs=1e-5), (ours["step"], name)


def test_no_sample_is_skipped_and_some_mismatched_answers_are_longer(
    train: Callable[..., list[dict[str, Any]]], data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else the test above says nothing of KTO's."""
    records = train("dpo-kto", "lists", 149)
    assert records[-1]["eval_kl"] > 1e-2
    assert "skipped" not in capsys.readouterr().err
    found = (SampleSet(marker.parent) for marker in (data / "cache").glob("*/*/complete.json"))
    samples = next(one for one in found if "lists" in one[0].id)
    whole = [samples[place] for place in range(len(samples))]
    prompts = [len(sample.segments[0].tokens) for sample in whole]
    answers = [sample.length - prompt for sample, prompt in zip(whole, prompts, strict=True)]
    assert max(prompts) + max(answers) > 150

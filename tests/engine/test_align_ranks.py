"""Preference learning on two real processes over gloo gives the numbers of one, whatever the reference is; and so does
learning from a teacher.

Each pair of processes runs all cases one after the other, as torchrun would start them. The last step has one sample,
so one rank has an empty row.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import assert_equal_runs, final_tensors, on_ranks, on_two_ranks

from litrecipe.engine.recorder import diff
from litrecipe.engine.rundir import read_records

LORA = {"adapter.method": "lora", "adapter.r": 4, "optim.lr": 5e-3}
CACHE, MOVING = {"dpo.reference": "cache"}, {"dpo.reference": "moving"}
TASK = {"eval.every": 2, "eval.tasks": '["exact_match:toy:units?n=2&seed=0&split=test"]'}
TEXTS = {"data.train": "toy:units?n=9&seed=0", "data.val": "toy:units?n=3&split=test"}
RANKED, RATED = {"data.train": "ranked.jsonl"}, {"data.train": "rated.jsonl"}
CASES: dict[str, dict[str, Any]] = {
    "reward": {},
    "reward-lora": {**LORA, "optim.lr": 2e-3},
    "reward-ranked": {**RANKED, "reward.centering_coef": 0.1},
    "reward-hydra": {**RANKED, "reward.sft_coef": 0.5},
    "dpo-cache": CACHE,
    "dpo-cache-lora": {**LORA, **CACHE},
    "dpo-off": {**LORA, "dpo.reference": "adapter_off"},
    "dpo-copy": {"dpo.reference": "copy", **TASK},
    "dpo-copy-dora": {**LORA, "adapter.method": "dora", "dpo.reference": "copy"},
    "dpo-copy-nf4": {**LORA, "quantize.method": "nf4", "dpo.reference": "copy"},
    "dpo-soft": {**LORA, **MOVING, "dpo.ref_alpha": 0.6},
    "dpo-hard": {**MOVING, "dpo.ref_alpha": 1, "dpo.ref_every": 3, "data.val": "toy:units-pairs?n=3&split=test"},
    "dpo-ranked": {**LORA, **RANKED, **CACHE, "dpo.nll_coef": 0.2, "dpo.weighting": "true"},
    "dpo-aot": {**LORA, **CACHE, "dpo.loss": "aot"},
    "dpo-aot_unpaired": {**CACHE, "dpo.loss": "aot_unpaired"},
    "dpo-kto": {"dpo.loss": "kto"},
    "dpo-kto-rated": {**LORA, **RATED, "dpo.loss": "kto"},
    "finetune-full": TEXTS,
    "finetune-top": {**LORA, **TEXTS, "distil.method": "top_k", "distil.alpha": 0.3, "distil.quantize": "nf4"},
    "finetune-kept": {**TEXTS, "distil.method": "top_1", "distil.cache": "true"},
}
SCRIPT = """
import json, os, sys
from litrecipe.config import groups, schema
from litrecipe.recipes import dpo, finetune, reward

VERBS = {
    "dpo": (groups.DpoRecipe, dpo),
    "reward": (groups.RewardRecipe, reward),
    "finetune": (groups.FinetuneRecipe, finetune),
}
os.chdir(sys.argv[1])
for verb, flags in json.loads(sys.argv[3]):
    kind, recipe = VERBS[verb]
    assert recipe.main(schema.load(kind, [], [(key, str(value)) for key, value in flags.items()])) == 0
print("done")
"""


def row(number: int, answers: int) -> dict[str, Any]:
    """Answers of different lengths, best first."""
    words = ("alpha", "beta", "gamma", "delta")[:answers]
    completions = [f"It is {number} {word} {'x' * (3 * place + number % 5)}" for place, word in enumerate(words)]
    scores = list(range(answers, 0, -1))
    return {"prompt": f"Say {number} {'please ' * (number % 4)}.", "completions": completions, "scores": scores}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ranked lists of two to four answers, and single answers with a label."""
    folder = tmp_path_factory.mktemp("ranks")
    lists = [row(number, 2 + number % 3) for number in range(9)]
    (folder / "ranked.jsonl").write_text("".join(json.dumps(found) + "\n" for found in lists))
    rated = [
        {"prompt": found["prompt"], "completion": found["completions"][1], "label": number % 3 == 0}
        for number, found in enumerate(lists)
    ]
    (folder / "rated.jsonl").write_text("".join(json.dumps(found) + "\n" for found in rated))
    return folder


@pytest.fixture(scope="module")
def jobs(tiny_model: Path, teacher_model: Path) -> Callable[..., str]:
    """Recipes of some cases as JSON."""

    def build(name: str, cases: list[str], **flags: object) -> str:
        common = {
            "model.source": str(tiny_model),
            "data.train": "toy:units-pairs?n=9&seed=0",
            "data.cache_dir": "cache",
            "train.epochs": 1,
            "train.global_batch_size": 4,
            "train.micro_batch_tokens": 300,
            "optim.lr": 1e-3,
            "schedule.name": "constant",
            "log.loggers": [],
            "fabric.accelerator": "cpu",
        }
        changes = {key.replace("__", "."): value for key, value in flags.items()}
        verbs = {case: case.split("-")[0] for case in cases}
        of_verb = {"finetune": {"distil.teacher": str(teacher_model)}}
        return json.dumps(
            [
                (verb, common | of_verb.get(verb, {}) | CASES[case] | changes | {"out_dir": f"{name}/{case}"})
                for case, verb in verbs.items()
            ]
        )

    return build


def alone(folder: Path, jobs: str) -> None:
    on_ranks(1, SCRIPT, folder, jobs)


@pytest.fixture(scope="module")
def runs(folder: Path, jobs: Callable[..., str]) -> Path:
    """All cases, alone and with both strategies."""
    alone(folder, jobs("alone", list(CASES)))
    for strategy in ("ddp", "fsdp"):
        flags = {"fabric__strategy": strategy, "fabric__devices": 2, "data__cache_dir": f"cache-{strategy}"}
        said = on_two_ranks(SCRIPT, folder, jobs(strategy, list(CASES), **flags))
        assert [text.splitlines()[-1:] for text in said] == [["done"], ["done"]]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_numbers_of_one(runs: Path, strategy: str, case: str) -> None:
    one, two = (read_records(runs / name / case / "metrics.jsonl") for name in ("alone", strategy))
    assert diff(runs / "alone" / case, runs / strategy / case, tolerance=1e-5) == []
    assert len(one) == len(two) >= 3
    for ours, theirs in zip(one, two, strict=True):
        for name in ours.keys() & {"loss", "grad_norm", "eval_loss"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-5), (ours["step"], name)
        for name in ours:
            if name.startswith(("rewards/", "logps/", "kl", "accuracy", "margin", "eval_")):
                assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), (ours["step"], name)
    ours, theirs = final_tensors(runs / "alone" / case), final_tensors(runs / strategy / case)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_resume_with_their_moving_reference(folder: Path, jobs: Callable, strategy: str) -> None:
    """Also where the first part was done alone: the reference comes from the checkpoint, not from the model."""
    cases = ["dpo-soft", "dpo-hard", "reward-lora"]
    both = {"train__epochs": 2, "data__val": "null"}
    ranks = {"fabric__strategy": strategy, "fabric__devices": 2, **both}
    whole, broken, mixed = (f"{strategy}-{name}" for name in ("whole", "broken", "mixed"))
    parts = [
        jobs(whole, cases, **ranks),
        jobs(broken, cases, **ranks, train__max_steps=2),
        jobs(broken, cases, **ranks, checkpoint__resume="auto"),
    ]
    alone(folder, jobs(mixed, cases, **both, train__max_steps=2))
    parts.append(jobs(mixed, cases, **ranks, checkpoint__resume="auto"))
    together = json.dumps([job for part in parts for job in json.loads(part)])
    assert all(text.endswith("done\n") for text in on_two_ranks(SCRIPT, folder, together))
    for case in cases:
        assert_equal_runs(folder / whole / case, folder / broken / case, 5)
        assert diff(folder / whole / case, folder / mixed / case, tolerance=1e-5) == []

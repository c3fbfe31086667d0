"""Sampling and learning on two real processes over gloo gives the completions and the numbers of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import final_tensors, on_ranks, on_two_ranks

from litrecipe.engine.rundir import read_records

LORA = {"adapter.r": 4, "optim.lr": 5e-3}
FULL = {"adapter.method": "none", "optim.lr": 1e-3}
CASES: dict[str, dict[str, Any]] = {
    "ppo-lora": {**LORA, "ppo.kl_target": 0.1, "rewards.scale": "running", "ppo.ref_ema": 0.3},
    "ppo-separate": {**FULL, "ppo.layout": "separate", "ppo.critic_warmup": 1, "rewards.combine": "normalise"},
    "ppo-normalised": {**FULL, "ppo.layout": "separate", "ppo.normalise_values": True, "ppo.max_ratio": 1.001},
    "ppo-joined": {**LORA, "ppo.layout": "joined"},
    "grpo-full": {**FULL, "grpo.completions_per_prompt": 3, "grpo.zero_variance": "resample"},
    # A rollout of one prompt: the second rank has nothing to sample, to score and to learn.
    "grpo-one": FULL
    | {"grpo.completions_per_prompt": 3, "grpo.rollout_batch_size": 3, "grpo.minibatches": 1, "eval.success": 0.5}
    | {"data.val": "toy:units?n=1&seed=0&split=test", "grpo.max_pass_rate": 0.9},
    "rloo-odd": {**LORA, "rloo.completions_per_prompt": 2, "rloo.rollout_batch_size": 6, "train.epochs": 1},
}
SCRIPT = """
import json, os, sys
from litrecipe.config import online, schema
from litrecipe.recipes import grpo, ppo

os.chdir(sys.argv[1])
kinds = {"ppo": (online.PpoRecipe, ppo), "grpo": (online.GrpoRecipe, grpo), "rloo": (online.RlooRecipe, grpo)}
for verb, flags in json.loads(sys.argv[3]):
    kind, recipe = kinds[verb]
    assert recipe.main(schema.load(kind, [], [(key, str(value)) for key, value in flags.items()])) == 0
print("done")
"""


@pytest.fixture(scope="module")
def jobs(tiny_model: Path) -> Callable[..., str]:
    """The recipes of all cases as JSON."""

    def build(name: str, **flags: object) -> str:
        found = []
        for case, changes in CASES.items():
            verb = case.split("-")[0]
            common = {
                "model.source": str(tiny_model),
                "data.train": "toy:units?n=13&seed=0",
                "data.val": "toy:units?n=3&seed=0&split=test",
                "eval.every": 2,
                "eval.samples": 2,
                "rewards.sources": '{"regex?pattern=[aeiou]": 1.0, "length?max=5": 0.1}',
                f"{verb}.rollout_batch_size": 12,
                f"{verb}.minibatches": 2,
                f"{verb}.max_new_tokens": 8,
                "train.micro_batch_tokens": 300,
                "schedule.name": "constant",
                "log.loggers": [],
                "fabric.accelerator": "cpu",
                "train.max_steps": 6,
                "train.epochs": 9,
            }
            more = {key.replace("__", "."): value for key, value in flags.items()}
            found.append((verb, common | changes | more | {"out_dir": f"{name}/{case}"}))
        return json.dumps(found)

    return build


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, jobs: Callable[..., str]) -> Path:
    """All cases, alone and on two ranks."""
    folder = tmp_path_factory.mktemp("online-ranks")
    on_ranks(1, SCRIPT, folder, jobs("alone"))
    said = on_two_ranks(SCRIPT, folder, jobs("ddp", fabric__strategy="ddp", fabric__devices=2))
    assert [text.splitlines()[-1:] for text in said] == [["done"], ["done"]]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_sample_and_learn_as_one(runs: Path, case: str) -> None:
    """The same completions, to the token, because each has a random stream of its own; and the same numbers."""
    texts = [
        [json.loads(line)["completion"] for path in sorted(run.glob("*.jsonl")) for line in path.open()]
        for run in (runs / name / case / "rollouts" for name in ("alone", "ddp"))
    ]
    assert texts[0] == texts[1]
    one, two = (read_records(runs / name / case / "metrics.jsonl") for name in ("alone", "ddp"))
    assert len(one) == len(two) >= 6
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"tokens_per_second", "memory", "time/rollout"}:
            assert theirs[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-5), (ours["step"], name)
    ours, theirs = final_tensors(runs / "alone" / case), final_tensors(runs / "ddp" / case)
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).abs().max() < 1e-4, name

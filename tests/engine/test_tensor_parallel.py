"""Ranks that share a model over gloo, two of them or two by two, give the numbers of one process in every recipe, and
go on from one another's checkpoints.

One fork of each world runs all cases one after the other. The flight recorder is how these tests look: equal sample
ids, batches and losses, step by step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import final_tensors, on_ranks
from tiny import TINY_CONFIG, write_tiny_tokenizer

from litrecipe.config import groups, online, pretrain, schema
from litrecipe.engine.recorder import diff
from litrecipe.engine.rundir import read_records
from litrecipe.engine.telling import TIMING
from litrecipe.recipes import dpo, finetune, ppo, reward
from litrecipe.recipes import pretrain as pretraining

RECIPES: dict[str, tuple[Any, Any]] = {
    "finetune": (groups.FinetuneRecipe, finetune),
    "dpo": (groups.DpoRecipe, dpo),
    "reward": (groups.RewardRecipe, reward),
    "ppo": (online.PpoRecipe, ppo),
    "pretrain": (pretrain.PretrainRecipe, pretraining),
}
LORA = {"adapter.method": "lora", "adapter.r": 4, "optim.lr": 2e-3}
"""A rate at which roundings do not grow: at 5e-3 Adam makes 1e-5 of 1e-7 within six steps of preference learning."""
LONG, VAL = {"train.max_steps": 20}, {"data.val": "toy:units?n=6&seed=0&split=test"}
CASES: dict[str, dict[str, Any]] = {
    "finetune-full": {**LONG, **VAL},
    "finetune-lora": {**LORA, **LONG, **VAL},
    "finetune-dora": {**LORA, "adapter.method": "dora"},
    "finetune-fused": {"model.source": "fused", "model.init": "random", "fabric.activation_checkpointing": True},
    "finetune-taught": {**LORA, "distil.teacher": "TEACHER"},
    "dpo-off": {**LORA, **LONG, "dpo.reference": "adapter_off"},
    "dpo-moving": {**LONG, "dpo.reference": "moving", "dpo.ref_alpha": 0.6},
    "dpo-moving-soon": {"dpo.reference": "moving", "dpo.ref_every": 3},
    "reward-full": {"data.val": "toy:units-pairs?n=5&seed=0&split=test"},
    "ppo-separate": {**LONG, "train.epochs": 9, "ppo.layout": "separate", "ppo.kl_coef": 0.1, "adapter.method": "none"},
    "ppo-lora": {**LORA, "rewards.scale": "running", "ppo.policy_ema": 0.9},
    "pretrain-experts": {**LONG, "model.source": "experts", "model.init": "random", "pretrain.z_loss": 1e-3},
}
MIXED = ("finetune-fused", "finetune-dora", "dpo-moving-soon", "ppo-lora")
OF_FOUR = ("finetune-full", "ppo-lora")
OF_VERB: dict[str, dict[str, Any]] = {
    "finetune": {"data.train": "toy:units?n=40&seed=0"},
    "dpo": {"data.train": "toy:units-pairs?n=20&seed=0"},
    "reward": {"data.train": "toy:units-pairs?n=20&seed=0"},
    "ppo": {
        "data.train": "toy:units?n=13&seed=0",
        "data.val": "toy:units?n=3&seed=0&split=test",
        "eval.every": 3,
        "eval.samples": 2,
        "rewards.sources": '{"regex?pattern=[aeiou]": 1.0, "length?max=5": 0.1}',
        "ppo.rollout_batch_size": 8,
        "ppo.minibatches": 2,
        "ppo.max_new_tokens": 8,
    },
    "pretrain": {
        "data.sources": "{texts: texts.jsonl}",
        "data.max_length": 32,
        "data.workers": 1,
        "router.aux_loss_coef": 0.01,
        "router.z_loss_coef": 1e-3,
    },
}
EXPERTS = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
EXPERTS |= {"head_dim": 12}
FUSED = {"model_type": "gpt2", "vocab_size": 321, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}
FUSED |= {"layer_norm_epsilon": 1e-5, "activation_function": "gelu_new"}
SCRIPT = """
import json, os, sys
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/engine"]
from test_tensor_parallel import start

os.chdir(sys.argv[1])
for verb, flags in json.loads(sys.argv[4]):
    start(verb, flags)
print("done")
"""


def start(verb: str, flags: dict[str, Any]) -> None:
    kind, recipe = RECIPES[verb]
    assert recipe.main(schema.load(kind, [], [(key, str(value)) for key, value in flags.items()])) == 0


def on_several(ranks: int, folder: Path, jobs: list[tuple[str, dict[str, Any]]]) -> None:
    said = on_ranks(ranks, SCRIPT, folder, Path(__file__).parents[1], json.dumps(jobs))
    assert [text.splitlines()[-1:] for text in said] == [["done"]] * ranks


def write_config(folder: Path, config: dict[str, Any]) -> None:
    write_tiny_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with experts and one with fused projections, biases and an odd vocabulary, without weights; and texts."""
    folder = tmp_path_factory.mktemp("tensor")
    special = {key: TINY_CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_config(folder / "experts", TINY_CONFIG | EXPERTS)
    write_config(folder / "fused", FUSED | special)
    texts = [{"text": " ".join(["the quick brown fox"] * (2 + number % 5))} for number in range(60)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    return folder


@pytest.fixture(scope="module")
def jobs(tiny_model: Path, teacher_model: Path) -> Callable[..., list[tuple[str, dict[str, Any]]]]:
    """The recipes of some cases."""

    def build(name: str, cases: Iterator[str], **changes: Any) -> list[tuple[str, dict[str, Any]]]:
        found = []
        for case in cases:
            verb = case.split("-")[0]
            flags = {
                "model.source": str(tiny_model),
                "data.cache_dir": f"cache-{name}",
                "train.max_steps": 6,
                "checkpoint.keep": 9,
                "train.global_batch_size": 5,
                "train.micro_batch_tokens": 300,
                "optim.lr": 1e-3,
                "schedule.name": "constant",
                "log.loggers": [],
                "fabric.accelerator": "cpu",
                "out_dir": f"{name}/{case}",
            }
            flags |= OF_VERB[verb] | CASES[case] | {key.replace("__", "."): value for key, value in changes.items()}
            if verb == "ppo":
                del flags["train.global_batch_size"]
            taught = {"distil.teacher": str(teacher_model)} if "distil.teacher" in flags else {}
            found.append((verb, flags | taught))
        return found

    return build


@pytest.fixture(scope="module")
def alone(folder: Path, jobs: Callable, monkeypatch_module: pytest.MonkeyPatch) -> Path:
    """All cases in one process."""
    monkeypatch_module.chdir(folder)
    for verb, flags in jobs("alone", CASES):
        start(verb, flags)
    return folder / "alone"


@pytest.fixture(scope="module")
def monkeypatch_module() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def assert_same_numbers(one: Path, other: Path, stops: bool = False) -> None:
    """To 1e-5 in loss and gradient norm; what was sampled to the token; and weights. What `stops` is evaluated then."""
    if not one.name.startswith("ppo"):  # whose batches hold numbers that were computed
        assert diff(one, other, tolerance=1e-5) == []
    ours, theirs = (read_records(run / "metrics.jsonl") for run in (one, other))
    if stops:
        ours, theirs = ([record for record in run if "grad_norm" in record] for run in (ours, theirs))
    assert len(ours) == len(theirs) >= 6
    for a, b in zip(ours, theirs, strict=True):
        for name in a.keys() & {"loss", "grad_norm"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), (one.name, a.get("step"), name)
        for name in a.keys() - set(TIMING):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (one.name, a.get("step"), name)
    texts = [
        [json.loads(line)["completion"] for path in sorted(run.glob("rollouts/*.jsonl")) for line in path.open()]
        for run in (one, other)
    ]
    assert texts[0] == texts[1]
    ours, theirs = final_tensors(one), final_tensors(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.allclose(tensor, theirs[name], rtol=0, atol=1e-4), name


@pytest.fixture(scope="module")
def of_two(folder: Path, jobs: Callable, alone: Path) -> Path:
    """All cases by two ranks, and the beginning of some that others go on with."""
    two = {"fabric__devices": 2, "fabric__tensor_parallel": 2}
    on_several(2, folder, jobs("two", CASES, **two) + jobs("mixed", MIXED, **two, train__max_steps=2))
    return folder


@pytest.fixture(scope="module")
def of_four(folder: Path, jobs: Callable, of_two: Path) -> Path:
    """Two by two; of what two ranks began, one process has done two steps meanwhile."""
    again = {"checkpoint__resume": "auto"}
    for verb, flags in jobs("mixed", MIXED, train__max_steps=4, **again):
        start(verb, flags)
    four = {"fabric__devices": 4, "fabric__tensor_parallel": 2}
    on_several(4, folder, jobs("four", OF_FOUR, **four) + jobs("mixed", MIXED, **four, **again))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_with_a_part_each_give_the_numbers_of_one(of_two: Path, case: str) -> None:
    assert_same_numbers(of_two / "alone" / case, of_two / "two" / case)


@pytest.mark.slow
@pytest.mark.parametrize("case", OF_FOUR)
def test_two_copies_of_two_parts_give_the_numbers_of_one(of_four: Path, case: str) -> None:
    """The parts are sharded over the copies, which see different data."""
    assert_same_numbers(of_four / "alone" / case, of_four / "four" / case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXED)
def test_others_go_on_from_what_parts_were_saved(of_four: Path, case: str) -> None:
    """Two ranks with a part each, then one process, then two copies of two parts; no sample twice, none left out."""
    assert_same_numbers(of_four / "alone" / case, of_four / "mixed" / case, stops=True)
    written = [
        sorted(path.name for path in (of_four / "mixed" / case / "checkpoints").glob(f"{step}/weights-*"))
        for step in ("step-00000002", "step-00000004", "step-00000006")
    ]
    assert list(map(len, written)) == [2, 1, 4]

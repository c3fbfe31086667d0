"""What any number of processes saved, however they shared the model, any other number goes on with: each sample comes
once, as in a run of one process that never stopped, and losses agree to rounding (1e-5).

The flight recorder is how these tests look: sample ids, hashes of what is in them, random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import final_tensors, losses
from tiny import TINY_CONFIG, write_tiny_tokenizer

from litrecipe.checkpoint import state
from litrecipe.engine.recorder import diff
from litrecipe.engine.rundir import read_records

Train = Callable[..., Path]


def share(strategy: str, devices: int) -> list[object]:
    return ["--fabric.strategy", strategy, "--fabric.devices", devices] if devices > 1 else []


@pytest.fixture
def train(litrecipe: Callable[..., Any], tiny_model: Path, tmp_path: Path) -> Train:
    common = [
        *("--data.cache_dir", tmp_path / "cache", "--train.micro_batch_tokens", 300, "--log.loggers", "[]"),
        *("--fabric.accelerator", "cpu", "--checkpoint.resume", "auto", "--schedule.name", "constant"),
    ]
    of_verb: dict[str, list[object]] = {
        "finetune": [
            *("finetune", "--model", tiny_model, "--data.train", "toy:units?n=30&seed=0", "--optim.lr", "1e-3"),
            *("--train.global_batch_size", 5, "--adapter.method", "dora", "--adapter.r", 4),
        ],
        "pretrain": [
            *("pretrain", "--model", tiny_model, "--data.mix", '{"a": 2, "b": 1}', "--data.max_length", 32),
            *("--data.sources", json.dumps({name: str(tmp_path / f"{name}.jsonl") for name in "ab"})),
            *("--train.global_batch_size", 6, "--optim.lr", "1e-3", "--data.workers", 1),
        ],
        "ppo": [
            *("align", "ppo", "--model", tiny_model, "--data.train", "toy:units?n=24&seed=0", "--adapter.r", 4),
            *("--rewards.sources", '{"regex?pattern=[aeiou]": 1.0}', "--ppo.rollout_batch_size", 12),
            *("--ppo.minibatches", 2, "--ppo.epochs", 2, "--ppo.max_new_tokens", 8, "--train.epochs", 9),
            *("--rewards.scale", "running", "--optim.lr", "5e-3"),
        ],
    }

    def run(verb: str, name: str, steps: int, *flags: object) -> Path:
        out = tmp_path / name
        litrecipe(*of_verb[verb], *common, "--out_dir", out, "--train.max_steps", steps, *flags)
        return out

    return run


def agree(unbroken: Path, out: Path, steps: int) -> None:
    """Samples and their order to the letter, losses to 1e-5."""
    ids = [[record["samples"] for record in read_records(run / "flight.jsonl")] for run in (unbroken, out)]
    assert ids[0] == ids[1]
    assert len(ids[0]) == len(losses(out)) == steps
    assert losses(out) == pytest.approx(losses(unbroken), rel=1e-5, abs=1e-5)


def ranks_of(out: Path, step: int) -> int:
    return len(json.loads((state.step_folder(out / "checkpoints", step) / "state.json").read_text())["ranks"])


@pytest.mark.slow
def test_a_fine_tuning_goes_on_with_any_number_of_processes(train: Train) -> None:
    unbroken = train("finetune", "unbroken", 6)
    legs = [("", 1), ("fsdp", 4), ("ddp", 2), ("fsdp", 2), ("ddp", 4), ("", 1)]
    for step, (strategy, devices) in enumerate(legs, start=1):
        out = train("finetune", "run", step, *share(strategy, devices))
        assert ranks_of(out, step) == devices
    agree(unbroken, out, 6)
    assert diff(unbroken, out, tolerance=1e9) == [], "contents and random numbers, too"
    # With no step left to do: the weights are the saved ones to the bit.
    saved = final_tensors(out)
    again = final_tensors(train("finetune", "run", 6, *share("fsdp", 2)))
    assert saved.keys() == again.keys()
    assert all((tensor == again[name]).all() for name, tensor in saved.items())


@pytest.mark.slow
def test_a_pretraining_goes_on_with_any_number_of_processes(train: Train, tmp_path: Path) -> None:
    """In the midst of a mixture of sources, and of their epochs."""
    for number, name in enumerate("ab"):
        lines = [json.dumps({"text": f"The {name} of {n}: " + "so it goes " * (n % 5 + 1)}) for n in range(9 + number)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    unbroken = train("pretrain", "unbroken", 6)
    for step, (strategy, devices) in zip((2, 3, 5, 6), [("fsdp", 2), ("", 1), ("ddp", 4), ("fsdp", 2)], strict=True):
        out = train("pretrain", "run", step, *share(strategy, devices))
    agree(unbroken, out, 6)


@pytest.mark.slow
def test_experts_that_are_fewer_than_processes_are_cut_along_their_rows(train: Train, tmp_path: Path) -> None:
    """Saved by four and gone on with by four and by one."""
    experts = {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1, "initializer_range": 0.1}
    write_tiny_tokenizer(tmp_path / "experts")
    (tmp_path / "experts" / "config.json").write_text(json.dumps(TINY_CONFIG | experts))
    for name in "ab":
        lines = [json.dumps({"text": f"The {name} of {n}: " + "so it goes " * (n % 5 + 1)}) for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    model = ["--model.source", tmp_path / "experts" / "config.json", "--model.tokenizer", tmp_path / "experts"]
    model += ["--model.init", "random"]
    unbroken = train("pretrain", "unbroken", 6, *model)
    for step, devices in ((2, 4), (4, 4), (6, 1)):
        out = train("pretrain", "run", step, *model, *share("fsdp", devices))
    agree(unbroken, out, 6)
    ours, theirs = final_tensors(out), final_tensors(unbroken)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].numpy() == pytest.approx(tensor.numpy(), abs=1e-5), name


@pytest.mark.slow
def test_a_run_that_samples_goes_on_with_any_number_of_processes(train: Train) -> None:
    """A rollout has four steps: the checkpoints stand in the midst of one. Completions have random streams of their
    own, so they are the same, to the letter."""
    unbroken = train("ppo", "unbroken", 8)
    for step, (strategy, devices) in zip(
        (2, 3, 5, 7, 8), [("ddp", 2), ("", 1), ("ddp", 4), ("fsdp", 2), ("", 1)], strict=True
    ):
        out = train("ppo", "run", step, *share(strategy, devices))
    agree(unbroken, out, 8)
    for name in ("000001.jsonl", "000002.jsonl"):
        ours, theirs = ((run / "rollouts" / name).read_text().splitlines() for run in (out, unbroken))
        assert [json.loads(one)["completion"] for one in ours] == [json.loads(one)["completion"] for one in theirs]
    assert [r["completions"] for r in read_records(out / "metrics.jsonl")][-1] == 24


@pytest.mark.slow
def test_four_copies_go_on_to_the_bit(train: Train) -> None:
    """With more than two ranks a sum depends on the order in which it is added up, and that on its place in a message:
    messages must be the same after a new start."""
    unbroken = train("finetune", "unbroken", 4, *share("ddp", 4))
    for steps in (2, 4):
        out = train("finetune", "run", steps, *share("ddp", 4))
    assert diff(unbroken, out) == []
    assert losses(out) == losses(unbroken)
    ours, theirs = final_tensors(out), final_tensors(unbroken)
    assert all((tensor == ours[name]).all() for name, tensor in theirs.items())

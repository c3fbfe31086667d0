"""Two real processes over gloo: DDP and FSDP2 give the losses of one process, and resume.

The flight recorder is how these tests look: equal sample ids, batches and losses, step by step.
"""

import json

import pytest
from processes import final_tensors, losses

from litrecipe.engine.recorder import diff
from litrecipe.engine.rundir import read_records

METHODS = {
    "full": ["--optim.lr", "1e-3"],
    "lora": ["--adapter.method", "lora", "--adapter.r", "4"],
    "dora": ["--adapter.method", "dora", "--adapter.r", "4"],
    "qlora": ["--adapter.method", "lora", "--adapter.r", "4", "--quantize.method", "nf4"],
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train(litrecipe, tiny_model, cache, tmp_path):
    def run(name, method, *flags, steps=10):
        out = tmp_path / name
        litrecipe(
            *("finetune", "--model", tiny_model, "--data.train", "toy:units?n=40&seed=0", "--data.cache_dir", cache),
            *("--data.val", "toy:units?n=6&seed=0&split=test", "--out_dir", out, "--train.max_steps", steps),
            *("--train.global_batch_size", 5, "--train.micro_batch_tokens", 300, "--checkpoint.every", 4),
            *("--fabric.accelerator", "cpu", "--checkpoint.resume", "auto", *METHODS[method], *flags),
        )
        return out

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", list(METHODS))
def test_two_processes_give_the_losses_of_one(train, method):
    alone = train("alone", method)
    expected = losses(alone)
    assert len(expected) == 10
    # What shares a model is held against one process in test_shared_ranks.py, too.
    for strategy in ("ddp", "fsdp") if method in ("lora", "dora") else ("ddp",):
        run = train(strategy, method, "--fabric.devices", 2, "--fabric.strategy", strategy)
        assert diff(alone, run, tolerance=1e-5) == []
        assert losses(run) == pytest.approx(expected, rel=1e-5)
        ours, theirs = final_tensors(alone), final_tensors(run)
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).abs().max() < 1e-4, name
        evaluations = [
            [r["eval_loss"] for r in read_records(x / "metrics.jsonl") if "eval_loss" in r] for x in (alone, run)
        ]
        assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "method"), [("ddp", "lora"), ("fsdp", "full"), ("fsdp", "dora")])
def test_two_processes_resume_exactly(train, strategy, method):
    flags = ("--fabric.devices", 2, "--fabric.strategy", strategy)
    unbroken = train("unbroken", method, *flags, "--schedule.name", "constant")
    train("broken", method, *flags, "--schedule.name", "constant", steps=6)
    broken = train("broken", method, *flags, "--schedule.name", "constant")
    assert diff(unbroken, broken) == []
    checkpoint = broken / "checkpoints" / "step-00000010"
    assert len(json.loads((checkpoint / "state.json").read_text())["ranks"]) == 2
    ours, theirs = final_tensors(unbroken), final_tensors(broken)
    assert all((tensor == theirs[name]).all() for name, tensor in ours.items())


@pytest.mark.slow
def test_sharded_mixed_precision_with_activation_checkpointing(train):
    """What the hub's full-fsdp recipes set, together. bf16 rounds alike where the rows are alike."""
    flags = ("--fabric.precision", "bf16-mixed", "--fabric.activation_checkpointing", "true")
    alone = train("alone", "full", *flags)
    sharded = train("sharded", "full", *flags, "--fabric.devices", 2, "--fabric.strategy", "fsdp")
    assert losses(sharded) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(sharded) == pytest.approx(losses(train("fp32", "full")), rel=1e-2)
    assert losses(sharded)[-1] < losses(sharded)[0]

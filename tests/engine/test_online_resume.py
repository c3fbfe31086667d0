"""Runs that sample from their own model and are killed go on to the last bit, in the midst of a rollout too."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import assert_equal_runs, kill_at, start, steps_done, wait_until

STEPS = 12
LORA = ("--adapter.r", 4, "--optim.lr", "5e-3")
FULL = ("--adapter.method", "none", "--optim.lr", "1e-3")
SCALED = ("--rewards.scale", "running", "--rewards.clip", 5)
CASES = {
    # A rollout is 2 · 2 steps, so checkpoints every 3 stand in the midst of one.
    "ppo": (
        *("ppo", *LORA, *SCALED, "--ppo.ref_ema", 0.2, "--ppo.kl_target", 0.5, "--ppo.kl_horizon", 50),
        *("--ppo.normalise_values", "true", "--ppo.value_schedule", "linear", "--optim.adam_style", "tf"),
    ),
    "ppo-separate": ("ppo", *FULL, "--ppo.layout", "separate", "--ppo.critic_warmup", 3, "--ppo.max_kl", "1e-6"),
    "grpo": (
        *("grpo", *FULL, "--grpo.kl_coef", 0.1, "--grpo.completions_per_prompt", 4, "--grpo.zero_variance", "drop"),
        *("--grpo.max_pass_rate", 0.7, "--eval.success", 1),
    ),
}
Command = Callable[..., list[object]]


@pytest.fixture
def command(tiny_model: Path) -> Command:
    def build(out: Path, case: str, *flags: object) -> list[object]:
        verb, *settings = CASES[case]
        return [
            *("align", verb, "--model", tiny_model, "--data.train", "toy:units?n=64&seed=0", "--out_dir", out),
            *("--data.val", "toy:units?n=3&seed=0&split=test", "--rewards.sources", '{"regex?pattern=[aeiou]": 1.0}'),
            *(f"--{verb}.rollout_batch_size", 16, f"--{verb}.minibatches", 2, f"--{verb}.epochs", 2),
            *(f"--{verb}.max_new_tokens", 8, "--train.max_steps", STEPS, "--train.micro_batch_tokens", 300),
            *("--checkpoint.every", 3, "--checkpoint.resume", "auto", "--eval.every", 5, "--train.epochs", 9),
            *("--fabric.accelerator", "cpu", "--log.loggers", "[]", *settings, *flags),
        ]

    return build


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_kill_9_and_resume_equals_the_unbroken_run(litrecipe, command: Command, tmp_path: Path, case: str) -> None:
    """Weights, critic, optimizer, KL coefficient, random numbers and metrics; and what lies there for people."""
    rng = random.Random(case)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    litrecipe(*command(unbroken, case))
    process = start(command(broken, case), broken, tmp_path / "log")
    kind = "inside a save" if case == "grpo" else "between steps"
    assert kill_at(kind, process, broken, rng), (tmp_path / "log").read_text()
    assert steps_done(broken) < STEPS
    litrecipe(*command(broken, case))
    assert_equal_runs(unbroken, broken, STEPS)
    for name in sorted(path.name for path in (unbroken / "rollouts").glob("*.jsonl")):
        assert (unbroken / "rollouts" / name).read_bytes() == (broken / "rollouts" / name).read_bytes(), name
    if case.startswith("ppo"):
        critics = [(run / "final" / "critic").glob("*.safetensors") for run in (unbroken, broken)]
        [a], [b] = map(list, critics)
        assert a.read_bytes() == b.read_bytes()


@pytest.mark.slow
def test_a_signal_in_the_midst_of_a_rollout_drops_it_and_saves(litrecipe, command: Command, tmp_path: Path) -> None:
    """Sampling takes the larger part of this run, so the signal most likely meets it; what is saved is the step before,
    and the resumed run equals the unbroken one."""
    long = ("--ppo.rollout_batch_size", 32, "--ppo.max_new_tokens", 60, "--eval.every", "null")
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    process = start(command(broken, "ppo", *long), broken, tmp_path / "log")
    assert wait_until(lambda: steps_done(broken) == 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 85, (tmp_path / "log").read_text()
    done = steps_done(broken)
    assert done < STEPS
    newest = max((broken / "checkpoints").iterdir())
    assert json.loads((newest / "state.json").read_text())["step"] == done
    litrecipe(*command(broken, "ppo", *long))
    litrecipe(*command(unbroken, "ppo", *long))
    assert_equal_runs(unbroken, broken, STEPS)

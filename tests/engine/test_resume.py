"""A killed or pre-empted run, resumed, equals the unbroken one to the last bit; and stops answer with their exit code.

The runs are real processes. Their data spans two epochs with a step across the boundary, and is packed into rows.
"""

import json
import os
import random
import signal
import time

import pytest
from processes import FRESH, assert_equal_runs, kill_at, start, steps_done, wait_until

from litrecipe.checkpoint.manifest import mistakes_of
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Fabric, FinetuneRecipe, Quantize
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import finetune

STEPS = 24
METHODS = {
    "full": ["--optim.lr", "1e-3"],
    "lora": ["--adapter.method", "lora", "--adapter.r", "4", "--adapter.dropout", "0.1"],
    "dora": ["--adapter.method", "dora", "--adapter.r", "4", "--checkpoint.asynchronous", "true"],
}


@pytest.fixture
def command(tiny_model, tmp_path):
    def build(out, *flags):
        return [
            *("finetune", "--model", tiny_model, "--data.train", "toy:units?n=50&seed=0", "--out_dir", out),
            *("--data.val", "toy:units?n=8&seed=0&split=test", "--data.cache_dir", tmp_path / "cache"),
            *("--train.max_steps", STEPS, "--train.global_batch_size", 4, "--train.micro_batch_tokens", 300),
            *("--checkpoint.every", 3, "--checkpoint.resume", "auto", "--eval.every", 7),
            *("--fabric.accelerator", "cpu", *flags),
        ]

    return build


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "kills"),
    [
        ("full", ["between steps", "inside a save", "set-up", "between steps", "inside a save"]),
        ("lora", ["between steps", "inside a save"]),
        ("dora", ["between steps", "inside a save"]),
    ],
)
def test_kill_9_and_resume_equals_the_unbroken_run(litrecipe, command, tmp_path, method, kills):
    rng = random.Random(method)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    litrecipe(*command(unbroken, *METHODS[method]))
    killed = 0
    for kind in kills:
        process = start(
            command(broken, *METHODS[method]), broken, tmp_path / "log", by=FRESH if kind == "set-up" else ()
        )
        killed += kill_at(kind, process, broken, rng)
        process.wait()
    assert killed >= len(kills) - 1, (tmp_path / "log").read_text()
    litrecipe(*command(broken, *METHODS[method]))
    assert_equal_runs(unbroken, broken, STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resumed_run_is_equal(litrecipe, command, tmp_path, number, code):
    broken = tmp_path / "broken"
    process = start(command(broken, "--checkpoint.every", "1000"), broken, tmp_path / "log")
    assert wait_until(lambda: steps_done(broken) >= 5, process)
    process.send_signal(number)
    assert process.wait(30) == code, (tmp_path / "log").read_text()
    newest = max((broken / "checkpoints").iterdir())
    assert mistakes_of(newest, "") == []
    at_signal = steps_done(broken)
    assert json.loads((newest / "state.json").read_text())["step"] == at_signal < STEPS
    if number == signal.SIGTERM:
        unbroken = tmp_path / "unbroken"
        litrecipe(*command(broken, "--checkpoint.every", "1000"))
        litrecipe(*command(unbroken, "--checkpoint.every", "1000"))
        assert_equal_runs(unbroken, broken, STEPS)


@pytest.mark.slow
def test_a_signal_during_set_up_exits_85_at_once(command, tmp_path):
    rng = random.Random(0)
    for _ in range(3):
        process = start(command(tmp_path / "run"), tmp_path / "run", tmp_path / "log", by=FRESH)
        time.sleep(rng.uniform(0.4, 3))
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 85, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_signal_during_evaluation_stops_it(litrecipe, command, tmp_path):
    """The evaluation is cut short, the step saved, and the resumed run does the evaluation again."""
    out = tmp_path / "run"
    flags = ("--data.val", "toy:fields?n=20000&seed=0&split=test", "--train.max_steps", "8")
    process = start(command(out, *flags), out, tmp_path / "log")
    assert wait_until(lambda: steps_done(out) == 7, process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 85
    assert not any("eval_loss" in record for record in read_records(out / "metrics.jsonl"))
    litrecipe(*command(out, "--data.val", "toy:units?n=8&seed=0&split=test", "--train.max_steps", "8"))
    evaluated = [record["step"] for record in read_records(out / "metrics.jsonl") if "eval_loss" in record]
    assert evaluated == [7, 8]


@pytest.mark.slow
def test_a_torn_newest_checkpoint_falls_back_with_a_warning(litrecipe, command, tmp_path):
    """With a constant rate a run that was told to end earlier took the same steps as one that goes on."""
    out, unbroken = tmp_path / "run", tmp_path / "unbroken"
    constant = ("--schedule.name", "constant", "--optim.lr", "1e-3")
    litrecipe(*command(unbroken, *constant))
    litrecipe(*command(out, *constant, "--train.max_steps", STEPS - 1))
    newest, older = sorted((out / "checkpoints").iterdir(), reverse=True)
    assert [newest.name, older.name] == [f"step-{STEPS - 1:08d}", f"step-{STEPS - 3:08d}"]
    weights = newest / "weights-00000.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    done = litrecipe(*command(out, *constant))
    assert f"warning: {weights}: torn" in done.stderr
    assert f"falling back to {older.name}" in done.stderr
    assert f"resumed {older} at step {STEPS - 3} of {STEPS}" in done.stderr
    assert_equal_runs(unbroken, out, STEPS)


@pytest.fixture
def recipe(tiny_model, tmp_path):
    """Two steps with a LoRA adapter."""
    recipe = FinetuneRecipe(out_dir=str(tmp_path / "run"), adapter=Adapter(method="lora", r=4))
    recipe.model.source = str(tiny_model)
    recipe.data.train, recipe.data.cache_dir = "toy:units?n=20&seed=0", str(tmp_path / "cache")
    recipe.train.max_steps = 2
    recipe.checkpoint.resume = "auto"
    recipe.fabric.accelerator = "cpu"
    recipe.log.loggers = []
    return recipe


@pytest.mark.parametrize(
    ("group", "settings", "said"),
    [
        ("adapter", Adapter(method="lora", r=4, alpha=8), r"other adapter\.alpha \(32\.0, now 8"),
        ("adapter", Adapter(method="lora", r=4, rslora=True), r"other adapter\.rslora \(False, now True"),
        ("adapter", Adapter(method="lora", r=1), r"other adapter\.r \(4, now 1"),
        ("quantize", Quantize(method="nf4"), r"other quantize\.method \(none, now nf4"),
        ("fabric", Fabric(accelerator="cpu", precision="bf16-true"), r"precision \(32-true, now bf16-true"),
    ],
)
def test_other_settings_are_refused_by_name(recipe, group, settings, said):
    assert finetune.main(recipe) == 0
    setattr(recipe, group, settings)
    recipe.train.max_steps, recipe.train.seed = 3, 1
    with pytest.raises(InputError, match=said) as error:
        finetune.main(recipe)
    assert any(mistake.startswith("train.seed: 1: ") for mistake in error.value.mistakes)


def test_a_run_that_continues_anothers_checkpoint_has_one_of_its_own(recipe, tmp_path):
    """Even when there is no step left to do, so that it can be resumed in its turn."""
    assert finetune.main(recipe) == 0
    first = tmp_path / "run" / "checkpoints" / "step-00000002"
    recipe.out_dir, recipe.checkpoint.resume = str(tmp_path / "second"), str(first)
    assert finetune.main(recipe) == 0
    mine = tmp_path / "second" / "checkpoints" / "step-00000002"
    for name in ("weights-00000.safetensors", "optimizer-00000.safetensors"):
        assert (mine / name).read_bytes() == (first / name).read_bytes()

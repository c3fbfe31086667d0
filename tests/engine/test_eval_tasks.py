"""`eval.tasks` inside training, in real processes: random numbers, several ranks, and signals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from litrecipe.checkpoint.manifest import verify
from litrecipe.config import groups
from litrecipe.engine.recorder import diff
from litrecipe.engine.rundir import read_records
from litrecipe.evaluation.sampling import complete
from litrecipe.evaluation.session import open_session

TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{goal}}}}"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
metric_list:
  - metric: acc
  - metric: f1
    aggregation: f1
    higher_is_better: true
"""
SHORT = "exact_match:toy:units?n=1&seed=0&split=test"
LONG = "exact_match:toy:units?n=400&seed=0&split=test"
TWO = {
    "ddp": ["--fabric.devices", "2", "--fabric.strategy", "ddp"],
    "fsdp": ["--fabric.devices", "2", "--fabric.strategy", "fsdp"],
}


@pytest.fixture
def choice(tmp_path):
    """An lm-eval task with a metric whose error is bootstrapped."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"goal": f"cage {n}?", "sol1": f"{n} strips", "sol2": f"{n} dogs", "label": n % 2} for n in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return f"{folder}:tiny_choice"


@pytest.fixture
def command(tiny_model, tmp_path):
    def build(out, tasks, *flags):
        return [
            *("finetune", "--model", tiny_model, "--data.train", "toy:units?n=24&seed=0", "--out_dir", out),
            *("--data.cache_dir", tmp_path / "cache", "--train.max_steps", 6, "--train.global_batch_size", 4),
            *("--train.micro_batch_tokens", 300, "--checkpoint.every", 1, "--checkpoint.resume", "auto"),
            *("--checkpoint.keep", 9, "--eval.every", 2, "--eval.tasks", json.dumps([tasks])),
            *("--fabric.accelerator", "cpu", *flags),
        ]

    return build


def start(command, log):
    words = [sys.executable, "-m", "litrecipe", *map(str, command)]
    return subprocess.Popen(words, stdout=log.open("ab"), stderr=subprocess.STDOUT)


def wait_until(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def steps_done(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"grad_norm"') if path.exists() else 0


def evaluations(out):
    return [
        {key: value for key, value in record.items() if key == "step" or key.startswith("eval_")}
        for record in read_records(out / "metrics.jsonl")
        if any(key.startswith("eval_") for key in record)
    ]


@pytest.mark.slow
def test_an_evaluation_leaves_the_random_numbers_alone(litrecipe, command, choice, tmp_path):
    """lm-eval seeds all generators. A run killed after an evaluation does not repeat it, and draws the same masks."""
    flags = ("--adapter.method", "lora", "--adapter.r", 4, "--adapter.dropout", 0.3, "--train.max_steps", 4)
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    litrecipe(*command(unbroken, choice, *flags))
    # As a kill in step 3 leaves it: the evaluation after step 2 is on record, its checkpoint the newest.
    shutil.copytree(unbroken, broken)
    shutil.rmtree(broken / "final")
    for step in (3, 4):
        shutil.rmtree(broken / "checkpoints" / f"step-{step:08d}")
    for name in ("metrics.jsonl", "flight.jsonl"):
        lines = (broken / name).read_text().splitlines(keepends=True)
        (broken / name).write_text("".join(line for line in lines if json.loads(line)["step"] <= 2))
    assert [record["step"] for record in evaluations(broken)] == [2]
    litrecipe(*command(broken, choice, *flags))
    assert diff(unbroken, broken) == []
    assert evaluations(unbroken) == evaluations(broken)
    assert [record["step"] for record in evaluations(broken)] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", list(TWO))
def test_two_ranks_sample_what_one_process_samples(litrecipe, command, varied_model, tmp_path, strategy):
    """One of the two references is the model's own answer."""
    model = tmp_path / "model"
    shutil.copytree(varied_model, model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 512}
    (model / "config.json").write_text(json.dumps(config))
    session = open_session(groups.Model(source=str(model)), groups.Quantize(), groups.Fabric(accelerator="cpu"))
    questions = ["the fox?", "how lazy is the dog?"]
    prompts = [session.tokenizer.encode_prompt([{"role": "user", "content": question}]) for question in questions]
    answers = complete(session.model, session.tokenizer, prompts, groups.Generate())
    assert all(len(answer.tokens) > 8 for answer in answers)
    rows = [
        {"prompt": questions[0], "answer": answers[0].text},
        {"prompt": questions[1], "answer": "not" + answers[1].text},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", model, "--train.max_steps", 1, "--optim.lr", 1e-9)
    litrecipe(*command(tmp_path / "run", f"exact_match:{tmp_path / 'rows.jsonl'}", *flags, *TWO[strategy]))
    [evaluation] = evaluations(tmp_path / "run")
    assert [value for key, value in evaluation.items() if key.endswith("exact_match")] == [0.5]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["one", "ddp", "fsdp"])
def test_a_signal_while_sampling_stops_all_ranks(litrecipe, command, tmp_path, strategy):
    out = tmp_path / "run"
    flags = TWO.get(strategy, [])
    process = start(command(out, LONG, "--checkpoint.every", 1000, *flags), tmp_path / "log")
    wait_until(lambda: steps_done(out) == 2, process)
    time.sleep(2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    try:
        code = process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail((tmp_path / "log").read_text())
    assert code == 85, (tmp_path / "log").read_text()
    assert time.monotonic() - sent < 15
    assert evaluations(out) == []
    [checkpoint] = (out / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000002"
    verify(checkpoint)
    litrecipe(*command(out, SHORT, "--train.max_steps", 3, *flags))
    assert [record["step"] for record in evaluations(out)] == [2, 3]


@pytest.mark.slow
def test_held_out_samples_that_fit_no_row_are_counted_once(litrecipe, tiny_model, tmp_path):
    rows = [{"prompt": "the dog?", "completion": "fox " * words} for words in (3, 5, 400)]
    (tmp_path / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = litrecipe(
        *("finetune", "--model", tiny_model, "--data.train", "toy:units?n=4", "--data.val", tmp_path / "val.jsonl"),
        *("--data.cache_dir", tmp_path / "cache", "--out_dir", tmp_path / "run", "--train.micro_batch_tokens", 300),
        *("--train.global_batch_size", 2, "--train.max_steps", 2, "--eval.every", 1, "--fabric.accelerator", "cpu"),
    )
    assert len(evaluations(tmp_path / "run")) == 2
    assert done.stderr.count("data.val: 1 of 3 samples do not fit train.micro_batch_tokens 300") == 1

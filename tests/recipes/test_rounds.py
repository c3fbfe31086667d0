"""`litrecipe align iterative-dpo` and `rejection-sampling` from recipe to final model, on the tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.rounds import IterativeDpoRecipe, RejectionSamplingRecipe
from litrecipe.data.samples import SampleSet
from litrecipe.engine.fit import Run
from litrecipe.engine.rundir import read_records
from litrecipe.model.row import make_row
from litrecipe.recipes import iterative_dpo, rejection_sampling
from litrecipe.rollout.candidates import CandidateFile

FULL = {"adapter.method": "none"}
LORA = {"adapter.r": 4}
VERBS = {
    "iterative-dpo": (
        IterativeDpoRecipe,
        iterative_dpo,
        {
            "iterative_dpo.prompts_per_round": 6,
            "iterative_dpo.minibatches": 2,
            "iterative_dpo.max_new_tokens": 6,
            "train.max_steps": 4,
        },
    ),
    "rejection-sampling": (
        RejectionSamplingRecipe,
        rejection_sampling,
        {
            "rejection_sampling.completions_per_prompt": 4,
            "rejection_sampling.prompts_per_batch": 4,
            "rejection_sampling.max_new_tokens": 6,
            "rejection_sampling.truncated": "learn",
            "train.max_steps": 3,
        },
    ),
}
LOG_2 = math.log(2)
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path) -> Train:
    """Run it; returns the records of its steps."""

    def run(verb: str, out: str = "run", *, dry_run: bool = False, **flags: object) -> list[dict[str, Any]]:
        kind, recipe, usual = VERBS[verb]
        given = {
            "model.source": tiny_model,
            "data.train": "toy:units?n=48&seed=0",
            "data.cache_dir": tmp_path / "cache",
            "rewards.sources": '{"regex?pattern=[aeiou]": 1.0, "repetition": -0.1, "length?max=9": 0.01}',
            "train.micro_batch_tokens": 400,
            "optim.lr": 1e-3,
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / out,
            **usual,
        } | {key.replace("__", "."): value for key, value in flags.items()}
        flat = [(key, str(value)) for key, value in given.items() if value is not None]
        assert recipe.main(schema.load(kind, [], flat), dry_run=dry_run) == 0
        return [record for record in read_records(tmp_path / out / "metrics.jsonl") if "grad_norm" in record]

    return run


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def weights_of(folder: Path) -> bytes:
    [file] = folder.glob("*.safetensors")
    return file.read_bytes()


def said_of(model: Path, samples: SampleSet) -> list[torch.Tensor]:
    """Log-probabilities of each sample's predictions under a model."""
    loaded = load_model(open_model(str(model))).eval()
    with torch.no_grad():
        return [loaded(make_row([samples[place]])).logps for place in range(len(samples))]


@pytest.mark.parametrize(
    ("flags", "starts_at_log_2"),
    [
        (LORA, True),
        (FULL, True),
        (LORA | {"iterative_dpo.reference": "start"}, False),
        (FULL | {"iterative_dpo.reference": "start"}, False),
    ],
)
def test_rounds_hold_the_policy_to_its_reference(
    train: Train, tmp_path: Path, tiny_model: Path, flags: dict[str, Any], starts_at_log_2: bool
) -> None:
    """Two rounds of two steps. In the second, `latest` is the model that the first one left, and lies in rounds/01;
    `start` is the model that the run began with. All of a round's log-ratios are 0 where it is its own reference."""
    records = train("iterative-dpo", **flags)
    assert [record["loss"] for record in records[::2]] == [
        pytest.approx(LOG_2, abs=1e-5),
        pytest.approx(LOG_2, abs=1e-5 if starts_at_log_2 else 1),
    ]
    assert (abs(records[2]["loss"] - LOG_2) < 1e-5) == starts_at_log_2
    assert {"rewards/margins", "reward", "pairs/share", "pairs/margin", "logps/chosen"} <= records[0].keys()
    samples = SampleSet(tmp_path / "run" / "rollouts" / "000002.samples")
    reference = tmp_path / "run" / "rounds" / "01" if starts_at_log_2 else tiny_model
    for place, logps in enumerate(said_of(reference, samples)):
        np.testing.assert_allclose(samples[place].extra["ref_logps"], logps.numpy(), atol=1e-4)
    assert weights_of(tmp_path / "run" / "rounds" / "02") == weights_of(tmp_path / "run" / "final")


def test_a_round_pairs_what_its_rollout_holds(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Best and worst of each prompt by the scores of the rollout's own lines, and the share of prompts with a pair."""
    [first, *_] = train("iterative-dpo", **LORA, train__max_steps=1)
    assert "start: policy and reference say the same, as they must; the loss was 0.6931 = log 2" in (
        said := capsys.readouterr().err
    )
    rollout = lines_of(tmp_path / "run" / "rollouts" / "000001.jsonl")
    pairs = lines_of(tmp_path / "run" / "pairs" / "000001.jsonl")
    by_prompt = {one["prompt_id"]: [] for one in rollout}  # type: ignore[var-annotated]
    for one in rollout:
        by_prompt[one["prompt_id"]].append(one["reward"])
    wanted = {where: (max(found), min(found)) for where, found in by_prompt.items() if max(found) > min(found)}
    assert {one["prompt_id"]: (one["score_chosen"], one["score_rejected"]) for one in pairs} == wanted
    assert first["pairs/share"] == len(wanted) / 6
    assert first["pairs/margin"] == pytest.approx(sum(a - b for a, b in wanted.values()) / len(wanted))
    assert first["reward"] == pytest.approx(sum(one["reward"] for one in rollout) / 24)
    assert f"round 1: {len(wanted)} pairs from 6 prompts" in said


@pytest.mark.parametrize(
    "flags",
    [
        {"dpo.loss": "simpo", "dpo.beta": 2},
        {"dpo.loss": "aot", "iterative_dpo.epochs": 2},
        {"dpo.weighting": "true", "dpo.nll_coef": 0.1},
        {"iterative_dpo.top_p": 0.95, "iterative_dpo.temperature": 0.7, "data.val": "toy:units?n=3&seed=0&split=test"},
        {"iterative_dpo.gold": "answer", "iterative_dpo.completions_per_prompt": 1, "iterative_dpo.max_new_tokens": 30},
        {"iterative_dpo.soft_labels": "true", "iterative_dpo.history": 0.5, "iterative_dpo.max_repetition": 0.3},
    ],
)
def test_losses_sampling_and_the_datas_own_answers(train: Train, flags: dict[str, Any]) -> None:
    records = train("iterative-dpo", **LORA, **flags)
    assert len(records) == 4
    assert all(math.isfinite(record["loss"]) for record in records)
    assert ("pairs/gold_chosen" in records[0]) == ("iterative_dpo.gold" in flags)


def test_online_samples_before_every_step(train: Train, tmp_path: Path) -> None:
    """Four steps, four rollouts; the reference is the start of the run, so later losses are not log 2; and nothing is
    kept of rounds."""
    flags = {"iterative_dpo.online": "true", "iterative_dpo.minibatches": None}
    records = train("iterative-dpo", **LORA, **flags)
    assert [record["completions"] for record in records] == [24, 48, 72, 96]
    assert records[0]["loss"] == pytest.approx(LOG_2, abs=1e-5)
    assert all(abs(record["loss"] - LOG_2) > 1e-5 for record in records[1:])
    assert not (tmp_path / "run" / "rounds").exists() and not (tmp_path / "run" / "pairs").exists()


def test_a_judge_compares(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that likes what sorts first: the chosen text of a pair does, and its score is 1, that of the other 0."""
    (tmp_path / "likes.py").write_text(
        "def early(prompts, a, b, rows):\n    return [float(x < y) for x, y in zip(a, b)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = {"rewards.sources": "{}", "iterative_dpo.judge": "function:likes:early"}
    train("iterative-dpo", **LORA, **flags, iterative_dpo__completions_per_prompt=2, train__max_steps=1)
    pairs = lines_of(tmp_path / "run" / "pairs" / "000001.jsonl")
    assert len(pairs) == 6
    for one in pairs:
        assert one["chosen"] < one["rejected"]
        assert (one["score_chosen"], one["score_rejected"]) == (1, 0)


def test_an_interrupted_run_goes_on_to_the_bit(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints after steps 3 and 6, the first in the midst of round 2; broken off in step 5, the first of round 3,
    whose rollout is done. The pairs of round 1 and 2 that are learnt again are the same too."""
    flags = LORA | {"train.max_steps": 7, "checkpoint.every": 3, "checkpoint.resume": "auto", "train.epochs": 9}
    flags |= {"iterative_dpo.history": 0.5, "rewards.scale": "running", "iterative_dpo.epochs": 1}
    unbroken = train("iterative-dpo", "unbroken", **flags)
    whole, steps = Run.train_step, []

    def breaks_off(run: Run, samples: Any) -> Any:
        steps.append(samples)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return whole(run, samples)

    monkeypatch.setattr(Run, "train_step", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        train("iterative-dpo", "broken", **flags)
    monkeypatch.undo()
    assert {one.id.partition("@")[2][:2] for one in [*steps[2], *steps[3]]} == {"1:", "2:"}
    broken = train("iterative-dpo", "broken", **flags)
    for name in ("loss", "grad_norm", "reward", "pairs", "completions"):
        assert [one[name] for one in broken] == [one[name] for one in unbroken], name
    for folder in ("final", "rounds/01", "rounds/02", "rounds/03"):
        assert weights_of(tmp_path / "broken" / folder) == weights_of(tmp_path / "unbroken" / folder), folder
    for path in (tmp_path / "unbroken" / "pairs").glob("*.jsonl"):
        assert path.read_bytes() == (tmp_path / "broken" / "pairs" / path.name).read_bytes()


def test_what_is_rewarded_becomes_likelier(train: Train) -> None:
    """About one in seven completions of a random model has an e in it; those score 1."""
    flags = {"iterative_dpo.prompts_per_round": 32, "iterative_dpo.minibatches": 4, "train.epochs": 9}
    flags |= {"rewards.sources": '{"regex?pattern=e": 1.0}', "schedule.name": "constant", "dpo.beta": 0.05}
    records = train("iterative-dpo", **FULL, **flags, train__max_steps=24, optim__lr=3e-3)
    rewards = [record["reward"] for record in records[::4]]
    assert rewards[-1] > rewards[0] + 0.2, rewards


def test_candidates_the_best_of_them_and_a_model_that_learnt_those(train: Train, tmp_path: Path) -> None:
    """All by hand from candidates.jsonl: 48 prompts, 4 completions each."""
    records = train("rejection-sampling", **LORA, optim__lr=1e-2)
    candidates = lines_of(tmp_path / "run" / "candidates.jsonl")
    groups = [candidates[first : first + 4] for first in range(0, len(candidates), 4)]
    assert len(groups) == 48
    assert all(len({one["prompt_id"] for one in group}) == 1 for group in groups)
    best = [max(group, key=lambda one: one["reward"]) for group in groups]
    learnt = lines_of(tmp_path / "run" / "sft.jsonl")
    assert [row["messages"] for row in learnt] == [
        [*one["prompt"], {"role": "assistant", "content": one["completion"]}] for one in best
    ]
    summary = json.loads((tmp_path / "run" / "best_of.json").read_text())
    assert [one["n"] for one in summary["curve"]] == [1, 2, 4]
    assert summary["curve"][0]["reward"] == pytest.approx(sum(one["reward"] for one in candidates) / 192)
    assert summary["curve"][-1]["reward"] == pytest.approx(sum(one["reward"] for one in best) / 48)
    assert "upper bound" in summary["note"]
    assert (tmp_path / "run" / "best_of.png").read_bytes().startswith(b"\x89PNG")
    assert records[-1]["loss"] < records[0]["loss"]
    assert load_model(open_model(str(tmp_path / "run"))) is not None


def test_sampling_goes_on_after_the_last_whole_batch(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off within the third batch of twelve, and, in two goes, before training: candidates and model are those of
    the unbroken run, to the bit."""
    flags = LORA | {"checkpoint.resume": "auto"}
    unbroken = train("rejection-sampling", "unbroken", **flags)
    whole, batches = CandidateFile.add, []

    def breaks_off(file: CandidateFile, scored: Any) -> None:
        batches.append(scored)
        whole(file, scored)
        if len(batches) == 3:
            file.path.write_bytes(file.path.read_bytes()[:-50])
            raise KeyboardInterrupt

    monkeypatch.setattr(CandidateFile, "add", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        train("rejection-sampling", "broken", **flags)
    assert len(batches) == 3
    train("rejection-sampling", "broken", **flags, rejection_sampling__only_sample="true")
    assert len(batches) == 3 + 10
    assert not (tmp_path / "broken" / "final").exists()
    broken = train("rejection-sampling", "broken", **flags)
    assert len(batches) == 3 + 10
    assert [one["loss"] for one in broken] == [one["loss"] for one in unbroken]
    for name in ("candidates.jsonl", "sft.jsonl", "best_of.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "unbroken" / name).read_bytes()
    assert weights_of(tmp_path / "broken" / "final") == weights_of(tmp_path / "unbroken" / "final")


def test_candidates_of_another_run_are_not_taken(train: Train) -> None:
    """Neither without asking nor with another temperature; what is chosen of them may change."""
    only = LORA | {"rejection_sampling.only_sample": "true", "rejection_sampling.prompts_per_batch": 48}
    train("rejection-sampling", **only)
    with pytest.raises(InputError, match=r"holds candidates already: continue with --checkpoint\.resume auto"):
        train("rejection-sampling", **only)
    with pytest.raises(InputError, match=r"made with other rejection_sampling\.temperature \(1\.0, now 0\.5\)"):
        train("rejection-sampling", **only, rejection_sampling__temperature=0.5, checkpoint__resume="auto")
    train("rejection-sampling", **only, rejection_sampling__keep=2, checkpoint__resume="auto", adapter__alpha=8)
    with pytest.raises(InputError, match=r"0 of 192 completions are learnt.*192 below min_score.*lower min_score"):
        train("rejection-sampling", **only, rejection_sampling__min_score=7, checkpoint__resume="auto")


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("iterative-dpo", "at most 4, in 2 rounds of up to 2: in a round 6 prompts get 4 completions each"),
        ("rejection-sampling", "48 prompts, 4 completions each, 192 in all, of up to 6 tokens"),
    ],
)
def test_a_dry_run_counts_and_writes_nothing(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str, words: str
) -> None:
    train(verb, **LORA, dry_run=True)
    assert words in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("iterative-dpo", {"rewards.sources": "{}"}, "rewards.sources: missing"),
        ("iterative-dpo", {"dpo.reference": "copy"}, "dpo.reference: copy: rounds have their own: remove it"),
        ("iterative-dpo", {"dpo.loss": "kto"}, "dpo.loss: kto: rounds make pairs"),
        (
            "iterative-dpo",
            {"iterative_dpo.gold_margin": 1},
            "iterative_dpo.gold_margin: 1.0: does nothing without gold",
        ),
        ("iterative-dpo", {"iterative_dpo.soft_labels": "true", "dpo.loss": "ipo"}, "ipo learns no probabilities: use"),
        ("iterative-dpo", {"dpo.loss": "cdpo"}, "dpo.label_smoothing: 0: cdpo needs it above 0"),
        ("iterative-dpo", {"iterative_dpo.completions_per_prompt": 1}, "a pair has two: give 2 or more"),
        ("iterative-dpo", {"iterative_dpo.online": "true"}, "iterative_dpo.minibatches: 2: online makes a round one"),
        ("iterative-dpo", {"iterative_dpo.minibatches": 7}, "a round has at most 6 pairs"),
        ("iterative-dpo", {"iterative_dpo.judge": "function:a:b"}, "iterative_dpo.judge compares instead"),
        ("iterative-dpo", {"iterative_dpo.judge": "numeric"}, "what scores completions goes into rewards.sources"),
        ("iterative-dpo", {"iterative_dpo.gold": "nothing"}, "iterative_dpo.gold: nothing: no row has a text there"),
        ("iterative-dpo", {"iterative_dpo.soft_limit": 6}, "soft_limit: 6: must be less than max_new_tokens 6"),
        ("iterative-dpo", {"train.global_batch_size": 4}, "a step takes the pairs of iterative_dpo.prompts_per_round"),
        (
            "iterative-dpo",
            {"rewards.sources": '{"regex?pattern=zzzzzz": 1}', "iterative_dpo.prompts_per_round": 4},
            "nothing to learn in 10 rollouts of 4 prompts each, one after the other (0 pairs from 4 prompts (4 tied))",
        ),
        ("rejection-sampling", {"rewards.sources": "{}"}, "rewards.sources: missing"),
        ("rejection-sampling", {"rewards.sources": "{exat: 1}"}, "exat: no such source"),
        ("rejection-sampling", {"rewards.scale": "running"}, "the best completion is the same at any scale"),
        ("rejection-sampling", {"rejection_sampling.keep": 5}, "a prompt has completions_per_prompt 4: at most that"),
    ],
)
def test_mistakes_are_told_at_once(train: Train, verb: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as told:
        train(verb, **LORA, **flags)
    assert words in str(told.value)

"""`litrecipe align ppo`, `grpo` and `rloo` from recipe to final model, on the tiny model with rules for rewards."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from litrecipe.checkpoint.load import load_model, load_reward_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.online import GrpoRecipe, PpoRecipe, RlooRecipe
from litrecipe.data.samples import SampleSet
from litrecipe.engine.rundir import read_records
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.recipes import grpo, ppo

FULL = {"adapter.method": "none"}
LORA = {"adapter.r": 4}
LAYOUTS: dict[str, dict[str, Any]] = {
    "separate": {**FULL, "ppo.layout": "separate", "ppo.value_lr": 1e-3},
    "lora": LORA,
    "dora": {**LORA, "adapter.method": "dora"},
    "joined": {**LORA, "ppo.layout": "joined"},
    "joined-full": {**FULL, "ppo.layout": "joined"},
}
KINDS = {"ppo": (PpoRecipe, ppo), "grpo": (GrpoRecipe, grpo), "rloo": (RlooRecipe, grpo)}
Train = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path) -> Train:
    """Run it; returns the records of its steps."""

    def run(verb: str, out: str = "run", **flags: object) -> list[dict[str, Any]]:
        kind, recipe = KINDS[verb]
        given = {
            "model.source": tiny_model,
            "data.train": "toy:units?n=64&seed=0",
            "rewards.sources": '{"regex?pattern=[aeiou]": 1.0}',
            f"{verb}.rollout_batch_size": 8,
            f"{verb}.max_new_tokens": 6,
            "train.micro_batch_tokens": 400,
            "train.max_steps": 4,
            "optim.lr": 1e-3,
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / out,
        } | {key.replace("__", "."): value for key, value in flags.items()}
        assert recipe.main(schema.load(kind, [], [(key, str(value)) for key, value in given.items()])) == 0
        return [record for record in read_records(tmp_path / out / "metrics.jsonl") if "grad_norm" in record]

    return run


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_ppo_starts_at_ratio_1_and_leaves_policy_and_critic(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """Both are models that anybody loads; the critic's scores are what it said of the last tokens."""
    records = train("ppo", **LAYOUTS[layout])
    said = capsys.readouterr().err
    assert "start: the policy says of its completions what it said when it sampled them" in said
    assert records[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert records[0]["policy/approxkl"] < 1e-10
    assert records[3]["policy/approxkl"] > 0
    assert records[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert {"reward", "value/explained_variance", "objective/entropy", "completions/mean_length"} <= records[0].keys()
    assert load_model(open_model(str(tmp_path / "run" / "final"))) is not None
    critic = load_reward_model(open_model(str(tmp_path / "run" / "final" / "critic")))
    assert critic.score.weight.abs().max() > 0
    apart = "grad_norm/critic" in records[0]
    assert apart != layout.startswith("joined")


def test_lora_shares_its_base_between_policy_critic_and_reference(train: Train, tmp_path: Path) -> None:
    """What is trained and saved are two adapters and a score: the base is in no checkpoint."""
    train("ppo", **LORA)
    [checkpoint] = (tmp_path / "run" / "checkpoints").iterdir()
    from safetensors import safe_open

    with safe_open(str(checkpoint / "weights-00000.safetensors"), "pt") as file:
        names = set(file.keys())
    assert {name.partition(".")[0] for name in names} == {"policy", "critic"}
    assert "critic.score.weight" in names
    assert all("lora_" in name for name in names - {"critic.score.weight"})


def test_the_critic_warms_up_alone(train: Train, tmp_path: Path) -> None:
    """For two of three steps the policy stays as it was, to the bit; the critic learns."""
    records = train("ppo", **FULL, ppo__layout="separate", ppo__critic_warmup=4)
    assert [record["grad_norm/policy"] for record in records] == [0.0] * 4
    assert all(record["grad_norm/critic"] > 0 for record in records)
    assert all(record["policy/approxkl"] < 1e-10 for record in records)
    again = train("ppo", "after", **FULL, ppo__layout="separate", ppo__critic_warmup=2)
    assert [record["grad_norm/policy"] > 0 for record in again] == [False, False, True, True]


def test_the_critic_has_a_schedule_of_its_own(train: Train) -> None:
    """Four steps: the policy's rate falls evenly from 1e-3, the critic's warms up and stays."""
    schedules = {"schedule.name": "linear", "ppo.value_schedule": "constant", "ppo.value_warmup_steps": 1}
    records = train("ppo", **FULL, **schedules, ppo__layout="separate", ppo__value_lr=1e-2)
    assert [record["lr"] for record in records] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert [record["lr/policy"] for record in records] == [record["lr"] for record in records]
    assert [record["lr/critic"] for record in records] == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2])


def test_a_minibatch_that_is_too_far_off_is_passed_over(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """A rate at which a rollout's second pass finds ratios far from 1: from there on nothing moves, so nothing changes
    until the next rollout."""
    flags = {"optim.lr": 0.1, "schedule.name": "constant", "grpo.epochs": 4, "grpo.max_ratio": 1.05}
    records = train("grpo", **FULL, **flags, train__max_steps=8, train__seed=1)
    ratios, skipped = ([record[f"policy/{name}"] for record in records] for name in ("ratio", "skipped"))
    assert skipped == [float(ratio > 1.05) for ratio in ratios]
    assert skipped[0] == skipped[4] == 0 and sum(skipped) > 0
    for place in range(7):
        if skipped[place] and place != 3:
            assert ratios[place + 1] == pytest.approx(ratios[place], rel=1e-6)
    assert "on average, above grpo.max_ratio 1.05: not learnt" in capsys.readouterr().err


ENGINES = """
import copy

import torch

from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.rollout.sampler import OwnSampler


class Noisy:
    # Samples from the policy in other weights, and says how likely it found each token.

    def __init__(self, policy, tokenizer, noise):
        self.policy, self.tokenizer, self.noise = policy, tokenizer, noise

    @torch.no_grad()
    def __call__(self, prompts, settings, completions, streams, progress):
        twin = copy.deepcopy(self.policy)
        generator = torch.Generator().manual_seed(1)
        for parameter in twin.parameters():
            parameter += self.noise * torch.randn(parameter.shape, generator=generator)
        found = OwnSampler(twin, self.tokenizer, 8192)(prompts, settings, completions, streams, progress)
        logps = []
        for prompt, tokens in zip(found.prompts, found.tokens):
            root = Segment(prompt.tokens, [0.0] * len(prompt.tokens))
            row = make_row([Sample("", (root, Segment(torch.tensor(tokens).numpy(), [1.0] * len(tokens), 0)))])
            logps.append(twin(row, settings.temperature or 1.0).logps.tolist())
        return type(found)(found.prompts, found.texts, found.tokens, found.ended, logps)


def same(policy, tokenizer):
    return Noisy(policy, tokenizer, 0.0)


def noisy(policy, tokenizer):
    return Noisy(policy, tokenizer, 0.02)


def mute(policy, tokenizer):
    return OwnSampler(policy, tokenizer, 100)


def short(policy, tokenizer):
    def sampler(*given):
        found = OwnSampler(policy, tokenizer, 100)(*given)
        return type(found)(found.prompts, found.texts[:-1], found.tokens, found.ended)
    return sampler


def empty(policy, tokenizer):
    def sampler(*given):
        found = OwnSampler(policy, tokenizer, 100)(*given)
        return type(found)(found.prompts, found.texts, [[] for _ in found.tokens], found.ended)
    return sampler
"""


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engines.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "engines", raising=False)


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize("verb", ["ppo", "grpo"])
def test_another_engine_may_sample(train: Train, tmp_path: Path, verb: str) -> None:
    """One that is the policy itself changes nothing but what is told of it. Of one with other weights the samples bring
    min(π / π_engine, 1.2), not all 1, and the ratio of new to old policy still starts at 1."""
    flags = {"data.val": "toy:units?n=3&seed=0&split=test", "train.max_steps": 2, "train.epochs": 9}
    if verb == "grpo":
        flags["grpo.completions_per_prompt"] = 4
    own = train(verb, "own", **LORA, **flags)
    same = train(verb, "same", **LORA, **flags, **{f"{verb}.sampler": "function:engines:same"})
    assert [one["loss"] for one in same] == pytest.approx([one["loss"] for one in own], rel=1e-3, abs=1e-5)
    assert same[0]["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert not any("sampling/" in name for name in own[0])
    other = {f"{verb}.sampler": "function:engines:noisy", f"{verb}.importance_cap": 1.2}
    noisy = train(verb, "noisy", **LORA, **flags, **other)
    assert noisy[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert noisy[0]["sampling/importance_sampling_ratio/max"] == pytest.approx(1.2)
    assert noisy[0]["sampling/importance_sampling_ratio/min"] < 0.95
    assert noisy[0]["sampling/sampling_logp_difference/max"] > 0.1
    assert train(verb, "mute", **LORA, **flags, **{f"{verb}.sampler": "function:engines:mute"}) is not None


@pytest.mark.usefixtures("engines")
@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("function:engines:short", "grpo.sampler: function:engines:short: returned 7 / 8 / 8 of 8 completions: give"),
        ("function:engines:empty", "a completion of 0 tokens: give 1 to 6"),
        ("function:engines:absent", "grpo.sampler: function:engines:absent: absent: not in engines"),
        ("engines", "grpo.sampler: engines: give function:MODULE:NAME"),
    ],
)
def test_an_engine_is_held_to_its_promises(train: Train, spec: str, words: str) -> None:
    with pytest.raises(InputError) as told:
        train("grpo", **LORA, grpo__sampler=spec)
    assert words in str(told.value)


def test_a_critic_of_normalised_returns_is_saved_in_units_of_the_score(train: Train, tmp_path: Path) -> None:
    """Rewards of 100 or 110. After a while it foresees them, and so does what is saved, which knows nothing of the run;
    within the run values have mean 0 and spread 1."""
    sources = {"rewards.sources": '{"regex?pattern=[aeiou]": 10, "length?max=100": 100}'}
    flags = {"ppo.layout": "separate", "ppo.normalise_values": "true", "ppo.value_lr": 1e-2, "ppo.kl_coef": 0.0}
    records = train("ppo", **FULL, **sources, **flags, train__max_steps=32, train__epochs=9)
    assert abs(records[-1]["value/mean"]) < 1.5
    first = json.loads((tmp_path / "run" / "rollouts" / "000008.jsonl").read_text().splitlines()[0])
    assert 99 < first["reward"] < 111
    state = json.loads((max((tmp_path / "run" / "checkpoints").iterdir()) / "state.json").read_text())
    returns = state["source"]["scoring"]["returns"]
    assert 100 < returns["mean"] < 110
    critic = load_reward_model(open_model(str(tmp_path / "run" / "final" / "critic")))
    samples = SampleSet(tmp_path / "run" / "rollouts" / "000008.samples")
    row = make_row([samples[0]])
    with torch.no_grad():
        values = critic.normalised(critic.read(row, row.predict_from))
    assert values.tolist() == pytest.approx([105.0] * len(values), abs=8)


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("grpo", {}),
        ("grpo", {"grpo.kl_coef": 0.1}),
        ("grpo", {"grpo.advantage": "centered", "grpo.aggregate": "constant", "grpo.ratio": "sequence_mean"}),
        ("grpo", {"grpo.advantage": "batch", "grpo.loss": "cispo", "grpo.kl_in": "reward", "grpo.kl_estimator": "k1"}),
        ("grpo", {"grpo.entropy_coef": 0.01, "grpo.clip_high": 0.28, "grpo.dual_clip": 3}),
        ("grpo", {"grpo.zero_variance": "resample", "grpo.soft_limit": 2}),
        ("rloo", {"rloo.ref_ema": 0.5}),
        ("rloo", {"rloo.loss": "mirror", "rloo.ratio": "token", "rloo.epochs": 2}),
    ],
)
def test_groups_without_a_critic(train: Train, tmp_path: Path, verb: str, flags: dict[str, Any]) -> None:
    records = train(verb, **LORA, **{f"{verb}.completions_per_prompt": 4}, **flags)
    assert len(records) == 4
    assert records[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert all(0 <= record["frac_reward_zero_std"] <= 1 for record in records)
    assert ("kl" in records[0]) == (verb == "rloo" or "grpo.kl_coef" in flags)


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("ppo", {"ppo.layout": "separate", "ppo.kl_coef": 0, "train.max_steps": 80}),
        ("grpo", {"train.max_steps": 24}),
        ("rloo", {"rloo.kl_coef": 0, "train.max_steps": 24}),
    ],
)
def test_what_is_rewarded_becomes_likelier(train: Train, verb: str, flags: dict[str, Any]) -> None:
    """About one in seven completions of a random model has an e in it; those score 1."""
    common = {f"{verb}.rollout_batch_size": 64, "train.epochs": 99, "rewards.sources": '{"regex?pattern=e": 1.0}'}
    records = train(verb, **FULL, **common, **{"optim.lr": 3e-3, "schedule.name": "constant"}, **flags)
    rewards = [record["reward"] for record in records]
    assert sum(rewards[-8:]) / 8 > sum(rewards[:4]) / 4 + 0.2, rewards


def test_a_held_out_prompt_is_answered_before_the_first_step_and_on_the_way(train: Train, tmp_path: Path) -> None:
    """Greedily and sampled; and what the run learns is the same with and without."""
    flags = {"data.val": "toy:units?n=5&seed=0&split=test", "eval.every": 2, "eval.samples": 4, "eval.success": 1}
    told = train("grpo", **LORA, **flags, grpo__completions_per_prompt=4)
    evaluated = [one for one in read_records(tmp_path / "run" / "metrics.jsonl") if "eval_reward" in one]
    assert [one["step"] for one in evaluated] == [0, 2, 4]
    assert evaluated[0].keys() >= {"eval_success", "eval_sampled/reward", "eval_pass@1", "eval_pass@2", "eval_pass@4"}
    for one in evaluated:
        assert one["eval_pass@1"] <= one["eval_pass@2"] <= one["eval_pass@4"]
        assert one["eval_pass@1"] == pytest.approx(one["eval_sampled/success"])
    without = train("grpo", "without", **LORA, grpo__completions_per_prompt=4)
    assert [one["loss"] for one in told] == [one["loss"] for one in without]


def test_a_judge_of_held_out_answers_chooses_the_best_policy(train: Train, tmp_path: Path) -> None:
    """It hates what is rewarded: the best policy is that of the lowest reward. What each source says is told too."""
    sources = {"rewards.sources": '{"length?target=9&unit=characters": 1.0, "length?max=9": 0.5}'}
    val = {"data.val": "toy:units?n=9&seed=0&split=test", "eval.every": 3, "eval.samples": 4, "train.epochs": 9}
    judge = {"eval.sources": '{"length?target=9&unit=characters": -1.0}', "grpo.completions_per_prompt": 4}
    train("grpo", **FULL, **sources, **val, **judge, optim__lr=0.3, train__max_steps=6)
    evaluated = [one for one in read_records(tmp_path / "run" / "metrics.jsonl") if "eval_reward" in one]
    characters = "length?target=9&unit=characters"
    for one in evaluated:
        assert one["eval_judge/reward"] == pytest.approx(-one[f"eval_rewards/{characters}"])
        assert one[f"eval_judge/{characters}"] == pytest.approx(one[f"eval_rewards/{characters}"])
        assert one["eval_reward"] == pytest.approx(one[f"eval_rewards/{characters}"] + 0.5)
        assert one["eval_sampled/judge/reward"] == pytest.approx(-one[f"eval_sampled/rewards/{characters}"])
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    highest = max(one["eval_judge/reward"] for one in evaluated)
    assert best["eval_judge/reward"] == highest
    assert best["step"] == next(one["step"] for one in evaluated if one["eval_judge/reward"] == highest)
    assert len({one["eval_reward"] for one in evaluated}) > 1


def test_the_ratio_is_looked_at_wherever_a_run_goes_on(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    """At the first minibatch of the first new rollout."""
    flags = {"checkpoint.resume": "auto", "grpo.epochs": 2, "grpo.completions_per_prompt": 4}
    train("grpo", **LORA, **flags, train__max_steps=3)
    assert capsys.readouterr().err.count("start: the policy says of its completions what it said") == 1
    train("grpo", **LORA, **flags, train__max_steps=6)
    assert capsys.readouterr().err.count("start: the policy says of its completions what it said") == 1


def test_an_adapter_that_was_trained_before_is_held_to_itself(train: Train, tmp_path: Path) -> None:
    """Not to its base, which it never was: at the start the KL is 0."""
    train("grpo", "first", **LORA, optim__lr=1e-2, grpo__completions_per_prompt=4)
    second = train("ppo", "second", **FULL, **{"model.source": tmp_path / "first" / "final"})
    assert second[0]["kl"] == pytest.approx(0, abs=1e-5)


def test_a_reward_model_is_a_source(train: Train, tmp_path: Path, tiny_model: Path) -> None:
    """Its score of a completion, with the end of the turn behind it, is what a rollout's record says."""
    from litrecipe.config.groups import RewardRecipe
    from litrecipe.recipes import reward

    flags = {
        "model.source": tiny_model,
        "data.train": "toy:units-pairs?n=8&seed=0",
        "data.cache_dir": tmp_path / "cache",
        "train.max_steps": 1,
        "log.loggers": [],
        "fabric.accelerator": "cpu",
        "out_dir": tmp_path / "judge",
    }
    assert reward.main(schema.load(RewardRecipe, [], [(key, str(value)) for key, value in flags.items()])) == 0
    train("ppo", **LORA, **{"rewards.sources": f'{{"model:{tmp_path / "judge"}": 1.0}}'})
    lines = (tmp_path / "run" / "rollouts" / "000001.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    judge = load_reward_model(open_model(str(tmp_path / "judge" / "final")))
    from litrecipe.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tiny_model)
    for record in records[:3]:
        saved = record["completion"]
        ids = [*tokenizer.encode_prompt(record["prompt"]), *tokenizer.encode(saved)]
        ids += tokenizer.encode("<|im_end|>\n", specials=True)
        weights = torch.zeros(len(ids))
        weights[-1] = 1
        row = make_row([Sample("", (Segment(torch.tensor(ids).numpy(), weights.numpy()),))])
        if "\ufffd" not in saved and record["stop"] == "length":
            assert record["reward"] == pytest.approx(float(judge.normalised(judge(row))[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("verb", "flags", "words"),
    [
        ("ppo", {"rewards.sources": "{}"}, "rewards.sources: missing"),
        ("ppo", {"ppo.top_k": 5}, "ppo.top_k: 5: cuts off what the log-probabilities know of"),
        ("ppo", {"ppo.layout": "separate"}, "adapter.method: lora: ppo.layout separate trains all weights"),
        ("ppo", {"train.global_batch_size": 4}, "a step takes ppo.rollout_batch_size / ppo.minibatches completions"),
        ("ppo", {"ppo.rollout_batch_size": 9, "ppo.completions_per_prompt": 2}, "must be divisible by"),
        ("grpo", {"grpo.completions_per_prompt": 1}, "grpo.completions_per_prompt: 1: a completion by itself"),
        ("grpo", {"rewards.sources": '{"exact?column=nothing": 1}'}, "nothing: no row has this column"),
        ("ppo", {"ppo.layout": "joined", "ppo.critic_warmup": 2}, "ppo.critic_warmup: 2: a joined critic is a head on"),
        ("ppo", {"ppo.truncated": "mask"}, "all completions were cut at ppo.max_new_tokens 6, none is learnt"),
        (
            "ppo",
            {"train.micro_batch_tokens": 40},
            "up to 6 more with a completion: raise it, or leave out long",
        ),
        ("rloo", {"rloo.max_pass_rate": 0.9}, "rloo.max_pass_rate: 0.9: needs the score that is a pass: set eval.succ"),
        ("grpo", {"grpo.min_pass_rate": 0.9, "grpo.max_pass_rate": 0.1, "eval.success": 1}, "must be at most max_pass"),
        ("grpo", {"eval.sources": "{exact: 1}"}, "eval.sources: exact: judge held-out answers: give data.val"),
        (
            "grpo",
            {"eval.sources": '{"exact?column=no": 1}', "data.val": "toy:units?n=2&seed=0&split=test"},
            "eval.sources: exact?column=no: no: no row has this column",
        ),
        ("ppo", {"ppo.kl_in": "loss"}, "ppo.kl_estimator: k1: on its own samples k1 teaches a policy nothing"),
        (
            "grpo",
            {"grpo.max_pass_rate": 0.9, "eval.success": 1, "rewards.scale": "running"},
            "rewards.scale: running: makes eval.success another score in each rollout",
        ),
        ("grpo", {"grpo.importance_cap": 3}, "grpo.importance_cap: 3.0: does nothing without sampler"),
        ("ppo", {"optim.adam_style": "tf", "optim.name": "sgd"}, "optim.adam_style: tf: sgd has no epsilon"),
    ],
)
def test_mistakes_are_told_at_once(train: Train, verb: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as told:
        train(verb, **flags)
    assert words in str(told.value)


def test_plain_text_is_learnt_along(train: Train, tmp_path: Path) -> None:
    """As many conversations a step as completions; the policy's own part of the loss is what it is without."""
    flags = {**LORA, "data.cache_dir": tmp_path / "cache"}
    alone = train("grpo", "alone", **flags)
    ptx = {"grpo.ptx_coef": 0.5, "grpo.ptx_data": "toy:fields?n=6&seed=0"}
    beside = train("grpo", **flags, **ptx, **{"train.micro_batch_tokens": 2000})
    assert beside[0]["tokens"] > alone[0]["tokens"]
    assert beside[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert beside[0]["loss"] - alone[0]["loss"] > 1  # half of the 5.8 nats a token that a random model needs
    assert beside[-1]["loss"] < beside[0]["loss"]


def test_the_mean_of_the_policy_and_the_best_policy_are_saved(train: Train, tmp_path: Path) -> None:
    """With decay 0 the mean is the policy itself; with .5 it lies between the last two policies and more."""
    val = {"data.val": "toy:units?n=5&seed=0&split=test", "eval.every": 1}
    train("grpo", **FULL, **val, grpo__policy_ema=0.0, optim__lr=1e-2)
    final, mean = (load_model(open_model(str(tmp_path / "run" / "final" / name))) for name in ("", "ema"))
    assert all(torch.equal(a, b) for a, b in zip(final.parameters(), mean.parameters(), strict=True))
    evaluated = [one for one in read_records(tmp_path / "run" / "metrics.jsonl") if "eval_reward" in one]
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    highest = max(one["eval_reward"] for one in evaluated)
    assert best["eval_reward"] == highest
    assert best["step"] == next(one["step"] for one in evaluated if one["eval_reward"] == highest)
    load_model(open_model(str(tmp_path / "run" / "best")))
    train("grpo", "slow", **FULL, grpo__policy_ema=0.5, optim__lr=1e-2)
    slow = load_model(open_model(str(tmp_path / "slow" / "final" / "ema")))
    assert not all(torch.equal(a, b) for a, b in zip(final.parameters(), slow.parameters(), strict=True))


def test_tasks_behind_held_out_prompts_are_measured_at_rest(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling leaves an evaluation as it found it: with nothing dropped out."""
    from litrecipe.recipes import examination

    modes = []

    def told(policy: torch.nn.Module, *_: object) -> Callable[[], dict[str, float]]:
        return lambda: modes.append(policy.training) or {}  # type: ignore[func-returns-value]

    monkeypatch.setattr(examination, "task_runner", told)
    train("grpo", **LORA, **{"data.val": "toy:units?n=3&seed=0&split=test", "train.max_steps": 1})
    assert modes == [False]

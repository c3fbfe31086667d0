"""What must not go wrong after minutes of measuring."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_a_result_is_written_without_git_and_without_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(BENCHMARKS / "common.py", tmp_path / "benchmarks")
    common = load(tmp_path / "benchmarks" / "common.py", monkeypatch)
    assert common.MACHINE["commit"] is None and common.MACHINE["uncommitted_changes"] is None
    monkeypatch.setattr(common, "PACKAGES", ("torch", "no-such-package"))
    versions = common.machine()["versions"]
    assert versions["torch"] and versions["no-such-package"] is None
    assert common.write_result("none", {}).is_file()


def test_a_part_that_is_run_again_leaves_the_others_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common = load(BENCHMARKS / "common.py", monkeypatch)
    monkeypatch.setattr(common, "REPO", tmp_path)
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    for part, made in (("second", 2), ("gone", 0), ("first", 1), ("second", 3)):
        path = common.write_part("some", part, made, ["first", "second"])
    found = json.loads(path.read_text())
    assert [(name, found[name]) for name in found if name in ("first", "second", "gone")] == [
        ("first", 1),
        ("second", 3),
    ]


def test_a_checkout_is_named_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (BENCHMARKS.parent / ".git").exists():
        pytest.skip("no history here")
    head = ["git", "-C", str(BENCHMARKS), "rev-parse", "HEAD"]
    commit = load(BENCHMARKS / "common.py", monkeypatch).machine()["commit"]
    assert subprocess.run(head, capture_output=True, text=True).stdout.startswith(commit)


@pytest.mark.parametrize(
    ("device", "flops"),
    [("NVIDIA L4", 121e12), ("NVIDIA L40", None), ("NVIDIA L40S", 362e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_a_gpu_is_known_by_its_whole_name(device: str, flops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_check = load(BENCHMARKS / "gpu_check.py", monkeypatch)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    assert gpu_check.peak_flops(SimpleNamespace(accelerator="cuda")) == flops


def test_one_broken_check_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_check = load(BENCHMARKS / "gpu_check.py", monkeypatch)
    checks = {"first": lambda _: {}["missing"], "second": lambda _: {"ok": True}}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--accelerator", "cpu"])
    with pytest.raises(SystemExit, match=r"failed: first$"):
        gpu_check.main()
    assert "second: ok" in capsys.readouterr().out


def run(seconds: float, memory: int, losses: list[float]) -> dict:
    return {"train_seconds": seconds, "wall_seconds": seconds + 5, "peak_rss_mib": memory, "losses": losses}


def test_goals_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    common = load(BENCHMARKS / "common.py", monkeypatch)
    runs = {
        "litrecipe": [run(10, 100, [0.5, 0.4]), run(12, 120, [0.5, 0.4]), run(11, 110, [0.5, 0.4])],
        "slow": [run(44, 220, [0.5, 0.40002])],
        "close": [run(33, 99, [0.5, 0.44])],
    }
    summary = common.compare(runs)
    assert summary["litrecipe"] == {"train_seconds": 11, "wall_seconds": 16, "peak_rss_mib": 110}
    assert summary["slow"]["times_our_seconds"] == 4 and summary["slow"]["times_our_memory"] == 2
    assert summary["slow"]["largest_relative_loss_difference"] == pytest.approx(0.00002 / 0.40002, abs=1e-7)
    goals = common.Goals(faster=3.5, larger=1.0, apart=1e-4)
    assert goals.missed("slow", summary["slow"]) == []
    assert goals.missed("close", summary["close"]) == [
        "close: 3.0 times our seconds, the goal is 3.5",
        "close: 0.9 times our memory, the goal is 1.0",
        "close: losses 0.091 apart, the goal is 0.0001",
    ]


def test_losses_of_another_job_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    common = load(BENCHMARKS / "common.py", monkeypatch)
    with pytest.raises(ValueError, match="zip"):
        common.compare({"litrecipe": [run(1, 1, [0.5])], "other": [run(1, 1, [0.5, 0.4])]})


def test_seconds_of_steps_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    common = load(BENCHMARKS / "common.py", monkeypatch)
    steps = [{"tokens": 100, "tokens_per_second": 50.0}, {"tokens": 400, "tokens_per_second": 100.0}]
    assert common.step_seconds(steps) == 5


def test_seconds_of_the_reference_are_found_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from litrecipe.data.cache import alone

    dpo = load(BENCHMARKS / "dpo.py", monkeypatch)
    assert dpo.reference_seconds(tmp_path) == 0
    entry = tmp_path / "reference" / "0f"
    with alone(entry):
        entry.mkdir()
        (entry / "complete.json").touch()
    (lock,) = set(entry.parent.iterdir()) - {entry}
    os.utime(lock, (1000, 1000))
    os.utime(entry / "complete.json", (1012.5, 1012.5))
    assert dpo.reference_seconds(tmp_path) == 12.5


def test_long_pairs_differ_in_their_prompts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    dpo = load(BENCHMARKS / "dpo.py", monkeypatch)
    texts = {"chosen": "good", "rejected": "bad"}
    rows = [
        {name: [{"role": "assistant", "content": f"{word} {n}"}] for name, word in texts.items()} for n in range(600)
    ]
    shorter, longer = (dpo.long_pairs(rows, words) for words in (48, 236))
    assert len(shorter) == len(longer) == dpo.LONG_PAIRS
    for short, long in zip(shorter, longer, strict=True):
        assert len(short["prompt"].split()) == 48 and len(long["prompt"].split()) == 236
        assert long["prompt"].startswith(short["prompt"] + " ")
        assert short["chosen"] == long["chosen"] != short["rejected"] == long["rejected"]
    assert len({pair["prompt"] for pair in shorter}) == dpo.LONG_PAIRS


@pytest.mark.parametrize("verb", ["finetune", "align dpo"])
def test_a_peer_gets_our_tokens_in_our_order(
    verb: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = load(BENCHMARKS / "peers" / "rows.py", monkeypatch)
    written = [
        {"prompt": f"say {n}", "completion": f"said {n}"}
        if verb == "finetune"
        else {"prompt": f"say {n}", "chosen": f"said {n}", "rejected": f"did not say {n}"}
        for n in range(5)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in written))
    recipe = {
        "model": {"source": str(tiny_model)},
        "adapter": {"method": "lora", "r": 2},
        "data": {"train": str(data), "cache_dir": str(tmp_path / "cache")},
        "train": {"global_batch_size": 2},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    out, adapter = tmp_path / "out.jsonl", tmp_path / "adapter.safetensors"
    rows.main(verb, str(tmp_path / "recipe.yaml"), str(out), str(adapter))
    found = [json.loads(line) for line in out.read_text().splitlines()]
    tokenizer = rows.Tokenizer.load(tiny_model)
    if verb == "finetune":
        said = [tokenizer.decode([t for t in row["labels"] if t != -100]) for row in found]
        wanted = [row["completion"] for row in written]
    else:
        assert all(row.keys() == {"prompt_ids", "chosen_ids", "rejected_ids"} for row in found)
        said = [tokenizer.decode(row["chosen_ids"]) for row in found]
        wanted = [row["chosen"] for row in written]
    places = [next(n for n, text in enumerate(wanted) if text in line) for line in said]
    assert sorted(places) == list(range(5)) and places != sorted(places)
    assert adapter.stat().st_size


def test_gold_pairs_share_their_first_word_and_differ_in_their_label(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = load(BENCHMARKS / "budget.py", monkeypatch)
    texts = {0: ["it fell apart", "it broke", "never again", "no"], 1: ["it shines", "always good"]}
    rows = [{"text": text, "label": label} for label, some in texts.items() for text in some]
    pairs = budget.gold_pairs(rows, 10)
    assert sorted(pairs, key=lambda pair: pair["rejected"]) == [
        {"prompt": "it", "chosen": " shines", "rejected": " broke"},
        {"prompt": "it", "chosen": " shines", "rejected": " fell apart"},
    ]


def test_prompts_are_whole_tokens_of_longer_sentences(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from litrecipe.data.new_tokenizer import learn_tokenizer

    budget = load(BENCHMARKS / "budget.py", monkeypatch)
    tokenizer = learn_tokenizer(["a b c d e f g h"] * 2, 300)
    prompts = budget.prompts_of(["a b c d e f g h", "a b c d h g f e", "a b c d e f g"], tokenizer)
    assert prompts == ["a b c d"]


def test_labels_are_drawn_with_the_odds_of_the_gold(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = load(BENCHMARKS / "budget.py", monkeypatch)
    asked = [{"role": "user", "content": "so"}]
    one, other = ({"prompt": asked, "completion": text, "reward": r} for text, r in ((" good", 1.0), (" bad", 0.0)))
    pairs, told = budget.label([one, other, other, one] * 5000 + [one, one], spread=2.0, seed=0)
    odds = 1 / (1 + 2.718281828459045**-2)
    chosen = sum(pair == {"prompt": "so", "chosen": " good", "rejected": " bad"} for pair in pairs)
    assert len(pairs) == 10_000 and told["sure"] == pytest.approx(odds)
    assert told["as_the_gold_ranks"] == chosen / 10_000
    assert abs(chosen / 10_000 - odds) < 4 * (odds * (1 - odds) / 10_000) ** 0.5


def test_methods_are_compared_where_they_went_equally_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that pass 4 nats, one of them between two of its policies, and one that never does; rewards have mean 10
    and spread 2 at the start, and the straight line goes along √KL: 4 nats are half way from 1 to 9."""
    import numpy as np

    budget = load(BENCHMARKS / "budget.py", monkeypatch)
    spread = np.tile([-2.0, 2.0], 8)

    def judged(kl: float, gold: float) -> dict:
        told = {"kl": [kl] * 16, "gold": (gold + spread).tolist(), "proxy": (gold + spread).tolist()}
        return told | {"length": [5] * 16, "ended": [True] * 16, "texts": ["a", "b"] * 8}

    start = judged(0.0, 10.0)
    curves = {
        "dpo": {0: start, 8: judged(1.0, 12.0), 16: judged(9.0, 16.0)},
        "iterative-dpo": {0: start, 8: judged(1.0, 13.0)},
        "ppo": {0: start, 8: judged(4.0, 20.0)},
    }
    found = budget.verdict(curves, seed=0)
    assert found["units"]["gold"] == {"mean": 10.0, "spread": 2.0}
    assert found["at_equal_kl"]["4"] == {
        "gold": {"dpo": 2.0, "ppo": 5.0},
        "apart": {"ppo - dpo": {"mean": 3.0, "low": 3.0, "high": 3.0}},
    }
    assert found["at_equal_kl"]["1"]["apart"]["iterative-dpo - dpo"]["mean"] == 0.5
    assert found["at_equal_kl"]["8"] == {"gold": {"dpo": 2.8284}, "apart": {}}  # √8: the line is reward = √KL
    assert found["last"]["wins"]["ppo over dpo"]["mean"] == 1.0
    assert found["curves"]["dpo"][1]["gold"] == 1.0 and found["curves"]["dpo"][1]["different"] == 0.125
    again = budget.over_seeds({"0": found, "1": found})
    assert again["at_equal_kl"]["4"]["ppo - dpo"] == {"seeds": 2, "mean": 3.0, "half": 0.0}


def test_an_interval_is_that_of_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 400 numbers with spread 1 the mean is known to 1.96/20 either way."""
    import numpy as np

    budget = load(BENCHMARKS / "budget.py", monkeypatch)
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 1.0, 400)
    found = budget.interval(values, rng.integers(0, 400, (4000, 400)))
    assert found["mean"] == pytest.approx(values.mean(), abs=1e-4)
    for side, bound in (("low", -1), ("high", 1)):
        assert found[side] - found["mean"] == pytest.approx(bound * 1.96 * values.std() / 20, rel=0.05)


ADDITION = "experiments/addition"


def test_each_rung_of_the_ladder_changes_one_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    from litrecipe.config import schema
    from litrecipe.config.online import PpoRecipe

    ladder = load(BENCHMARKS / "ladder.py", monkeypatch)
    rungs = [schema.load(PpoRecipe, [f"{ADDITION}/{arm}"]) for arm in ladder.ARMS]
    assert [
        {
            name: value
            for name, value in vars(above.ppo).items()
            if value != getattr(below.ppo, name) and above.model == below.model and above.optim == below.optim
        }
        for below, above in itertools.pairwise(rungs)
    ] == [{"normalise_advantages": True}, {"rollout_batch_size": 512}, {"ref_ema": 0.06}]
    last = rungs[-1].ppo
    assert last.ref_ema == pytest.approx(3 / (ladder.EPISODES / last.rollout_batch_size), rel=0.01)
    for rung in rungs:
        assert rung.ppo.completions_per_prompt == ladder.COMPLETIONS_PER_PROMPT
        steps = ladder.EPISODES / rung.ppo.rollout_batch_size * rung.ppo.minibatches * rung.ppo.epochs
        assert steps / (rung.eval.every or 0) == 10, "all are measured after equally many completions"


def test_what_a_rung_told_is_gathered_and_paired_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ladder = load(BENCHMARKS / "ladder.py", monkeypatch)
    small, large = "ppo-small-batch", "ppo-large-batch"

    def ran(arm: str, seed: int, curve: list[float]) -> None:
        out = tmp_path / f"{arm}-0.0003-{seed}"
        (out / "final").mkdir(parents=True)
        told = {"kl": 0.5, "kl_coef": 0.2, "policy/ratio_max": 1.5, "loss": 0.0}
        steps = [{"step": step, "reward": step / 10, **told} for step in range(1, 21)]
        measured = [
            {"step": 10 * place, "eval_success": success, "eval_sampled/success": success / 2}
            for place, success in enumerate(curve)
        ]
        (out / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in [*steps, *measured]))

    for seed, ours, theirs in ((0, 0.5, 0.1), (1, 0.7, 0.2)):
        ran(small, seed, [0.3, 0.05, theirs])
        ran(large, seed, [0.3, 0.4, ours])
    ran(large, 2, [0.3, 0.4, 0.9])  # its partner is missing
    found = ladder.compare(ladder.Ladder(tmp_path, may_run=False), {small: 3e-4, large: 3e-4}, range(5))
    run = found["arms"][small]["runs"]["1"]
    assert run["curve"] == [[0, 0.3], [ladder.EPISODES / 2, 0.05], [ladder.EPISODES, 0.2]]
    assert (run["start"], run["final"], run["worst"], run["best"]) == (0.3, 0.2, 0.05, 0.3)
    assert (run["reward_gained"], run["beta_kl"], run["sampled"]) == (1.9, 0.1, [0.15, 0.025, 0.1])
    assert found["arms"][large]["final"]["seeds"] == 3
    apart = found["paired_by_seed"][f"{large} - {small}"]["final"]
    assert apart["mean"] == pytest.approx((0.4 + 0.5) / 2)
    assert apart["half"] == pytest.approx(12.706 * 0.1 / 2, abs=1e-4)  # |0.5 - 0.4| / √2 is the spread, / √2 again


@pytest.mark.slow
def test_the_ladder_runs_and_does_not_run_again(tmp_path: Path) -> None:
    """Its process of its own: it forks."""
    code = """
import sys, pathlib
import ladder
ladder.EPISODES, ladder.ARMS = 1024, {"ppo-ref-ema": ""}
work = ladder.Ladder(pathlib.Path(sys.argv[1]), may_run=True)
ladder.cli()
told = [ladder.compare(work, {"ppo-ref-ema": 3e-4}, [0]) for _ in range(2)]
assert told[0] == told[1], told
[run] = told[0]["arms"]["ppo-ref-ema"]["runs"].values()
assert run["steps"] == 4 and 0.1 < run["start"] < 0.3, run
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd=BENCHMARKS, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["sft", "ppo-ref-ema-0.0003-0"]


def test_comparisons_of_the_bandit_are_right_and_leave_answers_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bandit = load(BENCHMARKS / "bandit.py", monkeypatch)
    bandits, n = bandit.Bandits(3), bandit.ANSWERS
    for seed in range(3):
        covered = set()
        for better, worse, counts in zip(
            bandits.better[seed].tolist(), bandits.worse[seed].tolist(), bandits.counts[seed].tolist(), strict=True
        ):
            (prompt, good), (same, bad) = divmod(better, n), divmod(worse, n)
            assert prompt == same and bool(counts) == (abs(good - prompt) < abs(bad - prompt))
            covered |= {better, worse} if counts else set()
        left_out = {x * n + y for x in range(n) for y in range(n) if x != y} - covered
        assert bandits.uncovered[seed].flatten().nonzero().flatten().tolist() == sorted(left_out)
        assert left_out and covered


def test_the_bandits_seeds_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three by itself learns what it learns among the others, but for the order of sums."""
    import copy

    import torch

    bandit = load(BENCHMARKS / "bandit.py", monkeypatch)
    monkeypatch.setattr(bandit, "DPO_STEPS", (3,))
    three = bandit.Bandits(3)
    one = copy.copy(three)
    one.seeds = 1
    for name in ("better", "worse", "counts"):
        setattr(one, name, getattr(three, name)[1:2])
    alone = one.dpo([weights[1:2] for weights in three.start])[3]
    torch.testing.assert_close(alone[0], three.dpo(three.start)[3][1], atol=1e-5, rtol=0)


def test_nothing_the_bandit_learns_is_beyond_the_exact_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """π_ref exp(r / β) has the highest E r - β KL of all policies; PPO comes near it."""
    import torch

    bandit = load(BENCHMARKS / "bandit.py", monkeypatch)
    monkeypatch.setattr(bandit, "REWARD_STEPS", 100)
    monkeypatch.setattr(bandit, "ROLLOUTS", 60)
    bandits = bandit.Bandits(2)
    reference, rewards = bandits.logps(bandits.start).detach(), bandits.rewards(bandit.L2)

    def value(logps: torch.Tensor) -> torch.Tensor:
        return (logps.exp() * (rewards - bandit.BETA * (logps - reference))).sum(-1).mean(-1)

    best, learnt = (
        value((reference + rewards / bandit.BETA).log_softmax(-1)),
        value(bandits.ppo(bandits.start, rewards)),
    )
    assert (best >= learnt).all() and (learnt > value(reference)).all()
    assert ((best - learnt) < 0.1 * (best - value(reference))).all()


def test_passes_of_a_layout_are_counted(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Policy, critic and reference each look at a rollout once, the first two learn it twice, all on one base."""
    passes = load(BENCHMARKS / "passes.py", monkeypatch)
    given = {
        "model": tiny_model,
        "data.train": "toy:units?n=8&seed=0",
        "rewards.sources": "{exact: 1}",
        "adapter.r": 2,
        "ppo.rollout_batch_size": 4,
        "ppo.max_new_tokens": 4,
        "ppo.epochs": 2,
        "train.max_steps": 2,
        "fabric.accelerator": "cpu",
        "log.loggers": "[]",
        "out_dir": tmp_path / "run",
    }
    words = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    assert passes.count(tmp_path / "passes.json", ["align", "ppo", *words]) == 0
    counted = json.loads((tmp_path / "passes.json").read_text())
    rollout = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["tokens"] // 2
    assert counted["backbones"] == 1
    assert counted["tokens"]["look"] == 3 * rollout and counted["tokens"]["learn"] == 2 * 2 * rollout
    assert len(counted["cpu"]) == 2 and counted["cpu"][0] < counted["cpu"][1]


def test_the_largest_row_is_looked_for_from_a_guess_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and optimizer are 10, gradients 4, and for 8 samples scratch and holes 8, activations 16: n samples take
    10 + n + max(2 n, 4)."""
    hydra = load(BENCHMARKS / "hydra.py", monkeypatch)
    table = {"weights": 6, "optimizer": 4, "gradients": 4, "activations": 16, "scratch": 5, "holes": 3}
    assert [hydra.announced_peak(table, n) for n in (1, 2, 8)] == [15, 16, 34]
    assert {hydra.walk(lambda n: n <= 7, guess) for guess in (1, 6, 7, 8, 12)} == {7}
    assert hydra.walk(lambda _: False, 3) == 0

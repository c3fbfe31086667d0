"""What must not go wrong after minutes of measuring."""

from __future__ import annotations

import importlib.util
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
    assert found["at_equal_kl"]["16"] == {"gold": {}, "apart": {}}
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

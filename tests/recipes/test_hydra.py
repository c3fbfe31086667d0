"""From pairs to a hydra, and from that to a policy that learns from its own base's score; what a critic starts from."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from litrecipe.checkpoint.hf import save_hydra
from litrecipe.checkpoint.load import load_hydra, load_model, load_reward_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, RewardRecipe
from litrecipe.config.online import PpoRecipe
from litrecipe.engine.fit import Job, Run
from litrecipe.engine.rundir import read_records
from litrecipe.model.critic import ActorAndCritic
from litrecipe.model.lora_linear import LoraLinear
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Row, Sample, Segment, make_row
from litrecipe.recipes import evaluate, online, ppo, reward
from litrecipe.recipes.critics import misfit
from litrecipe.recipes.model import export, merge
from litrecipe.rollout.sources import ModelSource

LORA = {"adapter.r": 4}
Align = Callable[..., list[dict[str, Any]]]


def load(kind: type[Any], given: dict[str, Any]) -> Any:
    return schema.load(kind, [], [(key, str(value)) for key, value in given.items()])


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path) -> Align:
    """Run `align reward`; returns the records of its steps."""

    def run(out: str, **flags: object) -> list[dict[str, Any]]:
        given = {
            "model.source": tiny_model,
            "data.train": "toy:units-pairs?n=16&seed=0",
            "data.cache_dir": tmp_path / "cache",
            "train.max_steps": 3,
            "train.global_batch_size": 8,
            "optim.lr": 1e-3,
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / out,
        } | flags
        assert reward.main(load(RewardRecipe, given)) == 0
        return [record for record in read_records(tmp_path / out / "metrics.jsonl") if "grad_norm" in record]

    return run


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Callable[..., PpoRecipe]:
    def make(out: str = "run", **flags: object) -> PpoRecipe:
        given = {
            "model.source": tiny_model,
            "data.train": "toy:units?n=64&seed=0",
            "ppo.rollout_batch_size": 8,
            "ppo.max_new_tokens": 6,
            "train.micro_batch_tokens": 400,
            "train.max_steps": 4,
            "optim.lr": 1e-3,
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            "out_dir": tmp_path / out,
            **LORA,
        } | flags
        return load(PpoRecipe, given)

    return make


@pytest.fixture
def practise(recipe: Callable[..., PpoRecipe], tmp_path: Path) -> Align:
    """Run `align ppo`; returns the records of its steps."""

    def run(out: str = "run", **flags: object) -> list[dict[str, Any]]:
        assert ppo.main(recipe(out, **flags)) == 0
        return [record for record in read_records(tmp_path / out / "metrics.jsonl") if "grad_norm" in record]

    return run


@pytest.fixture
def job(recipe: Callable[..., PpoRecipe], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Job]:
    """What `align ppo` hands to `fit`."""

    def caught(out: str = "run", **flags: object) -> Job:
        jobs: list[Job] = []
        with monkeypatch.context() as patch:
            patch.setattr(online, "fit", lambda one: jobs.append(one) or 0)
            assert ppo.main(recipe(out, **flags)) == 0
        return jobs[0]

    return caught


@pytest.fixture
def hydra(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a score beside it, which was never trained."""
    model = load_hydra(open_model(str(tiny_model)), seed=7)
    save_hydra(tmp_path / "hydra", model, tiny_model, pad_token="<|endoftext|>", statistics=(0.25, 0.5))
    return tmp_path / "hydra"


def row(*texts: list[int]) -> Row:
    weights = [np.array([0.0] + [1.0] * (len(ids) - 1), dtype=np.float32) for ids in texts]
    return make_row([Sample("", (Segment(np.array(ids), w),)) for ids, w in zip(texts, weights, strict=True)])


ROW = row([1, 50, 60, 70], [1, 81, 92, 33, 44, 2])


def linears(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """Of a transformer with an adapter, those that lie below it."""
    return [module.base_layer for module in model.modules() if isinstance(module, LoraLinear)]


def distinct(*modules: torch.nn.Module) -> int:
    """How many parameters lie in memory; those of an adapter are left out."""
    found = {id(p): p.numel() for module in modules for name, p in module.named_parameters() if "lora_" not in name}
    return sum(found.values())


@pytest.mark.parametrize("method", ["none", "lora"])
def test_from_pairs_to_a_policy(train: Align, practise: Align, tmp_path: Path, method: str) -> None:
    """Its judge is what a reward model of the folder says of the same completions, and it learns."""
    records = train("judge", **{"adapter.method": method, "adapter.r": 4, "reward.sft_coef": 0.5})
    assert records[-1]["loss"] < records[0]["loss"]
    assert {"accuracy", "margin", "mean_token_accuracy", "mean_reward"} <= records[0].keys()
    source = tmp_path / "judge"
    if method == "lora":
        with pytest.raises(InputError, match=r"model\.source: .*: an adapter, and the base of a hydra is frozen"):
            practise(**{"model.source": source, "ppo.layout": "hydra"})
        source = tmp_path / "merged"
        merge(str(tmp_path / "judge"), str(source))
    steps = practise(**{"model.source": source, "ppo.layout": "hydra"})
    assert steps[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[3]["policy/approxkl"] > 0
    assert steps[0]["reward"] == pytest.approx(steps[0]["rewards/hydra"], rel=1e-6)
    final = tmp_path / "run" / "final"
    load_model(open_model(str(final)))
    critic = open_model(str(final / "critic"))
    assert critic.reward_statistics == open_model(str(source)).reward_statistics
    assert not torch.equal(load_reward_model(critic).score.weight, open_model(str(source)).score())
    kept = final.rename(tmp_path / "kept")
    export(str(tmp_path / "run"), str(tmp_path / "out"))  # of the checkpoint; the critic in it is no policy
    ours, theirs = (load_model(open_model(str(folder))) for folder in (tmp_path / "out", kept))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    second = practise("model", **{"model.source": source, "rewards.sources": json.dumps({f"model:{source}": 1.0})})
    assert second[0]["reward"] == pytest.approx(steps[0]["reward"], rel=1e-5)


def test_a_hydra_is_one_backbone_and_separate_models_are_four(
    job: Callable[..., Job], hydra: Path, train: Align, tmp_path: Path, tiny_model: Path
) -> None:
    backbone = sum(p.numel() for p in RewardModel(open_model(str(tiny_model)).architecture).model.parameters())
    score = 48
    judged = {"rewards.sources": json.dumps({f"model:{hydra}": 1.0})}
    whole = {"ppo.layout": "separate", "adapter.method": "none"}
    for out, flags, expected in (
        ("hydra", {"model.source": hydra, "ppo.layout": "hydra"}, backbone + 2 * score),
        ("lora", {"rewards.sources": '{"regex?pattern=a": 1}'}, backbone + score),
        ("joined", {"rewards.sources": '{"regex?pattern=a": 1}', "ppo.layout": "joined"}, backbone + score),
        ("separate", {**judged, **whole}, 4 * backbone + 2 * score),
    ):
        made = job(out, **flags)
        sources = [one.source for one in made.source.method.scorer.sources]  # type: ignore[attr-defined]
        judges = [source.model for source in sources if isinstance(source, ModelSource)]
        assert distinct(made.module, *judges) == expected, out


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_hydra_may_be_quantised(
    train: Align, practise: Align, job: Callable[..., Job], tmp_path: Path, method: str
) -> None:
    """Both stages: an adapter learns both heads on a quantised base; merged and quantised again it is one backbone,
    shared to the byte, and what a reward model of the quantised folder says."""
    quantised = {"quantize.method": method}
    records = train("judge", **{"adapter.method": "lora", "adapter.r": 4, "reward.sft_coef": 0.5, **quantised})
    assert records[-1]["loss"] < records[0]["loss"]
    merge(str(tmp_path / "judge"), str(tmp_path / "merged"))
    layout = {"model.source": tmp_path / "merged", "ppo.layout": "hydra", **quantised}
    steps = practise(**layout)
    assert steps[0]["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert steps[3]["policy/approxkl"] > 0
    module = job("again", **layout).module
    assert isinstance(module, ActorAndCritic)
    twins = list(zip(linears(module.policy), linears(module.critic), strict=True))
    assert len(twins) == 14 and all(a.weight is b.weight for a, b in twins)
    assert all(getattr(a, "quant_state", None) is getattr(b, "quant_state", None) for a, b in twins)


@torch.no_grad()
def test_reference_and_reward_of_a_hydra_are_its_base_to_the_bit(job: Callable[..., Job], hydra: Path) -> None:
    """After steps that changed the policy too; and the critic starts from the score, in the reward's units."""
    made = job(**{"model.source": hydra, "ppo.layout": "hydra"})
    module = made.module
    assert isinstance(module, ActorAndCritic)
    base, judge = load_model(open_model(str(hydra))).eval(), load_reward_model(open_model(str(hydra))).eval()
    shown = row([1, 50, 60, 70, 9], [1, 81, 92, 33, 44, 2, 9])  # asked before the last tokens
    ends = torch.tensor([3, 9])
    torch.testing.assert_close(module.critic(shown)[ends], judge.normalised(judge(ROW)), rtol=1e-4, atol=1e-5)
    with torch.enable_grad():
        run = Run(made)
        for _ in range(2):
            run.train_step(made.source.next_step())
        run.teller.close()
    module.eval()
    assert not torch.equal(module.policy(ROW).logps, base(ROW).logps)
    assert torch.equal(module.ref_logps(ROW), base(ROW).logps)
    source = made.source.method.scorer.sources[0].source  # type: ignore[attr-defined]
    assert torch.equal(source.model(ROW), judge(ROW))
    assert torch.equal(source.model.normalised(judge(ROW)), judge.normalised(judge(ROW)))


def test_a_hydra_that_was_stopped_goes_on_to_the_bit(
    practise: Align,
    hydra: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the midst of a rollout, by an interruption after the third of five steps."""
    flags = {"model.source": hydra, "ppo.layout": "hydra", "ppo.epochs": 2, "train.max_steps": 5}
    flags |= {"checkpoint.resume": "auto", "checkpoint.every": 1, "rewards.scale": "running"}
    unbroken = practise("unbroken", **flags)
    whole = Run.train_step

    def broken(self: Run, samples: list[Sample]) -> Any:
        if self.at.step == 3:
            raise KeyboardInterrupt
        return whole(self, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "train_step", broken)
        with pytest.raises(KeyboardInterrupt):
            practise("broken", **flags)
    capsys.readouterr()
    resumed = practise("broken", **flags)
    assert "at step 3 of 5" in " ".join(capsys.readouterr().err.split())
    assert [one["loss"] for one in resumed] == [one["loss"] for one in unbroken]
    for name in ("adapter_model.safetensors", "critic/adapter_model.safetensors"):
        ours, theirs = (tmp_path / run / "final" / name for run in ("unbroken", "broken"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_critic_starts_from_the_reward_model_where_that_fits(
    train: Align, job: Callable[..., Job], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A whole critic from any reward model of the same architecture; an adapter from one on the same base with the
    same settings; else from the policy, and it is said why."""
    train("whole")
    train("adapter", **{"adapter.method": "lora", "adapter.r": 4})
    train("wide", **{"adapter.method": "lora", "adapter.r": 8})
    train("hydra", **{"adapter.method": "lora", "adapter.r": 4, "reward.sft_coef": 0.5})
    full = {"adapter.method": "none", "ppo.layout": "separate"}

    def start(judge: str, **flags: object) -> tuple[torch.Tensor, RewardModel, str]:
        sources = json.dumps({"regex?pattern=a": 0.5, f"model:{tmp_path / judge}": 1.0})
        capsys.readouterr()
        module = job(f"{judge}-{len(flags)}", **{"rewards.sources": sources, **flags}).module
        critic = copy.deepcopy(module.critic).eval()  # type: ignore[union-attr, operator]
        found = load_reward_model(open_model(str(tmp_path / judge))).eval()
        return critic, found, capsys.readouterr().err

    for judge, flags in (("whole", full), ("adapter", full), ("adapter", {}), ("hydra", {})):
        critic, found, said = start(judge, **flags)
        assert f"critic: starts as {tmp_path / judge / 'final'}, the first reward model of rewards.sources" in said
        assert critic.statistics == found.statistics is not None
        with torch.no_grad():
            torch.testing.assert_close(RewardModel.forward(critic, ROW), found(ROW), rtol=1e-4, atol=1e-5)
        assert ("lora_" in " ".join(dict(critic.named_parameters()))) == (not flags)
        learnt = {name for name, one in critic.named_parameters() if one.requires_grad}
        assert "score.weight" in learnt and (("model.norm.weight" in learnt) == bool(flags))
    for judge, why in (
        ("whole", "is a whole model, and the critic an adapter on the policy's base"),
        ("wide", "is an adapter of other settings than the policy's"),
    ):
        critic, _, said = start(judge)
        told = " ".join(said.split())
        assert f"critic: starts as the policy with a head of zeros: {tmp_path / judge / 'final'} {why}" in told
        assert critic.statistics is None and critic.score.weight.abs().max() == 0
    asked = {"rewards.sources": '{"regex?pattern=a": 1}', "ppo.critic": tmp_path / "adapter"}
    critic = job("asked", **asked).module.critic  # type: ignore[union-attr]
    assert torch.equal(critic.score.weight, load_reward_model(open_model(str(tmp_path / "adapter"))).score.weight)
    with pytest.raises(InputError, match=r"ppo\.critic: .*wide: is an adapter of other settings"):
        job("not", **{**asked, "ppo.critic": tmp_path / "wide"})
    policy = {"rewards.sources": json.dumps({f"model:{tmp_path / 'adapter'}": 1.0}), "ppo.critic": "policy"}
    assert job("policy", **policy).module.critic.score.weight.abs().max() == 0  # type: ignore[union-attr]


def test_what_a_critic_cannot_start_from(tiny_model: Path, varied_model: Path, hydra: Path, tmp_path: Path) -> None:
    """Whole critics ask for less than those that are adapters."""
    lora = Adapter("lora", r=4)
    files, varied = open_model(str(tiny_model)), open_model(str(varied_model))
    wide, foreign = (Path(shutil.copytree(hydra, tmp_path / name)) for name in ("wide", "foreign"))
    for folder, name, key, value in (
        (wide, "config.json", "intermediate_size", 128),
        (foreign, "tokenizer.json", "added_tokens", []),
    ):
        (folder / "manifest.json").unlink()
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | {key: value}))
    vocabulary = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["other"] = vocabulary["model"]["vocab"].pop("<|endoftext|>")
    (foreign / "tokenizer.json").write_text(json.dumps(vocabulary))
    save_adapter(
        tmp_path / "there",
        load_reward_model(varied, adapter=lora),
        lora,
        str(varied_model),
        varied_model,
        pad_token="<|endoftext|>",
    )
    for source, adapter, why in (
        (tiny_model, None, "is a language model and has no score"),
        (wide, None, "is of another architecture than the policy"),
        (foreign, None, "reads other tokens than the policy"),
        (hydra, None, None),
        (tmp_path / "there", None, None),
        (hydra, lora, "is a whole model, and the critic an adapter on the policy's base"),
        (tmp_path / "there", lora, "is an adapter on another base than the policy's"),
        (tmp_path / "there", Adapter("dora", r=4), "is an adapter of other settings than the policy's"),
    ):
        assert misfit(open_model(str(source)), files, adapter) == why, source
    assert misfit(open_model(str(tmp_path / "there")), varied, lora) is None


def test_a_hydra_is_a_judge_for_those_who_ask_for_one(hydra: Path, tmp_path: Path) -> None:
    """`preference` scores by its reward; with a reference, and for other tasks, it is a language model."""

    def measured(*tasks: str, **flags: object) -> list[dict[str, Any]]:
        given = {"model.source": hydra, "tasks": list(tasks), "out": tmp_path / "r.json", "log_samples": True} | flags
        assert evaluate.main(load(evaluate.EvaluateRecipe, given)) == 0
        [samples] = tmp_path.glob("r.samples*")
        found = [json.loads(line) for line in samples.read_text().splitlines()]
        samples.unlink()
        return found

    task = "preference:toy:units-pairs?n=4&seed=0"
    assert all(one["margin"] != 0 and "normalised" in one for one in measured(task))
    assert all(one["margin"] == 0 and "normalised" not in one for one in measured(task, reference=hydra))
    assert len(measured("exact_match:toy:units?n=2")) == 2


def test_a_checkpoint_of_a_hydra_is_exported(train: Align, tmp_path: Path) -> None:
    train("run", **{"adapter.method": "lora", "adapter.r": 4, "reward.sft_coef": 0.5})
    final = tmp_path / "run" / "final"
    final.rename(tmp_path / "final")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    ours, theirs = (load_hydra(open_model(str(tmp_path / name))) for name in ("out", "final"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert ours.statistics == theirs.statistics is not None


def test_the_dry_run_of_a_hydra_holds_one_backbone(
    recipe: Callable[..., PpoRecipe], hydra: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside it two adapters and a critic's score; no frozen copy and no reward model."""
    assert ppo.main(recipe(**{"model.source": hydra, "ppo.layout": "hydra"}), dry_run=True) == 0
    shown = capsys.readouterr().out
    assert "a frozen copy" not in shown and "reward models" not in shown and "hydra: 1.0" in shown
    whole = {"ppo.layout": "separate", "adapter.method": "none", "rewards.sources": f"{{'model:{hydra}': 1.0}}"}
    assert ppo.main(recipe(**whole), dry_run=True) == 0
    shown = capsys.readouterr().out
    weights, copied, judges = (
        float(line.split()[1])
        for line in shown.splitlines()
        if line.strip().startswith(("weights ", "reference ", "judges "))
    )
    assert weights == pytest.approx(2 * copied, abs=0.0011)
    assert copied == pytest.approx(judges, abs=0.0011)


def test_the_dry_run_of_the_joint_stage(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the tied kind it has as many parameters as a reward model; `tests/engine/test_memory.py` counts the rest."""
    given = {"model.source": tiny_model, "data.train": "toy:units-pairs?n=8", "data.cache_dir": tmp_path / "cache"}
    joint = load(RewardRecipe, {**given, "fabric.accelerator": "cpu", "reward.sft_coef": 0.5})
    assert reward.main(joint, dry_run=True) == 0
    count = sum(p.numel() for p in load_reward_model(open_model(str(tiny_model))).parameters())
    assert f"{count:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"ppo.layout": "hydra"}, "has no score beside its language model"),
        ({"rewards.sources": "{hydra: 1.0}"}, "rewards.sources: hydra: the score beside the language model"),
        ({"ppo.layout": "hydra", "adapter.method": "none"}, "adapter.method: none: a hydra's policy and critic are"),
        ({"ppo.layout": "hydra", "ppo.critic": "policy"}, "ppo.critic: policy: a hydra's critic starts from its score"),
        ({"rewards.sources": "{exact: 1}", "ppo.critic": "nowhere"}, "ppo.critic: nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_told_at_once(practise: Align, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as told:
        practise(**flags)
    assert words in str(told.value)

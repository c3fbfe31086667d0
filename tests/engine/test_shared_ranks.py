"""What two processes share with FSDP2, none of which ever holds a whole model, learns as one process does: twenty steps
of every kind of training, with the losses and gradient norms of one process to 1e-5; and it is written as one would.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import final_tensors, on_ranks
from tiny import TINY_CONFIG, write_tiny_tokenizer

from litrecipe.engine.rundir import read_records

LORA = {"adapter.method": "lora", "adapter.r": 4, "optim.lr": 2e-3}
"""A rate at which roundings do not grow: at 5e-3 Adam makes 1e-3 of 1e-7 within ten steps of preference learning."""
NF4 = {"quantize.method": "nf4"}
CHAT = {"data.train": "toy:units?n=40&seed=0", "train.global_batch_size": 5}
PAIRS = {"data.train": "toy:units-pairs?n=40&seed=0", "train.global_batch_size": 4}
ASKED = {
    "data.train": "toy:units?n=13&seed=0",
    "train.epochs": 99,
    "ppo.rollout_batch_size": 6,
    "ppo.minibatches": 2,
    "ppo.max_new_tokens": 6,
    "ppo.cache_tokens": 128,  # a few sequences at a time, so that one rank has more passes to make than the other
}
CASES: dict[str, dict[str, Any]] = {
    "finetune-full": {**CHAT, "data.val": "toy:units?n=3&seed=0&split=test", "optim.lr": 1e-3},
    "finetune-bf16": {**CHAT, "fabric.precision": "bf16-mixed", "optim.lr": 1e-3},
    "finetune-lora": {**CHAT, **LORA},
    "finetune-dora": {**CHAT, **LORA, "adapter.method": "dora"},
    "finetune-nf4-lora": {**CHAT, **LORA, **NF4},
    "finetune-nf4-dora": {**CHAT, **LORA, **NF4, "adapter.method": "dora", "quantize.double_quant": False},
    "dpo-moving-dora": {**PAIRS, **LORA, "adapter.method": "dora", "dpo.reference": "moving", "dpo.ref_every": 5},
    "ppo-separate": {
        **ASKED,
        "adapter.method": "none",
        "ppo.layout": "separate",
        "optim.lr": 1e-3,
        "rewards.sources": '{"model:judge": 1.0, "regex?pattern=[aeiou]": 0.5}',
        "ppo.ref_ema": 0.3,
        "ppo.policy_ema": 0.9,
    },
    "ppo-hydra": {**ASKED, **LORA, "model.source": "hydra", "ppo.layout": "hydra", "optim.lr": 1e-3},
    "grpo": {
        "data.train": "toy:units?n=13&seed=0",
        "train.epochs": 99,
        "adapter.method": "none",
        "rewards.sources": '{"function:rewarding:vowels": 1.0}',
        "optim.lr": 1e-3,
        "grpo.rollout_batch_size": 12,
        "grpo.completions_per_prompt": 3,
        "grpo.minibatches": 2,
        "grpo.max_new_tokens": 6,
        "grpo.kl_coef": 0.05,
    },
    "iterative": {
        **LORA,
        "data.train": "toy:units?n=13&seed=0",
        "train.epochs": 99,
        "rewards.sources": '{"function:rewarding:vowels": 1.0}',
        "iterative_dpo.prompts_per_round": 6,
        "iterative_dpo.completions_per_prompt": 3,
        "iterative_dpo.minibatches": 2,
        "iterative_dpo.max_new_tokens": 6,
    },
    "rejection": {
        "data.train": "toy:units?n=13&seed=0",
        "adapter.method": "none",
        "train.global_batch_size": 4,
        "rewards.sources": '{"function:rewarding:vowels": 1.0}',
        "optim.lr": 1e-3,
        "rejection_sampling.completions_per_prompt": 3,
        "rejection_sampling.max_new_tokens": 6,
        "rejection_sampling.truncated": "learn",
    },
    "pretrain-experts": {
        "model.source": "experts",
        "model.init": "random",
        "data.train": "texts.jsonl",
        "data.max_length": 64,
        "data.workers": 1,
        "train.global_batch_size": 6,
        "optim.lr": 1e-3,
    },
}
SHARED: dict[str, dict[str, Any]] = {
    "finetune-full": {"fabric.activation_checkpointing": True, "fabric.reshard_after_forward": False},
    "finetune-bf16": {"fabric.param_dtype": "bfloat16"},
    "finetune-nf4-lora": {"fabric.cpu_offload": True},
    "ppo-hydra": {"fabric.gather_to_sample": True},
}
"""Options of how models are shared, which change no number but where they round."""
ROUNDED = {"finetune-bf16": 2e-2}
"""bf16 has three digits; norms and residual stream are fp32 in one process."""
REWARDING = """
def vowels(prompts, completions, rows):
    return [sum(letter in "aeiou" for letter in one) / (1 + len(one)) for one in completions]
"""
SCRIPT = """
import json, os, sys
from pathlib import Path
from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config import groups, online, pretrain as pretraining, rounds, schema
from litrecipe.engine.fabric import Ranks, make_fabric
from litrecipe.recipes import dpo, finetune, grpo, iterative_dpo, ppo, pretrain, rejection_sampling

VERBS = {
    "finetune": (groups.FinetuneRecipe, finetune),
    "dpo": (groups.DpoRecipe, dpo),
    "ppo": (online.PpoRecipe, ppo),
    "grpo": (online.GrpoRecipe, grpo),
    "iterative": (rounds.IterativeDpoRecipe, iterative_dpo),
    "rejection": (rounds.RejectionSamplingRecipe, rejection_sampling),
    "pretrain": (pretraining.PretrainRecipe, pretrain),
}
os.chdir(sys.argv[1])
sys.path.insert(0, sys.argv[1])
jobs = json.loads(sys.argv[3])
for verb, flags in jobs:
    kind, recipe = VERBS[verb]
    assert recipe.main(schema.load(kind, [], [(key, str(value)) for key, value in flags.items()])) == 0
config = schema.load(groups.FinetuneRecipe, [], [(key, str(value)) for key, value in jobs[0][1].items()]).fabric
files, ranks = open_model("model"), Ranks(make_fabric(config))
model = load_model(files, shared=ranks.share_models)
model = ranks.place(model, config) if ranks.share_models else model
save_model(Path(sys.argv[4]), model, files.tokenizer_dir, max_shard_bytes=4e4)
print("done")
"""


def write_models(folder: Path, tiny_model: Path) -> None:
    """The language model, a reward model and a hydra made of it, and the config of one with experts."""
    from litrecipe.checkpoint.hf import save_hydra, save_reward_model
    from litrecipe.checkpoint.load import load_hydra, load_reward_model
    from litrecipe.checkpoint.source import open_model

    (folder / "model").symlink_to(tiny_model)
    files = open_model(str(tiny_model))
    beside: dict[str, Any] = {"pad_token": "<|endoftext|>", "statistics": (0.1, 0.5)}
    save_reward_model(folder / "judge", load_reward_model(files, seed=1), files.tokenizer_dir, **beside)
    save_hydra(folder / "hydra", load_hydra(files, seed=2), files.tokenizer_dir, **beside)
    write_tiny_tokenizer(folder / "experts")
    experts = {"model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "initializer_range": 0.1}
    (folder / "experts" / "config.json").write_text(json.dumps(TINY_CONFIG | experts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """All cases, alone and on two ranks."""
    folder = tmp_path_factory.mktemp("shared")
    write_models(folder, tiny_model)
    (folder / "rewarding.py").write_text(REWARDING)
    texts = [
        f"{number} the quick brown fox jumps over the lazy dog {'and asks ' * (number % 7)}" for number in range(90)
    ]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))

    def jobs(name: str, flags: dict[str, Any], more: Callable[[str], dict[str, Any]]) -> str:
        common = {
            "model.source": "model",
            "data.cache_dir": f"cache-{name}",
            "train.max_steps": 20,
            "train.micro_batch_tokens": 256,
            "schedule.name": "constant",
            "checkpoint.every": "null",
            "log.loggers": [],
            "fabric.accelerator": "cpu",
            **flags,
        }
        given = {
            case: {**common, **changes, **more(case), "out_dir": f"{name}/{case}"} for case, changes in CASES.items()
        }
        return json.dumps([(case.split("-")[0], flags) for case, flags in given.items()])

    on_ranks(1, SCRIPT, folder, jobs("alone", {}, lambda case: {}), "alone/export")
    shared = {"fabric.strategy": "fsdp", "fabric.devices": 2}
    said = on_ranks(2, SCRIPT, folder, jobs("fsdp", shared, lambda case: SHARED.get(case, {})), "fsdp/export")
    assert [text.splitlines()[-1] for text in said] == ["done", "done"]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", list(CASES))
def test_two_processes_that_share_learn_as_one(runs: Path, case: str) -> None:
    one, two = (read_records(runs / name / case / "metrics.jsonl") for name in ("alone", "fsdp"))
    assert len(one) == len(two) >= 20
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            if name in ("loss", "eval_loss", "reward") or name.startswith("grad_norm"):
                # The loss of PPO and GRPO is near 0 where terms of about 1 cancel.
                cancels = case.startswith(("ppo", "grpo"))
                near = pytest.approx(ours[name], rel=ROUNDED.get(case, 1e-5), abs=1e-6 if cancels else 1e-7)
                assert theirs[name] == near, (ours["step"], name)
    for part in ("", "ema", "critic"):
        ours, theirs = (final_tensors(runs / name / case, part) for name in ("alone", "fsdp"))
        assert ours.keys() == theirs.keys() and (ours or part)
        for name, tensor in ours.items():
            assert (tensor - theirs[name]).abs().max() < (1e-4 if case not in ROUNDED else 2e-2), name


@pytest.mark.slow
def test_what_was_sampled_is_the_same_to_the_token(runs: Path) -> None:
    for case, count in {"ppo-separate": 18, "ppo-hydra": 18, "grpo": 120, "iterative": 180}.items():
        texts = [
            [json.loads(line)["completion"] for path in sorted(run.glob("*.jsonl")) for line in path.open()]
            for run in (runs / name / case / "rollouts" for name in ("alone", "fsdp"))
        ]
        assert texts[0] == texts[1] and len(texts[0]) == count


@pytest.mark.slow
def test_ranks_write_the_folder_that_one_process_writes(runs: Path) -> None:
    """Byte for byte: several weight files, of which each rank writes its share."""
    ours, theirs = (json.loads((runs / name / "export" / "manifest.json").read_text()) for name in ("alone", "fsdp"))
    assert ours == theirs and sum(name.endswith(".safetensors") for name in ours["files"]) > 3

"""Routers of experts in a training step: beside transformers, however the step is cut, resumed, and on two ranks."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import on_two_ranks

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, FinetuneRecipe, Quantize, Router
from litrecipe.data.source import RecordedSource
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, Run, fit
from litrecipe.engine.memory import estimate
from litrecipe.engine.rundir import read_records
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.flops import forward_flops, training_flops
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.model.teacher import StudentAndTeacher, Teacher
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.objectives.distillation import Distillation
from litrecipe.objectives.routing import Balanced, Routed, with_routers
from litrecipe.recipes import finetune
from litrecipe.recipes.distilling import Lesson

CONFIG: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "router_aux_loss_coef": 3.0,
    "initializer_range": 0.2,
}
DENSE = CONFIG | {"model_type": "llama"}
STEP_2 = "checkpoints/step-00000002"


class Samples(list):
    """Documents of random tokens, all of which are learnt but the first."""

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        super().__init__()
        for i in range(count):
            weights = np.ones(int(rng.integers(5, 30)), np.float32)
            weights[0] = 0
            self.append(Sample(f"row:{i}", (Segment(rng.integers(0, 97, len(weights)), weights),)))
        self.lengths = np.array([sample.length for sample in self])


def make_job(
    out_dir: Path, router: Router | None = None, *, val: Any = None, strategy: Any = "auto", **train: Any
) -> Job:
    recipe = FinetuneRecipe(out_dir=str(out_dir), router=router or Router())
    recipe.fabric.accelerator, recipe.fabric.strategy = "cpu", strategy
    recipe.fabric.devices = 1 if strategy == "auto" else 2
    recipe.log.loggers = []
    recipe.optim.lr = 1e-2
    recipe.optim.weight_decay = 0.1
    for name, value in {"global_batch_size": 8, "grad_clip": None, **train}.items():
        setattr(recipe.train, name, value)
    model = Decoder(read_architecture(CONFIG))
    model.init_weights(seed=0)
    return Job(
        fabric=make_fabric(recipe.fabric),
        recipe=recipe,
        module=model,
        objective=with_routers(CausalLM(), model, recipe.router),
        source=RecordedSource(Samples(16), recipe.train),
        val=val,
        save_final=lambda folder: folder.mkdir(parents=True, exist_ok=True),
    )


def step_of(job: Job) -> tuple[Any, dict[str, torch.Tensor], list[int]]:
    """What the first step tells, its gradients, and how many rows went through the model without gradient and with."""
    run, taken, passes = Run(job), {}, [0, 0]
    run.raw.register_forward_pre_hook(
        lambda *_: passes.__setitem__(torch.is_grad_enabled(), passes[torch.is_grad_enabled()] + 1)
    )
    run.raw_optimizer.register_step_pre_hook(
        lambda *_: taken.update({name: p.grad.clone() for name, p in run.parameters.items()})
    )
    result = run.train_step(job.source.next_step())
    run.teller.close()
    return result, taken, passes


def transformers_step(job: Job, samples: list[Sample]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a padded batch, with its own balance loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIG, output_router_logits=True)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs.load_state_dict(job.module.state_dict())
    longest = max(sample.length for sample in samples)
    tokens, mask = torch.zeros(len(samples), longest).long(), torch.zeros(len(samples), longest).long()
    for place, sample in enumerate(samples):
        tokens[place, : sample.length] = torch.from_numpy(sample.segments[0].tokens)
        mask[place, : sample.length] = 1
    output = theirs(tokens, attention_mask=mask, labels=tokens.where(mask.bool(), -100))
    output.loss.backward()
    return output.loss.item(), {name: p.grad for name, p in theirs.named_parameters()}


def assert_equal(taken: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert taken.keys() == right.keys()
    for name, gradient in right.items():
        assert (taken[name] - gradient).norm() < 2e-5 * gradient.norm().clamp(min=1e-3), name


def test_a_step_equals_that_of_transformers(tmp_path: Path) -> None:
    """Loss and gradients, the balance loss in both; and without it they are others."""
    job = make_job(tmp_path / "ours", micro_batch_tokens=10_000)
    right, gradients = transformers_step(job, [job.source.samples[job.source.order[i]] for i in range(8)])
    result, taken, _ = step_of(job)
    assert result.loss == pytest.approx(right, rel=1e-6)
    assert_equal(taken, gradients)
    _, others, _ = step_of(make_job(tmp_path / "without", Router(aux_loss_coef=0), micro_batch_tokens=10_000))
    gate = "model.layers.0.mlp.gate.weight"
    assert (others[gate] - gradients[gate]).norm() > 0.1 * gradients[gate].norm()


@pytest.mark.parametrize("balance", ["hf", "layer"])
def test_equal_batches_cut_differently_give_equal_gradients(tmp_path: Path, balance: Any) -> None:
    """In one row, where the pass that learns tells how often experts were chosen, and in many, where another does."""
    whole = None
    for budget in (10_000, 90, 30):
        router = Router(balance=balance, aux_loss_coef=1.0, z_loss_coef=0.1)
        result, taken, passes = step_of(make_job(tmp_path / str(budget), router, micro_batch_tokens=budget))
        assert passes[0] == (0 if budget == 10_000 else passes[1]) and passes[1] >= 1
        if whole is None:
            whole = result, taken
            continue
        assert_equal(taken, whole[1])
        assert result.loss == pytest.approx(whole[0].loss, rel=1e-6)
        assert result.metrics == pytest.approx(whole[0].metrics, rel=1e-5)


def test_a_teacher_is_asked_once_a_row(tmp_path: Path) -> None:
    """Not for the statistics, which do not need it; and a step's operations are the student's and its forward pass."""
    results = []
    for budget in (60, 10_000):
        job = make_job(tmp_path / str(budget), micro_batch_tokens=budget)
        teacher = Teacher(read_architecture(DENSE | {"num_hidden_layers": 1}))
        teacher.init_weights(seed=1)
        what = Lesson(StudentAndTeacher(job.module, teacher.requires_grad_(False)), Distillation(0.5), [], None)  # type: ignore[arg-type]
        objective = with_routers(what.objective, job.module, job.recipe.router)  # type: ignore[arg-type]
        asked: list[int] = []
        teacher.register_forward_pre_hook(lambda *_, asked=asked: asked.append(0))
        job = replace(job, module=what.module, objective=objective, looking=what.looking)
        result, _, passes = step_of(job)
        assert len(asked) == passes[1] and (passes[0] == passes[1] > 1) == (budget == 60)
        results.append(result)
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].metrics == pytest.approx(results[1].metrics, rel=1e-5) and results[0].metrics["kl"] > 0
    samples, student = Samples(3), read_architecture(CONFIG)
    alone = 3 * forward_flops(student, samples)
    assert what.flops(student, samples) == alone + forward_flops(teacher.architecture, samples)
    what.go_on(taught=False, again=True)
    assert what.flops(student, samples) == alone == training_flops(student, samples)


def test_evaluation_and_metrics(tmp_path: Path) -> None:
    """What is held out is told of too; and the numbers are those of the counts of the step."""
    job = make_job(tmp_path / "run", val=Samples(5, seed=1), micro_batch_tokens=60, max_steps=1)
    assert isinstance(job.objective, Balanced)
    assert fit(job) == 0
    first, last = read_records(tmp_path / "run" / "metrics.jsonl")
    names = {"router/balance", "router/z", "router/load_entropy", "router/largest_share"}
    assert names <= first.keys() and {f"eval_{name}" for name in names} <= last.keys()
    assert 1 / 3 <= first["router/largest_share"] <= 1 and 0 < first["router/load_entropy"] < 1
    assert last["eval_loss"] > 2.5 * last["eval_router/balance"] > 0


def test_of_frozen_routers_is_told_and_nothing_asked(tmp_path: Path) -> None:
    """Unless the recipe says so. One whose every token goes to one of two experts, and one that spreads them evenly."""
    model = Decoder(read_architecture(CONFIG)).requires_grad_(False)
    assert type(with_routers(CausalLM(), model, Router())) is Routed
    assert type(with_routers(CausalLM(), model, Router(aux_loss_coef=0.1))) is Balanced
    dense = Decoder(read_architecture(DENSE))
    assert isinstance(with_routers(CausalLM(), dense, Router()), CausalLM)
    with pytest.raises(InputError, match=r"router\.z_loss_coef: 0\.1: the model has no experts: leave it out"):
        with_routers(CausalLM(), dense, Router(z_loss_coef=0.1))
    objective = with_routers(CausalLM(), model, Router())
    assert isinstance(objective, Routed)
    tokens, even = torch.tensor(12.0), torch.full((1, 6), 4.0)
    tallies = {"router/tokens": tokens, "router/probability": even / 2, "router/squared_logsumexp": torch.ones(1)}
    told = objective.tell({**tallies, "router/chosen": even})
    assert told["router/load_entropy"] == pytest.approx(1) and told["router/largest_share"] == pytest.approx(1 / 3)
    assert told["router/balance"] == pytest.approx(2) and told["router/z"] == pytest.approx(1 / 12)
    told = objective.tell({**tallies, "router/chosen": torch.tensor([[12.0, 12, 0, 0, 0, 0]])})
    assert told["router/load_entropy"] == pytest.approx(math.log(2) / math.log(6)) and told["router/largest_share"] == 1


def test_a_resumed_run_equals_the_unbroken_one_to_the_bit(tmp_path: Path) -> None:
    weights = []
    for name, resume in (("unbroken", None), ("resumed", "auto")):
        job = make_job(tmp_path / name, micro_batch_tokens=60, max_steps=4)
        job.recipe.checkpoint.every, job.recipe.checkpoint.keep, job.recipe.checkpoint.resume = 2, 2, resume
        if resume:
            shutil.copytree(tmp_path / "unbroken" / STEP_2, tmp_path / name / STEP_2)
            job.module.init_weights(seed=1)
        assert fit(job) == 0
        weights.append(dict(job.module.state_dict()))
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


RANKS = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[3], str(Path(sys.argv[3]).parent)]
from test_routing import fit, make_job
for strategy in ("ddp", "fsdp"):
    for budget in (60, 10_000):
        out = Path(sys.argv[1]) / f"{strategy}-{budget}"
        fit(make_job(out, strategy=strategy, micro_batch_tokens=budget, max_steps=3))
"""


@pytest.mark.slow
def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """With several rows a rank, and with one of all samples, the other rank's being empty; sharded too."""
    assert fit(make_job(tmp_path / "alone", micro_batch_tokens=60, max_steps=3)) == 0
    on_two_ranks(RANKS, tmp_path, Path(__file__).parent)
    right = read_records(tmp_path / "alone" / "metrics.jsonl")
    for strategy in ("ddp", "fsdp"):
        for budget in (60, 10_000):
            found = read_records(tmp_path / f"{strategy}-{budget}" / "metrics.jsonl")
            assert len(found) == len(right) >= 3
            for ours, theirs in zip(found, right, strict=True):
                for name in ("loss", "grad_norm", *(key for key in theirs if key.startswith("router/"))):
                    assert ours[name] == pytest.approx(theirs[name], rel=2e-5), (strategy, budget, name)


def test_experts_and_routers_decay_as_matrices_do(tmp_path: Path) -> None:
    run = Run(make_job(tmp_path / "run"))
    names = {id(parameter): name for name, parameter in run.parameters.items()}
    decayed = {
        names[id(p)]
        for group in run.raw_optimizer.param_groups
        if group["weight_decay"] == 0.1
        for p in group["params"]
    }
    run.teller.close()
    layer = "model.layers.0.mlp"
    assert {f"{layer}.experts.gate_up_proj", f"{layer}.experts.down_proj", f"{layer}.gate.weight"} <= decayed
    assert {name for name in run.parameters if "norm" in name} == set(run.parameters) - decayed


def test_memory_of_a_dry_run(tmp_path: Path) -> None:
    """Two experts work on a token: what is kept of them is gate and up, 2 x 2 x 24 numbers. In whole numbers are their
    matrices, and those of attention."""
    recipe = make_job(tmp_path / "run").recipe
    one = make_row([Sample("a", (Segment(np.arange(90), np.ones(90, np.float32) - np.eye(90, dtype=np.float32)[0]),))])
    sparse = estimate(recipe, read_architecture(CONFIG), one)
    wide = estimate(recipe, read_architecture(CONFIG | {"intermediate_size": 48}), one)
    # the last layer too: every token but one predicts
    assert wide.activations - sparse.activations == 4 * 2 * 2 * 24 * (2 * 90 + 89)
    assert wide.weights - sparse.weights == 4 * 3 * 6 * 3 * 24 * 32
    recipe.adapter, recipe.quantize = Adapter(method="lora", r=3), Quantize(method="int8")
    tuned = estimate(recipe, read_architecture(CONFIG), one)
    assert tuned.trained == 3 * 3 * (6 * (32 + 48) + 6 * (24 + 32) + 2 * 64 + 2 * 48)
    matrices = 3 * (2 * 32 * 32 + 2 * 32 * 16 + 6 * 3 * 24 * 32)
    assert tuned.weights == matrices + 4 * (sparse.parameters - matrices) + 4 * tuned.trained


def test_recipes_ask_for_it(tmp_path: Path, tiny_model: Path) -> None:
    """The config's coefficient where all weights learn, none under an adapter; what is written loads in transformers
    with nothing missing."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = CONFIG | {"vocab_size": 320, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    given = {
        "model.source": folder / "config.json",
        "model.init": "random",
        "data.train": "toy:units?n=8&seed=0",
        "data.cache_dir": tmp_path / "cache",
        "train.max_steps": 1,
        "log.loggers": [],
        "fabric.accelerator": "cpu",
        "out_dir": tmp_path / "full",
    }
    tuned = {"model.source": tmp_path / "full", "model.init": "pretrained", "adapter.method": "lora"}
    asked = {**tuned, "router.z_loss_coef": 0.5, "out_dir": tmp_path / "asked"}
    records = {}
    for name, change in (("full", {}), ("lora", {**tuned, "out_dir": tmp_path / "lora"}), ("asked", asked)):
        flags = [(key, str(value)) for key, value in (given | change).items()]
        assert finetune.main(schema.load(FinetuneRecipe, [], flags)) == 0
        records[name] = read_records(tmp_path / name / "metrics.jsonl")[0]
    one = records["full"]
    assert one["loss"] == pytest.approx(one["nll"] + 3 * one["router/balance"], rel=1e-6)
    assert records["lora"]["loss"] == pytest.approx(records["lora"]["nll"], rel=1e-6)
    one = records["asked"]
    assert one["loss"] == pytest.approx(one["nll"] + 0.5 * one["router/z"], rel=1e-6)
    said = json.loads((tmp_path / "lora" / "final" / "adapter_config.json").read_text())
    assert said["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "final", output_loading_info=True)
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

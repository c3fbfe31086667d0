"""Settings that change how a run computes, as a recipe sets them: those that must not change its losses do not.

The model is tiny but its layers hold at least 4096 weights each, so that bitsandbytes really keeps 8-bit state.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from litrecipe.config import schema
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.engine.recorder import diff, hash_rng
from litrecipe.engine.rundir import read_records
from litrecipe.recipes import finetune

LORA = {"adapter.method": "lora", "adapter.r": 4, "optim.lr": 5e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("options")


@pytest.fixture(scope="module")
def model(tiny_model: Path, folder: Path) -> Path:
    """The tiny model's tokenizer and a config with wider layers, as a saved model."""
    import shutil

    from safetensors.torch import save_file

    from litrecipe.model.decoder import Decoder
    from litrecipe.model.families import read_architecture

    copy = folder / "model"
    shutil.copytree(tiny_model, copy)
    config = json.loads((copy / "config.json").read_text()) | {"hidden_size": 64, "intermediate_size": 128}
    (copy / "config.json").write_text(json.dumps(config))
    decoder = Decoder(read_architecture(config))
    decoder.init_weights(seed=0)
    save_file({name: p.detach().clone() for name, p in decoder.named_parameters()}, copy / "model.safetensors")
    return copy


@pytest.fixture(scope="module")
def train(model: Path, folder: Path):
    """Run a recipe once; a run of the same name is not done again."""

    def run(name: str, settings: dict[str, object], steps: int = 6, resume: bool = False) -> Path:
        out = folder / name
        given: dict[str, object] = {
            "model.source": model,
            "data.train": "toy:units?n=40&seed=0",
            "data.cache_dir": folder / "cache",
            "train.max_steps": steps,
            "train.global_batch_size": 5,
            "train.micro_batch_tokens": 300,
            "schedule.name": "constant",
            "optim.lr": 2e-3,
            "fabric.accelerator": "cpu",
            "log.loggers": "[]",
            "out_dir": out,
        } | settings
        if resume:
            given["checkpoint.resume"] = "auto"
        if resume or not out.exists():
            assert finetune.main(schema.load(FinetuneRecipe, [], [(k, str(v)) for k, v in given.items()])) == 0
        return out

    return run


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_records(run / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_lora_learns_on_a_quantised_base_almost_as_on_a_plain_one(train, method: str) -> None:
    plain, quantised = losses(train("lora", LORA)), losses(train(method, LORA | {"quantize.method": method}))
    assert quantised[-1] < quantised[0] - 0.02
    assert quantised != plain
    assert quantised == pytest.approx(plain, rel=0.02)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_activation_checkpointing_changes_nothing(train, name: str) -> None:
    settings = LORA if name == "lora" else {}
    plain = train(name, settings)
    assert diff(plain, train(f"{name}-checkpointing", settings | {"fabric.activation_checkpointing": "true"})) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_compiled_blocks_compute_the_same(train, name: str) -> None:
    settings = LORA if name == "lora" else {}
    torch._dynamo.utils.counters.clear()
    plain, compiled = train(name, settings), train(f"{name}-compile", settings | {"fabric.compile": "true"})
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] > 0
    assert all("function attend" in reason for reason in counters["graph_break"])  # adapters are compiled too
    assert diff(plain, compiled, tolerance=1e-5) == []


@pytest.mark.parametrize("name", ["adamw8bit", "sgd"])
def test_other_optimizers_learn_and_resume_to_the_bit(train, name: str) -> None:
    settings = {"optim.name": name} | ({"optim.lr": 0.5} if name == "sgd" else {})
    unbroken = train(name, settings, steps=6)
    assert losses(unbroken)[-1] < losses(unbroken)[0] - 0.02
    train(f"{name}-broken", settings, steps=3)
    broken = train(f"{name}-broken", settings, steps=6, resume=True)
    assert diff(unbroken, broken) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_flight_record_sees_what_is_drawn_on_a_gpu() -> None:
    before = hash_rng()
    torch.rand(1, device="cuda")
    assert hash_rng() != before

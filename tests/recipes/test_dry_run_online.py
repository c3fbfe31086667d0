"""What the memory table of a method that samples counts: rows as they will be cut, judges, and the cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litrecipe.checkpoint.hf import save_hydra
from litrecipe.checkpoint.load import load_hydra, load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.groups import Data
from litrecipe.config.online import GrpoRecipe
from litrecipe.config.rounds import IterativeDpoRecipe
from litrecipe.data.prompts import PromptSet, load_prompts
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.memory import NF4_BYTES
from litrecipe.recipes import grpo, iterative_dpo
from litrecipe.recipes.dry_run_online import Shape, cache_bytes, laid_out_bytes, longest_rows

DATA = "toy:units?n=16&seed=0"
Shown = Callable[..., dict[str, float]]


@pytest.fixture
def given(tiny_model: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "model.source": tiny_model,
        "data.train": DATA,
        "rewards.sources": "{exact: 1.0}",
        "adapter.r": 4,
        "fabric.accelerator": "cpu",
        "log.loggers": [],
        "out_dir": tmp_path / "run",
    }


def load(kind: type, given: dict[str, object]):
    return schema.load(kind, [], [(key, str(value)) for key, value in given.items()])


@pytest.fixture
def prompts(tiny_model: Path) -> PromptSet:
    return load_prompts(Data(train=DATA), Tokenizer.load(tiny_model), max_new_tokens=8, max_positions=512, seed=0)


@pytest.fixture
def shown(given: dict[str, object], capsys: pytest.CaptureFixture[str]) -> Shown:
    """Numbers of the table of `align grpo --dry_run`: GB by line, and `row`, the tokens of the largest row."""

    def run(**flags: object) -> dict[str, float]:
        recipe = load(GrpoRecipe, given | {key.replace("__", "."): value for key, value in flags.items()})
        assert grpo.main(recipe, dry_run=True) == 0
        out = capsys.readouterr().out
        table = {name: float(gb) for name, gb in re.findall(r"^\s*(\w[\w ]*?)\s+(\d+\.\d{3})\s", out, re.MULTILINE)}
        found = re.search(r"largest row: (\d+) tokens", out)
        assert found is not None
        return {**table, "row": int(found[1])}

    return run


def test_a_group_is_cut_as_it_will_be_learnt(given: dict[str, object], prompts: PromptSet) -> None:
    """A prompt is at most P tokens; 8 completions of 8 do not fit a row of P + 20, two of them do."""
    longest = max(len(prompt.tokens) for prompt in prompts.train)
    recipe = load(GrpoRecipe, given | {"train.micro_batch_tokens": longest + 20})
    whole, cut = (longest_rows(recipe, Shape(8, 8, 1, 8, together=together), prompts, 1) for together in (True, False))
    assert len(whole.row.tokens) == longest + 8 * 8 and whole.rows == 1
    assert len(cut.row.tokens) == longest + 2 * 8 and cut.rows == 4
    assert cut.tokens == 4 * longest + 8 * 8


def test_a_pair_stays_in_one_row(given: dict[str, object], prompts: PromptSet, capsys: pytest.CaptureFixture) -> None:
    longest = max(len(prompt.tokens) for prompt in prompts.train)
    flags = {"train.micro_batch_tokens": longest + 8, "iterative_dpo.max_new_tokens": 8}
    rounds = {"iterative_dpo.prompts_per_round": 8, "iterative_dpo.minibatches": 8}
    assert iterative_dpo.main(load(IterativeDpoRecipe, given | flags | rounds), dry_run=True) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"largest row: {longest + 2 * 8} tokens" in text
    assert "on this machine, without sampling and scoring, reckoned and not measured" in text


def test_the_cache_holds_what_is_sampled_at_once(
    given: dict[str, object], prompts: PromptSet, tiny_model: Path
) -> None:
    """Keys and values, fp32, of 2 layers with 2 heads of 12; never less than one completion."""
    longest = max(len(prompt.tokens) for prompt in prompts.train) + 8
    architecture = open_model(str(tiny_model)).architecture
    a_token = 2 * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim * 4
    for cache_tokens, tokens in ((10**6, 16 * longest), (3 * longest, 3 * longest), (1, longest)):
        recipe = load(GrpoRecipe, given | {"grpo.cache_tokens": cache_tokens})
        assert cache_bytes(recipe, Shape(16, 8, 2, 8), architecture, prompts, 1) == tokens * a_token
    assert cache_bytes(recipe, Shape(16, 8, 2, 8), architecture, prompts, 2) == longest * a_token


def test_copies_of_the_weights_are_counted_where_they_are_made(given: dict[str, object], tiny_model: Path) -> None:
    """By the bytes of a model's own copies: for 8 completions and 1024 tokens a rank, of fp32 weights on a CPU."""
    model = load_model(open_model(str(tiny_model)))
    copied = sum(one.weight.nbytes for name, one in model.named_modules() if isinstance(one, torch.nn.Linear))
    recipe = load(GrpoRecipe, given)
    for shape, world, wanted in (
        (Shape(16, 64, 2, 8), 1, copied),
        (Shape(16, 63, 2, 8), 1, 0),
        (Shape(4, 999, 1, 4), 1, 0),
        (Shape(16, 64, 2, 8), 2, 0),
        (Shape(32, 64, 4, 8), 2, copied),
    ):
        assert laid_out_bytes(recipe, shape, model.architecture, world) == wanted
    for flag in ({"fabric.precision": "bf16-mixed"}, {"fabric.compile": True}, {"quantize.method": "int8"}):
        assert laid_out_bytes(load(GrpoRecipe, given | flag), Shape(16, 64, 2, 8), model.architecture, 1) == 0


def test_a_judge_is_as_precise_as_the_policy_and_stored_and_shared_as_it_will_be(
    shown: Shown, given: dict[str, object], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A million times as many parameters, so that the table has digits for them."""
    from litrecipe.recipes import dry_run_online

    hydra = load_hydra(open_model(str(tiny_model)))
    save_hydra(tmp_path / "hydra", hydra, tiny_model, pad_token="<|endoftext|>", statistics=None)
    counted = dry_run_online.frozen_bytes
    monkeypatch.setattr(dry_run_online, "frozen_bytes", lambda *a, **b: 10**6 * counted(*a, **b))
    judge = {"rewards.sources": json.dumps({f"model:{tmp_path / 'hydra'}": 1.0})}
    single, half = (shown(**judge, fabric__precision=one)["judges"] for one in ("32-true", "bf16-true"))
    assert single == pytest.approx(2 * half, rel=1e-3)
    assert shown(**judge, fabric__precision="bf16-mixed")["judges"] == single
    monkeypatch.undo()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(tmp_path / "hydra")
    nf4 = "adapter: {method: lora}\nquantize: {method: nf4}\n"
    text = f"model: {{source: b}}\ndata: {{train: d}}\nout_dir: run\n{nf4}"
    (tmp_path / "run" / "recipe.yaml").write_text(text)
    ranks = {"fabric.devices": 2, "fabric.strategy": "fsdp"}, {"fabric.devices": 2, "fabric.tensor_parallel": 2}
    alone, sharded, split = (load(GrpoRecipe, given | flags) for flags in ({}, *ranks))
    whole, part = (dry_run_online.judge_bytes(recipe, str(tmp_path / "hydra")) for recipe in (alone, split))
    assert whole == 4 * sum(p.numel() for name, p in hydra.named_parameters() if name != "lm_head.weight")
    both_layers = dry_run_online.judge_bytes(sharded, str(tmp_path / "hydra"))
    assert both_layers == whole // 2 + whole  # the model has two layers
    assert whole / 2 < part < 0.51 * whole
    matrices = 2 * (2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 96)
    quantised = dry_run_online.judge_bytes(alone, str(tmp_path / "run"))
    assert whole - quantised == pytest.approx((4 - NF4_BYTES) * matrices, abs=100)

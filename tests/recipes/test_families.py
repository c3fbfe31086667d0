"""Models of other families through the program: names of their own, learned positions, LongRoPE's two lists."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY_CONFIG, write_random_model, write_tiny_tokenizer

from litrecipe import cli
from litrecipe.checkpoint.hf import save_reward_model
from litrecipe.checkpoint.load import load_model, load_reward_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.groups import (
    Data,
    Fabric,
    FinetuneRecipe,
    Generate,
    GenerateRecipe,
    Model,
    Optim,
    RewardRecipe,
)
from litrecipe.config.online import Grpo, GrpoRecipe, longest_of
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.optim import make_optimizer, trained_parameters
from litrecipe.model.families import read_architecture
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.recipes import generate
from litrecipe.recipes.training import begin
from litrecipe.rollout.sources import load_source

QUESTION = "what does the fox say?"


def saved_by_transformers(folder: Path, family: str, **keys: Any) -> Any:
    """A shrunken random model with the tiny tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"vocab_size": 320, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **ids, **keys)).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder)
    return model


def test_a_pythia_comes_in_learns_and_goes_out(litrecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Import, info, an answer, an adapter, its merger: the last loads in transformers and says what ours says."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = saved_by_transformers(tmp_path / "theirs", "gpt_neox", intermediate_size=96, max_position_embeddings=256)
    model, run, merged = tmp_path / "model", tmp_path / "run", tmp_path / "merged"

    def here(*words: object) -> str:
        """What a command says that is run in this process."""
        capsys.readouterr()
        assert cli.run(list(map(str, words))) == 0
        return capsys.readouterr().out

    here("model", "import", tmp_path / "theirs", model)
    table = here("model", "info", model)
    assert "gpt_neox" in table and f"{sum(p.numel() for p in theirs.parameters()):,} parameters" in table
    assert "base 10000, the first 25 % of a head" in table and "4 of 12, 4 for keys and values" in table

    def said_by_theirs(folder: Path) -> str:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        asked = [{"role": "user", "content": QUESTION}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        out = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) + "\n"

    ask = ("--prompt", QUESTION, "--generate.max_new_tokens", 12)
    before = here("generate", "--model", model, *ask)
    assert before == said_by_theirs(model)
    data = ("--data.train", "toy:units?n=8&seed=0", "--fabric.accelerator", "cpu", "--train.max_steps", 2)
    learn = ("--adapter.method", "lora", "--optim.lr", 0.05)
    litrecipe("finetune", "--model", model, "--out_dir", run, *data, *learn)
    targets = json.loads((run / "final" / "adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]
    here("model", "merge", run, merged)
    after = here("generate", "--model", merged, *ask)
    assert after == said_by_theirs(merged) != before


def test_gpt2_reads_no_further_than_its_positions(litrecipe, tmp_path: Path) -> None:
    saved_by_transformers(tmp_path, "gpt2", n_positions=32)
    said = litrecipe("generate", "--model", tmp_path, "--prompt", "the fox " * 20, "--raw", check=False)
    assert said.returncode == 2
    assert "tokens and the model reads 32: shorten the prompt" in said.stderr
    table = litrecipe("finetune", "--model", tmp_path, "--data.train", "toy:units?n=8&seed=0", "--dry_run", check=False)
    assert table.returncode == 2
    assert "data.max_length: 2048: the model's context is 32 tokens" in table.stderr


def test_positions_begin_anew_with_each_sample(tmp_path: Path) -> None:
    """Two samples in a row, each longer than half of the positions there are."""
    saved_by_transformers(tmp_path, "gpt2", n_positions=32)
    model = load_model(open_model(str(tmp_path)))
    tokens = torch.arange(30)
    sample = Sample("a", (Segment(tokens.numpy(), (tokens > 0).float().numpy()),))
    with torch.no_grad():
        one, two = model(make_row([sample])).logps, model(make_row([sample, replace(sample, id="b")])).logps
    torch.testing.assert_close(two, one.repeat(2), atol=1e-5, rtol=1e-5)


def test_decay_is_for_matrices(tmp_path: Path) -> None:
    """Positions are one; norms and biases are none."""
    saved_by_transformers(tmp_path, "gpt2", n_positions=32)
    parameters = trained_parameters(load_model(open_model(str(tmp_path))))
    optimizer = make_optimizer(parameters, Optim(weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    kept = {name for name, p in parameters.items() if id(p) not in decayed}
    assert kept and all(name.endswith("bias") or "norm" in name for name in kept)
    assert id(parameters["model.embed_positions.weight"]) in decayed


# -- LongRoPE ---------------------------------------------------------------------------------------------------------

LONG = {"type": "longrope", "short_factor": [1.0, 1.2, 1.5, 2, 2.5, 3], "long_factor": [1.5, 2, 4, 8, 16, 32]}
PHI3: dict[str, Any] = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "rope_scaling": LONG}
PHI3 = TINY_CONFIG | PHI3 | {"original_max_position_embeddings": 128}


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made for 128 tokens, stretched to 512."""
    folder = tmp_path_factory.mktemp("phi3") / "model"
    write_tiny_tokenizer(folder)
    write_random_model(folder, PHI3 | {"initializer_range": 0.3}, seed=0)
    return folder


def test_one_choice_of_factors_holds_for_all_sequences(phi3: Path) -> None:
    """transformers chooses for each batch: ours are the same where its longest sequence is that of the run."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(phi3, dtype=torch.float32).eval()
    files, long, short = open_model(str(phi3)), torch.arange(129), torch.arange(128)
    of_short, of_long = (load_model(files.for_length(tokens)) for tokens in (128, 129))
    with torch.no_grad():
        for model, tokens in ((of_short, short), (of_long, long)):
            torch.testing.assert_close(model.logits(tokens), theirs(tokens[None]).logits[0], atol=1e-4, rtol=0)
        assert (of_long.logits(short) - of_short.logits(short)).abs().max() > 1e-2
        torch.testing.assert_close(of_long.logits(short), of_long.logits(long)[:128], atol=1e-5, rtol=1e-5)
        assert torch.equal(load_model(files).logits(short), of_long.logits(short))  # made for 512
    assert of_short.frequencies[0][1] == pytest.approx(math.sqrt(1 + math.log(4) / math.log(128)))
    llama = read_architecture(TINY_CONFIG)
    assert llama.for_length(9) == llama and llama.positions_note is None


def test_a_recipe_chooses_by_what_it_may_read(phi3: Path) -> None:
    def longest(kind: Any = FinetuneRecipe, max_length: int = 64, **keys: Any) -> int | None:
        recipe = kind(model=Model(source=str(phi3)), data=Data(train="toy:units?n=2", max_length=max_length), **keys)
        files, _ = begin(recipe, dry_run=True)
        assert files.architecture.longest == longest_of(recipe)
        return files.architecture.longest

    assert (longest(), longest(max_length=300), longest(RewardRecipe)) == (64, 300, 64)
    assert longest(GrpoRecipe, grpo=Grpo(max_new_tokens=100)) == 164


def test_judges_choose_by_what_the_run_may_read(phi3: Path, tmp_path: Path) -> None:
    judge = load_reward_model(open_model(str(phi3)))
    save_reward_model(tmp_path / "judge", judge, phi3, pad_token="<|endoftext|>", statistics=None)
    tokenizer = Tokenizer.load(phi3)
    for longest in (100, None):
        found = load_source(f"model:{tmp_path / 'judge'}", tokenizer, Fabric(), "cpu", longest=longest)
        assert found.model.architecture.longest == longest


def test_an_answer_chooses_by_how_long_it_may_get(phi3: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    found = []
    real = generate.complete
    monkeypatch.setattr(
        generate, "complete", lambda model, *a, **k: found.append(model.architecture.longest) or real(model, *a, **k)
    )
    for new in (4, 200):
        settings = Generate(max_new_tokens=new)
        generate.main(GenerateRecipe(model=Model(source=str(phi3)), generate=settings, prompt="the fox", raw=True))
    assert found[1] - found[0] == 196 and found[0] < 128 < found[1]
    said = capsys.readouterr().err
    assert f"LongRoPE: short factors, as texts may have up to {found[0]} tokens, no more than 128" in said
    assert f"LongRoPE: long factors, as texts may have up to {found[1]} tokens, more than 128" in said

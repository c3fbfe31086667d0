"""A hydra is a language model's folder with a score beside it: transformers and peft read the one, we read both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litrecipe.checkpoint.hf import save_hydra
from litrecipe.checkpoint.load import load_hydra, load_model, load_reward_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter
from litrecipe.model.hydra import Hydra
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.recipes.model import import_model, merge

PAD = "<|endoftext|>"
IDS = torch.tensor([1, 5, 3, 90, 41, 7, 60, 2])


@pytest.fixture
def made(varied_model: Path) -> Hydra:
    """On the varied model, with a fresh score."""
    return load_hydra(open_model(str(varied_model)), seed=7).eval()


@pytest.fixture
def folder(made: Hydra, varied_model: Path, tmp_path: Path) -> Path:
    save_hydra(tmp_path / "hydra", made, varied_model, pad_token=PAD, statistics=(0.5, 2.0))
    return tmp_path / "hydra"


@torch.no_grad()
def reward(source: Path) -> float:
    weights = torch.zeros(len(IDS))
    weights[-1] = 1
    row = make_row([Sample("text", (Segment(IDS.numpy(), weights.numpy()),))])
    return float(load_reward_model(open_model(str(source))).eval()(row))


@torch.no_grad()
def test_transformers_reads_the_language_model_and_finds_nothing_odd(made: Hydra, folder: Path) -> None:
    """And makes a classifier of it with the score's own config, whose reward is ours."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    theirs, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    torch.testing.assert_close(theirs.eval()(IDS[None]).logits[0], made.logits(IDS), rtol=1e-4, atol=1e-4)
    config = AutoConfig.from_pretrained(folder / "reward_config.json")
    judge = AutoModelForSequenceClassification.from_pretrained(folder, config=config).eval()
    judge.load_state_dict(load_file(folder / "reward_head.safetensors"), strict=False)
    assert float(judge(IDS[None]).logits) == pytest.approx(reward(folder), abs=1e-4)


@torch.no_grad()
def test_we_read_what_we_wrote_as_either_and_as_both(made: Hydra, folder: Path, varied_model: Path) -> None:
    files = open_model(str(folder))
    assert files.is_hydra and not files.is_reward_model and files.reward_statistics == (0.5, 2.0)
    assert "with a score beside its language model" in files.describe()
    assert files.weights_hash() == open_model(str(varied_model)).weights_hash()
    both, judge, language = load_hydra(files), load_reward_model(files), load_model(files)
    for found in (both, judge, language):
        expected = dict(made.named_parameters())
        assert all(torch.equal(one, expected[name]) for name, one in found.named_parameters())
    assert both.statistics == judge.statistics == (0.5, 2.0)
    assert torch.equal(language.logits(IDS), made.logits(IDS))
    import_model(str(folder), str(folder.parent / "imported"))
    assert reward(folder.parent / "imported") == reward(folder)


@torch.no_grad()
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_an_adapter_is_one_of_the_language_model_with_the_score_beside_it(
    varied_model: Path, tmp_path: Path, method: str
) -> None:
    """peft loads it as such, and merging carries the score over."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = Adapter(method, r=4)  # type: ignore[arg-type]
    model = load_hydra(open_model(str(varied_model)), adapter=settings, seed=7).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    folder, merged = tmp_path / "adapter", tmp_path / "merged"
    save_adapter(folder, model, settings, str(varied_model), varied_model, pad_token=PAD, statistics=(0.5, 2.0))
    assert json.loads((folder / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(varied_model), folder).eval()
    torch.testing.assert_close(theirs(IDS[None]).logits[0], model.logits(IDS), rtol=1e-4, atol=1e-4)
    files = open_model(str(folder))
    assert files.is_hydra and files.reward_statistics == (0.5, 2.0)
    again = dict(load_hydra(files).named_parameters())
    assert all(torch.equal(again[name], one) for name, one in model.named_parameters())
    merge(str(folder), str(merged))
    files = open_model(str(merged))
    assert files.adapter is None and files.is_hydra and files.reward_statistics == (0.5, 2.0)
    torch.testing.assert_close(load_model(files).logits(IDS), model.logits(IDS), rtol=1e-4, atol=1e-4)
    assert reward(merged) == pytest.approx(reward(folder), abs=1e-5)


def test_an_adapter_on_a_hydra_is_none(folder: Path, tmp_path: Path) -> None:
    """It changes the transformer that the score was trained on."""
    settings = Adapter("lora", r=4)
    model = load_model(open_model(str(folder)), adapter=settings)
    save_adapter(tmp_path / "policy", model, settings, str(folder), folder)
    files = open_model(str(tmp_path / "policy"))
    assert not files.is_hydra and not files.is_reward_model


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"weight": torch.zeros(1, 48)}, "must hold score.weight and nothing else"),
        ({"score.weight": torch.zeros(1, 7)}, r"shape \[1, 7\], not \[1, 48\] as the config says"),
        ({"score.weight": torch.zeros(2, 48)}, "2 labels: a reward model has one"),
    ],
)
def test_a_score_of_another_model_is_refused(folder: Path, tensors: dict[str, torch.Tensor], words: str) -> None:
    (folder / "manifest.json").unlink()
    save_file(tensors, folder / "reward_head.safetensors")
    with pytest.raises(InputError, match=words):
        load_hydra(open_model(str(folder)))


def test_a_reward_model_has_no_language_models_head(folder: Path, varied_model: Path, tmp_path: Path) -> None:
    from litrecipe.checkpoint.hf import save_reward_model

    judge = load_reward_model(open_model(str(folder)))
    save_reward_model(tmp_path / "judge", judge, varied_model, pad_token=PAD, statistics=None)
    with pytest.raises(InputError, match="has no language model head"):
        load_hydra(open_model(str(tmp_path / "judge")))

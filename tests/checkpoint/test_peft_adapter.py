"""Adapters go both ways between peft and us, and merge into what they computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model.adapters import merge_adapter

ADAPTERS = {
    "lora": Adapter(method="lora", r=4, alpha=8),
    "dora": Adapter(method="dora", r=4, alpha=6, targets=["q_proj", "v_proj", "down_proj"]),
    "rslora": Adapter(method="lora", r=8, alpha=4, rslora=True),
    "rsdora": Adapter(method="dora", r=2, alpha=2, rslora=True),
}
every_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def stir(model: torch.nn.Module) -> None:
    """Move the adapter away from its start, where it does nothing."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


def close(a: torch.Tensor, b: torch.Tensor, relative: float = 1e-5) -> None:
    assert (a - b).abs().max() <= relative * b.abs().max()


@pytest.fixture
def base(tmp_path: Path, make_llama) -> Path:
    make_llama(tmp_path / "base", tie_word_embeddings=True, attention_bias=True)
    return tmp_path / "base"


@pytest.fixture
def trained(base: Path, tmp_path: Path):
    """Our adapted model and the folder it was saved in."""

    def make(adapter: Adapter, quantize: Quantize | None = None):
        model = load_model(open_model(str(base)), adapter=adapter, quantize=quantize)
        stir(model)
        save_adapter(tmp_path / "adapter", model, adapter, str(base), base)
        return model, tmp_path / "adapter"

    return make


@every_adapter
def test_peft_loads_what_we_save(base: Path, trained, their_logits, our_logits, recwarn, adapter: Adapter) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ours, folder = trained(adapter)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = their_logits(plain)
    theirs = PeftModel.from_pretrained(plain, folder).eval()
    torch.testing.assert_close(their_logits(theirs), our_logits(ours), atol=1e-4, rtol=1e-5)
    assert (their_logits(theirs) - before).abs().max() > 0.1
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]


@every_adapter
def test_we_load_what_peft_saves(base: Path, tmp_path: Path, their_logits, our_logits, adapter: Adapter) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config = LoraConfig(
        r=adapter.r,
        lora_alpha=int(adapter.alpha),
        target_modules=adapter.targets,
        use_dora=adapter.method == "dora",
        use_rslora=adapter.rslora,
        task_type="CAUSAL_LM",
    )
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    files = open_model(str(tmp_path / "theirs"))
    assert files.base == str(base) and files.adapter is not None
    ours = load_model(files)
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=1e-5)


@every_adapter
def test_ours_comes_back_bit_for_bit(base: Path, trained, our_logits, adapter: Adapter) -> None:
    model, folder = trained(adapter)
    files = open_model(str(folder))
    assert files.describe().endswith(f"with a {adapter.method} adapter")
    assert torch.equal(our_logits(load_model(files)), our_logits(model))
    assert torch.equal(our_logits(load_model(files, adapter=adapter)), our_logits(model))
    with pytest.raises(InputError, match=f"adapter: model.source is a {adapter.method} adapter with r={adapter.r}"):
        load_model(files, adapter=Adapter(method="lora", r=3))


@every_adapter
def test_merged_equals_unmerged(tmp_path: Path, base: Path, trained, our_logits, adapter: Adapter) -> None:
    model, _ = trained(adapter)
    before = our_logits(model)
    merge_adapter(model)
    close(our_logits(model), before)
    save_model(tmp_path / "merged", model, base)
    close(our_logits(load_model(open_model(str(tmp_path / "merged")))), before)


@pytest.mark.parametrize(("name", "method"), [("lora", "nf4"), ("dora", "nf4"), ("lora", "int8"), ("dora", "int8")])
def test_a_quantised_base_merges_into_its_dequantised_weights(
    tmp_path: Path, base: Path, trained, our_logits, name: str, method: str
) -> None:
    quantize = Quantize(method=method)
    model, folder = trained(ADAPTERS[name], quantize)
    before = our_logits(model)
    again = load_model(open_model(str(folder)), quantize=quantize)
    assert torch.equal(our_logits(again), before)
    merge_adapter(again)
    save_model(tmp_path / "merged", again, base)
    merged = our_logits(load_model(open_model(str(tmp_path / "merged"))))
    close(merged, before)
    unquantised = load_model(open_model(str(folder)))
    assert (our_logits(unquantised) - before).abs().max() > 1e-3 * before.abs().max()


def rewrite(file: Path, **changes: object) -> None:
    (file.parent / "manifest.json").unlink(missing_ok=True)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, 'peft_type: "IA3": only LORA'),
        ({"target_modules": "all-linear"}, 'target_modules: "all-linear": only a list'),
        ({"bias": "all"}, 'bias: "all": only none'),
        ({"r": "8"}, 'r: "8": must be a whole number'),
        ({"r": None}, "r: null: must be a whole number"),
        ({"lora_alpha": None}, "lora_alpha: null: must be a number"),
        ({"lora_dropout": "0.1"}, 'lora_dropout: "0.1": must be a number'),
        (
            {"init_lora_weights": "pissa_niter_16"},
            'init_lora_weights: "pissa_niter_16": it was trained on a changed base',
        ),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"base_model_name_or_path": ""}, 'base_model_name_or_path: "": write'),
        ({"base_model_name_or_path": "/nowhere/at/all"}, "its base model cannot be opened"),
        ({"base_model_name_or_path": "nobody/nothing"}, "its base model cannot be opened"),
        ({"base_model_name_or_path": "."}, "an adapter itself: merge it first"),
        (
            {"target_parameters": ["mlp.experts"]},
            'target_parameters: ["mlp.experts"]: only mlp.experts.gate_up_proj and',
        ),
        ({"target_parameters": "down_proj"}, 'target_parameters: "down_proj": only mlp.experts.gate_up_proj and'),
        *[
            ({key: value}, f"{key}: {json.dumps(value)}: not implemented: train it anew without, or merge it with peft")
            for key, value in {
                "modules_to_save": ["lm_head"],
                "rank_pattern": {"q_proj": 3},
                "exclude_modules": "q_proj",
                "lora_bias": True,
                "use_qalora": True,
                "alora_invocation_tokens": [5, 6],
            }.items()
        ],
    ],
)
def test_adapters_that_cannot_be_opened(trained, changes: dict, said: str) -> None:
    _, folder = trained(ADAPTERS["lora"])
    rewrite(folder / "adapter_config.json", **changes)
    with pytest.raises(InputError) as caught:
        open_model(str(folder))
    assert said in str(caught.value) and str(caught.value).startswith(f"{folder}/adapter_config.json: ")
    assert len(caught.value.mistakes) == 1


def test_settings_that_change_nothing(trained) -> None:
    _, folder = trained(ADAPTERS["lora"])
    rewrite(folder / "adapter_config.json", lora_dropout=None, init_lora_weights="eva", exclude_modules=None)
    adapter = open_model(str(folder)).adapter
    assert adapter is not None and adapter.settings == Adapter(
        method="lora", r=4, alpha=8, targets=adapter.settings.targets
    )


def test_an_adapter_on_an_adapter_is_refused(trained, tmp_path: Path) -> None:
    _, lower = trained(ADAPTERS["lora"])
    upper, run = tmp_path / "upper", tmp_path / "run"
    shutil.copytree(lower, upper)
    shutil.copytree(lower, run / "final")
    (run / "recipe.yaml").write_text("")
    for base in (lower, run):
        rewrite(upper / "adapter_config.json", base_model_name_or_path=str(base))
        with pytest.raises(InputError, match="an adapter itself: merge it first"):
            open_model(str(upper))


def test_damaged_adapter_weights_are_named(trained) -> None:
    _, folder = trained(ADAPTERS["lora"])
    file = folder / "adapter_model.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 16
    file.write_bytes(whole)
    with pytest.raises(InputError, match=f"{file}: its sha256"):
        load_model(open_model(str(folder)))
    file.write_bytes(whole[:-5])
    with pytest.raises(InputError, match=f"{file}: .*{len(whole) - 5} bytes, not {len(whole)}"):
        open_model(str(folder))
    file.unlink()
    with pytest.raises(InputError, match=f"{file}: missing"):
        open_model(str(folder))


def test_an_adapter_of_another_rank_names_its_file(trained) -> None:
    _, folder = trained(ADAPTERS["lora"])
    rewrite(folder / "adapter_config.json", r=5)
    with pytest.raises(InputError) as caught:
        load_model(open_model(str(folder)))
    assert all(line.startswith(f"{folder}/adapter_model.safetensors: ") for line in caught.value.mistakes)


def test_how_the_base_is_named(base: Path, trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, folder = trained(ADAPTERS["lora"])
    config = folder / "adapter_config.json"
    monkeypatch.chdir(tmp_path)
    save_adapter(folder, model, ADAPTERS["lora"], "base", base)
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(base)
    save_adapter(folder, model, ADAPTERS["lora"], "org/name@v1", base)
    assert json.loads(config.read_text())["base_model_name_or_path"] == "org/name"
    assert json.loads(config.read_text())["revision"] == "v1"
    with pytest.raises(InputError, match="org/name@v1"):
        open_model(str(folder))
    rewrite(config, base_model_name_or_path="../base", revision=None)
    monkeypatch.chdir("/")
    assert open_model(str(folder)).architecture.hidden_size == 64

"""Reward models go both ways between transformers, peft and us, whole or as adapters, with their pad token and mean."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from litrecipe.checkpoint.hf import save_reward_model
from litrecipe.checkpoint.load import load_model, load_reward_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.reward import pad_for_rewards
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model.adapters import merge_adapter
from litrecipe.model.families import FAMILIES
from litrecipe.model.reward import RewardModel, Score
from litrecipe.model.row import Sample, Segment, make_row

EOS, PAD = 2, "<|endoftext|>"
PROMPTS = [[1, 60, 9, 13, 77], [1, 8]]
ANSWERS = [[[5, 4, 300, EOS], [41, EOS]], [[7, 7, 7, 100, 12, 30, EOS], [EOS]]]
TEXTS = [prompt + answer for prompt, answers in zip(PROMPTS, ANSWERS, strict=True) for answer in answers]
LORA = Adapter(method="lora", r=4, alpha=8)
DORA = Adapter(method="dora", r=4, alpha=6, targets=["q_proj", "v_proj", "down_proj"])
either_adapter = pytest.mark.parametrize("adapter", [LORA, DORA], ids=["lora", "dora"])


def segment(tokens: list[int], learnt: bool, parent: int = -1) -> Segment:
    return Segment(np.array(tokens), np.full(len(tokens), float(learnt), np.float32), parent)


@torch.no_grad()
def our_rewards(model: RewardModel) -> torch.Tensor:
    """Rewards of TEXTS as two prompts with two branches each."""
    samples = [
        Sample("pair", (segment(prompt, False), *(segment(answer, True, 0) for answer in answers)))
        for prompt, answers in zip(PROMPTS, ANSWERS, strict=True)
    ]
    return model(make_row(samples))


@torch.no_grad()
def their_rewards(model: Any) -> torch.Tensor:
    """Rewards of TEXTS apart, padded on the right; transformers finds their ends by itself."""
    pad = model.config.pad_token_id
    longest = max(map(len, TEXTS))
    ids = torch.tensor([text + [pad] * (longest - len(text)) for text in TEXTS])
    mask = torch.tensor([[1] * len(text) + [0] * (longest - len(text)) for text in TEXTS])
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def classifier(folder: Path | str, **keys: Any) -> Any:
    """The classifier in transformers, which must take every tensor and miss none."""
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **keys
    )
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stir(model: torch.nn.Module) -> None:
    """Move the adapter and the score away from where they start."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score" in name:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


THEIRS = [family for family in FAMILIES if family not in ("openelm", "granite")]
"""Families of which transformers has a classifier."""


@pytest.fixture
def base(tmp_path: Path, make_llama) -> Path:
    make_llama(tmp_path / "base", vocab_size=320)
    return tmp_path / "base"


@pytest.fixture
def save(tiny_model: Path):
    """Saves a reward model with the tiny tokenizer."""

    def save(folder: Path, model: RewardModel, **keys: Any) -> Path:
        save_reward_model(folder, model, tiny_model, **{"pad_token": PAD, "statistics": None, **keys})
        return folder

    return save


@pytest.fixture
def trained(base: Path, tmp_path: Path, tiny_model: Path):
    """Our reward model with an adapter, and the folder that was saved in."""

    def make(adapter: Adapter, **keys: Any) -> tuple[RewardModel, Path]:
        model = load_reward_model(open_model(str(base)), adapter=adapter, seed=5, **keys)
        stir(model)
        folder = tmp_path / "adapter"
        save_adapter(folder, model, adapter, str(base), tiny_model, pad_token=PAD, statistics=(0.5, 2.0))
        return model, folder

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", THEIRS)
def test_rewards_of_trees_equal_those_of_padded_texts(
    tmp_path: Path, make_llama, save, family: str, tied: bool
) -> None:
    make_llama(tmp_path / "base", family=family, tie_word_embeddings=tied, vocab_size=320)
    model = load_reward_model(open_model(str(tmp_path / "base")), seed=1)
    theirs = classifier(save(tmp_path / "saved", model))
    assert theirs.config.num_labels == 1 and theirs.config.pad_token_id == 0
    expected = their_rewards(theirs)
    assert expected.std() > 0.1
    same(our_rewards(model), expected)
    assert torch.equal(our_rewards(load_reward_model(open_model(str(tmp_path / "saved")))), our_rewards(model))


@pytest.mark.parametrize("family", THEIRS)
def test_classifiers_of_transformers(tmp_path: Path, make_llama, family: str) -> None:
    theirs = make_llama(tmp_path, family=family, labels=1, vocab_size=320, pad_token_id=0)
    files = open_model(str(tmp_path))
    assert files.is_reward_model and files.reward_statistics is None
    same(our_rewards(load_reward_model(files)), their_rewards(theirs))
    assert f"{family} reward model, " in files.describe()
    # its weights are read whatever the seed, and in the dtype asked for
    half = load_reward_model(files, dtype=torch.bfloat16, seed=8)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.score.weight, theirs.score.weight.bfloat16())


def test_a_language_model_gets_a_fresh_score(base: Path) -> None:
    files = open_model(str(base))
    assert not files.is_reward_model
    first, again, other = (load_reward_model(files, seed=seed).state_dict() for seed in (1, 1, 2))
    assert first["score.weight"].std().item() == pytest.approx(65**-0.5, rel=0.3)
    assert torch.equal(first["score.weight"], again["score.weight"])
    assert not torch.equal(first["score.weight"], other["score.weight"])
    backbone = load_model(files).state_dict()
    assert set(first) == set(backbone) - {"lm_head.weight"} | {"score.weight"}
    assert all(torch.equal(first[name], backbone[name]) for name in backbone if name != "lm_head.weight")


def test_random_weights(base: Path) -> None:
    files = open_model(str(base / "config.json"))
    first, again = (
        load_reward_model(files, init="random", seed=3, quantize=Quantize(method="nf4"), dtype=torch.bfloat16)
        for _ in range(2)
    )
    assert torch.equal(our_rewards(first), our_rewards(again)) and type(first.score) is Score
    with pytest.raises(InputError, match="without weights"):
        load_reward_model(files)


def test_saved_again_nothing_changes(tmp_path: Path, base: Path, save) -> None:
    saved = save(tmp_path / "once", load_reward_model(open_model(str(base))), statistics=(-1.25, 0.1))
    files = open_model(str(saved))
    assert files.reward_statistics == (-1.25, 0.1)
    pad = pad_for_rewards(files.tokenizer_dir, files.architecture)
    model = load_reward_model(files)
    save_reward_model(tmp_path / "twice", model, saved, pad_token=pad, statistics=files.reward_statistics)
    assert contents(tmp_path / "twice") == contents(saved)
    half = tmp_path / "half"
    save_reward_model(half, model, saved, pad_token=pad, statistics=None, dtype=torch.bfloat16, max_shard_bytes=9e4)
    assert len(list(half.glob("*.safetensors"))) > 1 and open_model(str(half)).reward_statistics is None
    assert json.loads((half / "config.json").read_text())["torch_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="merge adapters"):
        save(tmp_path / "no", load_reward_model(files, adapter=LORA))


def test_all_files_name_the_pad_token(tmp_path: Path, base: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(tiny_model, tokenizer)
    legacy = {"pad_token": {"content": "<|im_end|>", "lstrip": False}, "eos_token": "<|im_end|>"}
    (tokenizer / "special_tokens_map.json").write_text(json.dumps(legacy))
    (tokenizer / "generation_config.json").write_text('{"eos_token_id": 2, "pad_token_id": 2}')
    out = tmp_path / "out"
    model = load_reward_model(open_model(str(base)))
    save_reward_model(out, model, tokenizer, pad_token=PAD, statistics=(0.0, 1.0))
    written = {name: json.loads(text) for name, text in contents(out).items() if name.endswith(".json")}
    assert written["tokenizer_config.json"]["pad_token"] == written["special_tokens_map.json"]["pad_token"] == PAD
    assert written["config.json"]["pad_token_id"] == written["generation_config.json"]["pad_token_id"] == 0
    assert written["generation_config.json"]["eos_token_id"] == 2
    assert (written["config.json"]["reward_mean"], written["config.json"]["reward_std"]) == (0.0, 1.0)
    theirs = AutoTokenizer.from_pretrained(out)
    assert (theirs.pad_token_id, theirs.eos_token_id) == (0, 2)
    with pytest.raises(InputError, match=r"tokenizer\.json: pad token <pad>: not in it"):
        save_reward_model(tmp_path / "no", model, tokenizer, pad_token="<pad>", statistics=None)
    assert not (tmp_path / "no").exists()


@either_adapter
def test_peft_loads_what_we_save(base: Path, trained, recwarn, adapter: Adapter) -> None:
    from peft import AutoPeftModelForSequenceClassification, PeftModel
    from transformers import AutoModelForSequenceClassification

    ours, folder = trained(adapter)
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0, dtype=torch.float32)
    before = their_rewards(plain.eval())
    theirs = PeftModel.from_pretrained(plain, folder).eval()
    assert type(theirs).__name__ == "PeftModelForSequenceClassification"
    same(their_rewards(theirs), our_rewards(ours))
    assert (their_rewards(theirs) - before).abs().max() > 0.1
    at_once = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1, pad_token_id=0).eval()
    same(their_rewards(at_once), our_rewards(ours))
    assert not [w for w in recwarn if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]


def test_transformers_finds_labels_and_pad_token_beside_an_adapter(trained) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    ours, folder = trained(LORA)
    config = AutoConfig.from_pretrained(folder / "reward_config.json")
    assert (config.num_labels, config.pad_token_id, config.reward_mean, config.reward_std) == (1, 0, 0.5, 2.0)
    assert AutoTokenizer.from_pretrained(folder).pad_token_id == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    same(their_rewards(theirs), our_rewards(ours))


@either_adapter
def test_we_load_what_peft_saves(base: Path, tmp_path: Path, adapter: Adapter) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    config = LoraConfig(
        r=adapter.r,
        lora_alpha=int(adapter.alpha),
        target_modules=adapter.targets,
        use_dora=adapter.method == "dora",
        task_type="SEQ_CLS",
    )
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0, dtype=torch.float32)
    theirs = get_peft_model(plain, config).eval()
    stir(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    files = open_model(str(tmp_path / "theirs"))
    assert files.is_reward_model and files.reward_statistics is None
    same(our_rewards(load_reward_model(files)), their_rewards(theirs))


@either_adapter
def test_an_adapter_comes_back_bit_for_bit(trained, tmp_path: Path, adapter: Adapter) -> None:
    model, folder = trained(adapter)
    files = open_model(str(folder))
    assert files.is_reward_model and files.adapter is not None and files.reward_statistics == (0.5, 2.0)
    assert files.tokenizer_dir == folder
    again = load_reward_model(files, seed=99)
    assert torch.equal(our_rewards(again), our_rewards(model))
    settings = files.adapter.settings
    twice = tmp_path / "twice"
    save_adapter(twice, again, settings, files.base, folder, pad_token=PAD, statistics=files.reward_statistics)
    save_adapter(folder, model, settings, files.base, folder, pad_token=PAD, statistics=files.reward_statistics)
    assert contents(twice) == contents(folder)
    with pytest.raises(ValueError, match="pad_token: a reward model's adapter needs one"):
        save_adapter(twice, again, settings, files.base, folder)


def test_merged_equals_unmerged(trained, tmp_path: Path, save) -> None:
    model, folder = trained(DORA)
    before = our_rewards(model)
    merged = load_reward_model(open_model(str(folder)))
    merge_adapter(merged)
    same(our_rewards(merged), before)
    same(their_rewards(classifier(save(tmp_path / "merged", merged))), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_base_under_a_trained_score(trained, dtype: torch.dtype) -> None:
    quantize = Quantize(method="nf4")
    model, folder = trained(LORA, quantize=quantize, dtype=dtype)
    again = load_reward_model(open_model(str(folder)), quantize=quantize, dtype=dtype)
    assert torch.equal(our_rewards(again), our_rewards(model))
    assert again.score.weight.dtype == torch.float32
    samples = [Sample("text", (segment(text, False), segment([EOS], True, 0))) for text in TEXTS]
    again(make_row(samples)).square().sum().backward()
    for name, parameter in again.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or name == "score.weight")
        assert not parameter.requires_grad or (parameter.grad is not None and parameter.grad.any()), name


def test_a_language_models_adapter_is_trained_further(base: Path, tiny_model: Path, tmp_path: Path) -> None:
    language_model = load_model(open_model(str(base)), adapter=LORA)
    stir(language_model)
    save_adapter(tmp_path / "sft", language_model, LORA, str(base), tiny_model)
    files = open_model(str(tmp_path / "sft"))
    assert not files.is_reward_model
    model = load_reward_model(files, seed=4, dtype=torch.bfloat16)
    fresh = load_reward_model(open_model(str(base)), seed=4)
    assert torch.equal(model.score.weight, fresh.score.weight)  # to the last bit: it is not rounded to the base's dtype
    ours = dict(model.named_parameters())
    for name, parameter in language_model.named_parameters():
        if "lora_" in name:
            assert torch.equal(ours[name], parameter)
    save_adapter(tmp_path / "reward", model, LORA, files.base, tiny_model, pad_token=PAD)
    again = open_model(str(tmp_path / "reward"))
    assert again.is_reward_model and again.reward_statistics is None
    same(our_rewards(load_reward_model(again, dtype=torch.bfloat16)), our_rewards(model))


def test_an_adapter_on_a_reward_model_starts_from_its_score(tmp_path: Path, make_llama) -> None:
    theirs = make_llama(tmp_path, labels=1, vocab_size=320, pad_token_id=0)
    model = load_reward_model(open_model(str(tmp_path)), adapter=LORA, seed=3)
    same(our_rewards(model), their_rewards(theirs))
    assert model.score.weight.requires_grad


def rewrite(file: Path, **changes: object) -> None:
    (file.parent / "manifest.json").unlink(missing_ok=True)
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refusal(load: Any, source: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(open_model(str(source)))
    assert len(caught.value.mistakes) == 1
    return str(caught.value)


def test_reward_models_are_no_language_models(tmp_path: Path, base: Path, save, trained) -> None:
    whole = save(tmp_path / "whole", load_reward_model(open_model(str(base))))
    _, adapter = trained(LORA)
    for folder in (whole, adapter):
        said = f"model.source: {folder}: is a reward model, has no language model head: give a language model"
        assert refusal(load_model, folder) == said


def test_classifiers_of_several_labels_are_refused(tmp_path: Path, make_llama, save, base: Path) -> None:
    make_llama(tmp_path / "two", labels=2)
    make_llama(tmp_path / "three", labels=3)
    cure = "a reward model has one: give such a model, or a language model to start from"
    two, three = (f"model.source: {tmp_path / name}: " for name in ("two", "three"))
    assert refusal(load_reward_model, tmp_path / "two") == f"{two}score.weight: 2 labels: {cure}"
    assert refusal(load_reward_model, tmp_path / "three") == f"{three}config.json: id2label: 3 labels: {cure}"
    one = save(tmp_path / "one", load_reward_model(open_model(str(base))))
    rewrite(one / "config.json", num_labels=4)
    assert "config.json: num_labels: 4 labels" in refusal(load_reward_model, one)


def test_adapters_whose_score_is_wrong(trained) -> None:
    _, folder = trained(LORA)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(weights)
    for modules in (["score", "classifier", "score"], ["classifier", "score"]):
        rewrite(config, modules_to_save=modules)
        load_reward_model(open_model(str(folder)))
    for changes in ({"modules_to_save": ["score", "lm_head"]}, {"task_type": "CAUSAL_LM"}):
        rewrite(config, **{"modules_to_save": ["score"], "task_type": "SEQ_CLS", **changes})
        assert "modules_to_save: " in refusal(load_reward_model, folder)
    rewrite(config, task_type="SEQ_CLS")
    name = "base_model.model.score.weight"
    save_file({**tensors, name: torch.zeros(2, 64)}, weights)
    assert f"{folder}: score.weight: 2 labels: a reward model has one" in refusal(load_reward_model, folder)
    del tensors[name]
    save_file(tensors, weights)
    said = 'score.weight: missing from a SEQ_CLS adapter: save it again with modules_to_save ["score"]'
    assert refusal(load_reward_model, folder) == f"{weights}: {said}"


@pytest.mark.parametrize("value", [None, "1", [1.0], float("nan"), True])
def test_statistics_that_are_no_numbers(tmp_path: Path, base: Path, save, value: object) -> None:
    folder = save(tmp_path / "out", load_reward_model(open_model(str(base))), statistics=(0.0, 1.0))
    rewrite(folder / "config.json", reward_std=value)
    with pytest.raises(InputError, match=r"reward_std: .*: must be a number"):
        _ = open_model(str(folder)).reward_statistics


SPECIALS = ["<|im_start|>", "<|im_end|>", "<|eot|>", "<|endoftext|>", "<unk>", "<reserved_0>", "<unused1>", "<|a_pad|>"]


@pytest.mark.parametrize(
    ("specials", "pad", "chosen"),
    [
        (SPECIALS, "<unk>", "<unk>"),  # its own, which ends nothing
        (SPECIALS, {"content": "<unk>"}, "<unk>"),
        (SPECIALS, "<|im_end|>", "<|a_pad|>"),
        (SPECIALS, "<|im_start|>", "<|a_pad|>"),
        (SPECIALS, "<|eot|>", "<|a_pad|>"),  # written by the chat template
        (SPECIALS, "<|endoftext|>", "<|a_pad|>"),  # ends answers by generation_config.json
        (SPECIALS, None, "<|a_pad|>"),
        (SPECIALS, "<not there>", "<|a_pad|>"),
        (SPECIALS[:7], None, "<reserved_0>"),
        ([*SPECIALS[:5], "<unused1>"], None, "<unused1>"),
        (SPECIALS[:5], None, "<unk>"),
        ([*SPECIALS[:4], "<|end_of_page|>", "<repo>"], "<|im_end|>", "<repo>"),
        ([*SPECIALS[:4], "<|end_of_page|>"], "<|im_end|>", "<|end_of_page|>"),
        (SPECIALS[:4], "<|im_end|>", None),
    ],
)
def test_a_pad_token_that_ends_no_text(
    tmp_path: Path, base: Path, specials: list[str], pad: object, chosen: str | None
) -> None:
    added = [{"id": id, "content": token, "special": True} for id, token in enumerate(specials)]
    added.append({"id": 50, "content": "<plain_pad>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 60}}, "added_tokens": added}))
    settings = {"eos_token": "<|im_end|>", "bos_token": {"content": "<|im_start|>"}, "pad_token": pad}
    template = "{{ messages[0].content }}<|eot|>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    architecture = open_model(str(base)).architecture
    if chosen is None:
        said = r"tokenizer_config\.json: pad_token: \"<\|im_end\|>\": may end a text, and no special token is free"
        with pytest.raises(InputError, match=said):
            pad_for_rewards(tmp_path, architecture)
    else:
        assert pad_for_rewards(tmp_path, architecture) == chosen


def test_the_users_chat_template_says_what_ends_a_turn(tmp_path: Path, tiny_model: Path) -> None:
    architecture = open_model(str(tiny_model)).architecture
    assert pad_for_rewards(tiny_model, architecture) == PAD
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}<|endoftext|>")
    with pytest.raises(InputError, match="may end a text"):
        pad_for_rewards(tiny_model, architecture, chat_template=str(template))


@pytest.mark.real_model
def test_the_real_model_equals_transformers(real_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    files = open_model(str(real_model))
    pad = pad_for_rewards(files.tokenizer_dir, files.architecture)
    assert pad == "<repo_name>"
    model = load_reward_model(files, seed=1)
    save_reward_model(tmp_path / "hf", model, files.tokenizer_dir, pad_token=pad, statistics=(0.0, 1.0))
    theirs, tokenizer = classifier(tmp_path / "hf"), AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    answers = ["Paris.<|im_end|>", "I would rather not say, and there is nobody who could make me.<|im_end|>"]
    batch = tokenizer([prompt + answer for answer in answers], padding=True, padding_side="right", return_tensors="pt")
    assert batch["input_ids"][0, -1] == 3 and batch["input_ids"][1, -1] == EOS
    segments = [segment(tokenizer(answer)["input_ids"], True, 0) for answer in answers]
    tree = Sample("pair", (segment(tokenizer(prompt)["input_ids"], False), *segments))
    with torch.no_grad():
        expected = theirs(**batch).logits[:, 0]
        torch.testing.assert_close(model(make_row([tree])), expected, atol=1e-4, rtol=1e-5)


def test_a_template_of_the_hub_says_what_ends_a_turn(tmp_path: Path, base: Path) -> None:
    """`<|im_end|>` is no end token of this tokenizer, but of experiments/json/chatml.jinja."""
    specials = ["<|im_end|>", "<|spare|>"]
    added = [{"id": id, "content": token, "special": True} for id, token in enumerate(specials, start=20)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 60}}, "added_tokens": added}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None, "pad_token": "<|im_end|>"}))
    architecture = open_model(str(base)).architecture
    assert pad_for_rewards(tmp_path, architecture) == "<|im_end|>"
    assert pad_for_rewards(tmp_path, architecture, chat_template="hub:experiments/json/chatml.jinja") == "<|spare|>"

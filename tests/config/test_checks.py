"""Values and combinations that types cannot rule out."""

from __future__ import annotations

import pytest

from litrecipe.config import schema
from litrecipe.config.checks import RANGES, check, parse_duration
from litrecipe.config.errors import InputError
from litrecipe.config.groups import DpoRecipe, EvaluateRecipe, FinetuneRecipe, GenerateRecipe, RewardRecipe
from litrecipe.config.recipes import RECIPES

GOOD = [("model.source", "m"), ("data.train", "d")]


def mistakes(*flags: tuple[str, str], kind: type = FinetuneRecipe) -> list[str]:
    try:
        schema.load(kind, [], [*GOOD, *flags] if kind is FinetuneRecipe else flags)
    except InputError as wrong:
        return wrong.mistakes
    return []


def test_defaults_lack_only_what_nobody_can_guess() -> None:
    assert [key for key, _, _ in check(FinetuneRecipe())] == ["model.source", "data.train"]
    assert [key for key, _, _ in check(EvaluateRecipe())] == ["model.source", "tasks"]
    assert [key for key, _, _ in check(GenerateRecipe())] == ["model.source"]


def test_every_range_belongs_to_a_key() -> None:
    known = {key for kind in RECIPES.values() for key in schema.keys(kind)}
    assert set(RANGES) <= known


@pytest.mark.parametrize(
    ("key", "right", "wrong"),
    [
        ("optim.lr", ["1e-9", "1"], ["0", "-1"]),
        ("optim.betas", ["0,0.999"], ["0.9,1", "-0.1,0.9"]),
        ("optim.weight_decay", ["0", "0.1"], ["-0.1"]),
        ("adapter.r", ["1"], ["0", "-3"]),
        ("adapter.alpha", ["0.5"], ["0"]),
        ("adapter.dropout", ["0", "0.99"], ["1", "-0.1"]),
        ("data.val_fraction", ["0", "0.5"], ["1", "-0.1"]),
        ("data.max_length", ["2"], ["1"]),
        ("data.date", ["2024-02-29"], ["2023-02-29", "yesterday"]),
        ("schedule.warmup_steps", ["0"], ["-1"]),
        ("schema_version", ["1"], ["0", "2", "99"]),
        ("schedule.min_lr_ratio", ["0", "1"], ["1.1"]),
        ("train.max_steps", ["1", "null"], ["0"]),
        ("train.epochs", ["0.1"], ["0"]),
        ("train.global_batch_size", ["1"], ["0"]),
        ("train.micro_batch_tokens", ["1"], ["0"]),
        ("train.grad_clip", ["null", "0.1"], ["0"]),
        ("train.max_time", ["90s", "1h30m", "01:30:00"], ["90", "soon", "0s", "1m1h", ""]),
        ("checkpoint.every", ["null", "1"], ["0"]),
        ("checkpoint.keep", ["1"], ["0"]),
        ("fabric.devices", ["auto", "1"], ["0", "-1"]),
        ("fabric.tensor_parallel", ["1", "2"], ["0", "-1"]),
        ("out_dir", ["a"], [""]),
    ],
)
def test_ranges(key: str, right: list[str], wrong: list[str]) -> None:
    for text in right:
        assert mistakes((key, text)) == []
    for text in wrong:
        [mistake] = mistakes((key, text))
        assert mistake.startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("flags", "key", "cure"),
    [
        ("quantize.method=nf4", "quantize.method", "add adapter.method lora"),
        ("quantize.method=int8 adapter.method=lora fabric.strategy=fsdp", "quantize.method", "use nf4"),
        ("quantize.method=nf4 adapter.method=lora model.init=random", "quantize.method", "use none"),
        ("optim.name=adamw8bit fabric.strategy=fsdp", "optim.name", "use adamw"),
        ("optim.name=paged_adamw8bit fabric.strategy=fsdp", "optim.name", "use adamw"),
        ("fabric.tensor_parallel=2 fabric.strategy=ddp", "fabric.strategy", "use auto or fsdp"),
        ("fabric.tensor_parallel=2 fabric.devices=3", "fabric.tensor_parallel", "the run has 3 processes"),
        ("fabric.tensor_parallel=2 adapter.method=lora quantize.method=nf4", "quantize.method", "use none"),
        ("fabric.tensor_parallel=2 optim.name=adamw8bit", "optim.name", "use adamw"),
        ("fabric.tensor_parallel=2 fabric.compile=true", "fabric.compile", "use false"),
        ("fabric.tensor_parallel=2 distil.teacher=t distil.quantize=nf4", "distil.quantize", "distil.cache"),
        ("fabric.cpu_offload=true", "fabric.cpu_offload", "fabric.strategy fsdp"),
        ("fabric.tensor_parallel=2 fabric.cpu_offload=true", "fabric.cpu_offload", "fabric.strategy fsdp"),
        ("fabric.param_dtype=bfloat16 fabric.strategy=fsdp", "fabric.param_dtype", "use bf16-mixed"),
        ("schedule.decay_steps=3", "schedule.decay_steps", "schedule.name wsd"),
        ("data.val=v data.val_fraction=0.1", "data.val_fraction", "remove one of them"),
        ("eval.every=5", "eval.every", "give data.val, data.val_fraction or eval.tasks"),
        ("checkpoint.resume=", "checkpoint.resume: ''", "auto"),
        ("data.max_length=8192", "data.max_length", "train.micro_batch_tokens 4096"),
        ("data.max_length=512 train.micro_batch_tokens=256", "data.max_length", "train.micro_batch_tokens 256"),
        ("adapter.method=lora adapter.targets=[]", "adapter.targets", "q_proj"),
        ("adapter.targets=[q_proj,lm_head]", "adapter.targets", "q_proj"),
    ],
)
def test_what_does_not_go_together(flags: str, key: str, cure: str) -> None:
    [mistake] = mistakes(*(tuple(flag.split("=")) for flag in flags.split()))  # type: ignore[arg-type]
    assert mistake.startswith(f"{key}: ")
    assert cure in mistake


@pytest.mark.parametrize(
    "flags",
    [
        "quantize.method=nf4 adapter.method=lora fabric.strategy=fsdp",
        "fabric.strategy=fsdp fabric.param_dtype=bfloat16 fabric.precision=bf16-mixed fabric.cpu_offload=true",
        "fabric.strategy=fsdp fabric.reshard_after_forward=false fabric.gather_to_sample=true",
        "fabric.strategy=fsdp fabric.reduce_dtype=bfloat16 fabric.tensor_parallel=2",
        "quantize.method=nf4 adapter.method=dora",
        "quantize.method=int8 adapter.method=lora",
        "quantize.method=int8 adapter.method=dora",
        "optim.name=adamw8bit fabric.strategy=ddp",
        "schedule.name=wsd schedule.decay_steps=3",
        "model.init=random",
        "eval.every=5 data.val=v",
        "eval.every=5 data.val_fraction=0.1",
        "eval.every=5 eval.tasks=[a]",
        "train.max_steps=1 schedule.warmup_steps=10",
        "schedule.name=wsd train.max_steps=1 schedule.decay_steps=10",
        "train.micro_batch_tokens=256",
        "data.max_length=256 train.micro_batch_tokens=256",
    ],
)
def test_what_does(flags: str) -> None:
    assert mistakes(*(tuple(flag.split("=")) for flag in flags.split())) == []  # type: ignore[arg-type]


def test_a_quantised_model_can_be_measured() -> None:
    assert mistakes(("model.source", "m"), ("tasks", "a"), ("quantize.method", "int8"), kind=EvaluateRecipe) == []


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("0.5s", 0.5),
        ("30m", 1800),
        ("2h", 7200),
        ("1d", 86400),
        ("1h30m", 5400),
        ("01:30:00", 5400),
        ("1:30:05", 5405),
        ("1-00:00:01", 86401),
        ("100:00:00", 360000),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "s", "1:30", "01:60:00", "-1s", "1e3s", "1s ", "٣s", "9" * 400 + "s", "0:00:00"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="give a time"):
        parse_duration(text)


def test_a_value_out_of_range_is_not_held_against_others() -> None:
    assert mistakes(("train.micro_batch_tokens", "-1"), ("data.max_length", "100")) == [
        "train.micro_batch_tokens: -1: give 1 or more"
    ]


@pytest.mark.parametrize("key", ["train.max_steps", "optim.lr", "fabric.devices", "data.columns"])
def test_a_flag_without_a_value_is_not_taken_as_null(key: str) -> None:
    [mistake] = mistakes((key, ""))
    assert mistake.startswith(f"{key}: ")


PAIRS = (("model.source", "m"), ("data.train", "d"))


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([("dpo.loss", "robust")], ["dpo.label_smoothing: 0: robust needs it above 0"]),
        ([("dpo.mix", "{sigmoid: 1, foo: 2}"), ("dpo.divergence", "js")], ["dpo.mix: foo: give losses out of sigmoid"]),
        ([("dpo.mix", "{sigmoid: 1, kto: 2}")], ["dpo.mix: kto: give losses out of"]),
        ([("dpo.mix", "{sigmoid: 0}")], ["dpo.mix: sigmoid: 0: give a weight above 0"]),
        ([("dpo.mix", "{bco: 1}"), ("dpo.loss", "ipo")], ["dpo.loss: ipo: dpo.mix is taken instead"]),
        ([("dpo.loss", "ipo"), ("dpo.divergence", "js")], ["dpo.divergence: js: ipo does not know it"]),
        ([("dpo.loss", "hinge"), ("dpo.label_smoothing", "0.1")], ["dpo.label_smoothing: 0.1: hinge does not know it"]),
        ([("dpo.loss", "simpo"), ("dpo.reference", "copy")], ["dpo.reference: copy: simpo has no reference"]),
        ([("dpo.loss", "kto"), ("dpo.nll_coef", "0.2")], ["dpo.nll_coef: 0.2: kto does not know it"]),
        ([("dpo.loss", "aot"), ("dpo.weighting", "true")], ["dpo.weighting: True: aot compares whole steps"]),
        ([("dpo.gamma", "2")], ["dpo.gamma: 2.0: only dpo.loss simpo knows it"]),
        ([("dpo.ref_every", "9")], ["dpo.ref_every: 9: only dpo.reference moving knows it"]),
        ([("dpo.ref_alpha", "0"), ("dpo.beta", "-1")], ["dpo.beta: -1.0: give", "dpo.ref_alpha: 0.0: give"]),
        ([("data.mask", "all"), ("data.format", "text")], ["data.format: text: preferences", "data.mask: all: of"]),
    ],
)
def test_keys_of_preference_learning(flags: list[tuple[str, str]], found: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        schema.load(DpoRecipe, [], [*PAIRS, *flags])
    assert len(caught.value.mistakes) == len(found)
    assert all(told.startswith(start) for told, start in zip(sorted(caught.value.mistakes), found, strict=True))


def test_a_reward_model_has_no_tasks() -> None:
    with pytest.raises(InputError, match=r"eval\.tasks: .*: a reward model says no words"):
        schema.load(RewardRecipe, [], [*PAIRS, ("eval.tasks", "piqa")])


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ([("distil.method", "top_1")], ["distil.method: top_1: there is no teacher"]),
        ([("distil.alpha", "0"), ("distil.cache", "true")], ["distil.alpha: 0.0: there", "distil.cache: True: there"]),
        ([("distil.teacher", "t"), ("distil.top_k", "9")], ["distil.top_k: 9: only distil.method top_k knows it"]),
        ([("distil.teacher", "t"), ("distil.cache", "true")], ["distil.cache: True: whole distributions"]),
        ([("distil.teacher", "t"), ("distil.alpha", "1")], ["distil.alpha: 1.0: give 0 or more, and less than 1"]),
        (
            [("distil.teacher", "t"), ("distil.method", "top_1"), ("distil.temperature", "2")],
            ["distil.temperature: 2.0: the likeliest token is the same at any"],
        ),
        (
            [("distil.teacher", "t"), ("distil.quantize", "int8"), ("fabric.strategy", "fsdp")],
            ["distil.quantize: int8: int8 weights cannot be sharded"],
        ),
        (
            [("model.inherit_layers", "6"), ("adapter.method", "lora")],
            ["model.inherit_layers: 6: an adapter would name the whole model as its base"],
        ),
        (
            [("model.inherit_layers", "6"), ("model.init", "random")],
            ["model.inherit_layers: 6: fresh weights inherit nothing"],
        ),
        ([("model.inherit_layers", "0")], ["model.inherit_layers: 0: give 1 or more"]),
    ],
)
def test_keys_of_distillation(flags: list[tuple[str, str]], found: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        schema.load(FinetuneRecipe, [], [*PAIRS, *flags])
    assert len(caught.value.mistakes) == len(found)
    assert all(told.startswith(start) for told, start in zip(sorted(caught.value.mistakes), found, strict=True))

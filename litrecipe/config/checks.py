"""What types cannot say: which values a key may have, and which keys go together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from datetime import date
from typing import Any, get_args

from litrecipe.config.groups import (
    REFERENCE_FREE,
    SORTING,
    Data,
    Distil,
    Dpo,
    DpoLoss,
    DpoRecipe,
    EvaluateRecipe,
    Fabric,
    RewardRecipe,
    Target,
    TrainingRecipe,
)
from litrecipe.config.merge import SCHEMA_VERSION
from litrecipe.config.online import OnlineRecipe
from litrecipe.config.online_checks import ONLINE_RANGES, check_online
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.prepare import PREPARE_RANGES, PrepareRecipe, check_prepare, missing_of_prepare
from litrecipe.config.pretrain import PretrainRecipe, check_pretrain
from litrecipe.config.rounds import IterativeDpoRecipe, RejectionSamplingRecipe
from litrecipe.config.rounds_checks import ROUNDS_RANGES, check_iterative_dpo, check_rejection_sampling
from litrecipe.config.slurm import SLURM_RANGES, Slurm, check_slurm

Mistake = tuple[str, Any, str]
"""Key, value, cure."""
ONE_SOURCE = (
    "is one source: give a folder that holds all, or for `litrecipe pretrain` name them: `data.sources: {a: …}`"
)


def check(recipe: Any) -> Iterator[Mistake]:
    """All mistakes in the values of a recipe whose types are right."""
    yield from _missing(recipe)
    plausible = deepcopy(recipe)  # values that are wrong by themselves go with any others
    for key, (is_right, cure) in RANGES.items():
        value = _get(recipe, key)
        if value is not None and not is_right(value):
            yield key, value, f"give {cure}"
            reset(plausible, key)
    if slurm := _get(plausible, "slurm"):
        yield from _slurm(slurm)
    if isinstance(recipe, PipelineRecipe):  # its stages are looked at one by one
        return
    if isinstance(recipe, PrepareRecipe):
        yield from check_prepare(plausible)
        return
    yield from _combinations(plausible)
    if isinstance(recipe, TrainingRecipe):
        yield from _texts(recipe)
        yield from _training_combinations(plausible)
        if distil := _get(plausible, "distil"):
            yield from _distil_combinations(distil, plausible.fabric.strategy)
    if isinstance(recipe, PretrainRecipe):
        yield from check_pretrain(plausible)
    if isinstance(recipe, DpoRecipe | RewardRecipe):
        yield from _preference_rows(recipe)
    if isinstance(recipe, RewardRecipe) and recipe.eval.tasks:
        yield "eval.tasks", recipe.eval.tasks, "a reward model says no words: remove it; data.val is what is measured"
    if isinstance(recipe, IterativeDpoRecipe):
        yield from check_iterative_dpo(plausible)
    elif isinstance(recipe, OnlineRecipe):
        yield from check_online(plausible)
    if isinstance(recipe, RejectionSamplingRecipe):
        yield from check_rejection_sampling(plausible)
    if isinstance(recipe, DpoRecipe | IterativeDpoRecipe):
        yield from _mix(recipe.dpo)
        yield from _dpo_combinations(plausible.dpo)


def _get(recipe: Any, key: str) -> Any:
    """The value of a full key; None where a recipe has no such key."""
    for name in key.split("."):
        recipe = getattr(recipe, name, None)
    return recipe


def reset(recipe: Any, key: str) -> None:
    """Give a key its default."""
    *groups, name = key.split(".")
    owner = _get(recipe, groups[0]) if groups else recipe
    setattr(owner, name, getattr(type(owner)(), name))


Range = tuple[Callable[[Any], bool], str]


def _at_least(low: int) -> Range:
    return lambda value: value >= low, f"{low} or more"


ABOVE_0: Range = (lambda value: value > 0, "a number above 0")
SHARE: Range = (lambda value: 0 <= value < 1, "0 or more, and less than 1")
FROM_0_TO_1: Range = (lambda value: 0 <= value <= 1, "a number from 0 to 1")
BELOW_HALF: Range = (lambda value: 0 <= value < 0.5, "0 or more, and less than 0.5")

RANGES: dict[str, Range] = {
    "adapter.r": _at_least(1),
    "adapter.alpha": ABOVE_0,
    "adapter.dropout": SHARE,
    "data.val_fraction": SHARE,
    "beta": ABOVE_0,
    "dpo.beta": ABOVE_0,
    "dpo.label_smoothing": BELOW_HALF,
    "dpo.nll_coef": _at_least(0),
    "dpo.ld_alpha": FROM_0_TO_1,
    "dpo.divergence_alpha": (lambda value: 0 < value < 1, "a number between 0 and 1"),
    "dpo.desirable_weight": ABOVE_0,
    "dpo.undesirable_weight": ABOVE_0,
    "dpo.ref_alpha": (lambda value: 0 < value <= 1, "a number above 0, and at most 1"),
    "dpo.ref_every": _at_least(1),
    "distil.alpha": SHARE,
    "distil.temperature": ABOVE_0,
    "distil.top_k": _at_least(1),
    "model.inherit_layers": _at_least(1),
    "reward.label_smoothing": BELOW_HALF,
    "reward.centering_coef": _at_least(0),
    "reward.sft_coef": _at_least(0),
    "reward.measured": _at_least(2),
    "router.aux_loss_coef": _at_least(0),
    "router.z_loss_coef": _at_least(0),
    "data.max_length": _at_least(2),
    "data.temperature": ABOVE_0,
    "data.val_tokens": _at_least(1),
    "data.workers": _at_least(1),
    "model.init_std": ABOVE_0,
    "model.rope_theta": ABOVE_0,
    "optim.mup_base_width": _at_least(1),
    "pretrain.z_loss": _at_least(0),
    "pretrain.spike_sigmas": ABOVE_0,
    "pretrain.spike_window": _at_least(8),
    "train.initial_batch_size": _at_least(1),
    "train.batch_warmup_steps": _at_least(0),
    "schedule.half_life_steps": _at_least(1),
    "optim.lr": ABOVE_0,
    "optim.betas": (lambda betas: all(0 <= beta < 1 for beta in betas), "two numbers of 0 or more, and less than 1"),
    "optim.eps": ABOVE_0,
    "optim.weight_decay": _at_least(0),
    "schedule.warmup_steps": _at_least(0),
    "schedule.decay_steps": _at_least(1),
    "schedule.min_lr_ratio": FROM_0_TO_1,
    "train.max_steps": _at_least(1),
    "train.epochs": ABOVE_0,
    "train.max_tokens": _at_least(1),
    "train.global_batch_size": _at_least(1),
    "train.micro_batch_tokens": _at_least(1),
    "train.grad_clip": (lambda value: value > 0, "a number above 0, or null for no clipping"),
    "train.seed": _at_least(0),
    "eval.every": _at_least(1),
    "eval.limit": _at_least(1),
    "checkpoint.every": _at_least(1),
    "checkpoint.keep": _at_least(1),
    "log.every": _at_least(1),
    "fabric.devices": (lambda value: value == "auto" or value >= 1, "1 or more, or auto"),
    "fabric.num_nodes": _at_least(1),
    "fabric.tensor_parallel": _at_least(1),
    "generate.max_new_tokens": _at_least(1),
    "generate.temperature": _at_least(0),
    "generate.top_k": _at_least(0),
    "generate.top_p": (lambda value: 0 < value <= 1, "a number above 0, and at most 1"),
    "generate.seed": _at_least(0),
    "limit": _at_least(1),
    "seed": _at_least(0),
    "num_fewshot": _at_least(0),
    "batch_tokens": _at_least(1),
    "schema_version": (lambda value: value == SCHEMA_VERSION, f"{SCHEMA_VERSION}, the version this litrecipe knows"),
    **ONLINE_RANGES,
    **ROUNDS_RANGES,
    **PREPARE_RANGES,
    **SLURM_RANGES,
}
"""Key → what its value must fulfil, and that in words. A key that is null is not asked."""


def _missing(recipe: Any) -> Iterator[Mistake]:
    if isinstance(recipe, PipelineRecipe):
        if not recipe.out_dir:
            yield "out_dir", "''", "give the folder of the pipeline"
        return
    if isinstance(recipe, PrepareRecipe):
        yield from missing_of_prepare(recipe)
        return
    if not recipe.model.source:
        yield "model.source", "missing", "give a Hugging Face folder, a hub id or a GGUF file (`--model M`)"
    if isinstance(recipe, TrainingRecipe):
        if not recipe.data.train and not getattr(recipe.data, "sources", None):
            named = ", or several by name in data.sources" if isinstance(recipe, PretrainRecipe) else ""
            yield "data.train", "missing", f"give a data file or folder, a hub id, or `toy:units?n=512&seed=0`{named}"
        if not recipe.out_dir:
            yield "out_dir", "''", "give the folder of the run"
        if not recipe.adapter.targets and recipe.adapter.method != "none":
            yield "adapter.targets", "[]", f"name layers: {', '.join(get_args(Target))}"
    if isinstance(recipe, EvaluateRecipe) and not recipe.tasks:
        yield (
            "tasks",
            "missing",
            ("give lm-eval names, `perplexity:FILE`, `exact_match:FILE` or `preference:FILE` (`--tasks a,b`)"),
        )


def _texts(recipe: TrainingRecipe) -> Iterator[Mistake]:
    """Values that are text to the type system and more than that to us."""
    known = get_args(Target)
    for target in recipe.adapter.targets:
        if target not in known:
            yield "adapter.targets", target, f"give some of {', '.join(known)}"
    if recipe.data.train[:1] + recipe.data.train[-1:] in ("[]", "{}"):
        yield "data.train", recipe.data.train, ONE_SOURCE
    if recipe.train.max_time is not None:
        try:
            parse_duration(recipe.train.max_time)
        except ValueError as error:
            yield "train.max_time", recipe.train.max_time, str(error)
    if recipe.checkpoint.resume == "":
        yield "checkpoint.resume", "''", "give auto, a folder …/checkpoints/step-…, or null"
    if recipe.data.date is not None:
        try:
            date.fromisoformat(recipe.data.date)
        except ValueError:
            yield "data.date", recipe.data.date, "give a date such as 2025-01-31"


def _combinations(recipe: Any) -> Iterator[Mistake]:
    """Keys that every verb has."""
    quantized = recipe.quantize.method != "none"
    if quantized and recipe.model.init == "random":
        yield "quantize.method", recipe.quantize.method, "there is nothing to quantise in model.init random: use none"
    if recipe.fabric.tensor_parallel > 1:
        yield from _tensor_parallel(recipe)
    yield from _sharding(recipe.fabric)


def _sharding(fabric: Fabric) -> Iterator[Mistake]:
    """Keys of models that processes share."""
    for key in ("reshard_after_forward", "cpu_offload", "param_dtype", "reduce_dtype", "gather_to_sample"):
        value = getattr(fabric, key)
        if value != getattr(Fabric, key) and fabric.strategy != "fsdp":
            yield f"fabric.{key}", value, "only fabric.strategy fsdp knows it: remove it, or use that"
    if fabric.param_dtype != "auto" and fabric.precision != "bf16-mixed":
        cure = f"fabric.precision is {fabric.precision}: use bf16-mixed, or remove it"
        yield "fabric.param_dtype", fabric.param_dtype, cure


def _tensor_parallel(recipe: Any) -> Iterator[Mistake]:
    """What goes with processes that compute one copy of a model."""
    fabric = recipe.fabric
    if not isinstance(recipe, TrainingRecipe):
        yield "fabric.tensor_parallel", fabric.tensor_parallel, "only what is trained is split: remove it"
        return
    if fabric.strategy == "ddp":
        cure = "with fabric.tensor_parallel the others shard each model's parts: use auto or fsdp"
        yield "fabric.strategy", fabric.strategy, cure
    if fabric.devices != "auto" and fabric.devices * fabric.num_nodes % fabric.tensor_parallel:
        cure = f"the run has {fabric.devices * fabric.num_nodes} processes: give a divisor of it"
        yield "fabric.tensor_parallel", fabric.tensor_parallel, cure
    if fabric.compile:
        cure = "compiled blocks do not talk to other ranks: use false with fabric.tensor_parallel"
        yield "fabric.compile", True, cure
    if recipe.quantize.method != "none":
        cure = "blocks of quantised weights do not end where ranks' parts do: use none with fabric.tensor_parallel"
        yield "quantize.method", recipe.quantize.method, cure
    distil = _get(recipe, "distil")
    if distil and distil.quantize != "none" and not distil.cache:
        yield "distil.quantize", distil.quantize, "a quantised teacher cannot be split: use none, or distil.cache"
    if recipe.optim.name.endswith("8bit"):
        cure = "8-bit state of a part is not part of the whole's: use adamw with fabric.tensor_parallel"
        yield "optim.name", recipe.optim.name, cure


def _training_combinations(recipe: TrainingRecipe) -> Iterator[Mistake]:
    method, quantize, strategy = recipe.adapter.method, recipe.quantize.method, recipe.fabric.strategy
    if quantize != "none" and method == "none":
        yield "quantize.method", quantize, "quantised weights cannot be trained: add adapter.method lora, or use none"
    if quantize == "int8" and strategy == "fsdp":
        yield "quantize.method", quantize, "int8 weights cannot be sharded: use nf4, or fabric.strategy ddp"
    if recipe.model.inherit_layers is not None and recipe.model.init == "random":
        cure = "fresh weights inherit nothing: use model.init pretrained, or remove it"
        yield "model.inherit_layers", recipe.model.inherit_layers, cure
    if recipe.model.inherit_layers is not None and method != "none":
        cure = "an adapter would name the whole model as its base: train all weights, with adapter.method none"
        yield "model.inherit_layers", recipe.model.inherit_layers, cure
    if recipe.optim.name.endswith("8bit") and strategy == "fsdp":
        yield "optim.name", recipe.optim.name, "8-bit optimizers cannot be sharded: use adamw, or fabric.strategy ddp"
    if recipe.optim.adam_style == "tf" and recipe.optim.name == "sgd":
        yield "optim.adam_style", "tf", "sgd has no epsilon: remove it"
    if recipe.schedule.decay_steps is not None and recipe.schedule.name != "wsd":
        cure = f"{recipe.schedule.name} decays over the whole run: remove it, or use schedule.name wsd"
        yield "schedule.decay_steps", recipe.schedule.decay_steps, cure
    if recipe.schedule.decay != "linear" and recipe.schedule.name != "wsd":
        yield "schedule.decay", recipe.schedule.decay, "only schedule.name wsd knows it: remove it, or use that"
    half_life, is_halved = recipe.schedule.half_life_steps, recipe.schedule.decay == "exponential"
    if is_halved and half_life is None:
        yield "schedule.half_life_steps", "missing", "give the steps in which the rate halves"
    if half_life is not None and not is_halved:
        yield "schedule.half_life_steps", half_life, "only schedule.decay exponential knows it: remove it"
    yield from _without_effect(recipe)


def _slurm(slurm: Slurm) -> Iterator[Mistake]:
    try:
        seconds = None if slurm.time is None else parse_duration(slurm.time)
    except ValueError as error:
        yield "slurm.time", slurm.time, str(error)
        seconds = None
    yield from check_slurm(slurm, seconds)


def _preference_rows(recipe: DpoRecipe | RewardRecipe) -> Iterator[Mistake]:
    if recipe.data.format != "auto":
        yield "data.format", recipe.data.format, "preferences are recognised by their columns: remove it"
    if recipe.data.mask != "assistant":
        yield "data.mask", recipe.data.mask, "of preferences the answers are learnt: remove it"


SMOOTHED = ("sigmoid", "cdpo", "robust", "exo", "aot", "aot_unpaired", "sigmoid_norm", "simpo", "cpo")
"""Losses that know `label_smoothing`."""
DIVERGENT = ("sigmoid", "cdpo", "robust", "hinge", "exo", "nca", "sppo", "bco", "apo_zero", "apo_down", "discopop")
"""Losses of log-ratios, which `divergence` may bend."""


def _mix(dpo: Dpo) -> Iterator[Mistake]:
    known = [loss for loss in get_args(DpoLoss) if loss != "kto"]
    for loss, weight in dpo.mix.items():
        if loss not in known:
            yield "dpo.mix", loss, f"give losses out of {', '.join(known)}"
        elif weight <= 0:
            yield "dpo.mix", f"{loss}: {weight:g}", "give a weight above 0"


def _dpo_combinations(dpo: Dpo) -> Iterator[Mistake]:
    losses = [loss for loss in dpo.mix or [dpo.loss] if loss in get_args(DpoLoss)]
    for key, is_heard, hearer in (
        ("gamma", "simpo" in losses, "dpo.loss simpo"),
        ("length_normalize", "ipo" in losses, "dpo.loss ipo"),
        ("desirable_weight", "kto" in losses, "dpo.loss kto"),
        ("undesirable_weight", "kto" in losses, "dpo.loss kto"),
        ("divergence_alpha", dpo.divergence == "alpha", "dpo.divergence alpha"),
        ("ref_alpha", dpo.reference == "moving", "dpo.reference moving"),
        ("ref_every", dpo.reference == "moving", "dpo.reference moving"),
    ):
        value = getattr(dpo, key)
        if value != getattr(Dpo, key) and not is_heard:
            yield f"dpo.{key}", value, f"only {hearer} knows it: remove it, or use that"
    if dpo.mix and dpo.loss != Dpo.loss:
        yield "dpo.loss", dpo.loss, "dpo.mix is taken instead: remove one of them"
    for loss in {"cdpo", "robust", "exo"}.intersection(losses):
        if dpo.label_smoothing == 0:
            yield "dpo.label_smoothing", 0, f"{loss} needs it above 0: try 0.001 for exo, 0.1 for the others"
    for key, is_set, knowing in (
        ("label_smoothing", dpo.label_smoothing > 0, SMOOTHED),
        ("divergence", dpo.divergence != "reverse_kl", DIVERGENT),
    ):
        if is_set and (deaf := [loss for loss in losses if loss not in knowing]):
            yield f"dpo.{key}", getattr(dpo, key), f"{deaf[0]} does not know it: remove it, or use {', '.join(knowing)}"
    if dpo.weighting and SORTING.intersection(losses):
        yield "dpo.weighting", True, "aot compares whole steps, not pairs: remove it, or use another loss"
    if losses == ["kto"]:
        for key, is_set in (
            ("nll_coef", bool(dpo.nll_coef)),
            ("ld_alpha", dpo.ld_alpha != 1),
            ("weighting", dpo.weighting),
            ("mask_format_tokens", dpo.mask_format_tokens),
        ):
            if is_set:
                yield f"dpo.{key}", getattr(dpo, key), "kto does not know it: remove it"
    if dpo.reference != "auto" and losses and all(loss in REFERENCE_FREE for loss in losses):
        yield "dpo.reference", dpo.reference, f"{losses[0]} has no reference: remove it"


def _distil_combinations(distil: Distil, strategy: str) -> Iterator[Mistake]:
    for key in ("method", "alpha", "temperature", "top_k", "cache", "quantize"):
        value = getattr(distil, key)
        if value != getattr(Distil, key) and distil.teacher is None:
            yield f"distil.{key}", value, "there is no teacher: give distil.teacher, or remove it"
    if distil.teacher is None:
        return
    if distil.top_k != Distil.top_k and distil.method != "top_k":
        yield "distil.top_k", distil.top_k, "only distil.method top_k knows it: remove it, or use that"
    if distil.temperature != 1 and distil.method == "top_1":
        yield "distil.temperature", distil.temperature, "the likeliest token is the same at any: remove it"
    if distil.cache and distil.method == "full":
        yield "distil.cache", True, "whole distributions are not kept on disk: use distil.method top_k, or remove it"
    if distil.quantize == "int8" and strategy == "fsdp" and not distil.cache:
        yield "distil.quantize", "int8", "int8 weights cannot be sharded: use nf4, or fabric.strategy ddp"


def _without_effect(recipe: TrainingRecipe) -> Iterator[Mistake]:
    """Keys that others overrule."""
    data, train = recipe.data, recipe.train
    if data.val and data.val_fraction:
        yield "data.val_fraction", data.val_fraction, f"data.val {data.val} is measured instead: remove one of them"
    if recipe.eval.every and not (data.val or data.val_fraction or recipe.eval.tasks):
        share = "" if isinstance(recipe, PretrainRecipe) else " data.val_fraction"
        cure = f"there is nothing to measure: give data.val,{share} or eval.tasks, or remove it"
        yield "eval.every", recipe.eval.every, cure
    # The default of data.max_length is nobody's wish: then fit counts and tells the samples it leaves out.
    is_cut_to_fit = isinstance(recipe, PretrainRecipe)  # all its sequences are that long
    if data.max_length > train.micro_batch_tokens and data.max_length != Data.max_length and not is_cut_to_fit:
        cure = f"train.micro_batch_tokens {train.micro_batch_tokens} leaves out longer samples: raise it, or lower this"
        yield "data.max_length", data.max_length, cure


DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?", re.ASCII)
CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)", re.ASCII)
UNITS = (86400, 3600, 60, 1)


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `2h`, `1d`, `1h30m`, `01:30:00` or Slurm's `1-00:00:00`. ValueError for others."""
    found = DURATION.fullmatch(text) or CLOCK.fullmatch(text)
    seconds = sum(float(part or 0) * unit for part, unit in zip(found.groups(), UNITS, strict=True)) if found else 0.0
    if not 0 < seconds < math.inf:
        raise ValueError("give a time such as 90s, 30m, 2h, 1h30m or 01:30:00")
    return seconds

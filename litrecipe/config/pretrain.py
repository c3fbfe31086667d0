"""The groups of keys of pretraining, and how its stages are read.

As in `groups.py`: every field is one key, the string under it its documentation, and defaults live here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from litrecipe.config.groups import Data, Distil, Model, Optim, Router, Train, TrainingRecipe
from litrecipe.config.pipeline import NAME, NAMING


@dataclass
class PretrainModel(Model):
    """Which model, and what it starts from."""

    init_std: float | None = None
    """Standard deviation of fresh matrices (default: `initializer_range` of `config.json`)."""
    scaled_init: bool | None = None
    """Draw what writes into the residual stream smaller, by 1/√(2 · layers) (default: as the family's makers did)."""
    rope_theta: float | None = None
    """Base of the rotary embedding instead of that of `config.json`: for longer sequences a higher one."""


@dataclass
class PretrainData(Data):
    """What is trained on, as a stream of documents."""

    sources: dict[str, str] = field(default_factory=dict)
    """Several sources by name instead of `train`, each in the same forms: `{books: shards/books, code: a.jsonl}`."""
    mix: dict[str, float] = field(default_factory=dict)
    """Name → share of the tokens, as numbers of any sum (default: by the tokens that each source has)."""
    temperature: float = 1.0
    """Shares w become w^(1/temperature): above 1 small sources count more."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """Name (`train` where there is one source) → how often a source is gone through at most; then the others share what
    was its. Sources without repeat as long as the run lasts."""
    max_length: int = 2048
    """Tokens of a sequence."""
    attend_across: bool = False
    """Let tokens see the documents before their own in the sequence."""
    val_tokens: int = 1_000_000
    """At most about so many tokens of `val` are measured."""
    workers: int | None = None
    """Processes that prepare raw text (default: one a core)."""


@dataclass
class PretrainOptim(Optim):
    """The optimizer."""

    lr: float = 3e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates; the first is the momentum of `sgd`."""
    weight_decay: float = 0.1
    """Weight decay on matrices, decoupled from the gradient (`sgd` adds it to the gradient); vectors (norms, biases)
    are left alone."""
    decay_embeddings: bool = True
    """Whether the embedding decays as well."""
    mup_base_width: int | None = None
    """Hidden size at which `lr` and `model.init_std` were found. At another one, d, the layers' matrices learn at
    lr · base/d and start from init_std · √(base/d) (muP as in MiniCPM, 2404.06395). Both carry over where the logits
    are divided by d/base as well: this and the multipliers of embedding and residual stream are the model's own
    (`logits_scaling` and others of `model_type` granite)."""


@dataclass
class PretrainTrain(Train):
    """How long, and in what portions. A step is one optimizer step, of whole sequences."""

    epochs: float | None = None
    """Stop after so many times the tokens of all sources (default 1 when neither `max_steps` nor `max_tokens` is
    set)."""
    global_batch_size: int = 32
    """Sequences of one step, over all ranks."""
    initial_batch_size: int | None = None
    """Sequences of the first step, where batches grow."""
    batch_warmup_steps: int = 0
    """Steps over which they grow, evenly."""


@dataclass
class Pretrain:
    """What else there is to pretraining."""

    z_loss: float = 0.0
    """Weight of the mean of log² Z over the predicted tokens, which holds logits near 0 (PaLM: 1e-4)."""
    spike_sigmas: float | None = 6.0
    """Pass over a step whose loss or gradient norm lies that many standard deviations above the mean of the steps
    before it, or is not finite (null: never)."""
    spike_window: int = 128
    """Steps of which mean and deviation are taken; none is passed over before a quarter of them are there."""


@dataclass
class PretrainRecipe(TrainingRecipe):
    """Pretraining on a stream of documents, from fresh weights or on, in one stage or several."""

    model: PretrainModel = field(default_factory=PretrainModel)
    data: PretrainData = field(default_factory=PretrainData)
    optim: PretrainOptim = field(default_factory=PretrainOptim)
    train: PretrainTrain = field(default_factory=PretrainTrain)
    pretrain: Pretrain = field(default_factory=Pretrain)
    router: Router = field(default_factory=Router)
    distil: Distil = field(default_factory=Distil)
    stages: dict[str, Any] = field(default_factory=dict)
    """Name → the keys in which a stage differs from what stands outside of them, in the order in which they run:
    `{core: {train: {max_tokens: 2e9}}, long: {data: {max_length: 8192}, …}, …}`. `--help stages` shows them all."""
    out_dir: str = "runs/pretrain"

    @property
    def parts(self) -> dict[str, PretrainRecipe]:
        """The recipe of each stage; without stages the recipe itself, under no name."""
        return self.stages or {"": self}


OF_A_STAGE: dict[str, tuple[str, ...]] = {
    "data": ("train", "sources", "mix", "temperature", "max_epochs", "columns", "max_length", "attend_across"),
    "schedule": ("name", "warmup_steps", "decay_steps", "decay", "half_life_steps", "min_lr_ratio"),
    "optim": ("lr",),
    "model": ("rope_theta",),
    "distil": ("teacher",),
    "train": (
        "max_steps",
        "epochs",
        "max_tokens",
        "global_batch_size",
        "initial_batch_size",
        "batch_warmup_steps",
        "micro_batch_tokens",
    ),
}
"""Group → the keys that a stage may have for itself."""


EACH_STAGE = {f"{group}.{key}" for group, keys in OF_A_STAGE.items() for key in keys}
"""The same, as full names."""


def stage_keys(recipe: PretrainRecipe) -> dict[str, dict[str, Any]]:
    """All that a stage may have for itself, as a tree."""
    return {group: {key: getattr(getattr(recipe, group), key) for key in keys} for group, keys in OF_A_STAGE.items()}


def check_stages(recipe: PretrainRecipe) -> Iterator[tuple[str, Any, str]]:
    """How stages go together: key, value, cure."""
    teacher = recipe.distil.teacher
    for name, stage in recipe.stages.items():
        if stage.distil.teacher not in (None, teacher):
            cure = "write distil outside of the stages, and `distil: {teacher: null}` in those that do without"
            yield f"stages.{name}.distil.teacher", stage.distil.teacher, cure
    if teacher is not None and recipe.stages and all(stage.distil.teacher is None for stage in recipe.stages.values()):
        yield "distil.teacher", teacher, "no stage has it: remove it, or let one learn from it"


def check_pretrain(recipe: PretrainRecipe) -> Iterator[tuple[str, Any, str]]:
    """Which keys go together: key, value, cure."""
    data, train = recipe.data, recipe.train
    for key in ("format", "mask", "date"):
        if (value := getattr(data, key)) != getattr(Data, key):
            yield f"data.{key}", value, "of documents all is learnt, as it stands: remove it"
    if data.val_fraction:
        yield "data.val_fraction", data.val_fraction, "documents are held out by data.val: remove it"
    if data.sources and data.train:
        none = ", ".join(f"{name}: null" for name in data.sources)
        yield (
            "data.train",
            data.train,
            f"data.sources are taken instead: remove one of them (`data.sources: {{{none}}}`)",
        )
    names = list(data.sources) or ["train"]
    for name in data.sources:
        if not NAME.fullmatch(name):
            yield "data.sources", name or "''", f"no name for a source: {NAMING}"
    if data.mix and not data.sources:
        shares = ", ".join(f"{name}: null" for name in data.mix)
        cure = f"there are no data.sources to have shares: give some, or take them away: `data.mix: {{{shares}}}`"
        yield "data.mix", ", ".join(data.mix), cure
    for key in ("mix", "max_epochs") if data.sources else ("max_epochs",):
        for name, value in getattr(data, key).items():
            if name not in names:
                cure = f"no such source: there are {', '.join(names)}: put it right, or take it away (`{name}: null`)"
                yield f"data.{key}", name, cure
            elif value <= 0:
                yield f"data.{key}", f"{name}: {value:g}", "give a number above 0, or leave the source out"
    if data.mix and data.sources and (missing := [name for name in names if name not in data.mix]):
        yield "data.mix", f"{missing[0]}: missing", "give all sources a share, or none"
    if train.batch_warmup_steps and train.initial_batch_size is None:
        yield "train.batch_warmup_steps", train.batch_warmup_steps, "give train.initial_batch_size, or remove it"
    if train.initial_batch_size is not None:
        if not train.batch_warmup_steps:
            yield "train.initial_batch_size", train.initial_batch_size, "give train.batch_warmup_steps, or remove it"
        if train.initial_batch_size > train.global_batch_size:
            cure = f"batches grow to train.global_batch_size {train.global_batch_size}: give that or less"
            yield "train.initial_batch_size", train.initial_batch_size, cure
    if recipe.model.init == "random" and recipe.adapter.method != "none":
        cure = "fresh weights are nothing to adapt: use none, or model.init pretrained"
        yield "adapter.method", recipe.adapter.method, cure
    if recipe.model.init == "pretrained":
        for key in ("init_std", "scaled_init"):
            if (value := getattr(recipe.model, key)) is not None:
                yield f"model.{key}", value, "only model.init random knows it: remove it"
    if data.max_length > train.micro_batch_tokens:
        cure = f"train.micro_batch_tokens {train.micro_batch_tokens} cannot hold a sequence: raise it, or lower this"
        yield "data.max_length", data.max_length, cure

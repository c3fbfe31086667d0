"""A model opened to be measured or talked to: one process, one device, no gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from litrecipe.checkpoint.load import load_model, load_reward_model
from litrecipe.checkpoint.source import ModelFiles, open_asked
from litrecipe.config import groups, schema
from litrecipe.config.errors import InputError
from litrecipe.config.progress import say
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import accelerator_of
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.reward import RewardModel

M = TypeVar("M", bound=Trunk)
Reach = int | Callable[[Tokenizer], int] | None
"""Tokens of the longest sequence that will be read, or how the tokenizer tells them; None: as many as the model was
made for."""


@dataclass(frozen=True)
class Session(Generic[M]):
    """What the verbs that only read a model work with."""

    model: M
    """In evaluation mode, on its device."""
    tokenizer: Tokenizer
    source: str
    """Where it came from."""
    quantize: groups.Quantize
    """How its base is stored."""


def open_session(
    model: groups.Model, quantize: groups.Quantize, fabric: groups.Fabric, *, longest: Reach = None
) -> Session[Decoder]:
    """A language model; see `open_any`."""
    return _open(load_model, model, quantize, fabric, longest)


def open_any(
    model: groups.Model,
    quantize: groups.Quantize,
    fabric: groups.Fabric,
    *,
    as_judge: bool = False,
    longest: Reach = None,
    shared: bool = False,
) -> Session[Decoder] | Session[RewardModel]:
    """Load a Hugging Face folder, hub id, GGUF file, PEFT adapter folder, or the final model of a run directory.

    The model of a run is read as it was trained: on the same date and, where `quantize` says nothing, on a base
    quantised alike. `as_judge` takes a hydra for the reward model that it is, not for the language model. A `shared`
    model is still to be cut and filled, see `load_model`.

    Raises InputError for a source that cannot be opened and for `fabric` settings that only training knows.
    """
    files = open_asked(model)
    if files.is_reward_model or (files.is_hydra and as_judge):
        return _open(load_reward_model, model, quantize, fabric, longest, shared)
    return _open(load_model, model, quantize, fabric, longest, shared)


def _open(
    load: Callable[..., M],
    model: groups.Model,
    quantize: groups.Quantize,
    fabric: groups.Fabric,
    longest: Reach,
    shared: bool = False,
) -> Session[M]:
    device = _device(fabric)
    files = open_asked(model)
    run = schema.load_run(Path(model.source))
    if run is not None and quantize.method == "none" and run.quantize.method != "none":
        quantize = run.quantize
        say(f"{model.source}: base quantised to {quantize.method}, as in training (not so with its folder final/)")
    tokenizer = Tokenizer.load(files.tokenizer_dir, model.chat_template, run.data.date if run else None)
    files = files.for_length(longest(tokenizer) if callable(longest) else longest)
    say_positions(files)
    loaded = load(
        files,
        dtype=torch.bfloat16 if fabric.precision == "bf16-true" else torch.float32,
        device=device,
        quantize=quantize,
        init=model.init,
        shared=shared,
    )
    loaded.eval().requires_grad_(False)
    if fabric.compile:
        loaded.compile_blocks()
    return Session(loaded, tokenizer, model.source, quantize)


def say_positions(files: ModelFiles) -> None:
    """By which positions a run goes, where there is a choice."""
    if note := files.architecture.positions_note:
        say(f"{files.source}: {note}")


def _device(fabric: groups.Fabric) -> torch.device:
    if mistakes := only_training_knows(fabric):
        raise InputError(*mistakes)
    return torch.device(accelerator_of(fabric))


def only_training_knows(fabric: groups.Fabric) -> list[str]:
    """A line for each setting with which nothing is measured."""
    mistakes = []
    if fabric.devices not in ("auto", 1) or fabric.num_nodes != 1 or fabric.strategy != "auto":
        mistakes.append(f"fabric.devices: {fabric.devices}: evaluation and sampling run in one process: leave it out")
    if fabric.precision == "bf16-mixed":
        mistakes.append("fabric.precision: bf16-mixed: only training mixes precisions: use 32-true or bf16-true")
    return mistakes

"""What `--dry_run` shows of a recipe that samples from the model it trains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from litrecipe.checkpoint.source import ModelFiles, open_model
from litrecipe.config import progress
from litrecipe.config.online import Online, OnlineRecipe, method_of
from litrecipe.data.packing import pack
from litrecipe.data.prompts import PromptSet
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import world_size
from litrecipe.model.architecture import Architecture, count_parameters
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.recipes.dry_run import Load, memory_of, parameter_and_memory_table, show_recipe
from litrecipe.rollout.practice import CACHE_TOKENS
from litrecipe.rollout.source import steps_of
from litrecipe.rollout.sources import MODEL


def show_online(
    recipe: OnlineRecipe, files: ModelFiles, tokenizer: Tokenizer, prompts: PromptSet, *, frozen_copy: bool
) -> int:
    """Print recipe, parameters, memory with the longest completions there may be, steps, and a prompt."""
    console, world = progress.console(), world_size(recipe.fabric)
    _, config = method_of(recipe)
    show_recipe(recipe)
    load = longest_rows(recipe, config, prompts, world)
    judges = [open_model(spec.removeprefix(MODEL)) for spec in recipe.rewards.sources if spec.startswith(MODEL)]
    table = replace(
        memory_of(recipe, files, load, frozen_copy),
        judges=sum(4 * count_parameters(judge.architecture, is_reward_model=True) for judge in judges),
        cache=cache_bytes(recipe, config, files.architecture, prompts, world),
    )
    console.print(parameter_and_memory_table(recipe, table, load, world))
    steps = steps_of(config, recipe.train, len(prompts.train))
    a_rollout = config.minibatches * config.epochs
    completions = -(-steps // a_rollout) * config.rollout_batch_size
    console.print(
        f"[bold]steps[/bold] {steps}: {a_rollout} on each rollout of {config.rollout_batch_size} completions "
        f"({config.completions_per_prompt} a prompt), {completions} completions in all, of up to "
        f"{config.max_new_tokens} tokens; each step sees {config.rollout_batch_size // config.minibatches}"
    )
    console.print(f"[bold]data[/bold]\n{prompts.report}", highlight=False)
    console.print("[bold]one prompt[/bold], as it is asked")
    console.print(tokenizer.decode(prompts.train[0].tokens.tolist(), skip_special=False), highlight=False, markup=False)
    return 0


def longest_rows(recipe: OnlineRecipe, config: Online, prompts: PromptSet, world: int) -> Load:
    """A step whose prompts are the longest there are and whose completions are as long as they may be."""
    groups = config.rollout_batch_size // config.completions_per_prompt // config.minibatches
    longest = sorted(prompts.train, key=lambda prompt: -len(prompt.tokens))[:groups]
    said = np.ones(config.max_new_tokens, dtype=np.int32), np.ones(config.max_new_tokens, dtype=np.float32)
    samples = [
        Sample(
            prompt.where,
            (
                Segment(prompt.tokens, np.zeros(len(prompt.tokens), dtype=np.float32)),
                *(Segment(*said, parent=0) for _ in range(config.completions_per_prompt)),
            ),
        )
        for prompt in longest
    ]
    lengths = [one.length for one in samples]
    packing = pack(lengths, max(recipe.train.micro_batch_tokens, max(lengths)), multiple_of=world)
    row = max(packing.rows, key=lambda places: sum(lengths[place] for place in places))
    return Load(make_row([samples[place] for place in row]), len(packing.rows) // world, sum(lengths))


def cache_bytes(
    recipe: OnlineRecipe, config: Online, architecture: Architecture, prompts: PromptSet, world: int
) -> int:
    """Keys and values of the completions that are sampled at once."""
    longest = max(len(prompt.tokens) for prompt in prompts.train) + config.max_new_tokens
    tokens = min(max(CACHE_TOKENS, longest), -(-config.rollout_batch_size // world) * longest)
    bytes_each = 4 if recipe.fabric.precision == "32-true" else 2
    return 2 * tokens * architecture.num_layers * architecture.num_kv_heads * architecture.head_dim * bytes_each

"""What `--dry_run` shows of a recipe that samples from the model it trains."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from litrecipe.checkpoint.source import ModelFiles, open_model
from litrecipe.config import progress
from litrecipe.config.groups import TrainingRecipe
from litrecipe.config.online import OnlineRecipe, method_of, sampling_of
from litrecipe.config.progress import counted
from litrecipe.config.rounds import IterativeDpoRecipe, RejectionSamplingRecipe
from litrecipe.config.schema import load_run
from litrecipe.data.packing import pack
from litrecipe.data.prompts import PromptSet
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.forecast import device_of, layout_of
from litrecipe.engine.memory import frozen_bytes
from litrecipe.model.architecture import Architecture
from litrecipe.model.laid_out import LARGEST, pays, size
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.model.tensor_plan import narrowed
from litrecipe.recipes.dry_run import show_recipe
from litrecipe.recipes.dry_run_ranks import Load, memory_of, print_rank
from litrecipe.recipes.training import precision_of
from litrecipe.rollout.source import steps_of
from litrecipe.rollout.sources import MODEL


@dataclass(frozen=True)
class Shape:
    """What is sampled and learnt at once."""

    completions: int
    """Sampled at once, over all ranks."""
    longest: int
    """Tokens of the longest."""
    prompts: int
    """Prompts of a step."""
    learnt: int
    """Completions of each that are learnt."""
    together: bool = False
    """Whether those of a prompt must be in one row."""


def show_online(
    recipe: OnlineRecipe, files: ModelFiles, tokenizer: Tokenizer, prompts: PromptSet, *, frozen_copy: bool
) -> int:
    """Print recipe, parameters, memory with the longest completions there may be, steps, and a prompt."""
    _, config = method_of(recipe)
    n, size = config.completions_per_prompt, config.rollout_batch_size
    steps = steps_of(config, recipe.train, len(prompts.train))
    a_rollout = config.minibatches * config.epochs
    said = (
        f"[bold]steps[/bold] {steps}: {a_rollout} on each rollout of {counted(size, 'completion')} "
        f"({n} a prompt), {counted(-(-steps // a_rollout) * size, 'completion')} in all, of up to "
        f"{config.max_new_tokens} tokens; each step sees {size // config.minibatches}"
    )
    shape = Shape(size, config.max_new_tokens, size // n // config.minibatches, n)
    return _show(recipe, files, tokenizer, prompts, shape, said, frozen_copy=frozen_copy)


def show_rounds(
    recipe: IterativeDpoRecipe, files: ModelFiles, tokenizer: Tokenizer, prompts: PromptSet, *, frozen_copy: bool
) -> int:
    """The same of rounds of pairs."""
    rounds, config = recipe.iterative_dpo, recipe.iterative_dpo.as_rollouts()
    steps = steps_of(config, recipe.train, len(prompts.train))
    a_round = config.minibatches * config.epochs
    pairs = -(-rounds.prompts_per_round // config.minibatches)
    said = (
        f"[bold]steps[/bold] at most {steps}, in {counted(-(-steps // a_round), 'round')} of up to {a_round}: in a "
        "round "
        f"{counted(rounds.prompts_per_round, 'prompt')} get {counted(rounds.completions_per_prompt, 'completion')} "
        "each, of up to "
        f"{counted(rounds.max_new_tokens, 'token')}; each step sees up to {counted(pairs, 'pair')} of them"
    )
    shape = Shape(
        rounds.prompts_per_round * rounds.completions_per_prompt, rounds.max_new_tokens, pairs, 2, together=True
    )
    return _show(recipe, files, tokenizer, prompts, shape, said, frozen_copy=frozen_copy)


def show_rejection_sampling(
    recipe: RejectionSamplingRecipe, files: ModelFiles, tokenizer: Tokenizer, prompts: PromptSet
) -> int:
    """The same of sampling once and learning the best."""
    config, train = recipe.rejection_sampling, recipe.train
    count, n = len(prompts.train), config.completions_per_prompt
    epochs = 1.0 if train.epochs is None and train.max_steps is None else train.epochs
    limits = [
        train.max_steps,
        None if epochs is None else -(-round(epochs * count * config.keep) // train.global_batch_size),
    ]
    steps = min(limit for limit in limits if limit is not None)
    said = (
        f"[bold]sampling[/bold] {counted(count, 'prompt')}, {counted(n, 'completion')} each, {count * n} in all, of up "
        "to "
        f"{counted(config.max_new_tokens, 'token')}\n[bold]steps[/bold] at most {steps} of "
        f"{counted(train.global_batch_size, 'conversation')}"
    )
    shape = Shape(config.prompts_per_batch * n, config.max_new_tokens, train.global_batch_size, 1)
    return _show(recipe, files, tokenizer, prompts, shape, said, frozen_copy=False)


def _show(
    recipe: OnlineRecipe | RejectionSamplingRecipe,
    files: ModelFiles,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    shape: Shape,
    said: str,
    *,
    frozen_copy: bool,
) -> int:
    """`said` is about steps."""
    console, shares = progress.console(), layout_of(recipe.fabric).data
    show_recipe(recipe)
    own = narrowed(files.architecture, recipe.fabric.tensor_parallel)
    load = longest_rows(recipe, shape, prompts, shares)
    sources = [*recipe.rewards.sources, *(recipe.eval.sources if isinstance(recipe, OnlineRecipe) else [])]
    table = replace(
        memory_of(recipe, files, load, frozen_copy),
        judges=sum(judge_bytes(recipe, spec.removeprefix(MODEL)) for spec in sources if spec.startswith(MODEL)),
        cache=cache_bytes(recipe, shape, own, prompts, shares),
        laid_out=laid_out_bytes(recipe, shape, own, shares),
    )
    print_rank(recipe, files, load, table, samples=True)
    console.print(said)
    console.print(f"[bold]data[/bold]\n{prompts.report}", highlight=False)
    console.print("[bold]one prompt[/bold], as it is asked")
    console.print(tokenizer.decode(prompts.train[0].tokens.tolist(), skip_special=False), highlight=False, markup=False)
    return 0


def judge_bytes(recipe: TrainingRecipe, source: str) -> int:
    """Of a reward model: stored as it was trained (`evaluation.session.open_any`), and shared as the policy is."""
    run, layout = load_run(Path(source)), layout_of(recipe.fabric)
    with torch.device("meta"):
        judge = RewardModel(open_model(source).architecture).to(precision_of(recipe))
    shards = layout.data if layout.sharded else None
    return frozen_bytes(judge, run.quantize.method if run else "none", sharded_over=shards, split_over=layout.tensor)


def longest_rows(recipe: TrainingRecipe, shape: Shape, prompts: PromptSet, world: int) -> Load:
    """A step whose prompts are the longest there are and whose completions are as long as they may be."""
    longest = sorted(prompts.train, key=lambda prompt: -len(prompt.tokens))[: shape.prompts]
    said = np.ones(shape.longest, dtype=np.int32), np.ones(shape.longest, dtype=np.float32)
    samples = []
    for prompt in longest:
        root = Segment(prompt.tokens, np.zeros(len(prompt.tokens), dtype=np.float32))
        fit = max(1, (recipe.train.micro_batch_tokens - len(prompt.tokens)) // shape.longest)
        most = shape.learnt if shape.together else fit
        for first in range(0, shape.learnt, most):
            branches = [Segment(*said, parent=0)] * min(most, shape.learnt - first)
            samples.append(Sample(prompt.where, (root, *branches)))
    lengths = [one.length for one in samples]
    packing = pack(lengths, max(recipe.train.micro_batch_tokens, max(lengths)), multiple_of=world)
    row = max(packing.rows, key=lambda places: sum(lengths[place] for place in places))
    return Load(make_row([samples[place] for place in row]), len(packing.rows) // world, sum(lengths))


def cache_bytes(
    recipe: TrainingRecipe, shape: Shape, architecture: Architecture, prompts: PromptSet, world: int
) -> int:
    """Keys and values of the completions that are sampled at once."""
    longest = max(len(prompt.tokens) for prompt in prompts.train) + shape.longest
    tokens = min(max(sampling_of(recipe)[1].cache_tokens, longest), -(-shape.completions // world) * longest)
    bytes_each = 4 if recipe.fabric.precision == "32-true" else 2
    return tokens * architecture.cached_numbers * bytes_each


def laid_out_bytes(recipe: TrainingRecipe, shape: Shape, architecture: Architecture, world: int) -> int:
    """Copies of the weights that are sampled with, see `model.laid_out`."""
    fabric, completions = recipe.fabric, -(-shape.completions // world)
    plain = fabric.precision == "32-true" and recipe.quantize.method == "none" and not fabric.compile
    plain = plain and fabric.tensor_parallel == 1
    copied = plain and device_of(fabric) == "cpu" and pays(completions, completions * shape.longest)
    return size(architecture) if copied and size(architecture) <= LARGEST else 0

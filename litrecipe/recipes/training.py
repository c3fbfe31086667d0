"""What the recipes that train do alike: open what they start from, prepare data, load, save, know themselves again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from litrecipe.checkpoint.hf import save_hydra, save_model, save_reward_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.reward import pad_for_rewards
from litrecipe.checkpoint.source import ModelFiles, open_asked
from litrecipe.config.groups import Adapter, Dpo, Precision, RewardRecipe, TrainingRecipe
from litrecipe.config.online import longest_of
from litrecipe.config.progress import say
from litrecipe.data.prepared import Kind, Prepared, prepare
from litrecipe.data.prompts import PromptSet, load_prompts
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fit import StepResult
from litrecipe.engine.rundir import RunDir
from litrecipe.engine.telling import check_loggers, check_login
from litrecipe.evaluation.run import evaluate, metrics, plan
from litrecipe.evaluation.session import say_positions
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.hydra import Hydra
from litrecipe.model.reward import RewardModel
from litrecipe.model.tensor_plan import check_divides

M = TypeVar("M", bound=Trunk)
R = TypeVar("R", bound=TrainingRecipe)


def begin(recipe: TrainingRecipe, *, dry_run: bool) -> tuple[ModelFiles, Tokenizer]:
    """The model's files and its tokenizer, once everything that can be told without them is right."""
    check_loggers(recipe.log)
    if not dry_run:
        check_login(recipe.log)
        RunDir(recipe.out_dir).check_as_run(recipe.checkpoint.resume)
    if recipe.eval.tasks:
        plan(recipe.eval.tasks, key="eval.tasks")  # tells mistyped tasks now, not at the first evaluation
    files = open_asked(recipe.model).for_length(longest_of(recipe))
    say_positions(files)
    check_divides(files.architecture, recipe.fabric.tensor_parallel)
    if not isinstance(recipe, RewardRecipe) or recipe.reward.sft_coef:
        files.refuse_reward_model()
    return files, Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template, recipe.data.date)


def prepared(kind: Kind[Any], recipe: TrainingRecipe, files: ModelFiles, tokenizer: Tokenizer) -> Prepared:
    """The recipe's data as samples of a kind; says what became of its rows."""
    longest = files.architecture.max_positions
    data = prepare(kind, recipe.data, tokenizer, seed=recipe.train.seed, max_positions=longest)
    say(str(data.report))
    return data


def asked(recipe: TrainingRecipe, max_new_tokens: int, files: ModelFiles, tokenizer: Tokenizer) -> PromptSet:
    """The recipe's data as prompts that leave room for a completion; says what became of its rows."""
    found = prompts_for(recipe, max_new_tokens, files, tokenizer)
    say(str(found.report))
    return found


def prompts_for(recipe: TrainingRecipe, max_new_tokens: int, files: ModelFiles, tokenizer: Tokenizer) -> PromptSet:
    """The same, and says nothing."""
    longest, seed = files.architecture.max_positions, recipe.train.seed
    return load_prompts(recipe.data, tokenizer, max_new_tokens=max_new_tokens, max_positions=longest, seed=seed)


def load_to_train(load: Callable[..., M], files: ModelFiles, recipe: TrainingRecipe) -> M:
    """The model as a recipe trains it: base weights, quantised or not, and the adapter. Where processes share it, it
    gets its values when it is set up."""
    return load(
        files,
        dtype=precision_of(recipe),
        quantize=recipe.quantize,
        adapter=recipe.adapter,
        init=recipe.model.init,
        seed=recipe.train.seed,
        shared=recipe.fabric.is_sharded,
    )


def alone(recipe: R) -> R:
    """The same for a process that shares its models with no other."""
    return replace(recipe, fabric=replace(recipe.fabric, strategy="auto", tensor_parallel=1))


def save_trained(
    folder: Path,
    model: Decoder | RewardModel,
    files: ModelFiles,
    recipe: TrainingRecipe,
    statistics: tuple[float, float] | None = None,
) -> None:
    """Write what a recipe trained: an adapter folder, or a whole model. Every rank has to call this.

    `statistics` are mean and standard deviation of a reward model's rewards.
    """
    adapter = adapter_of(recipe, files)
    template, tokenizer = recipe.model.chat_template, files.tokenizer_dir
    pad = None
    if isinstance(model, RewardModel):
        pad = pad_for_rewards(tokenizer, files.architecture, chat_template=template)
    if adapter is not None:
        save_adapter(
            folder,
            model,
            adapter,
            files.base,
            tokenizer,
            chat_template=template,
            pad_token=pad,
            statistics=statistics,
        )
    elif isinstance(model, Hydra):
        assert pad is not None
        save_hydra(folder, model, tokenizer, pad_token=pad, statistics=statistics, chat_template=template)
    elif isinstance(model, RewardModel):
        assert pad is not None
        save_reward_model(folder, model, tokenizer, pad_token=pad, statistics=statistics, chat_template=template)
    else:
        save_model(folder, model, tokenizer, chat_template=template)


def adapter_of(recipe: TrainingRecipe, files: ModelFiles) -> Adapter | None:
    """The adapter's settings: the recipe's, or those of the adapter that is trained further."""
    if recipe.adapter.method != "none":
        return recipe.adapter
    return files.adapter.settings if files.adapter else None


def precision_of(recipe: TrainingRecipe) -> torch.dtype:
    """What a recipe's base weights are loaded in."""
    return torch.bfloat16 if recipe.fabric.precision == "bf16-true" else torch.float32


def make_ready(model: Trunk, recipe: TrainingRecipe) -> None:
    """Set a model that was loaded to how the recipe trains it. Comes last: a compiled model cannot be copied."""
    model.train()
    model.activation_checkpointing = recipe.fabric.activation_checkpointing
    if recipe.fabric.compile:
        model.compile_blocks()


def task_runner(model: Decoder, tokenizer: Tokenizer, recipe: TrainingRecipe) -> Callable[[], dict[str, float]] | None:
    """Runs `eval.tasks` on the model as it stands; None where there are none."""
    if not recipe.eval.tasks:
        return None

    def run_tasks() -> dict[str, float]:
        results = evaluate(model, tokenizer, recipe.eval.tasks, limit=recipe.eval.limit, chatty=False)
        return {
            f"{task}/{name}": value for task, found in results["results"].items() for name, value, _ in metrics(found)
        }

    return run_tasks


def nats_apart(result: StepResult, dpo: Dpo, precision: Precision) -> float:
    """By how many nats an answer policy and reference differed in a step before which they were the same model; 0 where
    that is rounding."""
    rewards = (result.metrics.get(f"rewards/{answer}", 0.0) for answer in ("chosen", "rejected"))
    off = max(map(abs, rewards)) / dpo.beta
    return off if off > (1e-2 if precision == "32-true" else 1.0) else 0.0


def say_same(result: StepResult, dpo: Dpo) -> None:
    """That they did not differ."""
    log_2 = " = log 2" if dpo.loss == "sigmoid" and not dpo.mix and not dpo.nll_coef else ""
    say(f"start: policy and reference say the same, as they must; the loss was {result.loss:.4f}{log_2}")

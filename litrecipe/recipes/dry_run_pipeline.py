"""What `--dry_run` shows of a pipeline, and what is looked at before its first stage runs.

Stages read what earlier ones have not made yet: the model of the first stage stands in for models that are to come.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

from rich.table import Table

from litrecipe.checkpoint.source import open_asked, open_model, open_model_as
from litrecipe.config import progress
from litrecipe.config.checks import reset
from litrecipe.config.errors import InputError
from litrecipe.config.groups import EvaluateRecipe, Model, TrainingRecipe
from litrecipe.config.online import sampling_of
from litrecipe.config.pipeline import PipelineRecipe, flat, texts
from litrecipe.evaluation.run import plan
from litrecipe.recipes.distilling import open_teaching
from litrecipe.recipes.dry_run import show_recipe, shown_instead
from litrecipe.recipes.training import begin, prompts_for
from litrecipe.rollout.sources import MODEL, check_columns_of, column_of, light_sources

FILES = {"align rloo": "grpo"}
"""Verbs whose file has another name."""


@dataclass
class Preview:
    """A stage as far as it can be shown now."""

    recipe: Any
    """With the first stage's model for those that are to come, and without what else is."""
    to_come: list[str] = field(default_factory=list)
    """The keys that speak of what is not there yet."""


def preview(pipeline: PipelineRecipe, name: str) -> Preview:
    """A stage's recipe in which everything exists."""
    recipe = pipeline.resolved(name)
    written = flat(pipeline.stages[name].recipe)
    to_come = [key for key, value in written.items() if any(map(pipeline.is_to_come, texts(value)))]
    first = _first_model(pipeline)
    for key in to_come:
        if key == "model.source":
            recipe.model = replace(first, chat_template=recipe.model.chat_template or first.chat_template)
        elif key == "rewards.sources":
            recipe.rewards.sources = {
                f"{MODEL}{first.source}" if pipeline.is_to_come(spec) else pipeline.located(spec): weight
                for spec, weight in written[key].items()
            }
        elif key != "data.train":
            reset(recipe, key)
    return Preview(recipe, to_come)


def _first_model(pipeline: PipelineRecipe) -> Model:
    """Of the first stage whose model is there; what no stage makes always is."""
    models = (stage.recipe.model for stage in pipeline.stages.values())
    found: Model = next(model for model in models if not pipeline.is_to_come(model.source))
    return replace(found, source=pipeline.located(found.source))


def check_recipes(pipeline: PipelineRecipe, names: list[str]) -> None:
    """Raise InputError with what the verbs themselves would find wrong with their recipes, of all stages at once."""
    mistakes: list[str] = []
    for name in names:
        mistakes += pipeline.stages[name].placed(name, mistakes_of(preview(pipeline, name)))
    if mistakes:
        raise InputError(*mistakes)


def mistakes_of(shown: Preview) -> list[str]:
    """What a verb itself would find wrong with its recipe before it learns anything."""
    mistakes: list[str] = []
    for look in (_open, _check_rewards, _check_columns):
        try:
            look(shown)
        except InputError as error:
            mistakes += error.mistakes
    return mistakes


def _open(shown: Preview) -> None:
    recipe = shown.recipe
    if isinstance(recipe, TrainingRecipe):
        _, tokenizer = begin(recipe, dry_run=True)
        if hasattr(recipe, "distil"):
            open_teaching(recipe.distil, tokenizer)
    elif recipe.tasks:  # otherwise they are all to come
        plan(recipe.tasks)
        open_asked(recipe.model)
        if recipe.reference is not None:
            open_model_as(recipe.reference, "reference: ")


def _check_rewards(shown: Preview) -> None:
    sources = _sources(shown.recipe)
    mistakes: list[str] = []
    for spec in sources:
        if spec.startswith(MODEL):
            try:
                open_model(spec.removeprefix(MODEL))
            except InputError as error:
                mistakes += [line.replace("model.source", "rewards.sources", 1) for line in error.mistakes]
    if mistakes:
        raise InputError(*mistakes)


def _check_columns(shown: Preview) -> None:
    """Rules, and whether rows that are there have the columns that they read."""
    recipe = shown.recipe
    if not _sources(recipe):
        return
    light = light_sources(recipe.rewards).values()
    if any(map(column_of, light)) and "data.train" not in shown.to_come:
        files, tokenizer = begin(recipe, dry_run=True)
        _, config = sampling_of(recipe)
        check_columns_of(light, prompts_for(recipe, config.max_new_tokens, files, tokenizer).train)


def _sources(recipe: Any) -> dict[str, float]:
    return dict(getattr(getattr(recipe, "rewards", None), "sources", {}))


def show_pipeline(pipeline: PipelineRecipe) -> int:
    """Print the order of the stages, and of each its recipe and what its own dry run says; nothing is written."""
    check_recipes(pipeline, pipeline.wanted)
    console = progress.console()
    table = Table("", "stage", "verb", "reads", box=None, title="stages", title_justify="left")
    for number, (name, stage) in enumerate(pipeline.stages.items(), start=1):
        reads = ", ".join(f"{key} from {other}{file}" for key, other, file in stage.references())
        skipped = "" if name in pipeline.wanted else " (not in `only`)"
        table.add_row(str(number), name, f"{stage.verb}{skipped}", reads or "what is there already")
    console.print(table)
    for number, name in enumerate(pipeline.stages, start=1):
        if name in pipeline.wanted:
            console.print()
            console.rule(
                f"stage {number} of {len(pipeline.stages)}, {name}: {pipeline.stages[name].verb}", align="left"
            )
            _show_stage(pipeline, name)
    return 0


def _show_stage(pipeline: PipelineRecipe, name: str) -> None:
    console, shown = progress.console(), preview(pipeline, name)
    for key in shown.to_come:
        stands_in = (
            f": {shown.recipe.model.source} stands in below" if key in ("model.source", "rewards.sources") else ""
        )
        console.print(f"[bold]to come[/bold] {key}{stands_in}", highlight=False)
    with shown_instead(pipeline.resolved(name)):
        if "data.train" in shown.to_come or isinstance(shown.recipe, EvaluateRecipe):
            show_recipe(shown.recipe)
            if "data.train" in shown.to_come:
                most = shown.recipe.train.max_steps
                limit = f", at most {most}" if most else ""
                console.print(f"[bold]steps[/bold] as many as data.train gives, once it is there{limit}")
            return
        quiet = contextlib.redirect_stderr(io.StringIO()) if shown.to_come else contextlib.nullcontext()
        try:
            with quiet:  # what is said of a stand-in is not so
                main_of(pipeline.stages[name].verb)(shown.recipe, dry_run=True)
        except InputError:
            if not shown.to_come:
                raise
            console.print("[bold]memory and steps[/bold] cannot be told before that is there")


def main_of(verb: str) -> Callable[..., int]:
    """What runs a verb."""
    file = FILES.get(verb, verb.split()[-1].replace("-", "_"))
    run: Callable[..., int] = import_module(f"litrecipe.recipes.{file}").main
    return run

"""What the recipes that train do alike: open what they start from, prepare data, know themselves again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from litrecipe.checkpoint.source import ModelFiles, open_model
from litrecipe.config.groups import TrainingRecipe
from litrecipe.config.progress import say
from litrecipe.data.prepared import Kind, Prepared, prepare
from litrecipe.data.samples import SampleSet
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.rundir import RunDir
from litrecipe.engine.telling import check_loggers, check_login
from litrecipe.evaluation.run import evaluate, metrics, plan
from litrecipe.model.decoder import Decoder, Trunk


def begin(recipe: TrainingRecipe, *, dry_run: bool) -> tuple[ModelFiles, Tokenizer]:
    """The model's files and its tokenizer, once everything that can be told without them is right."""
    check_loggers(recipe.log)
    if not dry_run:
        check_login(recipe.log)
        RunDir(recipe.out_dir).check(recipe.checkpoint.resume)
    if recipe.eval.tasks:
        plan(recipe.eval.tasks, key="eval.tasks")  # tells mistyped tasks now, not at the first evaluation
    files = open_model(recipe.model.source, tokenizer=recipe.model.tokenizer)
    return files, Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template, recipe.data.date)


def prepared(kind: Kind[Any], recipe: TrainingRecipe, files: ModelFiles, tokenizer: Tokenizer) -> Prepared:
    """The recipe's data as samples of a kind; says what became of its rows."""
    longest = files.architecture.max_positions
    data = prepare(kind, recipe.data, tokenizer, seed=recipe.train.seed, max_positions=longest)
    say(str(data.report))
    return data


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


def identity(
    recipe: TrainingRecipe, files: ModelFiles, tokenizer: Tokenizer, train: SampleSet, **groups: Any
) -> dict[str, str]:
    """What must be the same when a run goes on; `groups` are the recipe's own, all of whose keys count."""
    return {
        "base weights": files.weights_hash(),
        "tokenizer": tokenizer.fingerprint,
        "data": train.fingerprint,
        "fabric.precision": recipe.fabric.precision,
        **_settings("adapter", files.adapter.settings if files.adapter else recipe.adapter),
        **_settings("quantize", recipe.quantize),
        **{name: value for group, values in groups.items() for name, value in _settings(group, values).items()},
    }


def _settings(group: str, values: Any) -> dict[str, str]:
    """Every key of a group with its value, for people to read; only `method` where that is `none`."""
    keys = {"method": "none"} if getattr(values, "method", None) == "none" else asdict(values)
    return {f"{group}.{key}": str(value) for key, value in keys.items()}

"""The recipes that ship with the program: list, show, copy, check."""

from __future__ import annotations

import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from litrecipe.config import schema
from litrecipe.config.checks import reset
from litrecipe.config.errors import InputError
from litrecipe.config.groups import EvaluateRecipe, TrainingRecipe
from litrecipe.config.merge import (
    Mistakes,
    displayed,
    find,
    find_in_hub,
    hub_folder,
    hub_names,
    path_of,
    read_text,
)
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.progress import counted
from litrecipe.config.recipes import RECIPES


def ls() -> int:
    """A table of all recipes: name (always whole), what it does, on what hardware."""
    from rich.table import Column, Table

    from litrecipe.config import progress

    table = Table(Column("recipe", no_wrap=True, min_width=max(map(len, hub_names()))), "what it does", box=None)
    for name in hub_names():
        told, hardware = headline(hub_folder() / f"{name}.yaml")
        table.add_row(name, f"{told.removesuffix('.')}. For {hardware}.")
    console = progress.console()
    if not console.is_terminal:  # a program reads this: do not fold lines
        console.width = 300
    console.print(table, highlight=False)
    return 0


def headline(recipe: Path) -> tuple[str, str]:
    """The first comment line of a recipe, and its `Hardware:` line."""
    comments = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    hardware = [line.removeprefix("Hardware: ") for line in comments if line.startswith("Hardware: ")]
    return comments[0], hardware[0]


def show(name: str, resolved: bool = False) -> int:
    """Print a recipe as it is written, or with `extends` and all defaults filled in."""
    path = _found(name)
    if resolved:
        print(schema.dump(schema.load(kind_of(path), [path])), end="")
        return 0
    mistakes = Mistakes()
    text = read_text(path, mistakes)
    if text is None:
        raise InputError(*mistakes)
    print(text, end="")
    return 0


def copy(name: str, file: str) -> int:
    """Copy a hub recipe. What it extends beside it is named by its hub name, so that the copy still finds it."""
    mistakes = Mistakes()
    source, target = find_in_hub(name, mistakes), Path(file)
    if source is None:
        raise InputError(*mistakes)
    if target.is_dir():
        target /= source.name
    if target.exists():
        raise InputError(f"{target}: exists: give another name, or remove it first")
    if not target.parent.is_dir():
        raise InputError(f"{target.parent}: no such folder: create it first")
    text = "".join(_extends_by_name(line, source) for line in source.read_text().splitlines(keepends=True))
    try:
        target.write_text(text)
    except OSError as error:
        raise InputError(f"{target}: {error.strerror}: give a place where a file can be written") from error
    print(f"wrote {target}: run it with `--config {target}`")
    return 0


def _extends_by_name(line: str, source: Path) -> str:
    key, _, base = line.partition(":")
    beside = source.parent / base.strip()
    if key.strip() != "extends" or not beside.is_file():
        return line
    return f"{key}: {displayed(beside).removesuffix('.yaml')}\n"


def validate(names: list[str]) -> int:
    """Check every key of recipes and build their models without weights; prints parameter counts.

    Raises InputError with the mistakes of all of them.
    """
    mistakes: list[str] = []
    for name in names or hub_names():
        try:
            path = _found(name)
            recipe: Any = schema.load(kind_of(path), [path])
            print(f"{name}: {_check_beyond_keys(recipe, path)}", flush=True)
        except InputError as error:
            mistakes += error.mistakes
    if mistakes:
        raise InputError(*mistakes)
    return 0


def _check_beyond_keys(recipe: Any, path: Path) -> str:
    """Look up generated data and tasks, and build the model without weights if it is at hand."""
    if isinstance(recipe, PipelineRecipe):
        return _check_stages(recipe, path)
    try:
        _check_data(recipe)
        source = _model_at_hand(recipe, path)
        return "valid" if source is None else f"valid, {_count_parameters(recipe, source)}"
    except InputError as error:
        raise InputError(*(f"{displayed(path)}: {mistake}" for mistake in error.mistakes)) from error


def _check_stages(pipeline: PipelineRecipe, path: Path) -> str:
    """The same of every stage, as far as it does not speak of what others make."""
    mistakes: list[str] = []
    told = []
    for name, stage in pipeline.stages.items():
        made = {key for key, _, _ in stage.references()}
        recipe = deepcopy(stage.recipe)
        for key in made - {"model.source", "rewards.sources"}:
            reset(recipe, key)
        try:
            _check_data(recipe)
            source = None if "model.source" in made else _model_at_hand(recipe, path)
            told.append(name if source is None else f"{name} ({_count_parameters(recipe, source)})")
        except InputError as error:
            mistakes += stage.placed(name, error.mistakes)
    if mistakes:
        raise InputError(*mistakes)
    return f"valid, {counted(len(told), 'stage')}: {', '.join(told)}"


def _check_data(recipe: Any) -> None:
    from litrecipe.data.readers import check_sources

    tasks: list[str] = []
    if isinstance(recipe, TrainingRecipe):
        sources = {"data.train": recipe.data.train, "data.val": recipe.data.val or ""}
        check_sources({key: source for key, source in sources.items() if source.startswith("toy:")})
        tasks = recipe.eval.tasks
    elif isinstance(recipe, EvaluateRecipe):
        tasks = recipe.tasks
    if tasks:
        from litrecipe.evaluation.run import plan

        plan(tasks, key="eval.tasks" if isinstance(recipe, TrainingRecipe) else "tasks")


def _model_at_hand(recipe: Any, path: Path) -> Path | None:
    """The `config.json` that the hub has (under `finetune`) for a model to be fetched, or a source on this disk."""
    known = (hub_folder() / "finetune" / name / "config.json" for name in (path.parent.name, path.stem))
    source = path_of(recipe.model.source)
    if path.is_relative_to(hub_folder()) and (config := next(filter(Path.is_file, known), None)):
        return config
    return source if source.exists() else None


def _count_parameters(recipe: Any, source: Path) -> str:
    """Build model and adapter on the meta device: shapes without weights."""
    import torch

    from litrecipe.checkpoint.source import open_model
    from litrecipe.engine.memory import meta_model
    from litrecipe.model.decoder import Decoder
    from litrecipe.recipes.training import adapter_of

    files = open_model(str(source))
    if not isinstance(recipe, TrainingRecipe):
        with torch.device("meta"):
            return f"{sum(p.numel() for p in Decoder(files.architecture).parameters()):,} parameters"
    adapter = adapter_of(recipe, files)
    model = meta_model(replace(recipe, adapter=adapter or recipe.adapter), files.architecture)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    count = f"{sum(p.numel() for p in model.parameters()) - (trained if adapter else 0):,} parameters"
    return f"{count}, {trained:,} more are trained in the adapter" if adapter else f"{count}, all trained"


def kind_of(path: Path) -> type:
    """The dataclass of a recipe: of the verb that its hub folders are named after, or that its comment runs it with, or
    the one that knows most of its keys."""
    if not path.is_relative_to(hub_folder()):
        return schema.kind_of(path)
    name = path.relative_to(hub_folder()).with_suffix("").as_posix()
    folders = name.split("/")
    runs = re.findall(rf"^#\s+litrecipe (.+) --config {re.escape(name)}$", path.read_text(encoding="utf-8"), re.M)
    verbs = [verb for verb in (folders[0], " ".join(folders[:2]), *runs) if verb in RECIPES]
    return RECIPES[verbs[0]] if verbs else schema.kind_of(path)


def _found(name: str) -> Path:
    mistakes = Mistakes()
    path = find(name, None, mistakes, key="")
    if path is None:
        raise InputError(*mistakes)
    return path

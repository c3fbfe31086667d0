"""The recipes that ship with the program: list, show, copy, check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import RECIPES, FinetuneRecipe
from litrecipe.config.merge import Mistakes, displayed, find, find_in_hub, hub_folder, hub_names, read_recipe


def ls() -> int:
    """A table of all recipes: name, what it does, on what hardware."""
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it does", "hardware", box=None)
    for name in hub_names():
        table.add_row(name, *headline(hub_folder() / f"{name}.yaml"))
    console = Console()
    if not console.is_terminal:  # a program reads this: do not fold lines
        console.width = 200
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
    print(schema.dump(schema.load(kind_of(path), [path])) if resolved else path.read_text(), end="")
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
    target.write_text("".join(_extends_by_name(line, source) for line in source.read_text().splitlines(keepends=True)))
    print(f"wrote {target}: run it with `--config {target}`")
    return 0


def _extends_by_name(line: str, source: Path) -> str:
    key, _, base = line.partition(":")
    beside = source.parent / base.strip()
    if key != "extends" or not beside.is_file():
        return line
    return f"extends: {displayed(beside).removesuffix('.yaml')}\n"


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
    """Check generated data, and build the model from the `config.json` beside the recipe where there is one."""
    from litrecipe.data.readers import check_source

    if isinstance(recipe, FinetuneRecipe):
        for key, source in (("data.train", recipe.data.train), ("data.val", recipe.data.val)):
            if source and source.startswith("toy:"):
                check_source(f"{displayed(path)}: {key}", source)
    config = path.parent / "config.json"
    return f"valid, {_count_parameters(recipe, config)}" if config.is_file() else "valid"


def _count_parameters(recipe: Any, config: Path) -> str:
    """Build model and adapter on the meta device: shapes without weights."""
    import torch

    from litrecipe.model.adapters import add_adapter
    from litrecipe.model.architecture import read_architecture
    from litrecipe.model.decoder import Decoder

    with torch.device("meta"):
        model = Decoder(read_architecture(json.loads(config.read_text())))
        count = sum(p.numel() for p in model.parameters())
        if recipe.adapter.method == "none":
            return f"{count:,} parameters, all trained"
        add_adapter(model, recipe.adapter)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{count:,} parameters, {trained:,} more are trained in the adapter"


def kind_of(path: Path) -> type:
    """The dataclass of a recipe: the verb its hub folder is named after, or the one that knows most of its keys."""
    if path.is_relative_to(hub_folder()):
        return RECIPES[path.relative_to(hub_folder()).parts[0]]
    names = set(read_recipe(path, Mistakes()).value)
    return max(RECIPES.values(), key=lambda kind: len(names.intersection(get_type_hints(kind))))


def _found(name: str) -> Path:
    mistakes = Mistakes()
    path = find(name, None, mistakes, key="")
    if path is None:
        raise InputError(*mistakes)
    return path

"""The recipes that ship with the program: list, show, copy, check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import RECIPES
from litrecipe.config.merge import displayed, find, hub_folder, hub_names


def ls() -> int:
    """A table of all recipes: name, what it does, on what hardware."""
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it does", "hardware", box=None)
    for name in hub_names():
        words, hardware = headline(hub_folder() / f"{name}.yaml")
        table.add_row(name, words, hardware)
    console = Console()
    if not console.is_terminal:  # whoever reads this is a program: do not fold names
        console.width = 200
    console.print(table, highlight=False)
    return 0


def headline(path: Path) -> tuple[str, str]:
    """The first comment line of a recipe, and its `Hardware:` line."""
    comments = [line.lstrip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#")]
    hardware = [line.removeprefix("Hardware: ") for line in comments if line.startswith("Hardware: ")]
    return (comments or [""])[0], (hardware or [""])[0]


def show(name: str, resolved: bool = False) -> int:
    """Print a recipe as it is written, or with `extends` and all defaults filled in."""
    path = _find(name)
    print(schema.dump(schema.load(kind_of(path), [path])) if resolved else path.read_text(), end="")
    return 0


def copy(name: str, file: str) -> int:
    """Copy a recipe to a file of one's own; what it extends is named so that it is found from there."""
    source, target = _find(name), Path(file)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise InputError(f"{target}: exists: give another name, or remove it first")
    if not target.parent.is_dir():
        raise InputError(f"{target}: no such folder {target.parent}: create it first")
    lines = source.read_text().splitlines(keepends=True)
    target.write_text("".join(_extends_by_name(line, source) for line in lines))
    print(f"wrote {target}: run it with --config {target}")
    return 0


def _extends_by_name(line: str, source: Path) -> str:
    """`extends: lora.yaml` beside a hub recipe becomes `extends: finetune/smollm2-135m/lora`."""
    key, _, base = line.partition(":")
    beside = source.parent / base.strip()
    if key != "extends" or not beside.is_file():
        return line
    return f"extends: {displayed(beside.resolve()).removesuffix('.yaml') if _is_ours(beside) else beside.resolve()}\n"


def _is_ours(path: Path) -> bool:
    return path.resolve().is_relative_to(hub_folder())


def validate(names: list[str]) -> int:
    """Check every key of recipes and build their models without weights; prints parameter counts.

    Raises InputError with the mistakes of all of them.
    """
    mistakes: list[str] = []
    for name in names or hub_names():
        try:
            path = _find(name)
            recipe = schema.load(kind_of(path), [path])
            print(f"{name}: {_parameters(recipe, path)}")
        except InputError as error:
            mistakes += error.mistakes
    if mistakes:
        raise InputError(*mistakes)
    return 0


def _parameters(recipe: Any, path: Path) -> str:
    """Build the model on the meta device from the `config.json` beside a recipe, and count."""
    config = path.parent / "config.json"
    if not config.is_file():
        return "keys are right"
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
    return f"{count:,} parameters, and {trained:,} trained in the adapter"


def kind_of(path: Path) -> type:
    """The recipe's dataclass: by the verb its hub folder is named after, else by the groups the file has."""
    if _is_ours(path):
        return RECIPES[path.resolve().relative_to(hub_folder()).parts[0]]
    return max(RECIPES.values(), key=lambda kind: len(_known_keys(path, kind)))


def _known_keys(path: Path, kind: type) -> set[str]:
    from litrecipe.config.merge import read_recipe

    return set(read_recipe(path, []).value) & set(kind.__dataclass_fields__)  # type: ignore[attr-defined]


def _find(name: str) -> Path:
    mistakes: list[str] = []
    path = find(name, None, mistakes, key="")
    if path is None:
        raise InputError(*mistakes)
    return path

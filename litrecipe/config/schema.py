"""From a merged recipe to its dataclass: every key and value is checked, and all mistakes are told at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml

from litrecipe.config.checks import parse_duration
from litrecipe.config.errors import InputError
from litrecipe.config.groups import TrainingRecipe
from litrecipe.config.merge import Mistakes, Node, merge, read_recipe
from litrecipe.config.pipeline import FINAL, PipelineRecipe, Stage
from litrecipe.config.pretrain import PretrainRecipe, stage_keys
from litrecipe.config.recipes import RECIPES
from litrecipe.config.stages import read_pipeline, recipe_of
from litrecipe.config.walk import Walk, describe, keys

__all__ = ["Walk", "describe", "dump", "keys", "kind_of", "load", "load_run", "parse_duration"]

GIVEN_TO_STAGES = ("out_dir", "schema_version")
"""Keys of a stage's recipe that are written once, for the pipeline."""
Recipe = TypeVar("Recipe")


def load(
    kind: type[Recipe],
    configs: Sequence[str | Path] = (),
    flags: Iterable[tuple[str, str]] = (),
    *,
    whole: bool = True,
    over: Callable[[Node, Mistakes], Node] = lambda tree, _: tree,
) -> Recipe:
    """Read a recipe: files (or hub names), later ones on top, and flags (`train.max_steps`, `3`) over all; `over` lays
    the tree that they make over defaults.

    Raises InputError with every mistake that can be found; without what is missing where this is not the `whole` line.
    """
    mistakes = Mistakes()
    verb = next((name for name, other in RECIPES.items() if other is kind), "")
    tree = over(merge(configs, flags, mistakes, verb), mistakes)
    refuse_other_verb(kind, tree)
    recipe: Any
    if kind is PipelineRecipe:
        recipe = read_pipeline(tree, mistakes, whole=whole)
    else:
        recipe, _ = recipe_of(kind, tree, mistakes, whole=whole)
    if mistakes:
        raise InputError(*mistakes)
    return cast(Recipe, recipe)


def refuse_other_verb(kind: type, tree: Node) -> None:
    """Raise InputError when a file has keys that are wrong here and all right for another verb."""
    written = {name: node.where for name, node in tree.value.items() if node.where}
    unknown = [name for name in tree.value if name not in get_type_hints(kind)]
    if not unknown or not written.keys() >= set(unknown):
        return
    if verbs := [verb for verb, other in RECIPES.items() if written.keys() <= get_type_hints(other).keys()]:
        where = written[unknown[0]]
        of_hub = [verb for verb in verbs if where.startswith(f"{verb.replace(' ', '/')}/")]
        verb = max(of_hub, key=len) if of_hub else verbs[0]
        raise InputError(f"{where}{unknown[0]}: is of a recipe for `litrecipe {verb}`: run that, or give another")


def kind_of(path: Path) -> type:
    """The dataclass that knows most of a recipe's groups and keys."""
    tree = read_recipe(path, Mistakes()).value
    return kind_with({name: node.value if node.is_group else () for name, node in tree.items()})


def kind_with(groups: Mapping[str, Iterable[str]]) -> type:
    """The same by names alone: group → its keys, none for what is no group."""
    written = set(groups) | {f"{name}.{key}" for name, inner in groups.items() for key in inner}
    return max(RECIPES.values(), key=lambda kind: len(written & _names_in(kind)))


@cache
def _names_in(kind: type) -> frozenset[str]:
    """Groups and full keys."""
    return frozenset((*get_type_hints(kind), *keys(kind)))


def load_run(run: Path) -> TrainingRecipe | None:
    """What a run directory was made by, that of a pipeline by its last stage; None where there is no `recipe.yaml`."""
    path = run / "recipe.yaml"
    if not path.is_file():
        return None
    kind = kind_of(path)
    if kind is PipelineRecipe:
        return load_run((run / FINAL).resolve().parent)
    recipe: Any = load(kind, [path])
    return recipe if isinstance(recipe, TrainingRecipe) else None


class _Dumper(yaml.SafeDumper):
    """Groups as blocks, lists on one line, and quotes where a character cannot be seen."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_str)
for _kind in (list, tuple):
    _Dumper.add_representer(_kind, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, True))


def dump(recipe: Any) -> str:
    """A recipe as YAML with all its keys; read back, it gives an equal recipe."""
    text = yaml.dump(_tree(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return str(text)


def _tree(recipe: Any) -> dict[str, Any]:
    keys = dataclasses.asdict(recipe)
    if isinstance(recipe, PipelineRecipe):
        keys["stages"] = {name: _of_stage(stage) for name, stage in recipe.stages.items()}
    if isinstance(recipe, PretrainRecipe):
        keys["stages"] = {name: stage_keys(stage) for name, stage in recipe.stages.items()}
    return keys


def _of_stage(stage: Stage) -> dict[str, Any]:
    """Verb and keys, but for those that the pipeline decides."""
    found = {name: value for name, value in _tree(stage.recipe).items() if name not in GIVEN_TO_STAGES}
    if "checkpoint" in found:
        del found["checkpoint"]["resume"]
    return {"verb": stage.verb} | found

"""A pipeline: recipes of several verbs in one, each fed by what those before it made.

As in `groups.py`: every field of the recipe is one key, and the string under it its documentation.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from litrecipe.config.files import read_json
from litrecipe.config.groups import EvaluateRecipe
from litrecipe.config.slurm import Slurm

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""What a stage or a source may be called: it is a folder, and a part of a key."""
NAMING = "use a-z, A-Z, 0-9, and behind the first also - and _"
"""The same in words."""
FINAL = "final"
"""What a run makes, and so no name of a stage."""
NOTE = "stage.json"
"""In a stage's run directory: what the pipeline remembers of it."""
REFERENCE = re.compile(rf"(?<![\w-])stage:({NAME.pattern})((?:/[^\s?,]*)?)")
"""`stage:NAME`, the model of a stage, or `stage:NAME/FILE`, a file in its run directory, anywhere in a text."""


@dataclass
class Resume:
    """Saving and resuming; each stage has keys of its own for the former."""

    resume: Literal["auto"] | None = None
    """`auto` goes on where the pipeline in `out_dir` stands, if there is one."""


@dataclass
class Stage:
    """One run of a pipeline."""

    verb: str
    recipe: Any
    """The verb's dataclass, as it was written: references to other stages stand as they are."""
    where: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    """Key → `file:line: ` where it was written; the stage itself under the empty key."""

    def references(self) -> Iterator[tuple[str, str, str]]:
        """Of each reference: the key that has it, the stage, and the file in that (empty: its model)."""
        for key, value in flat(self.recipe).items():
            for match in REFERENCE.finditer("\n".join(texts(value))):
                yield key, match[1], match[2]

    @property
    def needs(self) -> list[str]:
        """The stages that this one reads from, each once."""
        return list(dict.fromkeys(name for _, name, _ in self.references()))

    @property
    def makes_a_model(self) -> bool:
        """Whether there is a `final/` when it is done."""
        sampling = getattr(self.recipe, "rejection_sampling", None)
        return not isinstance(self.recipe, EvaluateRecipe) and not (sampling and sampling.only_sample)

    @property
    def makes_a_policy(self) -> bool:
        """Whether that is a language model to talk with."""
        return self.makes_a_model and self.verb != "align reward"

    def placed(self, name: str, mistakes: list[str]) -> list[str]:
        """Lines about this stage's recipe, with the pipeline's own keys and the place where it has them."""
        lines = []
        for line in mistakes:
            key = line.partition(":")[0]
            here = self.where.get("", "")
            known = key in flat(self.recipe)
            lines.append(
                f"{self.where.get(key, here)}stages.{name}.{line}" if known else f"{here}stages.{name}: {line}"
            )
        return lines


@dataclass
class PipelineRecipe:
    """Recipes as stages, each fed by those before it: the Llama 3 pipeline, for example."""

    checkpoint: Resume = field(default_factory=Resume)
    slurm: Slurm = field(default_factory=Slurm)
    stages: dict[str, Any] = field(default_factory=dict)
    """Name → a recipe with its `verb`, in the order in which they run: `{sft: {verb: finetune, …}, …}`. Each runs in
    `out_dir/NAME`. `stage:NAME` in any text is the model that an earlier stage made, `stage:NAME/x` a file of its run;
    `extends` takes a recipe of that verb."""
    only: list[str] = field(default_factory=list)
    """Names of stages: run no others. What these need must be finished, and is taken as it is."""
    seed: int = 0
    """`train.seed` of every stage that sets none."""
    out_dir: str = "runs/pipeline"
    """Folder of the stages' run directories, with `pipeline.json`, and in `final` what the last policy has become."""
    schema_version: int = 1
    """Version of these keys; older recipes are migrated when they are read."""

    @property
    def wanted(self) -> list[str]:
        """The stages that are to run, in order."""
        return [name for name in self.stages if not self.only or name in self.only]

    def folder(self, name: str) -> Path:
        """A stage's run directory."""
        return Path(self.out_dir) / name

    def remembered(self, name: str) -> dict[str, Any]:
        """What was noted of a stage when it was last run here; empty before it begins. `done` where it ended well."""
        path = self.folder(name) / NOTE
        return read_json(path) if path.is_file() else {}

    def resolved(self, name: str) -> Any:
        """A stage's recipe as it is run: with paths for references, in its place, going on where it stands."""
        recipe = changed(self.stages[name].recipe, self.located)
        if isinstance(recipe, EvaluateRecipe):
            return dataclasses.replace(recipe, out=recipe.out or str(self.folder(name) / "results.json"))
        checkpoint = dataclasses.replace(recipe.checkpoint, resume="auto")
        return dataclasses.replace(recipe, out_dir=str(self.folder(name)), checkpoint=checkpoint)

    def located(self, text: str) -> str:
        """A text with paths in place of references."""
        return REFERENCE.sub(lambda match: str(self._path(*match.groups())), text)

    def is_to_come(self, text: str) -> bool:
        """Whether a text speaks of what a stage has not made yet."""
        return any(not self._path(*match.groups()).exists() for match in REFERENCE.finditer(text))

    def _path(self, name: str, file: str) -> Path:
        return self.folder(name) / (file.lstrip("/") if file else FINAL)


def flat(recipe: Any) -> dict[str, Any]:
    """Full key → value."""
    found: dict[str, Any] = {}
    for name, value in vars(recipe).items():
        if isinstance(value, dict) and any(dataclasses.is_dataclass(one) for one in value.values()):
            # The stages of a pretraining, each a recipe.
            found |= {f"{name}.{of}.{key}": one for of, stage in value.items() for key, one in flat(stage).items()}
            continue
        inner = vars(value) if dataclasses.is_dataclass(value) else None
        found |= {name: value} if inner is None else {f"{name}.{key}": one for key, one in inner.items()}
    return found


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of a value or recipe whose texts, those in lists and the keys of mappings too, are changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(changed(item, change) for item in value)
    if isinstance(value, dict):
        return {changed(key, change): changed(item, change) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: changed(inner, change) for name, inner in vars(value).items()})
    return value


def texts(value: Any) -> list[str]:
    """All texts that `changed` would change."""
    found: list[str] = []

    def take(text: str) -> str:
        found.append(text)
        return text

    changed(value, take)
    return found

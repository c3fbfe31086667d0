"""What `--dry_run` shows: the resolved recipe, parameters, memory, steps, and one sample as it is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config import progress, schema
from litrecipe.config.groups import Reference, TrainingRecipe
from litrecipe.data.packing import pack
from litrecipe.data.prepared import Kind, prepare
from litrecipe.data.report import render
from litrecipe.data.source import RecordedSource
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.forecast import layout_of
from litrecipe.engine.schedule import lr_factor
from litrecipe.model.row import make_row
from litrecipe.recipes.distilling import Teaching
from litrecipe.recipes.dry_run_ranks import Load, asked_beside, beside_teacher, memory_of, print_rank

STEPS_LOOKED_AT = 200
"""How many steps are packed to find the largest row."""


def show(
    recipe: TrainingRecipe,
    files: ModelFiles,
    tokenizer: Tokenizer,
    kind: Kind[Any],
    teaching: Teaching | None = None,
    *,
    reference: Reference | None = None,
) -> int:
    """Print it all; nothing is trained and the run directory is not touched.

    `reference`: what a policy is held to. A frozen copy stands beside it; with its adapter off it is asked itself.
    """
    console = progress.console()
    show_recipe(recipe)
    longest = files.architecture.max_positions
    data = prepare(kind, recipe.data, tokenizer, seed=recipe.train.seed, max_positions=longest)
    source = RecordedSource(data.train, recipe.train)
    steps = source.total_steps(recipe.train)
    load = heaviest(recipe, source, steps, layout_of(recipe.fabric).data)
    frozen_copy, asked = reference in ("copy", "moving"), int(reference == "adapter_off")
    table = memory_of(recipe, files, load, frozen_copy)
    if teaching:
        table = beside_teacher(table, teaching, recipe, load)
    print_rank(recipe, files, load, table, asked=asked, beside=asked_beside(recipe, files, teaching, frozen_copy))
    final = recipe.optim.lr * lr_factor(recipe.schedule, steps - 1, steps)
    console.print(
        f"[bold]steps[/bold] {steps} of {recipe.train.global_batch_size} samples, about {load.tokens:.0f} tokens a "
        f"step, {steps * load.tokens:.0f} in all; learning rate {recipe.optim.lr:g} at its peak, {final:g} in the "
        "last step"
    )
    console.print(f"[bold]data[/bold]\n{data.report}", highlight=False)
    console.print("[bold]one sample[/bold] (what is learnt is coloured)")
    console.print(render(data.train[source.order[0]], tokenizer))
    return 0


_instead: ContextVar[Any] = ContextVar("what is shown instead of a recipe", default=None)


@contextmanager
def shown_instead(recipe: Any) -> Iterator[None]:
    """Inside, this is what is shown as the recipe, whatever stands in for it in the numbers."""
    before = _instead.set(recipe)
    try:
        yield
    finally:
        _instead.reset(before)


def show_recipe(recipe: Any) -> None:
    """With all defaults filled in."""
    console = progress.console()
    console.print("[bold]recipe[/bold]")
    console.print(schema.dump(_instead.get() or recipe), highlight=False, markup=False)


def heaviest(recipe: TrainingRecipe, source: RecordedSource, steps: int, world: int) -> Load:
    """Look at the first steps, as they will be packed."""
    largest: list[int] = []
    most = rows = tokens = 0
    looked_at = min(steps, STEPS_LOOKED_AT)
    for step in range(looked_at):
        indices = source.indices_from(step * source.batch)
        lengths = [int(source.samples.lengths[i]) for i in indices]
        packing = pack(lengths, recipe.train.micro_batch_tokens, multiple_of=world)
        rows = max(rows, len(packing.rows) // world)
        for places in packing.rows:
            size = sum(lengths[place] for place in places)
            tokens += size
            if size > most:
                most, largest = size, [indices[place] for place in places]
    return Load(make_row([source.samples[i] for i in largest]), rows, tokens / looked_at)

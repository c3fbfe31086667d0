"""What `--dry_run` shows: the resolved recipe, parameters, memory, steps, and one sample as it is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

from rich.table import Table

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config import progress, schema
from litrecipe.config.groups import TrainingRecipe
from litrecipe.config.progress import counted
from litrecipe.data.packing import pack
from litrecipe.data.prepared import Kind, prepare
from litrecipe.data.report import render
from litrecipe.data.source import RecordedSource
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import accelerator_of, data_size, world_size
from litrecipe.engine.memory import MemoryTable, estimate, teacher_bytes
from litrecipe.engine.schedule import lr_factor
from litrecipe.model.row import Row, make_row
from litrecipe.recipes.distilling import Teaching, teacher_dtype
from litrecipe.recipes.training import adapter_of

STEPS_LOOKED_AT = 200
"""How many steps are packed to find the largest row."""


def show(
    recipe: TrainingRecipe,
    files: ModelFiles,
    tokenizer: Tokenizer,
    kind: Kind[Any],
    teaching: Teaching | None = None,
    *,
    frozen_copy: bool = False,
) -> int:
    """Print it all; nothing is trained and the run directory is not touched.

    `frozen_copy`: a reference stands beside the policy.
    """
    console, world = progress.console(), world_size(recipe.fabric)
    show_recipe(recipe)
    longest = files.architecture.max_positions
    data = prepare(kind, recipe.data, tokenizer, seed=recipe.train.seed, max_positions=longest)
    source = RecordedSource(data.train, recipe.train)
    steps = source.total_steps(recipe.train)
    load = heaviest(recipe, source, steps, data_size(recipe.fabric))
    table = memory_of(recipe, files, load, frozen_copy)
    if teaching:
        table = beside_teacher(table, teaching, recipe, load, world)
    console.print(parameter_and_memory_table(recipe, table, load, world))
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


def memory_of(recipe: TrainingRecipe, files: ModelFiles, load: Load, frozen_copy: bool) -> MemoryTable:
    """Of one rank."""
    with progress.patience("working out the memory"):
        return estimate(
            replace(recipe, adapter=adapter_of(recipe, files) or recipe.adapter),
            files.architecture,
            load.row,
            rows=load.rows,
            world_size=world_size(recipe.fabric),
            device=accelerator_of(recipe.fabric),
            frozen_copy=frozen_copy,
        )


def beside_teacher(
    table: MemoryTable, teaching: Teaching, recipe: TrainingRecipe, load: Load, world: int
) -> MemoryTable:
    """The table with the teacher in it, or before it where its answers are kept."""
    distil, shares = teaching.distil, world // recipe.fabric.tensor_parallel
    is_cut = recipe.fabric.strategy == "fsdp" or (recipe.fabric.is_sharded and shares > 1)
    size = teacher_bytes(
        teaching.files.architecture,
        teacher_dtype(recipe),
        distil.quantize,
        load.row,
        sharded_over=shares if is_cut and not distil.cache else None,
        split_over=1 if distil.cache else recipe.fabric.tensor_parallel,
        device=accelerator_of(recipe.fabric),
    )
    return replace(table, **{"asked" if distil.cache else "teacher": size})


class Load(NamedTuple):
    """What the steps ask of a rank."""

    row: Row
    """The one with most tokens."""
    rows: int
    """The most that a rank takes in one step."""
    tokens: float
    """Mean of a step, over all ranks."""


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


def parameter_and_memory_table(recipe: TrainingRecipe, table: MemoryTable, load: Load, world: int) -> Table:
    """Counts and bytes, one line each."""
    out = Table(title=f"memory of one rank ({world} in all), at its peak", box=None, title_justify="left")
    out.add_column("")
    out.add_column("GB", justify="right")
    out.add_column("")
    share = 100 * table.trained / table.parameters
    notes = {
        "weights": f"{table.parameters:,} parameters",
        "reference": "a frozen copy of what is trained",
        "judges": "reward models",
        "teacher": "what is learnt from, and what it computes with",
        "asked": "a teacher, before anything is learnt",
        "gradients": f"{table.trained:,} trained ({share:.2f} %)",
        "optimizer": recipe.optim.name,
        "saving": "a copy of what a checkpoint holds, while it is written in the background",
        "exchange": "gathered layers and whole gradients of fsdp, buckets of ddp",
        "activations": f"largest row: {len(load.row.tokens)} tokens, {len(load.row.target)} of them predicted",
        "scratch": "logits of one block, gradients on their way",
        "holes": "between tensors in the heap, on a CPU",
        "peak": "above what the imports take; " + beside(load.rows),
    }
    for name in ("reference", "judges", "teacher", "asked", "saving"):
        if not getattr(table, name):
            del notes[name]
    for name, note in notes.items():
        out.add_row(name, f"{getattr(table, name) / 1e9:.3f}", note, style="bold" if name == "peak" else "")
    note = "while completions are sampled, before anything is learnt" if table.cache else "not used in training"
    out.add_row("KV cache", f"{table.cache / 1e9:.3f}", note)
    if table.laid_out:
        out.add_row("laid out", f"{table.laid_out / 1e9:.3f}", "copies of the weights, for as long")
    return out


def beside(rows: int) -> str:
    """How gradients and activations share their room."""
    if rows == 1:
        return "gradients and activations share their room: a step is one row"
    return f"gradients lie beside the activations: a step is up to {counted(rows, 'row')}"

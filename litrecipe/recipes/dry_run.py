"""What `--dry_run` shows: the resolved recipe, parameters, memory, steps, and one sample as it is learnt."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config import schema
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.data.packing import pack
from litrecipe.data.report import render_sample
from litrecipe.data.source import RecordedSource
from litrecipe.data.supervised import load_supervised
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.memory import MemoryTable, estimate
from litrecipe.engine.schedule import lr_factor
from litrecipe.model.row import Row, make_row

STEPS_LOOKED_AT = 200
"""How many steps are packed to find the largest row."""


def show(recipe: FinetuneRecipe, files: ModelFiles, tokenizer: Tokenizer) -> int:
    """Print it all; nothing is trained and the run directory is not touched."""
    console = Console()
    console.print("[bold]recipe[/bold]")
    console.print(schema.dump(recipe), highlight=False, markup=False)
    data = load_supervised(recipe.data, tokenizer, seed=recipe.train.seed)
    source = RecordedSource(data.train, recipe.train)
    steps = source.total_steps(recipe.train)
    world = ranks(recipe)
    row, tokens_a_step = largest_row(recipe, source, steps, world)
    table = estimate(recipe, files.architecture, row, world)
    console.print(parameter_and_memory_table(recipe, table, row, world))
    final = recipe.optim.lr * lr_factor(recipe.schedule, steps - 1, steps)
    console.print(
        f"[bold]steps[/bold] {steps} of {recipe.train.global_batch_size} samples, about {tokens_a_step:.0f} tokens a "
        f"step, {steps * tokens_a_step:.0f} in all; learning rate {recipe.optim.lr:g} at its peak, {final:g} in the "
        "last step"
    )
    console.print(f"[bold]data[/bold] {data.report}", highlight=False)
    console.print("[bold]one sample[/bold] (what is learnt is coloured)")
    console.print(render_sample(data.train[source.index_at(0)], tokenizer))
    return 0


def ranks(recipe: FinetuneRecipe) -> int:
    """Processes the recipe will run on, as far as it can be known here."""
    devices = recipe.fabric.devices if isinstance(recipe.fabric.devices, int) else 1
    return devices * recipe.fabric.num_nodes


def largest_row(recipe: FinetuneRecipe, source: RecordedSource, steps: int, world: int) -> tuple[Row, float]:
    """The row with most tokens among the first steps, and the mean tokens of a step."""
    largest: list[int] = []
    most = tokens = 0
    looked_at = min(steps, STEPS_LOOKED_AT)
    for step in range(looked_at):
        start = step * source.batch
        stop = start + source.batch if source.limit is None else min(start + source.batch, source.limit)
        indices = [source.index_at(cursor) for cursor in range(start, stop)]
        lengths = [int(source.samples.lengths[i]) for i in indices]
        tokens += sum(lengths)
        for places in pack(lengths, recipe.train.micro_batch_tokens, multiple_of=world).rows:
            size = sum(lengths[place] for place in places)
            if size > most:
                most, largest = size, [indices[place] for place in places]
    return make_row([source.samples[i] for i in largest]), tokens / looked_at


def parameter_and_memory_table(recipe: FinetuneRecipe, table: MemoryTable, row: Row, world: int) -> Table:
    """Counts and bytes, one line each."""
    out = Table(title=f"memory of one rank ({world} in all), at its peak", box=None, title_justify="left")
    out.add_column("")
    out.add_column("GB", justify="right")
    out.add_column("")
    share = 100 * table.trained / table.parameters
    notes = {
        "weights": f"{table.parameters:,} parameters",
        "gradients": f"{table.trained:,} trained ({share:.2f} %)",
        "optimizer": recipe.optim.name,
        "activations": f"largest row: {len(row.tokens)} tokens, {len(row.target)} of them predicted",
        "scratch": "logits of one chunk, one block's gradients",
        "peak": "above what the imports take; gradients and activations share their room",
    }
    for name, note in notes.items():
        out.add_row(name, f"{getattr(table, name) / 1e9:.3f}", note, style="bold" if name == "peak" else "")
    out.add_row("KV cache", "0.000", "not used in training")
    return out

"""What a dry run shows of one rank: its memory, what it exchanges with others in a step, and how long a step should
take. The devices that a recipe plans for need not be there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.table import Table

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config import progress
from litrecipe.config.groups import Quantize, TrainingRecipe
from litrecipe.config.progress import counted
from litrecipe.engine.cost import Layout
from litrecipe.engine.forecast import Beside, Forecast, device_of, forecast, hardware_of, layout_of
from litrecipe.engine.memory import MemoryTable, estimate, meta_model, teacher_bytes
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.row import Row
from litrecipe.recipes.distilling import Teaching, teacher_dtype
from litrecipe.recipes.training import adapter_of


class Load(NamedTuple):
    """What the steps ask of a rank."""

    row: Row
    """The one with most tokens."""
    rows: int
    """The most that a rank takes in one step."""
    tokens: float
    """Mean of a step, over all ranks."""


def memory_of(recipe: TrainingRecipe, files: ModelFiles, load: Load, frozen_copy: bool) -> MemoryTable:
    """Of one rank."""
    with progress.patience("working out the memory"):
        return estimate(
            with_adapter(recipe, files),
            files.architecture,
            load.row,
            rows=load.rows,
            world_size=layout_of(recipe.fabric).world,
            device=device_of(recipe.fabric),
            frozen_copy=frozen_copy,
        )


def beside_teacher(table: MemoryTable, teaching: Teaching, recipe: TrainingRecipe, load: Load) -> MemoryTable:
    """The table with the teacher in it, or before it where its answers are kept."""
    distil, layout = teaching.distil, layout_of(recipe.fabric)
    size = teacher_bytes(
        teaching.files.architecture,
        teacher_dtype(recipe),
        distil.quantize,
        load.row,
        sharded_over=layout.data if layout.sharded and not distil.cache else None,
        split_over=1 if distil.cache else layout.tensor,
        device=device_of(recipe.fabric),
    )
    return replace(table, **{"asked" if distil.cache else "teacher": size})


def asked_beside(recipe: TrainingRecipe, files: ModelFiles, teaching: Teaching | None, reference: bool) -> list[Beside]:
    """The frozen models that are asked about every row: a copy of what learns as a reference, and a teacher."""
    found = []
    if reference:
        model = meta_model(with_adapter(recipe, files), files.architecture).requires_grad_(False)
        found += [Beside(one, 1, recipe.quantize) for one in model.modules() if isinstance(one, Trunk)]
    if teaching and not teaching.distil.cache:
        with torch.device("meta"):
            model = Decoder(teaching.files.architecture).to(teacher_dtype(recipe)).requires_grad_(False)
        found.append(Beside(model, 1, Quantize(method=teaching.distil.quantize)))
    return found


def print_rank(
    recipe: TrainingRecipe,
    files: ModelFiles,
    load: Load,
    table: MemoryTable,
    *,
    asked: int = 0,
    beside: Sequence[Beside] = (),
    samples: bool = False,
) -> None:
    """Memory, exchange and time; `asked` and `beside` as in `engine.forecast.forecast`.

    `samples`: steps learn from what is sampled, which takes time of its own.
    """
    console = progress.console()
    with progress.patience("working out a step"):
        expected = forecast(
            with_adapter(recipe, files),
            files.architecture,
            load.row,
            rows=load.rows,
            tokens=load.tokens,
            hardware=hardware_of(recipe.fabric),
            asked=asked,
            beside=beside,
        )
    console.print(parameter_and_memory_table(recipe, table, load, expected.layout))
    if expected.collectives:
        console.print(exchange_table(expected))
    console.print(time_line(recipe, expected, samples), highlight=False)


def with_adapter(recipe: TrainingRecipe, files: ModelFiles) -> TrainingRecipe:
    """The recipe with the adapter that it trains, be it that of its source."""
    return replace(recipe, adapter=adapter_of(recipe, files) or recipe.adapter)


def exchange_table(expected: Forecast) -> Table:
    """What a rank sends and gets in a step."""
    layout = expected.layout
    ways = [f"{layout.nodes} x {layout.devices} ranks", f"{layout.data} see different data"]
    ways += [f"{layout.tensor} share each layer"] if layout.tensor > 1 else []
    out = Table(title=f"exchange of one step ({', '.join(ways)})", box=None, title_justify="left")
    for heading in ("", "of", "pass", "ranks", "times", "MB each", "GB sent", ""):
        out.add_column(heading, justify="left" if heading in ("", "of", "pass") else "right")
    for one in expected.collectives:
        out.add_row(
            one.kind,
            one.what,
            one.phase,
            str(one.ranks),
            f"{one.times:,}",
            f"{one.bytes / 1e6:,.3f}",
            f"{one.sent / 1e9:,.3f}",
            "meanwhile" if one.hidden else "waited for",
        )
    total = sum(one.sent for one in expected.collectives)
    out.add_row("all", "", "", "", "", "", f"{total / 1e9:,.3f}", "by each rank", style="bold")
    return out


def time_line(recipe: TrainingRecipe, expected: Forecast, samples: bool) -> str:
    """How long a step should take."""
    time, name = expected.time, recipe.fabric.hardware
    if time is None:
        return "[bold]time of a step[/bold] nothing is known of this GPU: name one with fabric.hardware"
    what = "on this machine" if name == "here" else f"on {name}"
    rate = expected.tokens / time.total
    what += ", without the copies of fabric.cpu_offload" if recipe.fabric.cpu_offload else ""
    what += ", without sampling and scoring" if samples else ""
    mfu = "" if expected.mfu is None else f", {100 * expected.mfu:.0f} % of the peak (MFU)"
    return (
        f"[bold]time of a step[/bold] about {time.total:.3g} s {what}, reckoned and not measured: "
        f"{time.arithmetic:.3g} arithmetic, {time.waiting:.3g} waiting for others, {time.optimizer:.3g} optimizer; "
        f"{rate:,.0f} tokens a second, {86400 * rate / 1e9:.3g} billion a day{mfu}"
    )


def parameter_and_memory_table(recipe: TrainingRecipe, table: MemoryTable, load: Load, layout: Layout) -> Table:
    """Counts and bytes, one line each."""
    out = Table(title=f"memory of one rank ({layout.world} in all), at its peak", box=None, title_justify="left")
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
        "host": "weights, gradients and the optimizer, in main memory and not on the GPU",
        "saving": "a copy of what a checkpoint holds, while it is written in the background",
        "exchange": "gathered layers and whole gradients of fsdp, messages of ddp",
        "activations": f"largest row: {len(load.row.tokens)} tokens, {len(load.row.target)} of them predicted",
        "scratch": "logits of one block, gradients on their way",
        "holes": "between tensors in the heap, on a CPU",
        "peak": "above what the imports take; " + beside(load.rows),
    }
    for name in ("reference", "judges", "teacher", "asked", "host", "saving"):
        if not getattr(table, name):
            del notes[name]
    for name, note in notes.items():
        out.add_row(name, f"{getattr(table, name) / 1e9:.3f}", note, style="bold" if name == "peak" else "")
    note = "while completions are sampled, before anything is learnt" if table.cache else "not used in training"
    out.add_row("KV cache", f"{table.cache / 1e9:.3f}", note)
    if table.laid_out:
        out.add_row("laid out", f"{table.laid_out / 1e9:.3f}", "copies of the weights, for as long")
    if table.whole:
        out.add_row("whole", f"{table.whole / 1e9:.3f}", "the policy, which every rank gathers, for as long")
    return out


def beside(rows: int) -> str:
    """How gradients and activations share their room."""
    if rows == 1:
        return "gradients and activations share their room: a step is one row"
    return f"gradients lie beside the activations: a step is up to {counted(rows, 'row')}"

"""What `litrecipe pretrain --dry_run` and `--plan` show."""

from __future__ import annotations

from dataclasses import replace

from rich.table import Table

from litrecipe.checkpoint.source import ModelFiles, open_asked
from litrecipe.config import progress
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.config.progress import counted
from litrecipe.data.packing import pack
from litrecipe.data.pretraining import Stream, batches_of, open_stream, steps_of
from litrecipe.data.report import render
from litrecipe.data.stream import Stage
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.forecast import layout_of
from litrecipe.engine.schedule import lr_factor
from litrecipe.model.architecture import count_parameters
from litrecipe.model.flops import training_flops
from litrecipe.model.row import Sample, make_row
from litrecipe.objectives.scaling import CHINCHILLA, REPLICATION
from litrecipe.recipes.distilling import Teaching
from litrecipe.recipes.dry_run import show_recipe
from litrecipe.recipes.dry_run_ranks import Load, asked_beside, beside_teacher, memory_of, print_rank


def show_pretraining(recipe: PretrainRecipe, files: ModelFiles, tokenizer: Tokenizer, teaching: Teaching | None) -> int:
    """Print it all; nothing is trained and the run directory is not touched."""
    console, layout = progress.console(), layout_of(recipe.fabric)
    show_recipe(recipe)
    stream = open_stream(recipe, tokenizer)
    stages = zip(recipe.parts.items(), stream.source.stages, strict=True)
    for place, ((name, part), stage) in enumerate(stages):
        load = _load(part, stage, layout.data)
        table = memory_of(part, files, load, frozen_copy=False)
        there = teaching if teaching and _has_teacher(recipe, place) else None
        if there:
            table = beside_teacher(table, there, part, load)
        if name:
            console.print(f"[bold]stage {name}[/bold]")
        print_rank(part, files, load, table, beside=asked_beside(part, files, there, reference=False))
    console.print(_stages(recipe, stream, files))
    console.print("[bold]data[/bold]")
    for line in stream.report():
        console.print(line, highlight=False)
    first = stream.source.stages[0]
    sample = next(iter(first.mixture.sources.values()))[0]
    console.print(
        f"[bold]one sequence[/bold] of {counted(len(sample.segments), 'document')} (what is learnt is coloured)"
    )
    console.print(render(_beginning(sample), tokenizer))
    return 0


def _has_teacher(recipe: PretrainRecipe, place: int) -> bool:
    """Whether a teacher lies in memory while a stage runs: also one that only later stages ask, or that is sharded."""
    taught = [part.distil.teacher is not None for part in recipe.parts.values()]
    if recipe.distil.cache:
        return taught[place]
    return any(taught[place:]) or recipe.fabric.strategy == "fsdp"


def has_limits(recipe: PretrainRecipe) -> bool:
    """Whether each stage says in steps or tokens how long it takes."""
    trains = [part.train for part in recipe.parts.values()]
    return all(train.epochs is None and (train.max_steps or train.max_tokens) for train in trains)


SHOWN = 512
"""Tokens of the sequence that is shown."""


def _beginning(sample: Sample) -> Sample:
    segments, left = [], SHOWN
    for segment in sample.segments:
        if left > 0:
            segments.append(replace(segment, tokens=segment.tokens[:left], weights=segment.weights[:left]))
        left -= len(segment.tokens)
    return Sample(sample.id, tuple(segments))


def _load(part: PretrainRecipe, stage: Stage, world: int) -> Load:
    """All steps at full batch size are alike: so many sequences, cut into rows."""
    length = part.data.max_length
    packing = pack([length] * stage.batches.size, part.train.micro_batch_tokens, multiple_of=world)
    reel = max(stage.mixture.sources.values(), key=len)
    most = max(map(len, packing.rows))
    row = make_row([reel[index % len(reel)] for index in range(most)])
    return Load(row, len(packing.rows) // world, float(length * stage.batches.size))


def _stages(recipe: PretrainRecipe, stream: Stream, files: ModelFiles) -> Table:
    table = Table(title="steps", box=None, title_justify="left")
    for heading in ("", "steps", "sequences", "of tokens", "tokens", "lr peak", "lr last", "PFLOP"):
        table.add_column(heading, justify="left" if not heading else "right")
    for (name, part), stage in zip(recipe.parts.items(), stream.source.stages, strict=True):
        sequences, length = stage.batches.until(stage.steps), part.data.max_length
        reel = next(iter(stage.mixture.sources.values()))
        flops = training_flops(files.architecture, [reel[0]]) * sequences * length / reel.size(0)
        last = part.optim.lr * lr_factor(part.schedule, stage.steps - 1, stage.steps)
        batch = f"{stage.batches.initial} to {stage.batches.size}" if stage.batches.initial else str(stage.batches.size)
        table.add_row(
            name or "all",
            f"{stage.steps:,}",
            batch,
            f"{length:,}",
            f"{sequences * length:,}",
            f"{part.optim.lr:.3g}",
            f"{last:.3g}",
            f"{flops / 1e15:,.4g}",
        )
    return table


def show_plan(recipe: PretrainRecipe) -> int:
    """How many tokens scaling laws would give this model, beside those that the recipe gives it.

    Reads the data, and asks for a tokenizer, only where `train.epochs` says how long it takes.
    """
    console = progress.console()
    files = open_asked(replace(recipe.model, tokenizer=None) if has_limits(recipe) else recipe.model)
    parameters = count_parameters(files.architecture)
    if has_limits(recipe):
        steps = [steps_of(part, batches_of(part), tokens=0) for part in recipe.parts.values()]
    else:
        tokenizer = Tokenizer.load(files.tokenizer_dir)
        steps = [stage.steps for stage in open_stream(recipe, tokenizer).source.stages]
    tokens = sum(
        batches_of(part).until(count) * part.data.max_length
        for part, count in zip(recipe.parts.values(), steps, strict=True)
    )
    compute = 6.0 * parameters * tokens
    console.print(
        f"{parameters:,} parameters, {tokens:,} tokens in the recipe: {tokens / parameters:.1f} a parameter, about "
        f"{compute:.3g} operations",
        highlight=False,
    )
    table = Table(box=None)
    for heading in ("scaling law", "best tokens", "a parameter", "over-training", "best parameters", "their tokens"):
        table.add_column(heading, justify="left" if heading == "scaling law" else "right")
    for law in (REPLICATION, CHINCHILLA):
        best, other = law.best_tokens(parameters), law.best_parameters(compute)
        table.add_row(
            law.source,
            f"{best:.3g}",
            f"{best / parameters:.1f}",
            f"{tokens / best:.2f} times",
            f"{other:.3g}",
            f"{law.best_tokens(other):.3g}",
        )
    console.print(table, highlight=False)
    console.print(
        "best tokens: with which no smaller or larger model would reach a lower loss by as many operations; best "
        "parameters: of a model for the operations of the recipe. Models that are used much are trained far longer.",
        highlight=False,
    )
    return 0

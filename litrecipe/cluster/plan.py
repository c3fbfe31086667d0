"""What is submitted of a recipe: one job, an array of a sweep's runs, or a chain of a pipeline's stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from litrecipe.cluster.runs import job_of, jobs_of
from litrecipe.cluster.script import KEPT, RECIPE, Job
from litrecipe.cluster.sweep import Point
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import EvaluateRecipe, TrainingRecipe
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.prepare import PrepareRecipe
from litrecipe.config.slurm import Slurm
from litrecipe.data.prepare import PART, STATE
from litrecipe.engine.rundir import RunDir
from litrecipe.evaluation.session import only_training_knows
from litrecipe.recipes.dry_run_pipeline import Preview, check_recipes, mistakes_of
from litrecipe.recipes.pipeline import check_place, check_runs
from litrecipe.recipes.runs import differing
from litrecipe.recipes.stage_runs import StageRun

BESIDE = ".job"
"""Ends the folder of the job of a verb that has no run directory, beside what it writes."""
AUTO = ["--checkpoint.resume", "auto"]

Read = Callable[[Sequence[tuple[str, str]]], Any]
"""Gives the recipe of a command line with more flags; raises InputError with all that is wrong with it."""


@dataclass
class Plan:
    """Jobs, each of which waits for the one before it, and what is written before they are submitted."""

    verb: str
    folder: Path
    """Absolute."""
    jobs: list[Job]
    recipes: dict[Path, str] = field(default_factory=dict)
    """Folder → the YAML of the recipe that is run there."""
    left_out: list[str] = field(default_factory=list)
    """Runs and stages that need no job, each with the reason."""


def plan_run(verb: str, recipe: Any) -> Plan:
    """One job. Raises InputError for what the verb would refuse, and for what no job can be made of."""
    recipe = allotted(recipe)
    if mistakes := [] if isinstance(recipe, PrepareRecipe) else mistakes_of(Preview(recipe)):
        raise InputError(*mistakes)
    folder = folder_of(recipe)
    from_other = None
    if isinstance(recipe, TrainingRecipe):
        from_other = _other_checkpoint(recipe)
        recipe.checkpoint.resume = "auto" if from_other is None else str(from_other)
        if is_finished(recipe):
            cure = "ask for more steps to go on, or name another --out_dir"
            raise InputError(f"out_dir: {recipe.out_dir}: this run is finished: {cure}")
    command = [*verb.split(), "--config", str(folder / RECIPE)]
    if from_other is not None:
        command += ["--checkpoint.resume", "$resume"]
    elif isinstance(recipe, TrainingRecipe):
        command += AUTO
    name = f"{verb.split()[-1]}-{folder.name}"
    job = Job(name, folder, recipe.slurm, command, resume_from=from_other, kept=kept_by(recipe))
    return Plan(verb, folder, [job], {folder: written(recipe)})


def plan_sweep(verb: str, read: Read, points: list[Point]) -> Plan:
    """An array with a run a point. All points' recipes are looked at before anything is said of one."""
    mistakes: dict[str, None] = {}
    recipes: list[Any] = []
    outside = ""
    for point in points:
        try:
            recipe = read(point.flags)
            if not isinstance(recipe, TrainingRecipe):
                raise InputError(f"--sweep: {verb}: has no run directory, or several: sweep a verb that trains")
            outside = recipe.out_dir
            recipe = allotted(replace(recipe, out_dir=str(Path(outside) / point.name)))
            recipe.checkpoint.resume = "auto"
            RunDir(recipe.out_dir).check_as_run("auto")
            mistakes |= dict.fromkeys(mistakes_of(Preview(recipe)))
            recipes.append(recipe)
        except InputError as error:
            mistakes |= dict.fromkeys(error.mistakes)
    if mistakes:
        raise InputError(*mistakes)
    folder = Path(outside).absolute()
    if RunDir(folder).holds_a_run:
        raise InputError(f"out_dir: {outside}: holds a run: name a folder for the runs of the sweep")
    runs = [folder_of(recipe) for recipe in recipes]
    texts = {run: written(recipe) for run, recipe in zip(runs, recipes, strict=True)}
    jobs = jobs_of(runs)
    left_out: dict[Path, str] = {}
    for run, recipe in zip(runs, recipes, strict=True):
        if is_finished(recipe):
            left_out[run] = "finished before"
        elif (queued := job_of(run, jobs)) is not None:
            if is_text(run / RECIPE, texts[run]):
                left_out[run] = f"its job {queued.id} is {queued.state.lower()}"
            elif queued.state == "RUNNING":
                left_out[run] = f"its job {queued.id}, which was asked for otherwise, is running"
    job = Job(
        f"{verb.split()[-1]}-{folder.name}",
        folder,
        recipes[0].slurm,
        [*verb.split(), "--config", f"$run/{RECIPE}", *AUTO],
        runs=runs,
        indices=[index for index, run in enumerate(runs) if run not in left_out],
    )
    if not job.indices:
        raise InputError(f"out_dir: {outside}: all {len(points)} runs of this sweep are finished, or have a job")
    asked = {run: text for run, text in texts.items() if run not in left_out}
    return Plan(verb, folder, [job], asked, [f"{run.name}: {why}" for run, why in left_out.items()])


def plan_chain(verb: str, recipe: PipelineRecipe) -> Plan:
    """A job a stage, in their order. The pipeline itself runs each, and keeps its books: `--only NAME`."""
    recipe = deepcopy(recipe)
    mistakes: list[str] = []
    for name, stage in recipe.stages.items():
        try:
            stage.recipe = allotted(stage.recipe, recipe.slurm)
        except InputError as error:
            mistakes += stage.placed(name, error.mistakes)
    if mistakes:
        raise InputError(*mistakes)
    recipe.checkpoint.resume = "auto"
    check_place(RunDir(recipe.out_dir), recipe)
    runs = {name: StageRun(recipe, name) for name in recipe.stages}
    check_runs(runs, recipe)
    waiting = [name for name in recipe.wanted if not runs[name].done]
    check_recipes(recipe, waiting)
    if not waiting:
        raise InputError(f"out_dir: {recipe.out_dir}: all stages that are asked for are finished")
    folder = folder_of(recipe)
    jobs = [
        Job(
            f"{folder.name}-{name}",
            folder / name,
            recipe.stages[name].recipe.slurm,
            [*verb.split(), "--config", str(folder / RECIPE), "--only", name, *AUTO],
            launches_stages=True,
            kept=kept_by(recipe.stages[name].recipe),
        )
        for name in waiting
    ]
    left_out = [f"{name}: finished before" for name in recipe.wanted if name not in waiting]
    return Plan(verb, folder, jobs, {folder: written(replace(recipe, only=[]))}, left_out)


def is_text(path: Path, text: str) -> bool:
    """Whether a file holds this."""
    return path.is_file() and path.read_text(encoding="utf-8") == text


def kept_by(recipe: Any) -> tuple[str, ...]:
    """What a verb goes on from, as `Job.kept` has it: `evaluate` begins anew."""
    if isinstance(recipe, PrepareRecipe):
        return (f"../{Path(recipe.out).name}{PART}/{STATE}",)
    return KEPT if isinstance(recipe, TrainingRecipe) else ()


def written(recipe: Any) -> str:
    """The YAML of a recipe as its job reads it, and as it may be submitted again: nothing in it waits for a job that is
    long gone, or looks into the file of defaults for a cluster."""
    recipe = deepcopy(recipe)
    stages = recipe.stages.values() if isinstance(recipe, PipelineRecipe) else ()
    for slurm in (recipe.slurm, *(stage.recipe.slurm for stage in stages)):
        slurm.dependency = slurm.cluster = None
    return schema.dump(recipe)


def folder_of(recipe: Any) -> Path:
    """Where job and recipe lie, absolute: the run directory; beside what is written, where there is none.

    Raises InputError for what Slurm cannot write to.
    """
    key = "out_dir" if hasattr(recipe, "out_dir") else "out"
    written = getattr(recipe, key)
    if not written:
        raise InputError(f"{key}: missing: say where the results go")
    if "\\" in written or not written.isprintable():
        raise InputError(f"{key}: {written!r}: Slurm reads a backslash as more than that: use another name")
    if "$" in written:
        raise InputError(f"{key}: {written}: sbatch knows no variables: write out what is meant")
    path = Path(written).absolute()
    return path if key == "out_dir" else path.with_name(f"{path.stem}{BESIDE}")


def allotted(recipe: Any, of_all: Slurm | None = None) -> Any:
    """A copy of a recipe in which `fabric` and `slurm` say the same of machines and processes; a verb that is one
    process gets room for one, whatever stands for `of_all` stages.

    Raises InputError naming both keys where they do not.
    """
    recipe = deepcopy(recipe)
    slurm = recipe.slurm
    mistakes: list[str] = []
    if isinstance(recipe, PrepareRecipe | EvaluateRecipe):
        for key in ("nodes", "gpus_per_node", "tasks_per_node"):
            value = getattr(slurm, key)
            if (value or 1) > 1 and (of_all is None or value != getattr(of_all, key)):
                mistakes.append(f"slurm.{key}: {value}: this verb is one process: use cpus_per_task")
        mistakes += only_training_knows(recipe.fabric) if isinstance(recipe, EvaluateRecipe) else []
        if mistakes:
            raise InputError(*mistakes)
        slurm.nodes = slurm.tasks_per_node = 1
        slurm.gpus_per_node = slurm.gpus_per_node and 1
    if isinstance(recipe, PrepareRecipe):
        return recipe
    fabric = recipe.fabric
    tasks_key = "gpus_per_node" if slurm.gpus_per_node is not None else "tasks_per_node"
    tasks = getattr(slurm, tasks_key)
    if tasks is not None and fabric.devices not in ("auto", tasks):
        mistakes.append(f"fabric.devices: {fabric.devices}: slurm.{tasks_key} is {tasks}: make them the same, or auto")
    if slurm.nodes is not None and fabric.num_nodes not in (1, slurm.nodes):
        mistakes.append(f"fabric.num_nodes: {fabric.num_nodes}: slurm.nodes is {slurm.nodes}: make them the same")
    if slurm.gpus_per_node is not None and fabric.accelerator not in ("auto", "cuda"):
        cure = f"slurm.gpus_per_node is {slurm.gpus_per_node}: use cuda, or remove one of them"
        mistakes.append(f"fabric.accelerator: {fabric.accelerator}: {cure}")
    if mistakes:
        raise InputError(*mistakes)
    fabric.devices = tasks or (1 if fabric.devices == "auto" else fabric.devices)
    fabric.num_nodes = slurm.nodes or fabric.num_nodes
    slurm.nodes, slurm.tasks_per_node = fabric.num_nodes, fabric.devices
    if slurm.gpus_per_node is not None:
        fabric.accelerator = "cuda"
    return recipe


def is_finished(recipe: TrainingRecipe) -> bool:
    """Whether the run that a recipe describes has come to its end in its directory, or gone on behind that."""
    run = RunDir(recipe.out_dir)
    written = schema.load_run(run.path) if run.final.exists() else None
    if written is None:
        return False
    if (written.train.max_steps or 0) > (recipe.train.max_steps or math.inf):
        recipe = replace(recipe, train=written.train)
    return all(line.startswith("fabric.") for line in differing(written, recipe))


def _other_checkpoint(recipe: TrainingRecipe) -> Path | None:
    """The checkpoint of another run that this one begins with, if it does; also where it has begun since a job of its
    was told so, and only goes on."""
    run, resume = RunDir(recipe.out_dir), recipe.checkpoint.resume
    if resume in (None, "auto"):
        run.check_as_run("auto")
        return None
    other, told = Path(resume).absolute(), folder_of(recipe) / RECIPE
    has_begun = told.is_file() and schema.load(type(recipe), [told]).checkpoint.resume == str(other)
    run.check_as_run("auto" if has_begun else resume)
    if run.owns(other):
        cure = "a job that is queued again goes on from the newest: use auto"
        raise InputError(f"checkpoint.resume: {resume}: {cure}")
    return other

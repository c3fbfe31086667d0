"""`litrecipe align pipeline`: stages, each a run of its own in a process of its own, fed by those before it."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from litrecipe.checkpoint.manifest import write_text
from litrecipe.config import progress, schema, stop
from litrecipe.config.errors import WRONG_INPUT, InputError
from litrecipe.config.files import write_json
from litrecipe.config.pipeline import FINAL, PipelineRecipe
from litrecipe.config.progress import counted, say, warn
from litrecipe.config.slurm import LAUNCHER
from litrecipe.engine.allocation import is_a_task
from litrecipe.engine.rundir import RunDir
from litrecipe.recipes.dry_run_pipeline import check_recipes, show_pipeline
from litrecipe.recipes.stage_runs import StageRun, changed_recipes, other_origins

GO_ON = "the same command with --checkpoint.resume auto goes on"
FIRST = ("exact_match", "eval_reward", "eval_accuracy", "eval_rewards/accuracies", "eval_loss")
SHOWN = 2
"""Metrics of a stage that the table at the end shows."""


def main(recipe: PipelineRecipe, *, dry_run: bool = False) -> int:
    """Run the stages that are not finished, in order; returns the exit code of the first that does not end well."""
    refuse_several_ranks()
    if dry_run:
        return show_pipeline(recipe)
    out = RunDir(recipe.out_dir)
    runs = {name: StageRun(recipe, name) for name in recipe.stages}
    check_place(out, recipe)
    check_runs(runs, recipe)
    waiting = [name for name in recipe.wanted if not runs[name].done]
    check_recipes(recipe, waiting)
    with out.held(), stop.deferred():
        write_text(out.path / "recipe.yaml", schema.dump(replace(recipe, only=[])))
        if waiting and out.final.is_symlink():
            out.final.unlink()  # nobody shall take it for what the pipeline makes now
        for number, name in enumerate(recipe.stages, start=1):
            run = runs[name]
            said = f"stage {number} of {len(runs)}, {name}: {run.stage.verb}"
            if name not in recipe.wanted:
                continue
            if mistakes := other_origins(runs, name):
                raise InputError(*mistakes)
            if run.done:
                say(f"{said}: finished before")
                continue
            if asked := stop.requested():
                say(f"stopped by {signal.Signals(asked).name} before {said}; {GO_ON}")
                raise stop.Stopped(asked)
            say(said)
            code = run.run({other: runs[other].digest for other in run.stage.needs})
            remember(runs, out.path)
            if code:
                why = "was stopped" if code in (stop.PREEMPTED, stop.INTERRUPTED) else f"ended with exit code {code}"
                first = "put right what is wrong, then " if code == WRONG_INPUT else ""
                say(f"{said}: {why}; {first}{GO_ON}")
                return code
        finish(runs, out.path)
    return 0


def refuse_several_ranks() -> None:
    """Each rank would start stages of its own. The script of a job is one process, whose stages have its tasks."""
    has_launcher = bool(os.environ.get(LAUNCHER)) and not is_a_task()
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if int(os.environ.get(name) or 1) > 1 and not has_launcher:
            raise InputError(
                f"{name}: {os.environ[name]}: a pipeline is one process: start it as one, its stages start as many as "
                "their fabric.devices say"
            )


def check_place(out: RunDir, recipe: PipelineRecipe) -> None:
    """Raise InputError where `out_dir` cannot be written, or holds something else."""
    resume = recipe.checkpoint.resume
    out.check(resume)
    if (out.path / "checkpoints").exists():
        raise InputError(f"out_dir: {out.path}: holds a run that is no pipeline: name another --out_dir")
    if resume is None and (out.path / "recipe.yaml").exists():
        cure = "continue it with --checkpoint.resume auto, or name another --out_dir"
        raise InputError(f"out_dir: {out.path}: holds a pipeline already: {cure}")


def check_runs(runs: dict[str, StageRun], recipe: PipelineRecipe) -> None:
    """Raise InputError for stages that were begun otherwise than they are written now, or from something else, and for
    what `only` leaves out that is needed."""
    mistakes: list[str] = []
    taken: set[str] = set()
    for name in recipe.wanted:
        mistakes += changed_recipes(runs, name) or other_origins(runs, name)
        for other in runs[name].stage.needs:
            if other in recipe.wanted:
                continue
            if not runs[other].done:
                mistakes.append(f"only: {name}: needs {other}, which is not finished: run that too, or first")
            taken.add(other)
    if mistakes:
        raise InputError(*mistakes)
    for name in runs:
        if name in taken and (lines := changed_recipes(runs, name)):
            warn(f"{lines[0].partition(': put that back')[0]}: taken as it is")


def remember(runs: dict[str, StageRun], out: Path) -> None:
    """Write `pipeline.json`: what is known of each stage, and where `final` leads."""
    draft, link = out / "pipeline.json.tmp", out / FINAL
    final = str(link.readlink()) if link.is_symlink() else None
    write_json(draft, {"stages": {name: run.told() for name, run in runs.items()}, "final": final})
    draft.replace(out / "pipeline.json")


def finish(runs: dict[str, StageRun], out: Path) -> None:
    """Tell what came of the stages, and let `final` lead to the last policy once all are finished."""
    left = [name for name, run in runs.items() if not run.done]
    policies = [run for run in runs.values() if run.stage.makes_a_policy]
    if policies and not left:
        lead(out / FINAL, policies[-1].result)
    remember(runs, out)
    show_results(runs)
    if left:
        say(f"not run: {', '.join(left)}; without `only` {GO_ON}")
    elif policies:
        say(f"done: {counted(len(runs), 'stage')}; the model is in {out / FINAL}, which leads to {policies[-1].result}")
    else:
        say(f"done: {counted(len(runs), 'stage')}")


def lead(link: Path, target: Path) -> None:
    """A relative link, so that the folder can be moved; it appears, or changes, at once."""
    draft = link.with_name(f".{link.name}.new")
    draft.unlink(missing_ok=True)
    draft.symlink_to(os.path.relpath(target, link.parent))
    draft.replace(link)


def show_results(runs: dict[str, StageRun]) -> None:
    """A line a stage."""
    table = Table("stage", "verb", "steps", "time", "last metrics", "result", box=None)
    for stage, run in runs.items():
        told = run.told()
        table.add_row(
            stage,
            told["verb"],
            str(told["steps"] or "-"),
            progress.duration(told["seconds"]) if told["done"] else "-",
            " · ".join(f"{name} {value:.4g}" for name, value in worth_telling(told["metrics"])) or "-",
            str(run.result) if told["done"] else "not finished",
        )
    progress.console().print(table)


def worth_telling(metrics: dict[str, float]) -> list[tuple[str, float]]:
    """What was measured on held-out data, what matters most first; where nothing was, the loss."""
    measured = [key for key in metrics if key.startswith("eval_")]
    measured.sort(key=lambda key: next((at for at, word in enumerate(FIRST) if word in key), len(FIRST)))
    shown = {key: key.rpartition("/")[2] if ":" in key else key for key in measured[:SHOWN]}
    return [(name, metrics[key]) for key, name in (shown or {"loss": "loss"}).items() if key in metrics]

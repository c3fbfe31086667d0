"""`litrecipe submit`: a verb as a job of a Slurm cluster."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from litrecipe.checkpoint.manifest import write_text
from litrecipe.cluster import queue
from litrecipe.cluster.plan import Plan, Read, plan_chain, plan_run, plan_sweep
from litrecipe.cluster.runs import job_of, jobs_of, noted
from litrecipe.cluster.script import LOG, NOTE, RECIPE, SCRIPT, Job, text_of
from litrecipe.cluster.sweep import points_of
from litrecipe.config.errors import InputError
from litrecipe.config.files import locked
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.progress import say, warn
from litrecipe.engine.lock import holder_of, taken
from litrecipe.engine.rundir import RunDir


def main(verb: str, read: Read, *, sweep: list[str], dry_run: bool = False) -> int:
    """Work out the jobs, let Slurm look at them, write them, and queue them; nothing is written before all is right."""
    points = points_of(sweep)
    if points:
        plan = plan_sweep(verb, read, points)
    else:
        recipe = read([])
        is_pipeline = isinstance(recipe, PipelineRecipe)
        plan = plan_chain(verb, recipe) if is_pipeline else plan_run(verb, recipe)
    scripts = {job.folder: text_of(job, Path.cwd()) for job in plan.jobs}
    RunDir(plan.folder).check("auto")
    tested = look_at(scripts, dry_run)
    made = [folder for folder in folders_of(plan) if not folder.exists()]
    plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(plan.folder / ".submit.lock", "submits here"):
            refuse_twice(plan)
            refuse_running(plan)
            write(plan, scripts)
            show(plan, scripts, tested)
            if dry_run:
                say("not submitted: the same command without --dry_run does that")
                return 0
            jobs = queue_all(plan)
    except queue.Unanswered:  # a job that there may be reads what was written
        raise
    except InputError:
        take_back(made)
        raise
    tell(plan, jobs)
    return 0


def look_at(scripts: dict[Path, str], dry_run: bool) -> list[str]:
    """What Slurm says to each script. Raises InputError with its words where it does not take them."""
    if dry_run and not queue.there_is_slurm():
        warn("no Slurm here: whether it would take the job was not looked at")
        return []
    mistakes: dict[str, None] = {}
    told = []
    with TemporaryDirectory() as folder:
        for number, text in enumerate(scripts.values()):
            script = Path(folder) / f"{number}.sh"
            script.write_text(text)
            try:
                told.append(queue.test(script))
            except queue.NoAnswer as error:
                if not dry_run:
                    raise
                warn(f"{error} Whether it would take the job was not looked at")
                return []
            except InputError as error:
                mistakes |= dict.fromkeys(error.mistakes)
    if mistakes:
        raise InputError(*mistakes)
    return told


def folders_of(plan: Plan) -> list[Path]:
    """All that is written to, those inside others last."""
    return sorted({plan.folder, *plan.recipes, *(job.folder for job in plan.jobs)})


def take_back(folders: list[Path]) -> None:
    """Remove what was made for jobs that there are not to be."""
    for folder in reversed(folders):
        for name in (SCRIPT, RECIPE, NOTE, ".submit.lock"):
            (folder / name).unlink(missing_ok=True)
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def refuse_twice(plan: Plan) -> None:
    """Raise InputError where a job that was submitted for one of these runs has not ended."""
    jobs = jobs_of(runs_of(plan))
    mistakes = [
        f"out_dir: {folder}: its job {job.id} is {job.state.lower()}: wait for it, or `scancel {job.id}` first"
        for folder in runs_of(plan)
        if (job := job_of(folder, jobs)) is not None
    ]
    if mistakes:
        raise InputError(*mistakes)


def refuse_running(plan: Plan) -> None:
    """Raise InputError where something trains in one of these directories now, without a job of ours."""
    for folder in (plan.folder, *runs_of(plan)):
        if (holder := holder_of(folder)) is not None:
            raise taken(folder, holder)


def runs_of(plan: Plan) -> Iterator[Path]:
    """The run directories of the jobs."""
    for job in plan.jobs:
        yield from (job.runs[index] for index in job.indices) if job.runs else [job.folder]


def write(plan: Plan, scripts: dict[Path, str]) -> None:
    """Recipes and scripts."""
    for folder in folders_of(plan):
        folder.mkdir(parents=True, exist_ok=True)
    for folder, recipe in plan.recipes.items():
        write_text(folder / RECIPE, recipe)
    for job in plan.jobs:
        write_text(job.script, scripts[job.folder])
        job.script.chmod(0o755)


def show(plan: Plan, scripts: dict[Path, str], tested: list[str]) -> None:
    """The scripts, and what Slurm said to them."""
    for said in plan.left_out:
        say(f"{said}: left out")
    for number, job in enumerate(plan.jobs):
        print(f"── {job.script}\n{scripts[job.folder]}", flush=True)
        if tested:
            say(f"sbatch --test-only: {tested[number]}")


def queue_all(plan: Plan) -> list[str]:
    """Submit the jobs and note them; returns their ids. Where Slurm takes one and not another, none is left."""
    jobs: list[str] = []
    try:
        for job in plan.jobs:
            after = [f"afterok:{jobs[-1]}"] if jobs else []
            # What the first waits for, those behind it wait for, too.
            if job.slurm.dependency and not (jobs and job.slurm.dependency == plan.jobs[0].slurm.dependency):
                after.append(job.slurm.dependency)
            notes = [noted(folder) for folder in (job.runs or [job.folder])]
            known = {note["job"].partition("_")[0] for note in notes if note}
            jobs.append(queue.submit(job.script, ",".join(after) or None, known))
            note(plan.verb, job, jobs[-1])
    except InputError:
        if jobs:
            queue.cancel(jobs)
        raise
    return jobs


def note(verb: str, job: Job, number: str) -> None:
    """Write `job.json` beside each run of a job."""
    of_runs = {job.runs[index]: f"{number}_{index}" for index in job.indices} or {job.folder: number}
    for folder, one in of_runs.items():
        if job.runs:  # or `tail` would find no log before a task begins
            (folder / LOG).touch()
        when = datetime.now().isoformat(" ", "seconds")
        known = {"job": one, "verb": verb, "script": str(job.script), "submitted": when}
        draft = folder / f"{NOTE}.tmp"
        write_text(draft, json.dumps(known, indent=1, ensure_ascii=False))
        draft.replace(folder / NOTE)


def tell(plan: Plan, jobs: list[str]) -> None:
    """Ids, and the commands for what one does next."""
    named = ", ".join(f"{number} ({job.folder.name})" for number, job in zip(jobs, plan.jobs, strict=True))
    is_sweep = bool(plan.jobs[0].runs)
    folder = shlex.quote(str(plan.folder))
    logs = f"{folder}/*/{LOG}" if is_sweep else shlex.join(str(job.log) for job in plan.jobs)
    again = f"litrecipe submit {plan.verb} --config {shlex.quote(str(plan.folder / RECIPE))}"
    print(f"submitted: job{'s' if len(jobs) > 1 else ''} {named}")
    print(f"  follow:  tail -F {logs}")
    print(f"  look:    squeue --jobs={','.join(jobs)}; litrecipe runs ls {folder}")
    print(f"  cancel:  scancel {' '.join(jobs)}")
    print(f"  go on:   {'the same command' if is_sweep else again}", flush=True)

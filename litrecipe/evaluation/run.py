"""Run tasks on a model; results in lm-eval's JSON layout, whoever computed them."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.evaluation.preference import Preference
from litrecipe.evaluation.tasks import ExactMatch, Outcome, Perplexity, Settings, Task
from litrecipe.model.decoder import Decoder
from litrecipe.model.reward import RewardModel

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from rich.table import Table

Results = dict[str, Any]
"""lm-eval's layout: `results[task]["metric,filter"]`, `n-samples`, `configs`, `samples`, …"""

BUILTINS: dict[str, type[Perplexity] | type[ExactMatch] | type[Preference]] = {
    "perplexity": Perplexity,
    "exact_match": ExactMatch,
    "preference": Preference,
}
"""Name before the colon → task."""

BOOTSTRAP = 1000
"""Resamplings behind lm-eval's standard errors where there is no formula."""


@dataclass(frozen=True)
class Plan:
    """Task names, looked up."""

    builtin: list[Task]
    lm_eval: list[str]
    folders: tuple[str, ...]
    """Where lm-eval's task files are looked for, besides its own."""
    own: bool
    """Whether lm-eval's own tasks are wanted (reading them takes seconds)."""


def plan(tasks: Sequence[str], key: str = "tasks") -> Plan:
    """Look the tasks up: built-ins, lm-eval names and patterns, folders of lm-eval YAML, or `folder:task`.

    Raises InputError with all that cannot be found and the nearest names. Tasks of a folder see the files of that
    folder, and lm-eval's own tasks only when a name of theirs is asked for too. `key` is the recipe's for them.
    """
    mistakes: list[str] = []
    builtin: list[Task] = []
    local: list[tuple[str, str]] = []
    names: list[str] = []
    for spec in tasks:
        kind, _, rest = spec.partition(":")
        folder, _, name = spec.rpartition(":")
        if kind in BUILTINS and rest:
            builtin.extend(_gather(mistakes, BUILTINS[kind].parse, spec))
        elif kind in BUILTINS:
            mistakes.append(f"tasks: {spec}: needs data: {kind}:FILE")
        elif Path(spec).is_dir():
            local.append((spec, "*"))
        elif folder and Path(folder).is_dir():
            local.append((folder, name))
        elif rest:
            mistakes.append(f"tasks: {spec}: no such folder or built-in task{_hint(kind, BUILTINS, ':' + rest)}")
        else:
            names.append(spec)
    if not tasks:
        mistakes.append("tasks: nothing to measure: give names, e.g. `--tasks piqa,exact_match:test.jsonl`")
    if (local or names) and find_spec("lm_eval") is None:
        mistakes.append("tasks: lm-eval is not installed: pip install 'litrecipe[eval]'")
        local, names = [], []
    found = _look_up(mistakes, local, names)
    if mistakes:
        raise InputError(*(f"{key}{mistake.removeprefix('tasks')}" for mistake in mistakes))
    return Plan(builtin, found, tuple(dict.fromkeys(folder for folder, _ in local)), own=bool(names))


def _look_up(mistakes: list[str], local: list[tuple[str, str]], names: list[str]) -> list[str]:
    """Names that lm-eval knows, each once, for tasks of folders and tasks of its own."""
    found: list[str] = []
    for folder, name in local:
        found += _matches(mistakes, f"{folder}:{name}", name, _manager((folder,), own=False))
    if names:
        manager = _manager(tuple(dict.fromkeys(folder for folder, _ in local)), own=True)
        for name in names:
            found += _matches(mistakes, name, name, manager)
    return list(dict.fromkeys(found))


def evaluate(
    model: Decoder | RewardModel,
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_tokens: int = 8192,
    generate: Generate | None = None,
    log_samples: bool = False,
    chatty: bool = True,
    reference: Decoder | None = None,
    beta: float = 0.1,
    pictures: Path | None = None,
) -> Results:
    """Run the tasks (in evaluation mode) and return lm-eval's results dictionary, the built-in tasks merged in.

    `limit` bounds the samples of each task; `num_fewshot` and `log_samples` are lm-eval's; `reference`, `beta` and
    `pictures` are for `preference`. Raises InputError for tasks that do not exist, whose data cannot be had, or that a
    reward model cannot do.
    """
    wanted = plan(tasks)
    settings = Settings(limit, batch_tokens, generate or Generate(), chatty, reference, beta, pictures)
    if isinstance(model, RewardModel):
        others = [*wanted.lm_eval, *(task.spec for task in wanted.builtin if not isinstance(task, Preference))]
        if others:
            raise InputError(f"tasks: {others[0]}: a reward model says no words: give preference:FILE only")
    results: Results = {"results": {}, "configs": {}, "versions": {}, "n-shot": {}, "higher_is_better": {}}
    results |= {"n-samples": {}, "samples": {}, "config": {"limit": limit, "batch_tokens": batch_tokens}}
    results |= {"date": time.time(), **_describe(model, tokenizer)}
    was_training = model.training
    model.eval()
    try:
        if wanted.lm_eval and isinstance(model, Decoder):
            _merge(results, _run_lm_eval(model, tokenizer, wanted, settings, num_fewshot, log_samples))
        for task in wanted.builtin:
            _merge(results, _as_results(task, task.run(model, tokenizer, settings)))
    finally:
        model.train(was_training)
    if not log_samples:
        del results["samples"]
    return results


def _run_lm_eval(
    model: Decoder,
    tokenizer: Tokenizer,
    wanted: Plan,
    settings: Settings,
    num_fewshot: int | None,
    log_samples: bool,
) -> Results:
    from lm_eval import simple_evaluate

    from litrecipe.evaluation.lm_eval_model import LitrecipeLM

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # bootstrap here, not in forks of a process that has threads
    lm = LitrecipeLM(
        model,
        tokenizer,
        batch_tokens=settings.batch_tokens,
        defaults=settings.generate,
        chatty=settings.chatty,
    )
    try:
        with redirect_stdout(sys.stderr):
            return simple_evaluate(
                lm,
                tasks=list(wanted.lm_eval),
                num_fewshot=num_fewshot,
                limit=settings.limit,
                log_samples=log_samples,
                bootstrap_iters=BOOTSTRAP,
                task_manager=_manager(wanted.folders, own=wanted.own),
            )
    except (ConnectionError, FileNotFoundError) as error:
        raise InputError(
            f"tasks: {', '.join(wanted.lm_eval)}: the data cannot be had ({error}): check the network, "
            "HF_DATASETS_OFFLINE and the task's data_files"
        ) from error


ALL_TASKS = "`litrecipe evaluate --help` tells what can be given, `lm-eval ls tasks` all names"


@lru_cache(maxsize=4)
def _manager(folders: tuple[str, ...], own: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=list(folders), include_defaults=own)


def _matches(mistakes: list[str], spec: str, name: str, manager: TaskManager) -> list[str]:
    """The task, group or tag of this name; of a pattern, the tasks it matches."""
    found = [name] if name in manager.all_tasks else fnmatch.filter(manager.all_subtasks, name)
    if not found:
        hint = _hint(name, [*manager.all_tasks, *BUILTINS]) or f": {ALL_TASKS}"
        mistakes.append(f"tasks: {spec}: no such task{hint}")
    return found


def _hint(name: str, known: Iterable[str], rest: str = "") -> str:
    near = get_close_matches(name, list(known), n=3, cutoff=0.7)
    return f": did you mean {' or '.join(f'`{other}{rest}`' for other in near)}?" if near else ""


def _gather(mistakes: list[str], parse: Callable[[str], Task], spec: str) -> list[Task]:
    """The parsed task, or nothing and its mistakes noted."""
    try:
        return [parse(spec)]
    except InputError as error:
        mistakes.extend(error.mistakes)
        return []


def _as_results(task: Task, outcome: Outcome) -> Results:
    """A built-in task's outcome in lm-eval's layout."""
    name = task.spec
    measured: dict[str, Any] = {"name": name, "alias": name, "sample_len": len(outcome.samples)}
    for metric, value in outcome.metrics.items():
        stderr = outcome.stderrs[metric]
        measured[f"{metric},none"] = value
        measured[f"{metric}_stderr,none"] = "N/A" if stderr is None else stderr
    return {
        "results": {name: measured},
        "configs": {name: task.config()},
        "versions": {name: 1},
        "n-shot": {name: 0},
        "higher_is_better": {name: dict(task.higher_is_better)},
        "n-samples": {name: {"original": outcome.available, "effective": len(outcome.samples)}},
        "samples": {name: outcome.samples},
    }


def _describe(model: Decoder | RewardModel, tokenizer: Tokenizer) -> Results:
    """The model's end of text and length, and the special tokens as [text, id], under lm-eval's keys."""
    ids = {"pad": tokenizer.pad_id, "eos": next(iter(tokenizer.eos_ids), None), "bos": tokenizer.bos_id}
    tokens = {
        f"tokenizer_{name}_token": [tokenizer.special_tokens.get(f"{name}_token"), str(id)] for name, id in ids.items()
    }
    return {**tokens, "eot_token_id": ids["eos"], "max_length": model.architecture.max_positions}


def _merge(results: Results, more: Results) -> None:
    """Add the tasks of `more`; what describes the whole run is overwritten."""
    for key, value in more.items():
        if isinstance(value, dict):
            results.setdefault(key, {}).update(value)
        else:
            results[key] = value


def table(results: Results) -> Table:
    """Task, metric, value ± standard error and number of samples, a line a metric; groups after the tasks."""
    from rich.table import Table

    shown = Table("task", "metric", "value", "stderr", "n", box=None)
    shown.columns[0].overflow = "fold"
    for column in shown.columns[2:]:
        column.justify = "right"
    for task, measured in (results["results"] | results.get("groups", {})).items():
        count = results["n-samples"].get(task, {}).get("effective", "")
        for metric, value, stderr in metrics(measured):
            shown.add_row(task, metric, f"{value:.4f}", f"± {stderr:.4f}" if stderr is not None else "", str(count))
    return shown


def metrics(measured: dict[str, Any]) -> Iterator[tuple[str, float, float | None]]:
    """The `metric,filter` entries of a task as (name, value, standard error)."""
    for key, value in measured.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        stderr = measured.get(f"{metric}_stderr,{filter_name}")
        name = metric if filter_name == "none" else f"{metric} ({filter_name})"
        yield name, value, stderr if isinstance(stderr, float) else None


def write(results: Results, path: Path) -> list[Path]:
    """Write the results as JSON and, when they hold samples, a `<name>.samples.<task>.jsonl` a task beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [path]
    summary = {key: value for key, value in results.items() if key != "samples"}
    path.write_text(json.dumps(summary, indent=2, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")
    for task, samples in results.get("samples", {}).items():
        name = re.sub(r"[^\w.-]+", "_", task)
        beside = path.with_name(f"{path.stem}.samples.{name}.jsonl")
        lines = (json.dumps(sample, ensure_ascii=False, default=_plain) + "\n" for sample in samples)
        beside.write_text("".join(lines), encoding="utf-8")
        written.append(beside)
    return written


def _plain(value: Any) -> Any:
    """What JSON cannot hold: numpy numbers as numbers, sets as lists, functions and the rest by name."""
    if hasattr(value, "item"):
        return value.item()
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)

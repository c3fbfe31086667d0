"""`litrecipe evaluate`: measure a model on tasks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from litrecipe.config import progress
from litrecipe.config.errors import InputError
from litrecipe.config.files import try_writing
from litrecipe.config.groups import EvaluateRecipe
from litrecipe.config.progress import say
from litrecipe.evaluation.run import evaluate, plan, table, write
from litrecipe.evaluation.session import open_session


def main(recipe: EvaluateRecipe) -> int:
    """Open the model, run the tasks, print a table, write the results."""
    _check(recipe)
    session = open_session(recipe.model, recipe.quantize, recipe.fabric)
    results = evaluate(
        session.model,
        session.tokenizer,
        recipe.tasks,
        limit=recipe.limit,
        num_fewshot=recipe.num_fewshot,
        batch_tokens=recipe.batch_tokens,
        generate=recipe.generate,
        log_samples=recipe.log_samples,
    )
    results["config"] |= {"model": session.source, "quantize": session.quantize.method}
    progress.console().print(table(results))
    if recipe.out is not None:
        try:
            written = write(results, Path(recipe.out))
        except OSError as error:
            raise InputError(f"out: {recipe.out}: {error.strerror}: the results stand above only") from error
        for path in written:
            say(f"wrote {path}")
    return 0


def _check(recipe: EvaluateRecipe) -> None:
    """All mistakes, before the model is loaded."""
    mistakes = []
    if recipe.log_samples and recipe.out is None:
        mistakes.append("log_samples: true: samples are written beside the results: give `out`")
    if recipe.out is not None and Path(recipe.out).is_dir():
        mistakes.append(f"out: {recipe.out}: is a folder: give a file name, e.g. {Path(recipe.out) / 'results.json'}")
    try:
        plan(recipe.tasks)
    except InputError as error:
        mistakes += error.mistakes
    if mistakes:
        raise InputError(*mistakes)
    if recipe.out is not None:
        _check_writable(Path(recipe.out))


def _check_writable(out: Path) -> None:
    """Make the folder of the results and write something there, as the results will be."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        try_writing(out.parent)
        if out.exists() and not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise InputError(f"out: {out}: {error.strerror}: name a file that can be written") from error

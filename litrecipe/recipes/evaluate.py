"""`litrecipe evaluate`: measure a model on tasks."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path

from litrecipe.config import progress
from litrecipe.config.errors import InputError
from litrecipe.config.files import try_writing
from litrecipe.config.groups import EvaluateRecipe
from litrecipe.config.progress import say
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.evaluation.run import evaluate, plan, table, write
from litrecipe.evaluation.session import open_any, open_session
from litrecipe.model.decoder import Decoder


def main(recipe: EvaluateRecipe) -> int:
    """Open the model, run the tasks, print a table, write the results."""
    _check(recipe)
    # A hydra is a judge where nothing else is asked than how it tells answers apart.
    as_judge = recipe.reference is None and all(task.startswith("preference:") for task in recipe.tasks)
    session = open_any(recipe.model, recipe.quantize, recipe.fabric, as_judge=as_judge)
    reference = _reference(recipe, recipe.reference, session.tokenizer) if recipe.reference else None
    results = evaluate(
        session.model,
        session.tokenizer,
        recipe.tasks,
        limit=recipe.limit,
        num_fewshot=recipe.num_fewshot,
        batch_tokens=recipe.batch_tokens,
        generate=recipe.generate,
        log_samples=recipe.log_samples,
        reference=reference,
        beta=recipe.beta,
        pictures=Path(recipe.out) if recipe.out else None,
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


def _reference(recipe: EvaluateRecipe, source: str, tokenizer: Tokenizer) -> Decoder:
    """The model that implicit rewards are measured against; it must read the same tokens."""
    model = replace(recipe.model, source=source)
    session = open_session(model, recipe.quantize, recipe.fabric)
    if session.tokenizer.backend.get_vocab() != tokenizer.backend.get_vocab():
        raise InputError(f"reference: {source}: has another tokenizer than model.source: give one with the same")
    return session.model


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

"""`litrecipe finetune`: supervised fine-tuning, full or with an adapter, on a plain or quantised base, alone or from a
teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.groups import FinetuneRecipe, Router, TrainingRecipe
from litrecipe.data.prepared import Prepared
from litrecipe.data.source import RecordedSource
from litrecipe.data.supervised import SUPERVISED
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, fit
from litrecipe.objectives.routing import with_routers
from litrecipe.recipes.distilling import Teaching, lesson, open_teaching
from litrecipe.recipes.dry_run import show
from litrecipe.recipes.known import identity
from litrecipe.recipes.training import begin, load_to_train, make_ready, prepared, save_trained, task_runner

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def main(recipe: FinetuneRecipe, *, dry_run: bool = False) -> int:
    """Build model, data and objective, and hand them to `fit`."""
    files, tokenizer = begin(recipe, dry_run=dry_run)
    teaching = open_teaching(recipe.distil, tokenizer)
    if dry_run:
        return show(recipe, files, tokenizer, SUPERVISED, teaching)

    fabric = make_fabric(recipe.fabric)
    return tune(recipe, prepared(SUPERVISED, recipe, files, tokenizer), files, tokenizer, fabric, teaching)


def tune(
    recipe: TrainingRecipe,
    data: Prepared,
    files: ModelFiles,
    tokenizer: Tokenizer,
    fabric: Fabric,
    teaching: Teaching | None = None,
) -> int:
    """Train the recipe's model on conversations, and on what a teacher says of them."""
    known = identity(recipe, files, tokenizer, data.train) | (teaching.known_by if teaching else {})
    if teaching:
        teaching.check_reach(max(data.train.lengths))
    model = load_to_train(load_model, files, recipe)
    make_ready(model, recipe)
    router = recipe.router if isinstance(recipe, FinetuneRecipe) else Router()
    what = lesson(model, data.train, data.val, recipe, teaching, fabric, known)
    return fit(
        Job(
            fabric=fabric,
            recipe=recipe,
            module=what.module,
            objective=with_routers(what.objective, model, router),
            source=RecordedSource(what.train, recipe.train),
            val=what.val,
            save_final=lambda folder: save_trained(folder, model, files, recipe),
            evaluate_tasks=task_runner(model, tokenizer, recipe),
            looking=what.looking,
            identity=known,
        )
    )

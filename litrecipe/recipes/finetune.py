"""`litrecipe finetune`: supervised fine-tuning, full or with an adapter, on a plain or quantised base."""

from __future__ import annotations

from dataclasses import asdict

from litrecipe.checkpoint.source import open_model
from litrecipe.config.groups import Adapter, FinetuneRecipe, Quantize
from litrecipe.config.progress import say
from litrecipe.data.source import RecordedSource
from litrecipe.data.supervised import load_supervised
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, fit
from litrecipe.engine.rundir import RunDir
from litrecipe.engine.telling import check_loggers, check_login
from litrecipe.evaluation.run import evaluate, metrics, plan
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.recipes.model import load_to_train, save_trained


def main(recipe: FinetuneRecipe, *, dry_run: bool = False) -> int:
    """Build model, data and objective, and hand them to `fit`."""
    check_loggers(recipe.log)
    if not dry_run:
        check_login(recipe.log)
        RunDir(recipe.out_dir).check(recipe.checkpoint.resume)
    if recipe.eval.tasks:
        plan(recipe.eval.tasks, key="eval.tasks")  # tells mistyped tasks now, not at the first evaluation
    files = open_model(recipe.model.source, tokenizer=recipe.model.tokenizer)
    tokenizer = Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template, recipe.data.date)
    if dry_run:
        from litrecipe.recipes.dry_run import show

        return show(recipe, files, tokenizer)

    fabric = make_fabric(recipe.fabric)
    longest = files.architecture.max_positions
    data = load_supervised(recipe.data, tokenizer, seed=recipe.train.seed, max_positions=longest)
    say(str(data.report))
    model = load_to_train(files, recipe).train()
    model.activation_checkpointing = recipe.fabric.activation_checkpointing
    if recipe.fabric.compile:
        model.compile_blocks()

    def run_tasks() -> dict[str, float]:
        results = evaluate(model, tokenizer, recipe.eval.tasks, limit=recipe.eval.limit, chatty=False)
        return {
            f"{task}/{name}": value for task, found in results["results"].items() for name, value, _ in metrics(found)
        }

    return fit(
        Job(
            fabric=fabric,
            recipe=recipe,
            module=model,
            objective=CausalLM(),
            source=RecordedSource(data.train, recipe.train),
            val=data.val,
            save_final=lambda folder: save_trained(folder, model, files, recipe),
            evaluate_tasks=run_tasks if recipe.eval.tasks else None,
            identity={
                "base weights": files.weights_hash(),
                "tokenizer": tokenizer.fingerprint,
                "data": data.train.fingerprint,
                "fabric.precision": recipe.fabric.precision,
                **settings("adapter", files.adapter.settings if files.adapter else recipe.adapter),
                **settings("quantize", recipe.quantize),
            },
        )
    )


def settings(group: str, values: Adapter | Quantize) -> dict[str, str]:
    """Every key of a group with its value, for people to read; only `method` where that is `none`."""
    keys = {"method": "none"} if values.method == "none" else asdict(values)
    return {f"{group}.{key}": str(value) for key, value in keys.items()}

"""`litrecipe finetune`: supervised fine-tuning, full or with an adapter, on a plain or quantised base."""

from __future__ import annotations

from pathlib import Path

import torch

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import ModelFiles, open_model
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.data.source import RecordedSource
from litrecipe.data.supervised import Supervised, load_supervised
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, fit
from litrecipe.model.decoder import Decoder
from litrecipe.objectives.causal_lm import CausalLM


def main(recipe: FinetuneRecipe, *, dry_run: bool = False) -> int:
    """Build model, data and objective, and hand them to `fit`."""
    files = open_model(recipe.model.source, tokenizer=recipe.model.tokenizer)
    tokenizer = Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template)
    if dry_run:
        from litrecipe.recipes.dry_run import show

        return show(recipe, files, tokenizer)

    fabric = make_fabric(recipe.fabric)
    data = load_supervised(recipe.data, tokenizer, seed=recipe.train.seed)
    model = build_model(recipe, files)
    model = model.to(fabric.device) if recipe.fabric.strategy != "fsdp" else model
    job = Job(
        fabric=fabric,
        recipe=recipe,
        module=model,
        objective=CausalLM(),
        source=RecordedSource(data.train, recipe.train),
        val=data.val,
        save_final=lambda folder: save_final(recipe, files, model, folder),
        evaluate_tasks=task_evaluator(recipe, model, tokenizer) if recipe.eval.tasks else None,
        identity=identity(recipe, files, data),
    )
    return fit(job)


def build_model(recipe: FinetuneRecipe, files: ModelFiles) -> Decoder:
    """The model as it is trained: base weights, quantised or not, and the adapter."""
    dtype = torch.bfloat16 if recipe.fabric.precision == "bf16-true" else torch.float32
    model = load_model(
        files,
        dtype=dtype,
        quantize=recipe.quantize,
        adapter=recipe.adapter,
        init=recipe.model.init,
        seed=recipe.train.seed,
    )
    model.activation_checkpointing = recipe.fabric.activation_checkpointing
    if recipe.fabric.compile:
        model.compile_blocks()
    return model.train()

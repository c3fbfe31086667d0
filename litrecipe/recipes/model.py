"""`litrecipe model`: bring models in, take trained ones out, merge adapters, and tell what a model is made of."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from litrecipe.checkpoint import state
from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.manifest import MANIFEST, new_folder, refuse_foreign
from litrecipe.checkpoint.peft_adapter import ADAPTER_CONFIG, save_adapter
from litrecipe.checkpoint.source import ModelFiles, open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, FinetuneRecipe, Quantize
from litrecipe.config.progress import say, warn
from litrecipe.engine.memory import NF4_BYTES
from litrecipe.model.adapters import describe_parameters, merge_adapter
from litrecipe.model.architecture import Architecture
from litrecipe.model.decoder import Decoder


def import_model(src: str, out: str) -> int:
    """Write any model as a Hugging Face folder, in the precision it is stored in (GGUF: fp32)."""
    refuse_foreign(Path(out))
    files = open_model(src)
    if files.adapter:
        raise InputError(f"{src}: an adapter: use `litrecipe model merge {src} {out}`")
    save_model(Path(out), load_model(files, dtype=_stored_dtype(files)), files.tokenizer_dir)
    say(f"wrote {out}")
    return 0


def export(run: str, out: str) -> int:
    """Write the final model of a run, or its newest checkpoint, as a Hugging Face or adapter folder."""
    refuse_foreign(Path(out))
    folder = Path(run)
    final = folder / "final"
    if final.is_dir():
        open_model(str(final))  # checks what is in it
        with new_folder(Path(out)) as draft:
            for file in sorted(path for path in final.iterdir() if path.is_file() and path.name != MANIFEST):
                (draft / file.name).write_bytes(file.read_bytes())
        say(f"wrote {out} from {final}")
        return 0
    recipe = _recipe_of(folder)
    checkpoint = state.newest_complete(folder / "checkpoints", warn)
    if checkpoint is None:
        raise InputError(f"{run}: neither a final model nor a complete checkpoint in it: nothing to export yet")
    files = open_model(recipe.model.source, tokenizer=recipe.model.tokenizer)
    save_trained(Path(out), _restore(recipe, files, checkpoint), files, recipe)
    say(f"wrote {out} from {checkpoint}")
    return 0


def merge(run: str, out: str) -> int:
    """Fold the adapter of a run directory or of an adapter folder into its base, as a Hugging Face folder.

    Computed in fp32 and stored in the precision of the base. An adapter that was trained on a quantised base is merged
    into what that base's weights are after quantisation.
    """
    refuse_foreign(Path(out))
    source = Path(run) / "final" if (Path(run) / "recipe.yaml").is_file() else Path(run)
    if not (source / ADAPTER_CONFIG).is_file():
        raise InputError(f"{source}: no {ADAPTER_CONFIG} in it: give an adapter folder, or a run that trained one")
    recipe = source.parent / "recipe.yaml"
    quantize = _recipe_of(source.parent).quantize if recipe.is_file() else Quantize()
    files = open_model(str(source))
    model = load_model(files, quantize=quantize)
    merge_adapter(model)
    dtype = _stored_dtype(files)
    save_model(Path(out), model, files.tokenizer_dir, dtype=dtype)
    base = f"{files.base} as {quantize.method}" if quantize.method != "none" else files.base
    say(f"wrote {out}: {source} merged into {base}, in {str(dtype).removeprefix('torch.')}")
    return 0


def info(src: str) -> int:
    """Print architecture, parameters by part, KV cache and memory of the weights; reads no weights."""
    files = open_model(src)
    console = Console()
    console.print(files.describe(), soft_wrap=True, highlight=False)
    for table in (_architecture_table(files.architecture), _parameter_table(files), _memory_table(files.architecture)):
        console.print(table)
    return 0


def load_to_train(files: ModelFiles, recipe: FinetuneRecipe) -> Decoder:
    """The model as a recipe trains it: base weights, quantised or not, and the adapter."""
    return load_model(
        files,
        dtype=torch.bfloat16 if recipe.fabric.precision == "bf16-true" else torch.float32,
        quantize=recipe.quantize,
        adapter=recipe.adapter,
        init=recipe.model.init,
        seed=recipe.train.seed,
    )


def save_trained(folder: Path, model: Decoder, files: ModelFiles, recipe: FinetuneRecipe) -> None:
    """Write what a recipe trained: an adapter folder, or a whole model. Every rank has to call this."""
    adapter = adapter_of(recipe, files)
    template = recipe.model.chat_template
    if adapter is None:
        save_model(folder, model, files.tokenizer_dir, chat_template=template)
    else:
        save_adapter(folder, model, adapter, files.base, files.tokenizer_dir, chat_template=template)


def adapter_of(recipe: FinetuneRecipe, files: ModelFiles) -> Adapter | None:
    """The adapter's settings: the recipe's, or those of the adapter that is trained further."""
    if recipe.adapter.method != "none":
        return recipe.adapter
    return files.adapter.settings if files.adapter else None


def _restore(recipe: FinetuneRecipe, files: ModelFiles, checkpoint: Path) -> Decoder:
    """The model of a recipe with the trained weights of a checkpoint."""
    saved = state.Saved(checkpoint).tensors("weights")
    model = load_to_train(files, recipe)
    parameters = dict(model.named_parameters())
    if odd := sorted(saved.names() - parameters.keys()):
        raise InputError(f"{checkpoint}: {odd[0]}: not a weight of the recipe's model: the recipe was changed")
    with torch.no_grad():
        for name in saved.names():
            parameters[name].copy_(saved.read(name))
    return model


def _recipe_of(run: Path) -> FinetuneRecipe:
    path = run / "recipe.yaml"
    if not path.is_file():
        raise InputError(f"{run}: no recipe.yaml in it: give a run directory")
    return schema.load(FinetuneRecipe, [path])


def _stored_dtype(files: ModelFiles) -> torch.dtype:
    """The precision most of the base's weights are stored in."""
    name = files.config.get("torch_dtype") or files.config.get("dtype") or "float32"
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def _architecture_table(a: Architecture) -> Table:
    table = Table("architecture", "", box=None, title_justify="left")
    scaling = f", {a.rope_scaling['rope_type']} scaling by {a.rope_scaling['factor']:g}" if a.rope_scaling else ""
    rows = {
        "family": a.family,
        "layers": a.num_layers,
        "hidden size": a.hidden_size,
        "MLP size": a.intermediate_size,
        "heads": f"{a.num_heads} of {a.head_dim}, {a.num_kv_heads} for keys and values",
        "vocabulary": f"{a.vocab_size:,}, head {'tied to the embedding' if a.tie_embeddings else 'of its own'}",
        "context": f"{a.max_positions:,} tokens",
        "RoPE": f"base {a.rope_theta:g}{scaling}",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _parameter_table(files: ModelFiles) -> Table:
    with torch.device("meta"):
        counts = describe_parameters(Decoder(files.architecture))
    table = Table("parameters", "", "", box=None)
    table.columns[1].justify = table.columns[2].justify = "right"
    whole = counts["all"].total
    for kind, count in sorted(counts.items(), key=lambda item: item[1].total):
        table.add_row(kind, f"{count.total:,}", f"{100 * count.total / whole:.1f} %")
    if files.adapter:
        table.add_row("adapter", f"{sum(math.prod(e.shape) for e in files.adapter.weights.entries):,}", "on top")
    return table


def _memory_table(a: Architecture) -> Table:
    """Bytes of the weights by precision, and of the KV cache."""
    with torch.device("meta"):
        sizes = Counter[str]()
        for name, parameter in Decoder(a).named_parameters():
            quantised = parameter.ndim == 2 and name.startswith("model.layers.")
            sizes["linear" if quantised else "rest"] += parameter.numel()
    table = Table("memory", "GB", "", box=None)
    table.columns[1].justify = "right"
    for name, linear, rest in (("fp32", 4, 4), ("bf16", 2, 2), ("int8", 1, 2), ("nf4", NF4_BYTES, 2)):
        table.add_row(name, f"{(sizes['linear'] * linear + sizes['rest'] * rest) / 1e9:.3f}", _note(name))
    cache = 2 * a.num_layers * a.num_kv_heads * a.head_dim * 2
    whole = cache * a.max_positions / 1e9
    table.add_row("KV cache", f"{whole:.3f}", f"bf16, {a.max_positions:,} tokens; {cache:,} bytes a token")
    return table


def _note(precision: str) -> str:
    return "linear layers; the rest in bf16" if precision in ("int8", "nf4") else "all weights"

"""`litrecipe model`: bring models in, take trained ones out, merge adapters, and tell what a model is made of."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from litrecipe.checkpoint import state
from litrecipe.checkpoint.hf import save_hydra, save_model, save_reward_model
from litrecipe.checkpoint.load import load_hydra, load_model, load_reward_model
from litrecipe.checkpoint.manifest import MANIFEST, mistakes_of, new_folder, refuse_foreign
from litrecipe.checkpoint.peft_adapter import ADAPTER_CONFIG
from litrecipe.checkpoint.reward import pad_for_rewards
from litrecipe.checkpoint.source import ModelFiles, open_asked, open_model
from litrecipe.config import progress, schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import FinetuneRecipe, RewardRecipe, TrainingRecipe
from litrecipe.config.online import longest_of
from litrecipe.config.progress import say, warn
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.evaluation.demonstrations import demonstrations_of, mean_and_spread
from litrecipe.model.adapters import merge_adapter
from litrecipe.model.decoder import Decoder
from litrecipe.model.hydra import Hydra
from litrecipe.model.reward import RewardModel
from litrecipe.recipes.model_tables import architecture_table, memory_table, parameter_table
from litrecipe.recipes.reward import built, rewards_of
from litrecipe.recipes.training import alone, load_to_train, precision_of, save_trained


def import_model(src: str, out: str) -> int:
    """Write any model as a Hugging Face folder, in the precision it is stored in (GGUF: fp32)."""
    _take_place(out)
    files = open_model(src)
    _keep_apart(out, files)
    if files.adapter:
        raise InputError(f"{src}: an adapter: use `litrecipe model merge {src} {out}`")
    dtype = _stored_dtype(files)
    if files.is_hydra:
        save_both(Path(out), load_hydra(files, dtype=dtype), files)
    else:
        save_model(Path(out), load_model(files, dtype=dtype), files.tokenizer_dir)
    say(f"wrote {out}")
    return 0


def export(run: str, out: str) -> int:
    """Write a run's final model, or its newest checkpoint where that is newer, as a Hugging Face or adapter folder.

    Raises InputError when the final model is not as it was written.
    """
    _take_place(out)
    folder = Path(run)
    final = folder / "final"
    checkpoint = state.newest_complete(folder / "checkpoints", warn)
    if final.is_dir() and not (checkpoint and _written(checkpoint) > _written(final)):
        cure = f"remove {final} to export the newest checkpoint, or only {MANIFEST} in it if you meant to change it"
        if (final / MANIFEST).is_file() and (mistakes := mistakes_of(final, cure)):
            raise InputError(*mistakes)
        _keep_apart(out, open_model(str(final)))
        with new_folder(Path(out)) as draft:
            for file in sorted(path for path in final.iterdir() if path.is_file() and path.name != MANIFEST):
                shutil.copyfile(file, draft / file.name)
        step = f", step {state.step_of(checkpoint)}" if checkpoint else ""
        say(f"wrote {out} from {final}{step}")
        return 0
    recipe = _recipe_of(folder)
    if checkpoint is None:
        raise InputError(f"{run}: neither a final model nor a complete checkpoint in it: nothing to export yet")
    files = open_asked(recipe.model).for_length(longest_of(recipe))
    _keep_apart(out, files)
    model = _restore(recipe, files, checkpoint)
    statistics = None
    if isinstance(model, RewardModel) and isinstance(recipe, RewardRecipe):
        tokenizer = Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template, recipe.data.date)
        good = demonstrations_of(recipe, tokenizer)
        statistics = mean_and_spread(rewards_of(model.eval()), good, recipe.train.micro_batch_tokens, "cpu")
    save_trained(Path(out), model, files, recipe, statistics)
    newer = f", which is newer than {final}" if final.is_dir() else ""
    say(f"wrote {out} from {checkpoint}{newer}")
    return 0


def merge(run: str, out: str) -> int:
    """Fold the adapter of a run directory or of an adapter folder into its base, as a Hugging Face folder.

    Computed in fp32 and stored in the precision of the base. An adapter that was trained on a quantised base is merged
    into what that base's weights were after quantisation.
    """
    _take_place(out)
    files = open_model(run)
    if files.adapter is None:
        raise InputError(
            f"{files.source}: no {ADAPTER_CONFIG} in it: give an adapter folder, or a run that trained one"
        )
    _keep_apart(out, files)
    folder = files.adapter.folder
    recipe = schema.load_run(folder.parent) or FinetuneRecipe()
    quantize = recipe.quantize
    # Quantised weights are made from those of the run's precision; others are merged before anything is rounded.
    wide = precision_of(recipe) if quantize.method != "none" else torch.float32
    dtype, target, tokenizer = _stored_dtype(files), Path(out), files.tokenizer_dir
    if files.is_hydra:
        hydra = load_hydra(files, dtype=wide, quantize=quantize)
        merge_adapter(hydra)
        save_both(target, hydra, files, dtype)
    elif files.is_reward_model:
        rewards = load_reward_model(files, dtype=wide, quantize=quantize)
        merge_adapter(rewards)
        pad, statistics = pad_for_rewards(tokenizer, files.architecture), files.reward_statistics
        save_reward_model(target, rewards, tokenizer, pad_token=pad, statistics=statistics, dtype=dtype)
    else:
        model = load_model(files, dtype=wide, quantize=quantize)
        merge_adapter(model)
        save_model(target, model, tokenizer, dtype=dtype)
    base = f"{files.base} as {quantize.method}" if quantize.method != "none" else files.base
    say(f"wrote {out}: {folder} merged into {base}, in {str(dtype).removeprefix('torch.')}")
    return 0


def save_both(out: Path, model: Hydra, files: ModelFiles, dtype: torch.dtype | None = None) -> None:
    """Write a language model and the score beside it."""
    pad = pad_for_rewards(files.tokenizer_dir, files.architecture)
    save_hydra(out, model, files.tokenizer_dir, pad_token=pad, statistics=files.reward_statistics, dtype=dtype)


def info(src: str) -> int:
    """Print architecture, parameters by part, KV cache and memory of the weights; reads no weights."""
    files = open_model(src)
    console = progress.console()
    console.print(files.describe(), soft_wrap=True, highlight=False)
    for table in (architecture_table(files.architecture), parameter_table(files), memory_table(files)):
        console.print(table)
    return 0


def _restore(recipe: TrainingRecipe, files: ModelFiles, checkpoint: Path) -> Decoder | RewardModel:
    """The model of a recipe with the trained weights of a checkpoint."""
    saved = state.Saved(checkpoint).tensors("weights")
    model: Decoder | RewardModel
    recipe = alone(recipe)
    if isinstance(recipe, RewardRecipe):
        model, _ = built(files, recipe)
    else:
        model = load_to_train(load_model, files, recipe)
    parameters = dict(model.named_parameters())
    # of several models in one the one that is wanted
    inside = [name for name in saved.names() if name.startswith(("policy.", "student."))]
    names = {name.removeprefix("policy.").removeprefix("student."): name for name in inside or saved.names()}
    if odd := sorted(names.keys() - parameters.keys()):
        raise InputError(f"{checkpoint}: {odd[0]}: not a weight of the recipe's model: the recipe was changed")
    with torch.no_grad():
        for name, saved_as in names.items():
            parameters[name].copy_(saved.read(saved_as))
    return model


def _take_place(out: str) -> None:
    """Refuse to write over what is not litrecipe's, and say that what is will be replaced."""
    refuse_foreign(Path(out))
    if Path(out).is_dir() and any(Path(out).iterdir()):
        say(f"{out}: what litrecipe wrote there before is replaced")


def _keep_apart(out: str, files: ModelFiles) -> None:
    """Raise InputError when a folder at `out` would replace what is read, or lie in a run directory."""
    target = Path(out).resolve()
    for path in (Path(files.source), Path(files.base)):
        if path.exists() and target in (path.resolve(), *path.resolve().parents):
            raise InputError(f"{out}: would replace {path}, which is read: name another folder")
    for folder in (target, *target.parents):
        if (folder / "recipe.yaml").is_file() and (folder / "metrics.jsonl").is_file():
            raise InputError(f"{out}: in the run directory {folder}: name a folder outside of it")


def _written(folder: Path) -> float:
    """When a folder was completed; infinity where the user took its manifest away, to vouch for it himself."""
    manifest = folder / MANIFEST
    return manifest.stat().st_mtime if manifest.is_file() else float("inf")


def _recipe_of(run: Path) -> TrainingRecipe:
    if recipe := schema.load_run(run):
        return recipe
    raise InputError(f"{run}: no recipe.yaml in it: give a run directory")


def _stored_dtype(files: ModelFiles) -> torch.dtype:
    """What the base's config says its weights are stored in; fp32 where it says nothing."""
    name = files.config.get("torch_dtype") or files.config.get("dtype") or "float32"
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)

"""Write a model as a Hugging Face folder that transformers and litrecipe load."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from litrecipe.checkpoint.manifest import new_folder
from litrecipe.checkpoint.reward import BESIDE_ADAPTER, HEAD, write_config, write_config_alone
from litrecipe.checkpoint.safetensors_files import INDEX, SINGLE
from litrecipe.checkpoint.weight_files import WeightFiles, Written, rank_and_world
from litrecipe.config.errors import InputError
from litrecipe.config.files import write_json
from litrecipe.config.merge import path_of
from litrecipe.model.architecture import SCORE, Architecture
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.families import names_of, to_hf_config
from litrecipe.model.hydra import Hydra
from litrecipe.model.reference import kept
from litrecipe.model.reward import RewardModel
from litrecipe.model.tensor_plan import whole_size

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    GENERATION,  # says which ids end an answer
)


def save_model(
    folder: Path,
    model: Decoder,
    tokenizer_dir: Path,
    *,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write config, weights, tokenizer and a manifest; the folder has its name only once it is complete.

    `chat_template` is a Jinja file that replaces the tokenizer's; `dtype` is what floating-point weights are stored in
    (default: as they are). Every rank has to call this: each writes some of the files, tensor by tensor, so that none
    holds more than two tensors of a model that they share. Raises ValueError for a model with adapters or quantised
    weights, and on every rank InputError when the disk is full.
    """

    def configure(draft: Path, dtype: str) -> None:
        _configure_language_model(draft, model.architecture, dtype)

    _save(folder, model, tokenizer_dir, configure, chat_template, dtype, max_shard_bytes)


def _configure_language_model(draft: Path, architecture: Architecture, dtype: str) -> None:
    write_json(draft / "config.json", to_hf_config(architecture, dtype))
    if not (draft / GENERATION).is_file():
        write_json(draft / GENERATION, _special_ids(architecture))


def save_hydra(
    folder: Path,
    model: Hydra,
    tokenizer_dir: Path,
    *,
    pad_token: str,
    statistics: tuple[float, float] | None,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a hydra as the language model it is, and its score beside it; all else as `save_reward_model`."""
    score = gather([(SCORE, kept(model)[SCORE])])

    def configure(draft: Path, dtype: str) -> None:
        _configure_language_model(draft, model.architecture, dtype)
        write_head(draft, score, model.architecture, dtype, pad_token, statistics)

    _save(folder, model, tokenizer_dir, configure, chat_template, dtype, max_shard_bytes)


def write_head(
    draft: Path,
    score: dict[str, Tensor],
    architecture: Architecture,
    dtype: str,
    pad_token: str,
    statistics: tuple[float, float] | None,
) -> None:
    """Write a hydra's score (1, d), as it is, and the config of the reward model that it makes of its transformer."""
    save_file(score, draft / HEAD, metadata={"format": "pt"})
    write_config_alone(draft / BESIDE_ADAPTER, architecture, dtype, pad_token, statistics)


def save_reward_model(
    folder: Path,
    model: RewardModel,
    tokenizer_dir: Path,
    *,
    pad_token: str,
    statistics: tuple[float, float] | None,
    chat_template: str | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: float = 5e9,
) -> None:
    """Write a reward model as a sequence classifier with one label; all else as `save_model`.

    `pad_token` is what texts are padded with (see `pad_for_rewards`), `statistics` mean and standard deviation of the
    rewards of good answers.
    """

    def configure(draft: Path, dtype: str) -> None:
        write_config(draft / "config.json", model.architecture, dtype, pad_token, statistics)

    _save(folder, model, tokenizer_dir, configure, chat_template, dtype, max_shard_bytes)


def _save(
    folder: Path,
    model: Trunk,
    tokenizer_dir: Path,
    configure: Callable[[Path, str], None],
    chat_template: str | None,
    dtype: torch.dtype | None,
    max_shard_bytes: float,
) -> None:
    """`configure` completes a folder that has weights, in the dtype of this name, and tokenizer."""
    parameters = kept(model)
    if isinstance(model, Hydra):
        del parameters[SCORE]
    if strange := [n for n, p in parameters.items() if not p.is_floating_point() or ".base_layer." in n]:
        raise ValueError(f"{strange[0]}: merge adapters and dequantise before saving")
    dtype = dtype or parameters["model.embed_tokens.weight"].dtype
    shards = list(_cut(parameters, dtype.itemsize, max_shard_bytes))
    called = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else called
    translate = partial(names_of(model.architecture).written, architecture=model.architecture)
    weights = WeightFiles(parameters, dict(zip(names, shards, strict=True)), translate, dtype, model.group)

    def write(draft: Path) -> None:
        if len(shards) > 1:
            where = {stored: name for name in names for stored in weights.announced(name)}
            size = sum(map(whole_size, parameters.values())) * dtype.itemsize
            write_json(draft / INDEX, {"metadata": {"total_size": size}, "weight_map": where})
        copy_tokenizer(tokenizer_dir, draft, chat_template)
        configure(draft, dtype_name(dtype))

    write_folder(folder, write, weights)


def write_folder(folder: Path, write: Callable[[Path], None], weights: WeightFiles) -> None:
    """A new folder with weights, of which each rank writes some, and with what `write` lets the first one add.

    What goes wrong on any rank (InputError, OSError) is raised on all of them.
    """
    failure: Exception | None = None
    rank, _ = rank_and_world()
    try:
        if rank == 0:
            written: Written = {}
            with _shown(new_folder(folder, written)) as draft:
                written |= weights.write(draft)
                write(draft)
        elif draft := _first_says(None):
            weights.write(draft)
    except (InputError, OSError) as error:
        failure = error
    failure = _first_says(failure)
    if failure:
        raise failure


@contextmanager
def _shown(folder: AbstractContextManager[Path]) -> Iterator[Path]:
    """A folder of the first rank, which the others are told of; they are told too where there is none."""
    with ExitStack() as stack:
        try:
            draft = stack.enter_context(folder)
        except (InputError, OSError):
            _first_says(None)
            raise
        _first_says(draft)
        yield draft


def _first_says(value: Any) -> Any:
    """What the first rank brings, on all of them."""
    told = [value]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(told, src=0)
    return told[0]


def gather(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Small tensors, whole and in the main memory of the first rank; nothing on the others.

    A sharded tensor is put together on every rank: all have to call this.
    """
    whole = ((name, t.full_tensor() if isinstance(t, DTensor) else t) for name, t in tensors)
    keep = rank_and_world()[0] == 0
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in whole if keep}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32`, as a `config.json` has it."""
    return str(dtype).removeprefix("torch.")


def copy_tokenizer(source: Path, target: Path, chat_template: str | None = None) -> None:
    """Copy what makes a tokenizer; `chat_template` is a Jinja file that replaces the model's own."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if chat_template is not None:
        shutil.copyfile(path_of(chat_template), target / "chat_template.jinja")


def _cut(parameters: dict[str, nn.Parameter], itemsize: int, limit: float) -> Iterator[list[str]]:
    """Names of the tensors of each shard, in order."""
    names: list[str] = []
    size = 0
    for name, parameter in parameters.items():
        if names and size + whole_size(parameter) * itemsize > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += whole_size(parameter) * itemsize
    yield names


def _special_ids(architecture: Architecture) -> dict[str, int | list[int]]:
    config = to_hf_config(architecture)
    return {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}

"""Recognise what a user calls a model, and check it before anything large is read. Imports no torch.

A source is a Hugging Face folder, a hub id, a GGUF file, a PEFT adapter folder, a run directory (its final model), or a
`config.json` without weights, such as those that ship with recipes (`hub:experiments/addition/config.json`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from litrecipe.checkpoint.hub import HUB_ID, fetch
from litrecipe.checkpoint.manifest import keeping_in_cache, user_cache, verify
from litrecipe.checkpoint.peft_adapter import ADAPTER_CONFIG, AdapterFiles, read_adapter
from litrecipe.checkpoint.reward import BESIDE_ADAPTER, HEAD, read_statistics
from litrecipe.checkpoint.safetensors_files import SafetensorsFile, find_weights
from litrecipe.config.errors import InputError
from litrecipe.config.files import locked, nearest, read_json, refuse_linked_files
from litrecipe.config.groups import Model
from litrecipe.config.merge import path_of
from litrecipe.config.progress import counted
from litrecipe.model.architecture import SCORE, Architecture, count_parameters
from litrecipe.model.families import names_of, read_architecture
from litrecipe.model.names import Names

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "generation_config.json", "*.jinja"]
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer*"]
"""What is fetched from the hub; pickles are not."""
NOT_FETCHED = ["*/*", "consolidated*.safetensors", "manifest.json"]
"""Of those, what is left out: other formats in subfolders, Mistral's second copy of the weights, and lists of files of
which some are not fetched; the hub's own names vouch for large files."""
SOURCES = "a Hugging Face folder, a hub id, a GGUF file, an adapter folder, a run directory or a config.json"


class Weights(Protocol):
    """Tensors with the names of Hugging Face's files, wherever they are stored."""

    @property
    def paths(self) -> list[Path]:
        """The files."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape, known without reading a tensor."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor once, one at a time."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of a tensor, read by themselves; what `check` finds is not looked for."""

    def check(self, part: int = 0, parts: int = 1) -> None:
        """Raise InputError where a file is not what its digest says; of several processes each can look at a part."""

    def stored(self, name: str) -> bytes:
        """A tensor's bytes as they are stored."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk."""

    source: str
    """As the user wrote it; for a run directory its final model."""
    config: dict[str, Any]
    """The `config.json`, in Hugging Face's dialect."""
    architecture: Architecture
    tokenizer_dir: Path
    """Holds tokenizer.json, tokenizer_config.json, and what else Hugging Face keeps beside them."""
    weights: Weights | None
    """None when there is only a `config.json`."""
    adapter: AdapterFiles | None = None
    """The adapter, when `source` is a PEFT folder; all else is then its base model's."""
    head: SafetensorsFile | None = None
    """The score that lies beside the language model of a hydra."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as it is in memory, (name, tensor), one at a time. Raises InputError when there are none."""
        return names_of(self.architecture).read(self._need_weights().tensors(), self.architecture)

    def read(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """A part of a tensor as it is in memory. Of the files only its rows are read where they lie there as they do in
        memory, otherwise the whole tensor."""
        weights, names, a = self._need_weights(), names_of(self.architecture), self.architecture
        parts = self._parts[name]
        rows = where[0] if where else slice(None)
        if len(parts) == 1 and names.keeps(name):
            found = weights.rows(parts[0], rows.start or 0, rows.stop)
        else:
            found = names.read_rows(name, parts, rows, weights.rows, a)
        return found[(slice(None), *where[1:])]

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Name in memory → the tensors in files that make it up."""
        return names_of(self.architecture).made_of(self._need_weights().shapes)

    def check(self, part: int = 0, parts: int = 1) -> None:
        """Check the digests of files that are not read whole; of several processes each can look at a part."""
        if self.weights is not None:
            self.weights.check(part, parts)

    def for_length(self, tokens: int | None) -> ModelFiles:
        """The same for a run whose longest sequence has so many tokens, see `Architecture.for_length`; None: as many as
        the model was made for."""
        return self if tokens is None else replace(self, architecture=self.architecture.for_length(tokens))

    @property
    def is_reward_model(self) -> bool:
        """Whether the weights or the adapter hold a score; otherwise it is a language model."""
        if self.adapter and self.adapter.is_reward_model:
            return True
        return self.weights is not None and SCORE in self.weights.shapes

    @property
    def is_hydra(self) -> bool:
        """Whether it is a language model that is a reward model too, for those who ask for one."""
        return self.head is not None

    def score(self) -> Tensor:
        """The score (1, d) of a hydra."""
        assert self.head is not None
        return dict(self.head.tensors())[SCORE]

    def refuse_reward_model(self) -> None:
        """Raise InputError where a language model is needed and this is none."""
        if self.is_reward_model:
            raise InputError(
                f"model.source: {self.source}: is a reward model, has no language model head: give a language model"
            )

    @property
    def reward_statistics(self) -> tuple[float, float] | None:
        """Mean and standard deviation of a reward model's rewards of good answers, where its config tells them.

        Raises InputError when they are no numbers.
        """
        beside = self.head.path.parent if self.head else self.adapter.folder if self.adapter else None
        if beside is None:
            return read_statistics(self.config, self.source)
        config = beside / BESIDE_ADAPTER
        return read_statistics(read_json(config), config) if config.is_file() else None

    @property
    def base(self) -> str:
        """Where the base model is: `source`, or what an adapter folder names."""
        return self.adapter.base if self.adapter else self.source

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of the tensors, as they are in memory."""
        return names_of(self.architecture).shapes(self._need_weights().shapes)

    @property
    def weights_name(self) -> str:
        """The file or folder the tensors are in, for messages."""
        paths = self._need_weights().paths
        return str(paths[0] if len(paths) == 1 else paths[0].parent)

    def weights_hash(self) -> str:
        """sha256 over names and stored bytes of the tensors in sorted order; over the config where there are none.

        The result is remembered for files of the same path, size and time; of several processes one computes it.
        """
        if self.weights is None:
            return sha256(json.dumps(self.config, sort_keys=True).encode()).hexdigest()
        stamps: list[Any] = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in self.weights.paths]
        if isinstance(self.weights, FirstLayers):
            stamps.append(self.weights.layers)
        memory = user_cache() / "weights" / sha256(json.dumps(stamps).encode()).hexdigest()[:32]
        with keeping_in_cache(), locked(memory.with_suffix(".lock"), "reads the same weights"):
            if not memory.is_file():
                draft = memory.with_suffix(".tmp")
                draft.write_text(_digest(self.weights))
                draft.replace(memory)
            return memory.read_text()

    def describe(self) -> str:
        """One line for a person."""
        a = self.architecture
        size = count_parameters(a, is_reward_model=self.is_reward_model)
        kind = f"{a.family} reward model" if self.is_reward_model else a.family
        kind += " with a score beside its language model" if self.is_hydra else ""
        line = (
            f"{self.source}: {kind}, {counted(size, 'parameter', ',')} in {counted(a.num_layers, 'layer')} of "
            f"{a.hidden_size}"
        )
        if a.experts is not None:
            active = count_parameters(a, is_reward_model=self.is_reward_model, active=True)
            line += f", {active:,} of them at work on a token"
        return line + (f", with a {self.adapter.kind} adapter" if self.adapter else "")

    def _need_weights(self) -> Weights:
        if self.weights is None:
            raise InputError(
                f"model.source: {self.source}: a config.json without weights: give a folder with model.safetensors, or "
                "start from scratch with --model.init random"
            )
        return self.weights


def _digest(weights: Weights) -> str:
    digest = sha256()
    for name in sorted(weights.shapes):
        digest.update(name.encode())
        digest.update(weights.stored(name))
    return digest.hexdigest()


@dataclass(frozen=True)
class FirstLayers:
    """Weights without the layers behind the first so many."""

    whole: Weights
    layers: int
    names: Names

    @property
    def paths(self) -> list[Path]:
        """Those of all weights."""
        return self.whole.paths

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Weights`."""
        return {name: shape for name, shape in self.whole.shapes.items() if self._has(name)}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Weights`."""
        return ((name, tensor) for name, tensor in self.whole.tensors() if self._has(name))

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `Weights`."""
        return self.whole.rows(name, start, stop)

    def check(self, part: int = 0, parts: int = 1) -> None:
        """See `Weights`."""
        self.whole.check(part, parts)

    def stored(self, name: str) -> bytes:
        """See `Weights`."""
        return self.whole.stored(name)

    def _has(self, name: str) -> bool:
        number = layer_of(self.names.in_memory(name))
        return number is None or number < self.layers


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor is in, by its name in memory; None for all that is outside of layers."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None


def first_layers(files: ModelFiles, layers: int) -> ModelFiles:
    """A smaller model that inherits embedding, head, last norm and the first layers of a larger one (Inheritune,
    2404.08634, algorithm 1). Raises InputError where there are not so many, and for an adapter."""
    said, whole = f"model.inherit_layers: {layers}", files.architecture
    if layers > whole.num_layers:
        raise InputError(f"{said}: {files.source} has {whole.num_layers}: give at most that")
    if files.adapter:
        raise InputError(f"{said}: {files.source} is an adapter: `litrecipe model merge` it first")
    weights = FirstLayers(files.weights, layers, names_of(whole)) if files.weights else None
    return replace(files, architecture=whole.first_layers(layers), weights=weights, head=None)


def open_model(
    source: str, *, tokenizer: str | None = None, layers: int | None = None, fresh: bool = False
) -> ModelFiles:
    """Find a model and read its configuration; tensors are read only when they are asked for.

    `tokenizer` is a folder with `tokenizer.json` that replaces the model's own; of the model only the first `layers`
    are taken, or none of its weights: `fresh`. Raises InputError naming the file when something is missing, damaged,
    or does not fit.
    """
    files = _open(source)
    if layers is not None:
        files = first_layers(files, layers)
    if tokenizer is not None:
        folder = path_of(tokenizer)
        if not folder.exists() and (match := HUB_ID.fullmatch(tokenizer)):
            folder = fetch(f"model.tokenizer: {tokenizer}", match["repo"], match["revision"], allow=TOKENIZER_FILES)
        elif folder.is_file():
            folder = _open(tokenizer).tokenizer_dir  # a GGUF file has one in it
        if not (folder / "tokenizer.json").is_file():
            raise InputError(f"model.tokenizer: {tokenizer}: no tokenizer.json in it: give a folder that has one")
        refuse_linked_files(folder)
        files = replace(files, tokenizer_dir=folder)
    _check_tokenizer(files.tokenizer_dir / "tokenizer.json", files.architecture.vocab_size, fresh)
    return files


def open_asked(model: Model) -> ModelFiles:
    """The same of a recipe's `model` group."""
    fresh = model.init == "random"
    return open_model(model.source, tokenizer=model.tokenizer, layers=model.inherit_layers, fresh=fresh)


def open_model_as(source: str, key: str) -> ModelFiles:
    """The same of a model that another key names: mistakes are said of that, with what stands before the source there,
    such as `ppo.critic: `."""
    try:
        return open_model(source)
    except InputError as error:
        raise InputError(*(line.replace("model.source: ", key, 1) for line in error.mistakes)) from error


def _open(source: str, *, is_base: bool = False) -> ModelFiles:
    """`is_base`: an adapter's, which cannot be an adapter."""
    path = path_of(source)
    if not source:
        raise InputError(f"model.source: missing: give {SOURCES}")
    if path.is_dir():
        return _open_folder(path, source, is_base)
    if path.suffix == ".gguf" and path.is_file():
        return _open_gguf(path, source)
    if path.suffix == ".json" and path.is_file():
        return _hf_files(source, path, weights=None)
    if path.exists():
        raise InputError(
            f"model.source: {source}: neither a folder nor a .gguf file nor a config.json: give one of them"
        )
    if match := HUB_ID.fullmatch(source):
        said = f"model.source: {source}"
        folder = fetch(said, match["repo"], match["revision"], allow=HUB_FILES, ignore=NOT_FETCHED)
        return _open_folder(folder, source, is_base)
    close = nearest(path)
    cure = f"did you mean {close}?" if close else f"give {SOURCES}"
    raise InputError(f"model.source: {source}: no such file or folder: {cure}")


def _open_folder(folder: Path, source: str, is_base: bool) -> ModelFiles:
    refuse_linked_files(folder)
    verify(folder)
    if (folder / ADAPTER_CONFIG).is_file():
        if is_base:
            raise InputError(f"{source}: an adapter itself: merge it first with `litrecipe model merge`")
        return _open_adapter(folder, source)
    config = folder / "config.json"
    if not config.is_file():
        if (folder / "recipe.yaml").is_file():
            return _open_final(folder, source, is_base)
        one = next(folder.glob("*.gguf"), None)
        cure = f"give {one}" if one else "give a folder with config.json and model.safetensors"
        raise InputError(f"model.source: {source}: no config.json in it: {cure}")
    return replace(_hf_files(source, config, find_weights(folder)), head=_find_head(folder))


def _open_final(run: Path, source: str, is_base: bool) -> ModelFiles:
    final = run / "final"
    if not final.is_dir():
        raise InputError(
            f"model.source: {source}: this run has no final model yet: resume it, or take a checkpoint out with "
            "`litrecipe model export`"
        )
    return _open_folder(final, str(final), is_base)


def _hf_files(source: str, config_path: Path, weights: Weights | None) -> ModelFiles:
    config = read_json(config_path)
    if "quantization_config" in config:
        raise InputError(
            f"{config_path}: quantization_config: weights quantised by another tool: use the original model with "
            "--quantize.method nf4 or int8"
        )
    return ModelFiles(source, config, _architecture(config, config_path), config_path.parent, weights)


def _architecture(config: dict[str, Any], path: Path) -> Architecture:
    try:
        return read_architecture(config)
    except InputError as error:  # does not know where the config came from
        raise InputError(*(f"{path}{line.removeprefix('config.json')}" for line in error.mistakes)) from error


def _open_gguf(path: Path, source: str) -> ModelFiles:
    from litrecipe.checkpoint.gguf import GgufWeights
    from litrecipe.checkpoint.gguf_tokenizer import write_tokenizer

    weights = GgufWeights(path)
    return ModelFiles(source, weights.config, _architecture(weights.config, path), write_tokenizer(weights), weights)


def _open_adapter(folder: Path, source: str) -> ModelFiles:
    adapter = read_adapter(folder)
    try:
        files = _open(adapter.base, is_base=True)
    except InputError as error:
        key = f"{folder / ADAPTER_CONFIG}: base_model_name_or_path"
        raise InputError(f"{key}: its base model cannot be opened ({error}): write where it is") from error
    own_tokenizer = (folder / "tokenizer.json").is_file()
    tokenizer_dir = folder if own_tokenizer else files.tokenizer_dir
    adapter = replace(adapter, architecture=files.architecture)
    # A score of the base is not one of the adapter, unless that was trained with it.
    return replace(files, source=source, adapter=adapter, tokenizer_dir=tokenizer_dir, head=_find_head(folder))


def _find_head(folder: Path) -> SafetensorsFile | None:
    if not (folder / HEAD).is_file():
        return None
    head = SafetensorsFile(folder / HEAD)
    if [entry.name for entry in head.entries] != [SCORE]:
        raise InputError(f"{folder / HEAD}: must hold {SCORE} and nothing else: fetch or save the folder again")
    return head


def _check_tokenizer(path: Path, vocab_size: int, fresh: bool) -> None:
    """Every id of a tokenizer.json must have a row of the embedding. Who needs the file says so when it is missing."""
    if not path.is_file():
        return
    state = read_json(path)
    try:
        vocab = state["model"]["vocab"]
        ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values())
        largest = max([*ids, *(token["id"] for token in state.get("added_tokens", []))], default=-1)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: {error}: no tokenizer the tokenizers library wrote; fetch it again") from error
    if largest < vocab_size:
        return
    if fresh:
        cure = f"set it to {largest + 1} or more, or give another model.tokenizer"
        raise InputError(f"model.source: vocab_size {vocab_size}: {path} has ids up to {largest}: {cure}")
    raise InputError(
        f"{path}: token id {largest}: the model's embedding has {vocab_size} rows: use the tokenizer the model was "
        "trained with"
    )

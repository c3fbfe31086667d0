"""What a reward model's folder holds beside weights: one label, a pad token, and how high its rewards are.

transformers reads the score at the last token that is not the pad token, so that must be one that never ends a text.
Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json, write_json
from litrecipe.config.merge import path_of
from litrecipe.model.architecture import Architecture
from litrecipe.model.families import to_classifier_config

BESIDE_ADAPTER = "reward_config.json"
"""A reward model's config in an adapter folder: next to a `config.json`, transformers would look for whole weights.
Also beside the head of a hydra."""
HEAD = "reward_head.safetensors"
"""The score of a hydra, beside the folder of its language model or of an adapter on one."""
MEAN, STD = "reward_mean", "reward_std"
"""Keys of the config: mean and standard deviation of the rewards of good answers."""
SPARE = ("pad", "reserved", "unused", "unk")
"""Parts of the names of tokens that texts do not hold, the best first."""
ENDS = ("end", "eos", "eot", "eom", "</s>")
"""Parts of the names of tokens that may end a text of some other template; taken last."""


def write_config(
    path: Path, architecture: Architecture, dtype: str, pad_token: str, statistics: tuple[float, float] | None
) -> None:
    """Write the config of a sequence classifier beside its tokenizer, and make `pad_token` the pad token of both.

    Raises InputError when the tokenizer does not know that token.
    """
    draft = path.parent
    pad_id = write_config_alone(path, architecture, dtype, pad_token, statistics)
    write_json(draft / "tokenizer_config.json", _read(draft / "tokenizer_config.json") | {"pad_token": pad_token})
    for name, key, value in (
        ("special_tokens_map.json", "pad_token", pad_token),
        ("generation_config.json", "pad_token_id", pad_id),
    ):
        if (draft / name).is_file():
            write_json(draft / name, read_json(draft / name) | {key: value})


def write_config_alone(
    path: Path, architecture: Architecture, dtype: str, pad_token: str, statistics: tuple[float, float] | None
) -> int:
    """The same without a change to the tokenizer, which is a language model's too; returns the pad token's id."""
    pad_id = vocabulary(path.parent).get(pad_token)
    if pad_id is None:
        raise InputError(f"{path.parent / 'tokenizer.json'}: pad token {pad_token}: not in it: take another, or add it")
    config = to_classifier_config(architecture, dtype, pad_id)
    if statistics is not None:
        config |= dict(zip((MEAN, STD), statistics, strict=True))
    write_json(path, config)
    return pad_id


def read_statistics(config: dict[str, Any], path: Path | str) -> tuple[float, float] | None:
    """Mean and standard deviation in a config, None where it tells none.

    Raises InputError naming `path` when they are no numbers.
    """
    if config.get(MEAN) is None and config.get(STD) is None:
        return None
    for key in (MEAN, STD):
        value: Any = config.get(key)
        if type(value) not in (int, float) or not math.isfinite(value):
            cure = f"train the model again, or remove {MEAN} and {STD}"
            raise InputError(f"{path}: {key}: {json.dumps(value)}: must be a number: {cure}")
    return float(config[MEAN]), float(config[STD])


def pad_for_rewards(tokenizer_dir: Path, architecture: Architecture, *, chat_template: str | None = None) -> str:
    """A token to pad with that ends no text: the tokenizer's own pad token, or else a special token without a use.

    `chat_template` is a Jinja file that replaces the tokenizer's. Raises InputError when there is no such token.
    """
    config = _read(tokenizer_dir / "special_tokens_map.json") | _read(tokenizer_dir / "tokenizer_config.json")
    generation = _read(tokenizer_dir / "generation_config.json")
    ids = vocabulary(tokenizer_dir)
    template = _template(tokenizer_dir, config, chat_template)
    taken_ids = {architecture.bos_id, *architecture.eos_ids, *_ids(generation.get("eos_token_id"))}
    taken = {_text(config.get(name)) for name in ("bos_token", "eos_token")}

    def is_free(token: str) -> bool:
        id = ids.get(token)
        return id is not None and id not in taken_ids and token not in taken and token not in template

    own = _text(config.get("pad_token"))
    if own is not None and is_free(own):
        return own
    spare = [token for token in _special_tokens(tokenizer_dir) if is_free(token)]
    if not spare:
        raise InputError(
            f"{tokenizer_dir / 'tokenizer_config.json'}: pad_token: {json.dumps(own)}: may end a text, and no special "
            "token is free to take its place: add a token to tokenizer.json and name it here"
        )
    return min(spare, key=_rank)


def _rank(token: str) -> int:
    """How fit a free token is to pad with, 0 the best."""
    name = token.lower()
    fitness = next((place for place, part in enumerate(SPARE) if part in name), len(SPARE))
    return fitness + (fitness == len(SPARE) and any(part in name for part in ENDS))


def _template(folder: Path, config: dict[str, Any], replacement: str | None) -> str:
    """Source of the chat template, or of all there are."""
    path = path_of(replacement) if replacement else folder / "chat_template.jinja"
    if replacement or path.is_file():
        return path.read_text(encoding="utf-8")
    return json.dumps(config.get("chat_template"), ensure_ascii=False)


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _text(token: Any) -> str | None:
    """A token is a string or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def _ids(value: int | list[int] | None) -> Iterable[int]:
    return [value] if isinstance(value, int) else value or []


def _added(tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    return tokenizer.get("added_tokens") or []


def _special_tokens(folder: Path) -> list[str]:
    added = _added(read_json(folder / "tokenizer.json"))
    return [token["content"] for token in sorted(added, key=lambda token: token["id"]) if token["special"]]


def vocabulary(folder: Path) -> dict[str, int]:
    """Token → id."""
    tokenizer = read_json(folder / "tokenizer.json")
    vocabulary = tokenizer["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: pieces with their scores
        vocabulary = {piece: id for id, (piece, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in _added(tokenizer)}

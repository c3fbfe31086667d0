"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litrecipe.checkpoint.safetensors_files import SafetensorsFile
from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json, write_json
from litrecipe.config.groups import Adapter

if TYPE_CHECKING:
    from torch import Tensor

    from litrecipe.model.decoder import Decoder

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk."""

    folder: Path
    config: dict[str, Any]
    """peft's `adapter_config.json`."""
    weights: SafetensorsFile

    @property
    def base(self) -> str:
        """Folder or hub id of the model it was trained on; may be empty."""
        base = self.config.get("base_model_name_or_path") or ""
        if (beside := self.folder / base).exists():
            return str(beside)
        revision = self.config.get("revision")
        return f"{base}@{revision}" if base and revision and not Path(base).exists() else base

    @property
    def kind(self) -> str:
        """`lora` or `dora`."""
        return self.settings.method

    @property
    def settings(self) -> Adapter:
        """The same as a recipe's `adapter` group."""
        config = self.config
        return Adapter(
            method="dora" if config.get("use_dora") else "lora",
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout", 0.0),
            targets=sorted(config["target_modules"]),
            rslora=config.get("use_rslora", False),
        )

    def state(self) -> dict[str, Tensor]:
        """The adapter's tensors under the names in the file."""
        return dict(self.weights.tensors())


def read_adapter(folder: Path) -> AdapterFiles:
    """Open a PEFT folder. Raises InputError for damaged files and for adapters of other kinds."""
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    mistakes = []
    if config.get("peft_type") != "LORA":
        mistakes.append(f"{path}: peft_type: {config.get('peft_type')}: only LORA (with or without DoRA) can be read")
    mistakes += [f"{path}: {key}: missing" for key in ("r", "lora_alpha") if key not in config]
    if not isinstance(config.get("target_modules"), list):
        mistakes.append(f"{path}: target_modules: {config.get('target_modules')}: only a list of names can be read")
    mistakes += [
        f"{path}: {key}: {config[key]}: not implemented"
        for key in (
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "layers_to_transform",
            "layer_replication",
            "trainable_token_indices",
        )
        if config.get(key)
    ]
    if config.get("bias", "none") != "none":
        mistakes.append(f"{path}: bias: {config['bias']}: only none is implemented")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        mistakes.append(f"{folder / ADAPTER_WEIGHTS}: missing: the adapter's weights; fetch or save the folder again")
    if mistakes:
        raise InputError(*mistakes)
    return AdapterFiles(folder, config, SafetensorsFile(folder / ADAPTER_WEIGHTS))


def save_adapter(
    folder: Path,
    model: Decoder,
    adapter: Adapter,
    base: str,
    tokenizer_dir: Path,
    *,
    chat_template: str | None = None,
) -> None:
    """Write the adapter of `model` as a folder that peft and litrecipe load, with the tokenizer beside it.

    `adapter` holds the settings it was made with; `base` is where its base model is, a path or `org/name[@revision]`;
    `chat_template` is a Jinja file that replaces the tokenizer's. Every rank has to call this; the first one writes.
    Raises InputError on every rank when the disk is full.
    """
    from safetensors.torch import save_file

    from litrecipe.checkpoint.hf import copy_tokenizer, gather, write_folder
    from litrecipe.model.adapters import adapter_config, adapter_state

    state = gather(adapter_state(model).items())
    if Path(base).expanduser().exists():
        name, revision = str(Path(base).expanduser().resolve()), ""
    else:
        name, _, revision = base.partition("@")
    config = adapter_config(adapter, name)
    if revision:
        config["revision"] = revision

    def write(draft: Path) -> None:
        write_json(draft / ADAPTER_CONFIG, config)
        save_file(state, draft / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        copy_tokenizer(tokenizer_dir, draft, chat_template)

    write_folder(folder, write)

"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litrecipe.checkpoint.reward import BESIDE_ADAPTER, write_config
from litrecipe.checkpoint.safetensors_files import SafetensorsFile
from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json, write_json
from litrecipe.config.groups import Adapter
from litrecipe.config.merge import path_of
from litrecipe.model.architecture import EXPERTS, PROJECTIONS, SCORE, Architecture
from litrecipe.model.families import names_of

if TYPE_CHECKING:
    from torch import Tensor

    from litrecipe.model.decoder import Trunk

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""peft's `init_lora_weights` that leave the base as it is; the others (PiSSA, OLoRA, CorDA, LoftQ, …) train the adapter
on a changed base, which the folder does not hold."""
NOT_READ = (
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "exclude_modules",
    "layers_to_transform",
    "layer_replication",
    "trainable_token_indices",
    "lora_bias",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
"""peft's settings that change what an adapter computes or where it sits, and that are not implemented. Not among them
is `fan_in_fan_out`, which peft itself sets by the kind of layer, whatever it says."""
CLASSIFIER = "SEQ_CLS"
"""peft's `task_type` of a reward model's adapter."""


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter on disk."""

    folder: Path
    config: dict[str, Any]
    """peft's `adapter_config.json`."""
    weights: SafetensorsFile
    architecture: Architecture | None = None
    """Of its base, which says how the names in the files are to be read; None: as they stand."""

    @property
    def base(self) -> str:
        """Folder or hub id of the model it was trained on."""
        base = self.config["base_model_name_or_path"]
        if (beside := self.folder / base).exists():
            return str(beside)
        revision = self.config.get("revision")
        return f"{base}@{revision}" if revision and not Path(base).exists() else base

    @property
    def is_reward_model(self) -> bool:
        """Whether it holds the score of a reward model."""
        return self.config.get("task_type") == CLASSIFIER

    @property
    def score_shape(self) -> tuple[int, ...] | None:
        """Shape of the score, None where there is none."""
        return next((entry.shape for entry in self.weights.entries if entry.name.endswith(f".{SCORE}")), None)

    @property
    def kind(self) -> str:
        """`lora` or `dora`."""
        return self.settings.method

    @property
    def settings(self) -> Adapter:
        """The same as a recipe's `adapter` group, `targets` by their names in memory."""
        config, a = self.config, self.architecture
        targets = config["target_modules"] if a is None else names_of(a).targets_in_memory(config["target_modules"])
        return Adapter(
            method="dora" if config.get("use_dora") else "lora",
            r=config["r"],
            alpha=config["lora_alpha"],
            dropout=config.get("lora_dropout") or 0.0,
            targets=sorted([*targets, *_expert_targets(config)]),
            rslora=config.get("use_rslora", False),
        )

    def state(self) -> dict[str, Tensor]:
        """The adapter's tensors as they are in memory."""
        tensors, a = self.weights.tensors(), self.architecture
        return dict(tensors if a is None else names_of(a).read(tensors, a))


def read_adapter(folder: Path) -> AdapterFiles:
    """Open a PEFT folder. Raises InputError for damaged files and for adapters of other kinds."""
    path = folder / ADAPTER_CONFIG
    config = read_json(path)
    retrain = "train it anew without, or merge it with peft (`merge_and_unload`) and use the result"

    def wrong(key: str, cure: str) -> str:
        return f"{path}: {key}: {json.dumps(config.get(key), ensure_ascii=False)}: {cure}"

    mistakes = []
    if config.get("peft_type") != "LORA":
        mistakes.append(wrong("peft_type", "only LORA (with or without DoRA) is read: merge it with peft"))
    base, rank, targets = (config.get(key) for key in ("base_model_name_or_path", "r", "target_modules"))
    if not isinstance(base, str) or not base:
        mistakes.append(wrong("base_model_name_or_path", "write the base model's folder or hub id there"))
    if not isinstance(rank, int) or rank < 1:
        mistakes.append(wrong("r", "must be a whole number from 1 on: fetch or save the folder again"))
    mistakes += [
        wrong(key, "must be a number: fetch or save the folder again")
        for key, value in (("lora_alpha", config.get("lora_alpha")), ("lora_dropout", config.get("lora_dropout") or 0))
        if not isinstance(value, int | float)
    ]
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or len(_expert_targets(config)) != len(parameters):
        mistakes.append(wrong("target_parameters", f"only {EXPERTS}.{f' and {EXPERTS}.'.join(PROJECTIONS)} are read"))
    if not isinstance(targets, list):
        mistakes.append(wrong("target_modules", "only a list of names is read: write the names of the layers there"))
    if config.get("init_lora_weights", True) not in STARTS:
        mistakes.append(wrong("init_lora_weights", f"it was trained on a changed base: {retrain}"))
    if config.get("bias", "none") != "none":
        mistakes.append(wrong("bias", f"only none is implemented: {retrain}"))
    not_read = [key for key in NOT_READ if config.get(key)]
    if config.get("task_type") == CLASSIFIER and _saves_the_score(config):
        not_read.remove("modules_to_save")
    mistakes += [wrong(key, f"not implemented: {retrain}") for key in not_read]
    if not (folder / ADAPTER_WEIGHTS).is_file():
        mistakes.append(f"{folder / ADAPTER_WEIGHTS}: missing: the adapter's weights; fetch or save the folder again")
    if mistakes:
        raise InputError(*mistakes)
    adapter = AdapterFiles(folder, config, SafetensorsFile(folder / ADAPTER_WEIGHTS))
    if adapter.is_reward_model and adapter.score_shape is None:
        raise InputError(
            f"{adapter.weights.path}: {SCORE}: missing from a {CLASSIFIER} adapter: save it again with modules_to_save "
            '["score"]'
        )
    return adapter


def _expert_targets(config: dict[str, Any]) -> list[str]:
    """The projections of experts among peft's `target_parameters`, which any end of their names may tell."""
    whole = {name: f".{EXPERTS}.{name}" for name in PROJECTIONS}
    named = config.get("target_parameters") or []
    return [name for one in named for name, path in whole.items() if path.endswith(f".{one}")]


def _saves_the_score(config: dict[str, Any]) -> bool:
    """peft itself lists its other name of a classifier's head too, which no model here has."""
    modules = config.get("modules_to_save")
    return isinstance(modules, list) and {"score"} <= set(modules) <= {"score", "classifier"}


def save_adapter(
    folder: Path,
    model: Trunk,
    adapter: Adapter,
    base: str,
    tokenizer_dir: Path,
    *,
    chat_template: str | None = None,
    pad_token: str | None = None,
    statistics: tuple[float, float] | None = None,
) -> None:
    """Write the adapter of `model` as a folder that peft and litrecipe load, with the tokenizer beside it.

    `adapter` holds the settings it was made with; `base` is where its base model is, a path or `org/name[@revision]`;
    `chat_template` is a Jinja file that replaces the tokenizer's. A reward model's score goes along, and its
    `reward_config.json` with pad token, which must be given, and statistics; see `save_reward_model`. That of a hydra
    lies beside the adapter of its language model; see `save_hydra`. Every rank has to call this; the first one writes,
    tensor by tensor. Raises InputError on every rank when the disk is full.
    """
    from litrecipe.checkpoint.hf import copy_tokenizer, dtype_name, gather, write_folder, write_head
    from litrecipe.checkpoint.weight_files import WeightFiles
    from litrecipe.model.adapters import PEFT_PREFIX, adapter_config, adapter_state, fitting
    from litrecipe.model.hydra import Hydra
    from litrecipe.model.reward import RewardModel

    if isinstance(model, RewardModel) != (pad_token is not None):
        raise ValueError("pad_token: a reward model's adapter needs one, others have none")
    state = adapter_state(model)
    is_hydra = isinstance(model, Hydra)
    head = gather([(SCORE, state.pop(f"{PEFT_PREFIX}{SCORE}"))]) if is_hydra else {}
    if path_of(base).exists():
        name, revision = str(path_of(base).resolve()), ""
    else:
        name, _, revision = base.partition("@")
    names = names_of(model.architecture)
    config = adapter_config(
        fitting(adapter, model.architecture),
        name,
        names=names,
        with_score=isinstance(model, RewardModel) and not is_hydra,
        with_experts=model.architecture.experts is not None,
    )
    if revision:
        config["revision"] = revision

    def write(draft: Path) -> None:
        write_json(draft / ADAPTER_CONFIG, config)
        copy_tokenizer(tokenizer_dir, draft, chat_template)
        dtype = dtype_name(model.model.embed_tokens.weight.dtype)
        if is_hydra and pad_token is not None:
            write_head(draft, head, model.architecture, dtype, pad_token, statistics)
        elif pad_token is not None:
            write_config(draft / BESIDE_ADAPTER, model.architecture, dtype, pad_token, statistics)

    translate = partial(names.written, architecture=model.architecture)
    write_folder(folder, write, WeightFiles(state, {ADAPTER_WEIGHTS: list(state)}, translate, group=model.group))

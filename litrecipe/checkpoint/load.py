"""From files to a language model or a reward model, one tensor at a time.

The model is built without memory (on torch's meta device), every tensor is put where it belongs as it is read, and
each layer is quantised as soon as it is complete, so the peak is the finished model and one layer. A model that
processes share stays without memory until it is cut; then it is filled, see `fill.py`.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from litrecipe.checkpoint.fill import Filling
from litrecipe.checkpoint.source import ModelFiles, layer_of
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.config.progress import track
from litrecipe.model.architecture import SCORE, Architecture
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.families import names_of
from litrecipe.model.hydra import Hydra
from litrecipe.model.reward import RewardModel
from litrecipe.model.teacher import Teacher

SHOWN = 10
"""Wrong tensors named in one error."""


def load_model(
    files: ModelFiles,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Quantize | None = None,
    adapter: Adapter | None = None,
    init: str = "pretrained",
    seed: int = 0,
    shared: bool = False,
) -> Decoder:
    """The decoder of `files` with its weights in `dtype`, quantised linears and an adapter as asked for.

    `init` random draws fresh weights from `seed` instead of reading any. An adapter in `files` is loaded; a fresh one
    of other settings on top of it is refused. `shared` leaves the base weights without values: `model.fill` gives them
    to the pieces that each process holds. Raises InputError for a reward model, and when tensors are missing,
    unexpected or of another shape than the config says.
    """
    files.refuse_reward_model()
    settings = _adapter_settings(files, adapter)
    with torch.device("meta"):
        model = Decoder(files.architecture)
    _put_weights(model, files, dtype, device, quantize or Quantize(), init, seed, shared)
    model.tie_weights()
    if settings:
        _adapt(model, files, settings, seed)
    return model


def load_teacher(
    files: ModelFiles, *, dtype: torch.dtype = torch.float32, quantize: Quantize | None = None, shared: bool = False
) -> Teacher:
    """The same decoder, frozen, as one that is asked; an adapter in `files` is a part of it."""
    with torch.device("meta"):
        model = Teacher(files.architecture)
    _put_weights(model, files, dtype, "cpu", quantize or Quantize(), "pretrained", 0, shared)
    model.tie_weights()
    if files.adapter:
        _adapt(model, files, files.adapter.settings, seed=0)
    return model.requires_grad_(False).eval()


def load_reward_model(
    files: ModelFiles,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Quantize | None = None,
    adapter: Adapter | None = None,
    init: str = "pretrained",
    seed: int = 0,
    shared: bool = False,
) -> RewardModel:
    """The reward model of `files`, be it one of a hydra, or a fresh one on the transformer of a language model: its
    head is left out, and the score drawn from `seed`.

    All else as `load_model`; under an adapter the score is fp32 and trains. Raises InputError for a classifier of
    several labels.
    """
    if files.is_reward_model or files.is_hydra:
        _check_labels(files)
    settings = _adapter_settings(files, adapter)
    with torch.device("meta"):
        model = RewardModel(files.architecture)
    _put_weights(model, files, dtype, device, quantize or Quantize(), init, seed, shared)
    _put_score(model, files, device, init, seed)
    _finish_score(model, files, settings, dtype, seed)
    return model


def load_hydra(
    files: ModelFiles,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Quantize | None = None,
    adapter: Adapter | None = None,
    init: str = "pretrained",
    seed: int = 0,
    shared: bool = False,
) -> Hydra:
    """The language model of `files` with the score beside it, or with one that is drawn from `seed`.

    All else as `load_reward_model`. Raises InputError for a reward model, which has no language model's head.
    """
    files.refuse_reward_model()
    if files.is_hydra:
        _check_labels(files)
    settings = _adapter_settings(files, adapter)
    with torch.device("meta"):
        model = Hydra(files.architecture)
    _put_weights(model, files, dtype, device, quantize or Quantize(), init, seed, shared)
    model.tie_weights()
    _put_score(model, files, device, init, seed)
    _finish_score(model, files, settings, dtype, seed)
    return model


def _put_score(model: RewardModel, files: ModelFiles, device: torch.device | str, init: str, seed: int) -> None:
    """Statistics, and a score in fp32 where none was read with the weights: that of the files or a fresh one."""
    model.statistics = files.reward_statistics
    if not model.score.weight.is_meta:
        return
    if files.head is not None:
        score = files.score()
        if score.shape != model.score.weight.shape:
            shapes = f"shape {list(score.shape)}, not {list(model.score.weight.shape)} as the config says"
            raise InputError(f"{files.head.path}: {SCORE}: {shapes}: fetch or save the folder again")
        model.score.weight = nn.Parameter(score.to(device, torch.float32))
    elif init != "random" and SCORE in files.shapes:
        model.score.weight = nn.Parameter(files.read(SCORE, ()).to(device, torch.float32))
    else:
        model.score.to_empty(device=device)
        model.init_score(seed)


def _finish_score(
    model: RewardModel, files: ModelFiles, settings: Adapter | None, dtype: torch.dtype, seed: int
) -> None:
    """Under an adapter the score is fp32 and trains, else it is as the weights are."""
    if settings:
        _adapt(model, files, settings, seed)
    else:
        model.score.to(dtype)


def _check_labels(files: ModelFiles) -> None:
    adapter = files.adapter if files.adapter and files.adapter.is_reward_model else None
    shape = adapter.score_shape if adapter else files.shapes.get(SCORE)
    if files.head is not None:
        shape = files.head.entries[0].shape
    config = {} if adapter or files.head else files.config  # an adapter's is its base's
    labels = config.get("id2label")
    for key, count in (
        ("config.json: num_labels", config.get("num_labels", 1)),
        ("config.json: id2label", len(labels) if isinstance(labels, dict) else 1),
        (SCORE, shape[0] if shape else 0),
    ):
        if count != 1:
            raise InputError(
                f"model.source: {files.source}: {key}: {count} labels: a reward model has one: give such a model, or a "
                "language model to start from"
            )


def _put_weights(
    model: Trunk,
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: Quantize,
    init: str,
    seed: int,
    shared: bool,
) -> None:
    """Weights into a model without memory, fresh or read. A score that is not in the files stays without."""
    if shared:
        if quantize.method == "int8":
            raise InputError(f"{files.source}: int8 weights cannot be sharded: use nf4, or fabric.strategy ddp")
        if init != "random":
            _check_tensors(files, model)
        model.to(dtype)
        if quantize.method != "none":
            _quantize(model.model, quantize)
        model.fill = Filling(files, dtype, init, seed, fresh_adapter=files.adapter is None)
    elif init == "random":
        model.to_empty(device=device)
        model.init_weights(seed)
        model.to(dtype)
        if quantize.method != "none":
            _quantize(model.model, quantize)
    else:
        _check_tensors(files, model)
        _fill(model, files, dtype, device, quantize)


def _check_tensors(files: ModelFiles, model: Trunk) -> None:
    """Names and shapes, before anything is read. Each head may do without that of the other kind."""
    found = dict(files.shapes)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if SCORE not in found:
        expected.pop(SCORE, None)
    if "lm_head.weight" not in expected:
        found.pop("lm_head.weight", None)
    names = names_of(files.architecture)
    said, expected = names.in_files, names.parted(expected)
    mistakes = [f"{said(name)}: missing" for name in expected if name not in found]
    mistakes += [f"{said(name)}: unexpected" for name in found if name not in expected]
    mistakes += [
        f"{said(name)}: shape {list(found[name])}, not {list(shape)} as the config says"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if mistakes:
        more = [f"and {len(mistakes) - SHOWN} more"] if len(mistakes) > SHOWN else []
        cure = "weights and config.json are not of one model: fetch both again"
        raise InputError(*(f"{files.weights_name}: {mistake}: {cure}" for mistake in [*mistakes[:SHOWN], *more]))


def _fill(model: Trunk, files: ModelFiles, dtype: torch.dtype, device: torch.device | str, quantize: Quantize) -> None:
    """Put every tensor into the module it belongs to, a score in fp32; quantise a layer with its last tensor."""
    names = {name for name, _ in model.named_parameters()}
    waiting = Counter(_layer(name) for name in names)
    for name, tensor in track(files.tensors(), "loading weights", total=len(names)):
        if name not in names:
            continue
        owner, _, leaf = name.rpartition(".")
        kept = torch.float32 if name == SCORE else dtype
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor.to(device, kept)))
        layer = _layer(name)
        waiting[layer] -= 1
        if layer and not waiting[layer] and quantize.method != "none":
            _quantize(model.get_submodule(layer), quantize)


def _layer(name: str) -> str:
    """`model.layers.3` of a tensor in it, empty for all others."""
    number = layer_of(name)
    return "" if number is None else f"model.layers.{number}"


def _quantize(module: nn.Module, quantize: Quantize) -> None:
    from litrecipe.model.quantize import quantize_linears  # bitsandbytes takes seconds to import

    quantize_linears(module, quantize)


def _adapter_settings(files: ModelFiles, adapter: Adapter | None) -> Adapter | None:
    """Those of the adapter the model gets: the recipe's, or of the one in `files`; the two must agree."""
    wanted = adapter if adapter and adapter.method != "none" else None
    saved = files.adapter.settings if files.adapter else None
    if wanted and saved and not same_settings(wanted, saved, files.architecture):
        raise InputError(
            f"adapter: model.source is a {saved.method} adapter with r={saved.r}, alpha={saved.alpha:g} on "
            f"{', '.join(saved.targets)}: ask for the same to train it further, or `litrecipe model merge` it first"
        )
    return wanted or saved


def _adapt(model: Trunk, files: ModelFiles, settings: Adapter, seed: int) -> None:
    """Inject the adapter after the base weights are there: DoRA's magnitudes are made from them."""
    # peft takes seconds to import
    from litrecipe.model.adapters import PEFT_PREFIX, adapter_state, add_adapter, load_adapter_state

    # What is learnt of a model that processes share is small, and has values before that is cut.
    add_adapter(model, settings, seed=seed, device="cpu" if model.fill else None)
    if files.adapter:
        state = files.adapter.state()
        if isinstance(model, RewardModel) and not files.adapter.is_reward_model:  # a language model's has no score
            score = f"{PEFT_PREFIX}{SCORE}"
            state[score] = adapter_state(model)[score]
        try:
            load_adapter_state(model, state)
        except InputError as error:  # does not know where the tensors came from
            path, cure = files.adapter.weights.path, "weights and adapter_config.json do not fit: fetch both again"
            raise InputError(*(f"{path}{line.removeprefix('adapter')}: {cure}" for line in error.mistakes)) from error


def same_settings(a: Adapter, b: Adapter, architecture: Architecture) -> bool:
    """Whether the values of one adapter mean the same in the other, on a model of this architecture."""
    from litrecipe.model.adapters import fitting

    return _essence(fitting(a, architecture)) == _essence(fitting(b, architecture))


def _essence(adapter: Adapter) -> tuple:
    return adapter.method, adapter.r, float(adapter.alpha), sorted(adapter.targets), adapter.rslora

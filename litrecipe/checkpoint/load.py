"""From files to a decoder, one tensor at a time.

The decoder is built without memory (on torch's meta device), every tensor is put where it belongs as it is read, and
each layer is quantised as soon as it is complete, so the peak is the finished model and one layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.config.progress import track
from litrecipe.model.decoder import Decoder

SHOWN = 10
"""Wrong tensors named in one error."""
DERIVED = (".rotary_emb.inv_freq",)
"""Endings of tensors that older checkpoints hold though they follow from the config."""


def load_model(
    files: ModelFiles,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    quantize: Quantize | None = None,
    adapter: Adapter | None = None,
    init: str = "pretrained",
    seed: int = 0,
) -> Decoder:
    """The decoder of `files` with its weights in `dtype`, quantised linears and an adapter as asked for.

    `init` random draws fresh weights from `seed` instead of reading any. An adapter in `files` is loaded; a fresh one
    of other settings on top of it is refused. Raises InputError when tensors are missing, unexpected or of another
    shape than the config says.
    """
    with torch.device("meta"):
        model = Decoder(files.architecture)
    if init == "random":
        model.to_empty(device=device)
        model.init_weights(seed)
        model.to(dtype)
    else:
        _check_tensors(files, model)
        _fill(model, files, dtype, device)
    model.tie_weights()
    if quantize and quantize.method != "none":
        from litrecipe.model.quantize import quantize_linears

        quantize_linears(model, quantize)
    _adapt(model, files, adapter, quantize)
    return model


def _check_tensors(files: ModelFiles, model: Decoder) -> None:
    """Names and shapes, before anything is read."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = dict(files.shapes)
    for name in list(found):
        if name.endswith(DERIVED) or (name == "lm_head.weight" and name not in expected):
            del found[name]
    mistakes = [f"{name}: missing" for name in expected if name not in found]
    mistakes += [f"{name}: unexpected" for name in found if name not in expected]
    mistakes += [
        f"{name}: shape {list(found[name])}, not {list(shape)} as the config says"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if mistakes:
        more = [f"and {len(mistakes) - SHOWN} more"] if len(mistakes) > SHOWN else []
        raise InputError(*(f"{files.weights_name}: {mistake}" for mistake in [*mistakes[:SHOWN], *more]))


def _fill(model: Decoder, files: ModelFiles, dtype: torch.dtype, device: torch.device | str) -> None:
    """Put every tensor into the module it belongs to."""
    wanted = {name for name, _ in model.named_parameters()}
    for name, tensor in track(files.tensors(), "loading weights", total=len(files.shapes)):
        if name in wanted:
            owner, _, leaf = name.rpartition(".")
            _replace(model.get_submodule(owner), leaf, tensor.to(device, dtype))


def _replace(module: nn.Module, leaf: str, tensor: Tensor) -> None:
    setattr(module, leaf, nn.Parameter(tensor))


def _adapt(model: Decoder, files: ModelFiles, adapter: Adapter | None, quantize: Quantize | None) -> None:
    """Inject the adapter after the base weights are there: DoRA's magnitudes are made from them."""
    wanted = adapter if adapter and adapter.method != "none" else None
    if files.adapter is None and wanted is None:
        return
    from litrecipe.model.adapters import add_adapter, load_adapter_state

    quantized = quantize is not None and quantize.method != "none"
    if files.adapter is None:
        add_adapter(model, wanted, quantized)
        return
    saved = files.adapter.settings
    if wanted and _essence(wanted) != _essence(saved):
        raise InputError(
            f"adapter: model.source is a {saved.method} adapter with r={saved.r}, alpha={saved.alpha:g} on "
            f"{', '.join(saved.targets)}: ask for the same to train it further, or merge it first (`litrecipe model merge`)"
        )
    add_adapter(model, wanted or saved, quantized)
    load_adapter_state(model, files.adapter.state())


def _essence(adapter: Adapter) -> tuple:
    return adapter.method, adapter.r, float(adapter.alpha), sorted(adapter.targets), adapter.rslora

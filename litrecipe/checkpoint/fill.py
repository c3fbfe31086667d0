"""From files to the pieces of a model that one process holds.

A model that several processes share is built without memory and cut before it has values. Then each process reads what
its pieces consist of: rows of a tensor where files hold it as memory does, otherwise one whole tensor at a time. Fresh
weights are drawn one whole tensor at a time, so that they are those of a model that nobody shares.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed
from torch import Tensor, nn

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.checkpoint.state import local_pieces
from litrecipe.checkpoint.weight_files import rank_and_world
from litrecipe.config.errors import InputError
from litrecipe.config.progress import track
from litrecipe.model.architecture import EXPERTS, PROJECTIONS, SCORE
from litrecipe.model.decoder import Trunk
from litrecipe.model.tensor_plan import alike, held_of

if TYPE_CHECKING:
    from litrecipe.model.lora_linear import LoraLinear

ONE_EXPERT = re.compile(rf"(.*\.{re.escape(EXPERTS)}\.(?:{'|'.join(PROJECTIONS)}))\.(\d+)\.weight")
"""A quantised weight of an expert, which is a layer of its own."""


@dataclass(frozen=True)
class Filling:
    """Gives the base weights of a model their values, and DoRA's magnitudes, which are norms of these.

    All else is small and has values when the model is cut: the rest of an adapter, and a score.
    """

    files: ModelFiles
    dtype: torch.dtype
    """What values are rounded to before anything is made of them."""
    init: str
    seed: int
    fresh_adapter: bool = True
    """Whether magnitudes are to be made; otherwise they were read."""
    merged: Mapping[str, LoraLinear] = field(default_factory=dict)
    """Name of a weight → the adapter that is folded into it."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Filling:
        return self  # copies of a model start from the same files

    def __call__(self, model: Trunk) -> None:
        """Every process must call it. Raises InputError on all of them where one finds a file damaged."""
        rank, world = rank_and_world()
        _together(lambda: self._fill(model))
        if self.init != "random":
            _together(lambda: self.files.check(rank, world))

    @torch.no_grad()
    def _fill(self, model: Trunk) -> None:
        modules, generator = dict(model.named_modules()), torch.Generator().manual_seed(self.seed)
        parameters = dict(model.named_parameters())
        for name in track(list(parameters), "loading weights", total=len(parameters)):
            path, _, leaf = name.rpartition(".")
            stored = name.replace(".base_layer", "")
            if ".lora_" in name or leaf == "scales":
                continue
            read: Callable[[tuple[slice, ...]], Tensor]
            if self.init == "random":
                shape = held_of(parameters[name]).whole_shape(parameters[name].shape)
                whole = torch.empty(shape, device="cpu")
                model.draw(stored, whole, generator)
                read = whole.__getitem__
            else:
                read = partial(self._read, stored)
            if name == SCORE:
                continue
            if leaf == "weight" and hasattr(modules[path], "pack"):
                restored = modules[path].pack(read(()).to(self.dtype), put)
                read = restored.__getitem__
            elif stored in self.merged:
                put(parameters[name], _merged(self.merged[stored], read(()).to(self.dtype)))
            else:
                for piece, where in pieces_of(parameters[name]):
                    piece.copy_(read(where))
            if leaf == "weight" and self.fresh_adapter and path.endswith(".base_layer"):
                self._make_magnitude(modules[path.removesuffix(".base_layer")], read)

    def _read(self, name: str, where: tuple[slice, ...]) -> Tensor:
        """A part of a tensor in files, by the name of what is made of it."""
        if expert := ONE_EXPERT.fullmatch(name):
            number = int(expert[2])
            return self.files.read(expert[1], (slice(number, number + 1),))[0][where]
        return self.files.read(name, where)

    def _make_magnitude(self, layer: Any, read: Callable[[tuple[slice, ...]], Tensor]) -> None:
        """The norms of a layer's rows, where it has a magnitude: B A is zero."""
        if getattr(layer, "is_dora", False):
            for piece, where in pieces_of(layer.magnitude):
                rows = read((*where, slice(None))).to(self.dtype).float()
                piece.copy_(torch.linalg.vector_norm(rows, dim=1))


def merge_when_filled(model: Trunk, source: str) -> None:
    """`merge_adapter` for a model without values: they are merged when it gets them. Raises InputError for experts."""
    from litrecipe.model.adapters import adapted_layers  # peft takes seconds to import
    from litrecipe.model.lora_linear import LoraLinear
    from litrecipe.model.quantize import plain_linear

    assert isinstance(model.fill, Filling)
    merged: dict[str, LoraLinear] = {}
    for path, layer in adapted_layers(model):
        if not isinstance(layer, LoraLinear):
            raise InputError(f"{source}: an adapter on experts: fold it into them with `litrecipe model merge` first")
        merged[f"{path}.weight"] = layer
        model.set_submodule(path, plain_linear(layer.base.weight, layer.base.bias))
    model.fill = replace(model.fill, merged=merged)


def _merged(layer: LoraLinear, weight: Tensor) -> Tensor:
    """The weight with what an adapter adds, which itself has none below it."""
    layer.base.weight = nn.Parameter(weight, requires_grad=False)
    try:
        return layer.merged_weight().to(weight.dtype)
    finally:
        layer.base.weight = nn.Parameter(weight.to("meta"), requires_grad=False)


@torch.no_grad()
def put(parameter: Tensor, whole: Tensor) -> None:
    """Give a parameter its values, or those of the pieces of it that are here."""
    for piece, where in pieces_of(parameter):
        piece.copy_(whole[where])


def pieces_of(tensor: Tensor) -> list[tuple[Tensor, tuple[slice, ...]]]:
    """What this process holds of a tensor, and where in the whole it lies: a slice for each dimension."""
    return [
        (piece, tuple(slice(at, at + size) for at, size in zip(offset, piece.shape, strict=True)))
        for piece, offset in local_pieces(alike(tensor.detach(), tensor))
    ]


def _together(act: Callable[[], None]) -> None:
    """Every process must do it: where one finds a mistake all raise it."""
    mistakes: list[str] = []
    try:
        act()
    except InputError as error:
        mistakes = error.mistakes
    if (world := rank_and_world()[1]) > 1:
        found: list[Any] = [None] * world
        torch.distributed.all_gather_object(found, mistakes)
        mistakes = next(filter(None, found), [])
    if mistakes:
        raise InputError(*mistakes)

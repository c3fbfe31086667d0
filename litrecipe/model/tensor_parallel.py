"""A model made into one rank's part of it, by the plan of `tensor_plan`.

What is left on a rank is a model like any other, with fewer heads, narrower MLPs and fewer tokens, that asks its group
twice a layer: attention and each MLP read what all ranks have (`entered`), and what they write is added up. So packed
rows, caches and sharding know nothing of it. Embedding and head share the vocabulary (`split_layers`, `head`).

Every parameter says what it is a part of (`held_of`), for checkpoints, exports and gradients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from litrecipe.model.architecture import PROJECTIONS
from litrecipe.model.decoder import MLP, Decoder, RMSNorm, SelfAttention, Trunk
from litrecipe.model.experts import ExpertMLPs
from litrecipe.model.group import Group, added_up, entered
from litrecipe.model.head import OwnTokens
from litrecipe.model.lora_experts import LoraExperts
from litrecipe.model.split_layers import RowLinear, TokenEmbedding
from litrecipe.model.tensor_plan import (
    EXPERT_DIMS,
    Held,
    Style,
    bounds_of,
    held,
    mark,
    plan_of,
    tokens_held,
    width_of,
)

if TYPE_CHECKING:
    from litrecipe.model.lora_linear import LoraLinear

LAYER = re.compile(r"model\.layers\.(\d+)\.")


def split(module: nn.Module, group: Group) -> None:
    """Leave, of each model in a module, what this rank computes; in place, on whatever device it is.

    What models share they share afterwards. A teacher's tokens are parted where its student's are, whatever the sizes
    of their tables: both are compared token by token. Raises ValueError for parameters that the plan does not know,
    and for quantised ones.
    """
    models = [one for one in module.modules() if isinstance(one, Trunk)]
    first = bounds_of(models[0].architecture.vocab_size, group.size)
    seen: set[nn.Module | Tensor] = set()
    for model in models:
        _Splitting(model, group, (*first[:-1], model.architecture.vocab_size), seen).run()
    mark(module)


@torch.no_grad()
def whole(part: Tensor, what: Held, group: Group | None) -> Tensor:
    """The whole tensor, on every rank of the group, from each one's part."""
    if group is None or not what.is_split:
        return part
    found = part.new_zeros(what.whole_shape(part.shape))
    for (start, stop), piece in zip(what.ranges, part.detach().split(_widths(what), what.dim), strict=True):
        found.narrow(what.dim, start, stop - start).copy_(piece)
    group.add_up(found.view(torch.uint8))  # bytes that are 0 everywhere else: no bit changes
    return found


def _widths(what: Held) -> list[int]:
    return [stop - start for start, stop in what.ranges]


class _Splitting:
    """The splitting of one model."""

    def __init__(self, model: Trunk, group: Group, bounds: Sequence[int], seen: set[nn.Module | Tensor]) -> None:
        """`seen`: modules and parameters of models before it, which may be its own."""
        self.model, self.group, self.bounds, self.seen = model, group, bounds, seen
        self.known: set[Tensor] = set()
        self.everything = Held(is_copy=group.rank > 0)
        self.shared = self.everything._replace(is_share=True)

    def run(self) -> None:
        model, group, plan = self.model, self.group, plan_of(self.model.architecture)
        for name, part in list(model.named_modules()):
            style = plan.get(LAYER.sub("", name))
            if style is not None:
                self._split(name, part, style)
            elif isinstance(part, SelfAttention | MLP) and self._is_new(part):
                part.register_forward_pre_hook(partial(_enter, group))
                if isinstance(part, SelfAttention):
                    part.widths = cast(Any, tuple(width // group.size for width in part.widths))
        if strange := [name for name, one in model.named_parameters() if one not in self.known]:
            raise ValueError(f"{strange[0]}: no entry of the plan of tensor parallelism says how it is split")
        model.group = group
        if isinstance(model, Decoder):
            model.own_tokens = OwnTokens(group, tuple(self.bounds))

    def _split(self, name: str, part: nn.Module, style: Style) -> None:
        """A module that the plan has a style for; its adapter's factors lie within it."""
        layer = LAYER.match(name)
        shape = self.model.architecture.shape(int(layer[1]) if layer else 0)
        widths = [width_of(self.model.architecture, shape, width) for width in style.widths]
        if style.kind == "vocabulary":
            self._vocabulary(name, part)
        elif style.kind == "column":
            self._column(part, held(0, widths, self.group.rank, self.group.size))
        elif style.kind == "row":
            self._row(name, part, held(1, widths, self.group.rank, self.group.size))
        elif style.kind == "experts":
            self._experts(part, widths[0])
        elif style.kind == "norm":
            self._hold(part, weight=held(0, widths, self.group.rank, self.group.size))
            cast(RMSNorm, part).group = self.group
        else:
            what = self.shared if style.of_own_heads else self.everything
            self._hold(part, **{leaf: what for leaf, _ in part.named_parameters(recurse=False)})

    def _vocabulary(self, name: str, part: nn.Module) -> None:
        own = tokens_held(self.bounds, self.group.rank)
        self._hold(part, weight=own)
        if isinstance(part, nn.Embedding) and not isinstance(part, TokenEmbedding):
            embedding = TokenEmbedding(part, self.group, self.bounds[self.group.rank])
            embedding.held = part.held
            self.model.set_submodule(name, embedding)

    def _column(self, part: nn.Module, rows: Held) -> None:
        base, adapter = _parts(part)
        self._hold(base, weight=rows, bias=rows)
        base.out_features = len(base.weight)
        if adapter is not None:
            self._hold(adapter.lora_A["default"], weight=self.shared)
            self._hold(adapter.lora_B["default"], weight=rows)
            if adapter.is_dora:
                self._hold(adapter.lora_magnitude_vector["default"], weight=rows)

    def _row(self, name: str, part: nn.Module, columns: Held) -> None:
        base, adapter = _parts(part)
        self._hold(base, weight=columns, bias=self.everything)
        if not isinstance(base, RowLinear):
            linear = RowLinear(base, self.group)
            linear.held = base.held
            self.model.set_submodule(name if adapter is None else f"{name}.base_layer", linear)
        if adapter is not None:
            self._hold(adapter.lora_A["default"], weight=columns)
            self._hold(adapter.lora_B["default"], weight=self.shared)
            if adapter.is_dora:
                self._hold(adapter.lora_magnitude_vector["default"], weight=self.shared)

    def _experts(self, part: nn.Module, width: int) -> None:
        """Of gate and up (E, 2 I, d) rows, of down (E, d, I) columns; in an adapter's factors for all experts, A
        (E r, i) and B (o, r E), what belongs to these."""
        base = cast(ExpertMLPs, part.base_layer if isinstance(part, LoraExperts) else part)
        for projection in PROJECTIONS:
            dim, runs = EXPERT_DIMS[projection]
            own = held(dim, [width] * runs, self.group.rank, self.group.size)
            self._hold(base, **{projection: own})
            if isinstance(part, LoraExperts) and projection in part.lora_A:
                factor, other = (part.lora_B, part.lora_A) if dim == 1 else (part.lora_A, part.lora_B)
                self._hold(factor, **{projection: own._replace(dim=dim - 1)})
                self._hold(other, **{projection: self.shared})
        if self._is_new(part):
            base.shapes = {name: tuple(getattr(base, name).shape[1:]) for name in PROJECTIONS}
            part.register_forward_pre_hook(partial(_enter, self.group))
            part.register_forward_hook(partial(_add_up, self.group))

    def _hold(self, owner: nn.Module, **leaves: Held) -> None:
        """Cut parameters down to what is held of them; those of other models were cut with these."""
        there = {leaf: what for leaf, what in leaves.items() if isinstance(getattr(owner, leaf, None), nn.Parameter)}
        cast(Any, owner).held = getattr(owner, "held", {}) | there
        for leaf, what in there.items():
            parameter: nn.Parameter = getattr(owner, leaf)
            self.known.add(parameter)
            if parameter in self.seen:
                continue
            self.seen.add(parameter)
            if not parameter.is_floating_point():
                raise ValueError(f"{type(owner).__name__}.{leaf}: a quantised weight cannot be split")
            if what.is_split:
                parts = [parameter.data.narrow(what.dim, start, stop - start) for start, stop in what.ranges]
                parameter.data = torch.cat(parts, what.dim)

    def _is_new(self, part: nn.Module) -> bool:
        """Whether no model before has this module too."""
        is_new = part not in self.seen
        self.seen.add(part)
        return is_new


def _parts(layer: nn.Module) -> tuple[nn.Linear, LoraLinear | None]:
    """A linear layer without its adapter, and the adapter."""
    adapter = cast("LoraLinear", layer) if hasattr(layer, "lora_A") else None
    return cast(nn.Linear, layer) if adapter is None else adapter.base, adapter


def _enter(group: Group, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Gradients of what all ranks read and each works on are added up."""
    return tuple(entered(x, group) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _add_up(group: Group, _: nn.Module, __: tuple[Any, ...], y: Tensor) -> Tensor:
    return added_up(y, group)

"""Which part of each weight a rank has where several compute one copy of a model: the plan of tensor parallelism.

In memory all families call the parts of a model alike, so one table holds for all: heads of queries, keys and values
with what they write, the inner width of each MLP and of each expert, and the vocabulary are split; what reads or writes
the residual stream as a whole (norms, routers, scores, positions) every rank has. A new kind of layer needs an entry.
Imports no torch.

Shapes: H query heads, G key/value heads, D head dimension, I inner size of an MLP or of an expert, V vocabulary,
E experts, r rank of an adapter, i inputs, o outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import EXPERTS, PROJECTIONS, Architecture, LayerShape

if TYPE_CHECKING:
    from torch import Tensor, nn

Kind = Literal["column", "row", "vocabulary", "experts", "norm", "whole"]
"""`column`: some of a linear layer's outputs, in several runs where projections are fused. `row`: some of its inputs;
what it writes is added up. `vocabulary`: some tokens' rows. `experts`: some of each expert's inner width. `norm`: of
all heads as one, those of some. `whole`: everything, on all ranks."""
Width = Literal["queries", "keys", "inner", "expert"]
"""What is split: H D, G D, I of an MLP, I of an expert."""


class Style(NamedTuple):
    """How a module is split."""

    kind: Kind
    widths: tuple[Width, ...] = ()
    """Of its outputs' runs, or of its inputs."""
    of_own_heads: bool = False
    """Whether a whole weight is applied to a rank's own heads only: its gradient is a share then."""


def _column(*widths: Width) -> Style:
    return Style("column", widths)


def _row(width: Width) -> Style:
    return Style("row", (width,))


WHOLE = Style("whole")
PLAN: dict[str, Style] = {
    "model.embed_tokens": Style("vocabulary"),
    "model.embed_positions": WHOLE,
    "self_attn.q_proj": _column("queries"),
    "self_attn.k_proj": _column("keys"),
    "self_attn.v_proj": _column("keys"),
    "self_attn.qkv_proj": _column("queries", "keys", "keys"),
    "self_attn.o_proj": _row("queries"),
    "mlp.gate_proj": _column("inner"),
    "mlp.up_proj": _column("inner"),
    "mlp.gate_up_proj": _column("inner", "inner"),
    "mlp.down_proj": _row("inner"),
    "mlp.gate": WHOLE,
    EXPERTS: Style("experts", ("expert",)),
    "input_layernorm": WHOLE,
    "post_attention_layernorm": WHOLE,
    "pre_feedforward_layernorm": WHOLE,
    "post_feedforward_layernorm": WHOLE,
    "model.norm": WHOLE,
    "lm_head": Style("vocabulary"),
    "score": WHOLE,
}
"""Module, without its layer → style."""
QK_NORMS = {
    "none": {},
    "head": dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), Style("whole", of_own_heads=True)),
    "whole": {"self_attn.q_norm": Style("norm", ("queries",)), "self_attn.k_norm": Style("norm", ("keys",))},
}
"""The same for norms of queries and keys, by `Architecture.qk_norm`."""


def plan_of(architecture: Architecture) -> dict[str, Style]:
    """Of a model."""
    return PLAN | QK_NORMS[architecture.qk_norm]


def width_of(architecture: Architecture, shape: LayerShape, width: Width) -> int:
    """Of a layer."""
    a = architecture
    if width == "expert":
        assert a.experts is not None
        return a.experts.size
    whole = {"queries": shape.num_heads * a.head_dim, "keys": shape.num_kv_heads * a.head_dim}
    return (whole | {"inner": shape.intermediate_size})[width]


class Held(NamedTuple):
    """What a rank holds of a tensor: some ranges along one dimension, end to end; or all of it."""

    dim: int = 0
    ranges: tuple[tuple[int, int], ...] = ()
    """Start and stop of each in the whole tensor; none: every rank holds everything."""
    size: int = 0
    """Of the whole tensor along the dimension."""
    is_share: bool = False
    """Whether the gradient of what every rank holds is a share of it on each, to be added up."""
    is_copy: bool = False
    """Whether the first rank has the same."""

    @property
    def is_split(self) -> bool:
        """Whether other ranks hold other parts."""
        return bool(self.ranges)

    def whole_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Of a tensor of which a rank's part has this shape."""
        return (*shape[: self.dim], self.size, *shape[self.dim + 1 :]) if self.ranges else tuple(shape)


EVERYTHING = Held()


def held_of(tensor: Tensor) -> Held:
    """What a parameter, or what is `alike`, is a part of; everything where nothing is split."""
    return getattr(tensor, "held", EVERYTHING)


def alike(tensor: Tensor, parameter: Tensor) -> Tensor:
    """`tensor`, which is known from now on to be a part as `parameter` is, if it has its shape."""
    if tensor.shape == parameter.shape and hasattr(parameter, "held"):
        tensor.held = parameter.held  # type: ignore[attr-defined]
    return tensor


def whole_size(tensor: Tensor) -> int:
    """Elements of the whole that a parameter is a part of."""
    return prod(held_of(tensor).whole_shape(tensor.shape))


def mark(module: nn.Module) -> None:
    """Let each parameter know what it is a part of; again, where parameters were replaced or copied."""
    for owner in module.modules():
        for leaf, what in getattr(owner, "held", {}).items():
            getattr(owner, leaf).held = what


def held(dim: int, widths: Sequence[int], rank: int, size: int) -> Held:
    """An equal part of each of several runs along a dimension."""
    ranges, start = [], 0
    for width in widths:
        part = width // size
        ranges.append((start + rank * part, start + (rank + 1) * part))
        start += width
    return Held(dim, tuple(ranges), start)


def bounds_of(vocabulary: int, size: int) -> tuple[int, ...]:
    """Where the ranks' tokens begin, and where the last one's end."""
    return tuple(rank * vocabulary // size for rank in range(size + 1))


def tokens_held(bounds: Sequence[int], rank: int) -> Held:
    """A rank's rows of a table of tokens."""
    return Held(0, (tuple(pairwise(bounds))[rank],), bounds[-1])


def narrowed(architecture: Architecture, size: int) -> Architecture:
    """What one of `size` ranks computes: fewer heads, and narrower MLPs."""
    a = architecture
    shapes = tuple(LayerShape(*(width // size for width in shape)) for shape in a.shapes)
    experts = None if a.experts is None else replace(a.experts, size=a.experts.size // size)
    widths = {name: getattr(a, name) // size for name in LayerShape._fields}
    return replace(a, shapes=shapes, experts=experts, **widths)


def check_divides(architecture: Architecture, size: int, whose: str = "the model") -> None:
    """Raise InputError naming all that so many ranks cannot split evenly. Tokens need not be: some ranks get one more.

    Heads of keys and values are not copied, so there must be one for each rank.
    """
    if size == 1:
        return
    a = architecture
    names = {"num_heads": "heads", "num_kv_heads": "heads of keys and values", "intermediate_size": "inner width"}
    layers = range(a.num_layers)
    widths = {
        what: [(getattr(a.shape(layer), name), f" in layer {layer}" if a.shapes else "") for layer in layers]
        for name, what in names.items()
        if name != "intermediate_size" or any(a.experts_of(layer) is None for layer in layers)
    }
    if a.experts is not None:
        widths["inner width of an expert"] = [(a.experts.size, "")]
    mistakes = []
    for what, found in widths.items():
        odd = next(((width, where) for width, where in found if width % size), None)
        if odd is not None:
            mistakes.append(f"{whose}'s {what}, {odd[0]}{odd[1]}, cannot be split evenly: give a divisor of it")
    if a.vocab_size < size:
        mistakes.append(f"{whose} knows {a.vocab_size} tokens: give at most that")
    if mistakes:
        raise InputError(*(f"fabric.tensor_parallel: {size}: {mistake}" for mistake in mistakes))


EXPERT_DIMS = dict(zip(PROJECTIONS, ((1, 2), (2, 1)), strict=True))
"""Of the experts' weights (E, 2 I, d) and (E, d, I): the dimension that is split, and runs in it."""

"""What the ranks of a run send one another in a step: pure functions of shapes and of the recipe's choices.

A parameter is cut along one dimension, the first but for experts, as FSDP2 cuts it (2304.11277): each of n ranks has
⌈rows / n⌉ rows, the last ones padded. What is gathered or reduced at once is a *unit*: one layer, or all of a model but
its layers. Counted are the bytes of the whole, as every collective is asked for; `Collective.sent` says what of it a
rank puts on the wire.

Letters: n ranks of a collective, L layers, T tokens of a row, P predictions of it, d hidden size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from litrecipe.engine.gradients import messages

Kind = Literal["all-gather", "reduce-scatter", "all-reduce"]
Phase = Literal["forward", "backward", "step"]

LAYERS, REST = "layers", "rest"
"""Of what: a model's layers, and its embedding, head and last norm."""


@dataclass(frozen=True)
class Layout:
    """How the ranks of a run share out a model and its data.

    Ranks that share a layer stand next to one another, so they are of one node as long as they are no more than it has.
    """

    devices: int = 1
    """Ranks of one node."""
    nodes: int = 1
    tensor: int = 1
    """Ranks that share one copy of each layer (tensor parallelism, 1909.08053)."""
    sharded: bool = False
    """Whether the ranks that see different data share the weights (FSDP2), or each has them all."""
    reshard: bool = True
    """Whether a sharded layer is let go between its forward and its backward pass."""

    @property
    def world(self) -> int:
        """All ranks."""
        return self.devices * self.nodes

    @property
    def data(self) -> int:
        """Ranks that see different data."""
        return self.world // self.tensor

    @property
    def shards(self) -> int:
        """Into how many pieces each rank's part of the layers is cut."""
        return self.data if self.sharded else 1

    @property
    def neighbours(self) -> int:
        """Of the ranks that see different data: those of one node."""
        return max(1, self.devices // self.tensor)


def cut_dimension(shape: Sequence[int], ranks: int) -> int:
    """Along which so many ranks share out a parameter. Experts (E, o, i) are few: where they do not come out even the
    ranks share the rows of each, or most ranks would hold nothing, and all of them gather padding."""
    is_experts = len(shape) == 3
    return 1 if is_experts and shape[0] % ranks and shape[1] % ranks == 0 else 0


def largest_share(shape: Sequence[int], ranks: int) -> float:
    """What part of a parameter the rank with the most of it has."""
    rows = shape[cut_dimension(shape, ranks)]
    return -(-rows // ranks) / rows


class Piece(NamedTuple):
    """A parameter, as it is exchanged."""

    rows: int
    """Of the dimension along which it is cut."""
    width: int
    """Numbers of a row."""
    weight_bytes: int
    """Of each number as it is gathered."""
    gradient_bytes: int
    """Of each number of its gradient; 0 where it does not learn."""

    def padded(self, ranks: int) -> int:
        """Numbers of it with the padding that makes all ranks' pieces equal."""
        return -(-self.rows // ranks) * ranks * self.width


Unit = tuple[Piece, ...]
"""What is gathered at once."""


def gathered_bytes(unit: Unit, ranks: int) -> int:
    """Of the whole unit."""
    return sum(piece.padded(ranks) * piece.weight_bytes for piece in unit)


def reduced_bytes(unit: Unit, ranks: int) -> int:
    """Of the gradients of the whole unit."""
    return sum(piece.padded(ranks) * piece.gradient_bytes for piece in unit)


@dataclass(frozen=True)
class Member:
    """One transformer of those that a step runs."""

    layers: tuple[Unit, ...]
    rest: Unit
    """All but its layers: embedding, head, last norm. Of a model that learns it stays gathered from a row's first
    forward pass to its backward pass."""
    learns: bool = True
    asked: int = 0
    """Passes over a row without gradient, beside the one that learns: as a reference, a teacher, or to look at the step
    first."""


@dataclass(frozen=True)
class Collective:
    """Ranks that exchange something, so many times a step."""

    kind: Kind
    what: str
    phase: Phase
    """Of a row, or when all rows of a step are learnt."""
    ranks: int
    """How many take part."""
    neighbours: int
    """How many of these are of one node."""
    bytes: int
    """Of the whole: what each rank has after an all-gather, before a reduce-scatter, and both in an all-reduce."""
    times: int = 1
    hidden: bool = True
    """Whether arithmetic goes on meanwhile."""

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in a step, going round in a ring."""
        passes = 2 if self.kind == "all-reduce" else 1
        return self.times * passes * self.bytes * (self.ranks - 1) / self.ranks


def exchanged(members: Sequence[Member], layout: Layout, rows: int = 1) -> list[Collective]:
    """What ranks that see different data exchange in a step in which each learns from so many rows."""
    if layout.data == 1 and not layout.sharded:
        return []
    return list(_of_shards(members, layout, rows) if layout.sharded else _of_copies(members, layout))


def _of_shards(members: Sequence[Member], layout: Layout, rows: int) -> Iterator[Collective]:
    """Layers are gathered for each pass over a row, and again for the way back unless they were kept; gradients are
    reduced after each row: kept until the last they would be whole on every rank."""
    counted: Counter[tuple[Kind, str, Phase, int]] = Counter()
    for member in members:
        learns, again = int(member.learns), int(member.learns and layout.reshard)
        passes = learns + member.asked
        for layer in member.layers:
            counted["all-gather", LAYERS, "forward", gathered_bytes(layer, layout.data)] += passes
            counted["all-gather", LAYERS, "backward", gathered_bytes(layer, layout.data)] += again
            counted["reduce-scatter", LAYERS, "backward", reduced_bytes(layer, layout.data)] += learns
        counted["all-gather", REST, "forward", gathered_bytes(member.rest, layout.data)] += learns or passes
        counted["reduce-scatter", REST, "backward", reduced_bytes(member.rest, layout.data)] += learns
    for (kind, what, phase, size), times in counted.items():
        if size and times:
            hidden = what == LAYERS
            yield Collective(kind, what, phase, layout.data, layout.neighbours, size, times * rows, hidden)


def _of_copies(members: Sequence[Member], layout: Layout) -> Iterator[Collective]:
    """Gradients are added up once a step, when the last row's backward pass is over, in the order of the parameters."""
    gradients = [
        (piece.gradient_bytes, piece.padded(1) * piece.gradient_bytes)
        for member in members
        if member.learns
        for unit in (member.rest[:1], *member.layers, member.rest[1:])  # the embedding comes first
        for piece in unit
        if piece.gradient_bytes
    ]
    for width in dict.fromkeys(width for width, _ in gradients):
        sizes = [size for of_width, size in gradients if of_width == width]
        for size, times in Counter(sum(sizes[place] for place in places) for places in messages(sizes)).items():
            yield Collective(
                "all-reduce", "gradients", "step", layout.data, layout.neighbours, size, times, hidden=False
            )


class Widths(NamedTuple):
    """Of a row on a rank, for ranks that share each layer."""

    tokens: int
    predictions: int
    hidden: int
    stream: int
    """Bytes of a number of the residual stream, and of what a layer reads of it."""
    written: int
    """Bytes of a number that attention and MLP write to it."""


def added_up(
    members: Sequence[Member], layout: Layout, widths: Widths, rows: int = 1, *, again: bool = False
) -> list[Collective]:
    """What ranks that share each layer add up in a step (1909.08053, section 3): what attention and MLP write, and on
    the way back the gradients of what they read.

    Of the last layer only the places that predict are computed. Where a layer is computed `again`, so is what its
    attention writes; of its MLP nothing more is needed by then. The embedding adds up what it says of each token, the
    head the gradient of what it reads, and what its softmax comes to, a few numbers a prediction, which do not count.
    """
    inside = min(layout.tensor, layout.devices)
    counted: Counter[tuple[str, Phase, int]] = Counter()
    whole, predicted = widths.tokens * widths.hidden, widths.predictions * widths.hidden
    for member in members if layout.tensor > 1 else ():
        passes, learns, below = member.learns + member.asked, int(member.learns), len(member.layers) - 1
        counted[LAYERS, "forward", whole * widths.written] += 2 * below * passes
        counted[LAYERS, "forward", predicted * widths.written] += 2 * passes
        counted[LAYERS, "backward", whole * widths.stream] += (2 * below + 1) * learns
        counted[LAYERS, "backward", predicted * widths.stream] += learns
        counted[LAYERS, "backward", whole * widths.written] += below * (learns and again)
        counted[LAYERS, "backward", predicted * widths.written] += learns and again
        counted[REST, "forward", whole * widths.stream] += passes
        counted[REST, "backward", predicted * widths.stream] += learns
    return [
        Collective("all-reduce", what, phase, layout.tensor, inside, size, times * rows, hidden=False)
        for (what, phase, size), times in counted.items()
        if times and size
    ]


def total_bytes(collectives: Iterable[Collective]) -> dict[Kind, int]:
    """Of all collectives of a kind."""
    total: Counter[Kind] = Counter()
    for one in collectives:
        total[one.kind] += one.times * one.bytes
    return dict(total)

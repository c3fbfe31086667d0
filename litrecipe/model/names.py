"""What a family's files call the parts of a model, and how they lay them out, where that is not as in memory.

In memory all models have the names of Hugging Face's Llama (`model.layers.3.self_attn.o_proj.weight`). A family whose
files differ declares a `Names`; reading and writing of folders and of adapters goes through it. Imports no torch.

Shapes: i inputs, o outputs of a linear layer, r rank, H heads, D head dimension.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from litrecipe.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import Tensor

Layout = Literal["same", "transposed", "interleaved"]
"""Of a linear layer in files: weights (o, i) as in memory; weights (i, o), as those of GPT-2's `Conv1D`; or rows that
stand q, k, v of the first head, q, k, v of the second, … (GPT-NeoX), in memory the q of all heads, then k, then v."""
PEFT_PREFIX = "base_model.model."
"""peft keeps a model under two names of its own, which stand before every name in an adapter file."""


class Stored(NamedTuple):
    """A linear layer in files."""

    name: str
    layout: Layout


class Names:
    """Translates names of parameters and modules, with whatever stands behind a module's name."""

    def __init__(
        self, modules: Mapping[str, str | Stored] | None = None, *, prefix: str = "", derived: Collection[str] = ()
    ) -> None:
        """`modules` are those that differ, in memory → in files; names of a layer's parts without the layer's.

        `prefix` begins the names in files, but for heads; it may be missing there. `derived` are endings of tensors in
        files that follow from the config.
        """
        stored = {own: Stored(one, "same") if isinstance(one, str) else one for own, one in (modules or {}).items()}
        self.modules = {own: one.name for own, one in stored.items()}
        self.layouts: dict[str, Layout] = {own: one.layout for own, one in stored.items() if one.layout != "same"}
        self.prefix = prefix
        self.derived = (".rotary_emb.inv_freq", *derived)

    @property
    def transposes(self) -> bool:
        """Whether linear layers are `Conv1D`, which peft asks about."""
        return "transposed" in self.layouts.values()

    @cached_property
    def _outward(self) -> re.Pattern[str]:
        return _any_of(self.modules)

    @cached_property
    def _inward(self) -> re.Pattern[str]:
        return _any_of(self._own)

    @cached_property
    def _own(self) -> dict[str, str]:
        return {theirs: own for own, theirs in self.modules.items()}

    def in_files(self, name: str) -> str:
        """`model.layers.3.self_attn.o_proj.weight` → `transformer.h.3.attn.c_proj.weight`, for example."""
        return self._outward.sub(lambda found: self.modules[found[0]], name) if self.modules else name

    def in_memory(self, name: str) -> str:
        """The other way round; a prefix that is missing is added."""
        if not self.modules:
            return name
        before = PEFT_PREFIX if name.startswith(PEFT_PREFIX) else ""
        rest = name.removeprefix(before)
        head = self.modules.get("lm_head", "lm_head")
        if not rest.startswith((self.prefix, f"{head}.", "lm_head.", "score.")):
            rest = self.prefix + rest
        return before + self._inward.sub(lambda found: self._own[found[0]], rest)

    def read(self, tensors: Iterable[tuple[str, Tensor]], architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
        """The tensors of files as they are in memory."""
        for theirs, tensor in tensors:
            if not theirs.endswith(self.derived):
                own = self.in_memory(theirs)
                yield own, self._laid_out(own, tensor, (-1, 3, architecture.head_dim))

    def written(self, tensors: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
        """Tensors of memory as files have them."""
        rows = 3, -1, architecture.head_dim
        return {self.in_files(own): self._laid_out(own, tensor, rows) for own, tensor in tensors.items()}

    def shapes(self, found: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes that the tensors of files have in memory."""
        own = {self.in_memory(theirs): shape for theirs, shape in found.items() if not theirs.endswith(self.derived)}
        return {name: shape[::-1] if self._layout(name) == "transposed" else shape for name, shape in own.items()}

    def read_rows(
        self, name: str, parts: Sequence[str], rows: slice, read: Callable[[str], Tensor], architecture: Architecture
    ) -> Tensor:
        """Some rows of a tensor in memory, which `parts` of the files make up; `read` gives these."""
        return dict(self.read(((part, read(part)) for part in parts), architecture))[name][rows]

    def made_of(self, found: Iterable[str]) -> dict[str, list[str]]:
        """Name in memory → the tensors of files that make it up, in the order of `found`."""
        made: dict[str, list[str]] = {}
        for theirs in found:
            if not theirs.endswith(self.derived):
                made.setdefault(self._whole(self.in_memory(theirs)), []).append(theirs)
        return made

    def keeps(self, name: str) -> bool:
        """Whether a weight lies in files as it does in memory."""
        return self._whole(name) == name and self._layout(name) == "same"

    def _whole(self, name: str) -> str:
        """What in memory a tensor of files is a part of."""
        return name

    def parted(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The shapes of a model's parameters, by the names of `shapes`; those that files have in pieces, by piece."""
        return dict(shapes)

    def _laid_out(self, name: str, tensor: Tensor, rows: tuple[int, int, int]) -> Tensor:
        """`rows` are how those of an interleaved layer are counted where the tensor comes from: (H, 3, D) in files,
        (3, H, D) in memory. A tensor of another size is not of this model, which is told where that is known."""
        layout = self._layout(name)
        if layout == "interleaved" and len(tensor) % (3 * rows[2]) == 0:
            tensor = tensor.unflatten(0, rows).transpose(0, 1).flatten(0, 2)
        return (tensor.T if layout == "transposed" else tensor).contiguous()

    def _layout(self, name: str) -> Layout:
        """That of a parameter, or of a part of an adapter: of A (r, i) neither rows nor columns are outputs, and an
        adapter's matrices are the same for a `Conv1D`."""
        module, _, leaf = _parted(name)
        layouts = (layout for own, layout in self.layouts.items() if module.endswith(f".{own}"))
        layout: Layout = next(layouts, "same")
        if leaf == "lora_A.weight" or (layout == "transposed" and leaf != "weight"):
            return "same"
        return layout

    def targets_in_files(self, targets: Collection[str]) -> list[str]:
        """Names of layers in an adapter's config. One that several layers share stands alone only if all are meant."""
        meant = {target: self._module(target) for target in targets}
        found = []
        for target, module in meant.items():
            theirs = self.modules.get(module, target)
            last = theirs.rpartition(".")[2]
            shared = {own for own, other in self.modules.items() if other.rpartition(".")[2] == last}
            found.append(last if shared <= set(meant.values()) or not shared else theirs)
        return list(dict.fromkeys(found))

    def targets_in_memory(self, targets: Collection[str]) -> list[str]:
        """The other way round; a name that the family does not have stays as it is."""
        found = []
        for target in targets:
            own = [own for own, theirs in self.modules.items() if f".{theirs}".endswith(f".{target}")]
            found += [module.rpartition(".")[2] for module in own] or [target]
        return list(dict.fromkeys(found))

    def _module(self, target: str) -> str:
        """`self_attn.o_proj` of `o_proj`, where it has another name in files."""
        return next((own for own in self.modules if own.rpartition(".")[2] == target), target)


SAME_NAMES = Names()
"""Of families whose files have the names of memory."""


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """Matches any of these names, of one or several words, as whole words of a longer name; the longest first."""
    words = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    return re.compile(rf"(?<![^.])(?:{words})(?![^.])")


def _parted(name: str) -> tuple[str, str, str]:
    """Module, dot and what stands behind: `weight`, `bias`, or the part of an adapter."""
    for leaf in ("lora_A.weight", "lora_B.weight"):
        if name.endswith(f".{leaf}"):
            return name.removesuffix(f".{leaf}"), ".", leaf
    return name.rpartition(".")

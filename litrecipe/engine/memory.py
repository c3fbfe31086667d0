"""The memory table of a dry run: what one rank will hold at its peak.

Activations are not guessed from a formula: the recipe's own forward pass runs once on fake tensors (shapes without
data), and what autograd keeps for the backward pass is added up. So the figure follows the code.

Shapes: T tokens of the largest row, P its predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from litrecipe.config.groups import FinetuneRecipe
from litrecipe.model.adapters import add_adapter
from litrecipe.model.architecture import Architecture
from litrecipe.model.decoder import Decoder
from litrecipe.model.head import block_size
from litrecipe.model.row import Row
from litrecipe.objectives.causal_lm import CausalLM

OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "paged_adamw8bit": 2.1, "sgd": 4.0}
"""Bytes of state per trained parameter in fp32; 8-bit state carries a scale for each block of 256."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantisation: 4 bits, an 8-bit scale per 64, a 32-bit scale per 256 of those."""


@dataclass(frozen=True)
class MemoryTable:
    """Bytes of one rank, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    scratch: int
    """Blocks of logits and the gradients of one block's activations."""
    parameters: int
    trained: int

    @property
    def peak(self) -> int:
        """The most that is held at once.

        Gradients grow while activations are freed, so the backward pass holds the larger of the two, not both.
        """
        return self.weights + self.optimizer + max(self.activations + self.scratch, self.gradients)


def estimate(recipe: FinetuneRecipe, architecture: Architecture, row: Row, world_size: int = 1) -> MemoryTable:
    """The table for a recipe whose largest row is `row`."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    dtype = torch.bfloat16 if recipe.fabric.precision == "bf16-true" else torch.float32
    with torch.device("meta"):
        model = Decoder(architecture).to(dtype)
    if recipe.adapter.method != "none":
        add_adapter(model, recipe.adapter)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill_with_fakes(model)
        model.activation_checkpointing = recipe.fabric.activation_checkpointing
        saved = SavedBytes(model.parameters())
        tensors = {field.name: getattr(row, field.name) for field in fields(row)}
        tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items() if isinstance(t, Tensor)}
        fake = replace(row, **tensors)
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.fabric.precision == "bf16-mixed")
        with saved, autocast:
            CausalLM()(model(fake), fake)
        trained = [p for p in model.parameters() if p.requires_grad]
        frozen = [p for p in model.parameters() if not p.requires_grad]
        parameters = sum(p.numel() for p in trained + frozen)
    linear = sum(p.numel() for p in frozen if p.dim() == 2 and p.shape[0] != architecture.vocab_size)
    weights = sum(p.numel() * p.element_size() for p in trained + frozen)
    if recipe.quantize.method != "none":
        quantised = NF4_BYTES if recipe.quantize.method == "nf4" else 1.0
        weights = int(weights - linear * dtype.itemsize + linear * quantised)
    count = sum(p.numel() for p in trained)
    share = world_size if recipe.fabric.strategy == "fsdp" else 1
    widest = max(architecture.intermediate_size, architecture.hidden_size)
    predictions = len(row.target)
    block = 4 * predictions * min(block_size(predictions, "cpu"), architecture.vocab_size)
    scratch = 2 * block + 6 * len(row.tokens) * widest * 4
    return MemoryTable(
        weights=weights // share,
        gradients=sum(p.numel() * p.element_size() for p in trained) // share,
        optimizer=int(count * OPTIMIZER_BYTES[recipe.optim.name]) // share,
        activations=saved.total,
        scratch=scratch,
        parameters=parameters,
        trained=count,
    )


def fill_with_fakes(model: nn.Module) -> None:
    """Give a model on the meta device parameters of the mode that is on; tied ones stay tied."""
    twins: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in twins:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                twins[parameter] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = twins[parameter]


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Adds up the storage that autograd keeps, each once, parameters left out."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.total = 0
        self._seen = {p.untyped_storage()._cdata for p in parameters}
        self._alive: list[Tensor] = []
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)  # a freed storage's address could be given out again
            self.total += storage.nbytes()
        return tensor

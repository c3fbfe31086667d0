"""The memory table of a dry run: what one rank will hold at its peak.

Activations are not guessed from a formula: the recipe's own forward pass runs once on fake tensors (shapes without
data), and what autograd keeps for the backward pass is added up. So the figure follows the code. Of layers that are all
alike three are run, and the others counted as the third; of the vocabulary a part.

Shapes: T tokens of the largest row, P its predictions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from litrecipe.config.groups import RewardRecipe, TrainingRecipe
from litrecipe.config.online import PpoRecipe
from litrecipe.model.adapters import add_adapter
from litrecipe.model.architecture import Architecture, LayerShape
from litrecipe.model.critic import ActorAndCritic, critic_beside
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.experts import ExpertMLPs
from litrecipe.model.head import block_size
from litrecipe.model.hydra import Hydra, of_best
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Row

OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "paged_adamw8bit": 2.1, "sgd": 4.0}
"""Bytes of state per trained parameter in fp32; 8-bit state carries a scale for each block of 256."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""A weight in NF4 with double quantisation: 4 bits, an 8-bit scale per 64, a 32-bit scale per 256 of those."""
CPU_HOLES = 0.2
"""Share of the activations by which a process grows beyond its tensors on a CPU: freed pieces of the heap that are too
small for what comes next (glibc, SmolLM2-135M: 128 to 205 MiB beside 690 to 780 MiB of activations)."""
LAYERS = "model.layers."
LAYERS_RUN, WORDS_RUN = 3, 512
"""Layers and words of the vocabulary of the model that stands for a larger one of layers that are alike."""


@dataclass(frozen=True)
class MemoryTable:
    """Bytes of one rank, by what they are for."""

    weights: int
    reference: int
    """A frozen copy of what is trained, or where nothing can be shared of the whole model."""
    gradients: int
    optimizer: int
    exchange: int
    """What ranks hold to work together: FSDP's gathered layers and their whole gradients, DDP's buckets."""
    activations: int
    scratch: int
    """Blocks of logits, the head's gradient before it is added, the gradients of one block's activations."""
    holes: int
    """What the C library's heap holds in between, on a CPU."""
    held: int
    """Gradients of a step's earlier rows, which lie beside the activations of the next."""
    parameters: int
    trained: int
    judges: int = 0
    """Reward models beside what is trained."""
    teacher: int = 0
    """The frozen model that is learnt from, and what it computes with."""
    asked: int = 0
    """The same of one that is asked before anything is learnt."""
    cache: int = 0
    """Keys and values while completions are sampled, which is over when something is learnt."""
    laid_out: int = 0
    """Copies of the weights for as long."""

    @property
    def peak(self) -> int:
        """The most that is held at once.

        In a step of one row gradients grow while activations are freed, so it holds the larger of the two, not both.
        """
        backward = self.scratch + self.holes + max(self.held + self.activations, self.gradients)
        always = self.weights + self.reference + self.judges + self.teacher + self.optimizer + self.exchange
        return max(always + max(backward, self.cache + self.laid_out), self.weights + self.asked)


def estimate(
    recipe: TrainingRecipe,
    architecture: Architecture,
    row: Row,
    *,
    rows: int = 1,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    frozen_copy: bool = False,
) -> MemoryTable:
    """The table for a recipe whose largest row is `row`, and whose ranks take up to `rows` rows a step.

    `frozen_copy`: a reference stands beside the policy, which shares what is not trained; sharded it shares nothing.
    Of ranks that share each layer everything is that of one rank's part.
    """
    architecture = rank_architecture(architecture, recipe.fabric.tensor_parallel)
    model = meta_model(recipe, architecture)
    sizes = {name: stored_bytes(name, p, recipe.quantize.method) for name, p in model.named_parameters()}
    learnt = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}
    shards = world_size // recipe.fabric.tensor_parallel
    weights, gradients = sum(sizes.values()), sum(learnt.values())
    copied = sum(size for name, size in learnt.items() if not name.startswith("critic."))
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = int(trained * OPTIMIZER_BYTES[recipe.optim.name])
    strategy, exchange = recipe.fabric.strategy, 0
    whole_scales = scales_bytes(model) if recipe.quantize.method == "nf4" else 0
    if strategy == "fsdp":
        # The root (embedding, head, last norm) stays gathered; a block is fetched while the one before it works.
        exchange = gathered(sizes, architecture, blocks=2) + gathered(learnt, architecture, blocks=1)
        gradients, optimizer = gradients // shards, optimizer // shards
        weights = whole_scales + (weights - whole_scales) // shards
    elif strategy == "ddp" or world_size > 1:
        exchange = gradients
    widest = max(architecture.intermediate_size, architecture.hidden_size)
    if experts := architecture.experts:
        widest = max(widest, experts.chosen * max(experts.size, architecture.hidden_size))
    activations, again = kept_bytes(recipe, architecture, row)
    return MemoryTable(
        weights=weights,
        reference=(weights if strategy == "fsdp" else copied) if frozen_copy else 0,
        gradients=gradients,
        optimizer=optimizer,
        exchange=exchange,
        activations=activations,
        scratch=head_scratch(model, row, device) + experts_scratch(model) + 6 * len(row.tokens) * widest * 4 + again,
        holes=int(CPU_HOLES * activations) if torch.device(device).type == "cpu" else 0,
        held=gradients if rows > 1 else 0,
        parameters=parameters,
        trained=trained,
    )


def head_scratch(model: nn.Module, row: Row, device: torch.device | str) -> int:
    """Two blocks of logits, and the gradient of a head that is trained before it is added."""
    decoder = next((part for part in model.modules() if isinstance(part, Decoder)), None)
    if decoder is None:
        return 0
    read = of_best(row) if isinstance(decoder, Hydra) else row
    predictions, head = len(read.target), decoder.lm_head.weight
    block = 4 * predictions * min(block_size(predictions, device), len(head))
    return 2 * block + (head.numel() * head.element_size() if head.requires_grad else 0)


def experts_scratch(model: nn.Module) -> int:
    """The gradient of one layer's experts, where they are trained, before it is added."""
    sizes = (
        sum(p.numel() * p.element_size() for p in part.parameters(recurse=False) if p.requires_grad)
        for part in model.modules()
        if isinstance(part, ExpertMLPs)
    )
    return max(sizes, default=0)


def teacher_bytes(
    teacher: Architecture,
    dtype: torch.dtype,
    method: str,
    row: Row,
    *,
    sharded_over: int | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """Of a frozen model that is asked about a row beside the student: weights, hidden states and blocks of logits."""
    with torch.device("meta"):
        model = Decoder(teacher).to(dtype).requires_grad_(False)
    sizes = {name: stored_bytes(name, p, method) for name, p in model.named_parameters()}
    weights = sum(sizes.values())
    if sharded_over:
        head = model.lm_head.weight
        weights = weights // sharded_over + gathered(sizes, teacher, blocks=2) + head.numel() * head.element_size()
    widest = max(teacher.intermediate_size, teacher.hidden_size)
    return (
        weights
        + 2 * head_scratch(model, row, device)
        + 4 * (len(row.target) * teacher.hidden_size + 6 * len(row.tokens) * widest)
    )


def meta_model(recipe: TrainingRecipe, architecture: Architecture) -> nn.Module:
    """What the recipe trains, without memory; a quantised base is a plain one here."""
    kind: type[Trunk] = Decoder
    if isinstance(recipe, RewardRecipe):
        kind = Hydra if recipe.reward.sft_coef else RewardModel
    with torch.device("meta"):
        model = kind(architecture).to(torch.bfloat16 if recipe.fabric.precision == "bf16-true" else torch.float32)
    if recipe.adapter.method != "none":
        add_adapter(model, recipe.adapter)
    model.activation_checkpointing = recipe.fabric.activation_checkpointing
    if isinstance(recipe, PpoRecipe) and isinstance(model, Decoder):
        critic = critic_beside(model, joined=recipe.ppo.layout == "joined")
        critic.activation_checkpointing = model.activation_checkpointing
        return ActorAndCritic(model, critic)
    return model


def rank_architecture(architecture: Architecture, ranks: int) -> Architecture:
    """What one of so many ranks that share each layer has of a model: fewer heads, narrower MLPs, fewer words."""
    a = architecture
    if ranks == 1:
        return a
    shapes = tuple(LayerShape(*(width // ranks for width in shape)) for shape in a.shapes)
    experts = None if a.experts is None else replace(a.experts, size=a.experts.size // ranks)
    widths = {name: getattr(a, name) // ranks for name in LayerShape._fields}
    return replace(a, vocab_size=-(-a.vocab_size // ranks), shapes=shapes, experts=experts, **widths)


def kept_bytes(recipe: TrainingRecipe, architecture: Architecture, row: Row) -> tuple[int, int]:
    """What autograd keeps of a row's forward pass, and what of one layer when it is computed again on the way back.

    Both are exactly linear in the vocabulary, and in the layers where these are alike: two sizes tell all others.
    """
    a, recomputes = architecture, recipe.fabric.activation_checkpointing

    def of(layers: int, vocabulary: int, again: bool = recomputes) -> int:
        asked = replace(recipe, fabric=replace(recipe.fabric, activation_checkpointing=again))
        smaller = replace(a.first_layers(layers), vocab_size=vocabulary)
        return saved_bytes(meta_model(asked, smaller), asked, row)

    alike = not (a.kinds or a.shapes or (a.experts and a.experts.dense_layers)) and a.num_layers > LAYERS_RUN
    layers = LAYERS_RUN if alike else a.num_layers
    few = of(layers, WORDS_RUN)
    of_words = (of(layers, 2 * WORDS_RUN) - few) * (a.vocab_size - WORDS_RUN) // WORDS_RUN
    of_layer = few - of(layers - 1, WORDS_RUN) if alike else 0
    inside = 0
    if recomputes and a.num_layers > 1:
        deepest = min(LAYERS_RUN, a.num_layers)
        inside = of(deepest, WORDS_RUN, False) - of(deepest - 1, WORDS_RUN, False)
    return few + of_words + (a.num_layers - layers) * of_layer, inside


def scales_bytes(model: nn.Module) -> int:
    """Of NF4: they are no parameters, so no strategy shares them out."""
    quantised = (p.numel() for name, p in model.named_parameters() if can_be_quantised(name, p) and not p.requires_grad)
    return int(sum(quantised) * (NF4_BYTES - 0.5))


def saved_bytes(model: nn.Module, recipe: TrainingRecipe, row: Row) -> int:
    """What autograd keeps of one forward pass. The model's parameters become fake ones."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Which answers are the best is not to be told once values are fakes.
    shapes = [row, of_best(row)] if isinstance(model, Hydra) else [row]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fill_with_fakes(model)
        saved = SavedBytes(model.parameters())
        inputs = [faked(one) for one in shapes]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.fabric.precision == "bf16-mixed")
        with saved, autocast:
            model(*inputs)
    return saved.total


def faked(row: Row) -> Row:
    """The row with fakes for tensors, by the mode that is on."""
    tensors = {field.name: getattr(row, field.name) for field in fields(row)}
    tensors = {name: torch.empty(t.shape, dtype=t.dtype) for name, t in tensors.items() if isinstance(t, Tensor)}
    return replace(row, **tensors)


def stored_bytes(name: str, parameter: nn.Parameter, method: str) -> int:
    """A parameter as it lies in memory: frozen matrices of the layers may be quantised."""
    quantised = {"none": parameter.element_size(), "nf4": NF4_BYTES, "int8": 1.0}[method]
    is_frozen = not parameter.requires_grad
    return int(
        parameter.numel() * (quantised if is_frozen and can_be_quantised(name, parameter) else parameter.element_size())
    )


def can_be_quantised(name: str, parameter: nn.Parameter) -> bool:
    """Whether it is a matrix of a layer, or several, and no router's."""
    return LAYERS in name and parameter.ndim >= 2 and not name.endswith("mlp.gate.weight")


def gathered(sizes: dict[str, int], architecture: Architecture, blocks: int) -> int:
    """Bytes of everything outside the layers, and of some layers."""
    layers = sum(size for name, size in sizes.items() if LAYERS in name)
    return int(sum(sizes.values()) - layers + blocks * layers / architecture.num_layers)


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

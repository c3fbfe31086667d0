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

from litrecipe.config.groups import Fabric, RewardRecipe, TrainingRecipe
from litrecipe.config.online import PpoRecipe
from litrecipe.engine.cost import largest_share
from litrecipe.engine.gradients import messages
from litrecipe.engine.optim import optimizer_bytes
from litrecipe.model.adapters import add_adapter
from litrecipe.model.architecture import Architecture
from litrecipe.model.critic import ActorAndCritic, critic_beside
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.experts import ExpertMLPs
from litrecipe.model.group import Group
from litrecipe.model.head import block_size
from litrecipe.model.hydra import Hydra, of_best
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Row
from litrecipe.model.tensor_parallel import split
from litrecipe.model.tensor_plan import narrowed

NF4_BLOCK = 64
NF4_BYTES = 0.5 + 1 / NF4_BLOCK + 4 / (NF4_BLOCK * 256)
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
    """What ranks hold to work together: FSDP's gathered layers and their whole gradients, messages of copies."""
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
    host: int = 0
    """Weights, gradients and the optimizer, of a GPU that keeps them in main memory."""
    saving: int = 0
    """A copy of what a checkpoint holds, while it is written in the background; of a GPU's it lies in the host's
    memory."""

    @property
    def peak(self) -> int:
        """The most that is held at once.

        In a step of one row gradients grow while activations are freed, so it holds the larger of the two, not both.
        """
        backward = self.scratch + self.holes + max(self.held + self.activations, self.gradients)
        always = self.weights + self.reference + self.judges + self.teacher + self.optimizer + self.exchange
        always += self.saving
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
    kept: tuple[int, int] | None = None,
) -> MemoryTable:
    """The table for a recipe whose largest row is `row`, and whose ranks take up to `rows` rows a step. Where ranks
    share a copy of the model, that of the first.

    `frozen_copy`: a reference stands beside the policy, which shares what is not trained; sharded it shares nothing.
    `kept`: what `kept_bytes` told of the same row before.
    """
    model, size = part_model(recipe, architecture), recipe.fabric.tensor_parallel
    parameters, trained = parameter_counts(model if size == 1 else meta_model(recipe, architecture))
    whole, architecture, world_size = architecture, narrowed(architecture, size), world_size // size
    sizes = {name: stored_bytes(name, p, recipe.quantize.method) for name, p in model.named_parameters()}
    learnt = {name: p.numel() * p.element_size() for name, p in model.named_parameters() if p.requires_grad}
    weights, gradients = sum(sizes.values()), sum(learnt.values())
    copied = sum(size for name, size in learnt.items() if not name.startswith("critic."))
    optimizer = optimizer_bytes(recipe.optim.name, (p for p in model.parameters() if p.requires_grad))
    strategy, exchange = recipe.fabric.strategy, 0
    cuts = strategy == "fsdp" or (size > 1 and world_size > 1)
    if cuts:
        exchange = exchanged_bytes(recipe.fabric, sizes, learnt, architecture)
        shares = {name: largest_share(p.shape, world_size) for name, p in model.named_parameters()}
        whole_gradients, gradients = gradients, round(sum(size * shares[name] for name, size in learnt.items()))
        weights = round(sum(size * shares[name] for name, size in sizes.items()))
        optimizer = optimizer * gradients // max(1, whole_gradients)
    elif strategy == "ddp" or world_size > 1:
        exchange = exchanged_by_copies(list(learnt.values()))
    saved = sum(learnt.values()) // (world_size if cuts else 1) + optimizer
    reference = (weights if cuts else copied) if frozen_copy else 0
    host = 0
    if cuts and recipe.fabric.cpu_offload and torch.device(device).type != "cpu":
        host = weights + reference + gradients + optimizer
        weights = reference = gradients = optimizer = 0
    widest = max(architecture.intermediate_size, architecture.hidden_size)
    if experts := architecture.experts:
        widest = max(widest, experts.chosen * max(experts.size, architecture.hidden_size))
    activations, again = kept or kept_bytes(recipe, whole, row)
    return MemoryTable(
        weights=weights,
        reference=reference,
        gradients=gradients,
        optimizer=optimizer,
        exchange=exchange,
        activations=activations,
        scratch=head_scratch(model, row, device) + experts_scratch(model) + 6 * len(row.tokens) * widest * 4 + again,
        holes=int(CPU_HOLES * activations) if torch.device(device).type == "cpu" else 0,
        held=gradients if rows > 1 else 0,
        host=host,
        saving=saved if recipe.checkpoint.asynchronous and torch.device(device).type == "cpu" else 0,
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
    split_over: int = 1,
    device: torch.device | str = "cpu",
) -> int:
    """Of a frozen model that is asked about a row beside the student: weights, hidden states and blocks of logits.

    Ranks may each have a part of it (`split_over`), and pieces of that.
    """
    with torch.device("meta"):
        model = Decoder(teacher).to(dtype).requires_grad_(False)
    if split_over > 1:
        split(model, Group(0, split_over))
        teacher = narrowed(teacher, split_over)
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


def part_model(recipe: TrainingRecipe, architecture: Architecture) -> nn.Module:
    """What the first of the ranks that share a copy of `meta_model` has of it."""
    model = meta_model(recipe, architecture)
    if recipe.fabric.tensor_parallel > 1:
        split(model, Group(0, recipe.fabric.tensor_parallel))
    return model


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters, and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns)


def exchanged_bytes(config: Fabric, sizes: dict[str, int], learnt: dict[str, int], architecture: Architecture) -> int:
    """What a rank of FSDP2 holds besides its pieces: all outside of the layers and two of these, as one is fetched
    while another works, or all where none is let go; and on the way back the whole gradients of what is outside and of
    one layer."""
    share = 0.5 if config.param_dtype == "bfloat16" else 1.0
    layers = 2 if config.reshard_after_forward else architecture.num_layers
    return int(share * (gathered(sizes, architecture, layers) + gathered(learnt, architecture, 1)))


def exchanged_by_copies(learnt: list[int]) -> int:
    """What a rank that has the whole model holds besides: the gradients of several tensors that travel together."""
    several = [places for places in messages(learnt) if len(places) > 1]
    return max((sum(learnt[place] for place in places) for places in several), default=0)


def kept_bytes(recipe: TrainingRecipe, architecture: Architecture, row: Row) -> tuple[int, int]:
    """What autograd keeps of a row's forward pass, and what of one layer when it is computed again on the way back.

    Both are exactly linear in the vocabulary, and in the layers where these are alike: two sizes tell all others.
    """
    a, recomputes = architecture, recipe.fabric.activation_checkpointing

    def of(layers: int, vocabulary: int, again: bool = recomputes) -> int:
        fabric = replace(recipe.fabric, activation_checkpointing=again)
        if fabric.param_dtype == "bfloat16":  # gathered in bf16 a model computes as one that is stored so
            fabric = replace(fabric, precision="bf16-true")
        asked = replace(recipe, fabric=fabric)
        smaller = replace(a.first_layers(layers), vocab_size=vocabulary)
        return saved_bytes(part_model(asked, smaller), asked, row)

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

"""A model that two ranks compute together says what one says, of every family, and has its gradients."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from openelm import OPENELM
from processes import on_two_ranks
from torch import Tensor, nn

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter
from litrecipe.model.adapters import adapter_state, add_adapter
from litrecipe.model.architecture import Architecture
from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import generate
from litrecipe.model.families import FAMILIES, read_architecture
from litrecipe.model.group import Group
from litrecipe.model.head import Predictions
from litrecipe.model.reference import PolicyAndReference, frozen_twin
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.model.teacher import StudentAndTeacher, Teacher
from litrecipe.model.tensor_parallel import split, whole
from litrecipe.model.tensor_plan import check_divides, held_of

sys.path.insert(0, str(Path(__file__).parent))
from test_families import CASES, LONGEST, SMALL, family_of

V = SMALL["vocab_size"]
"""97: ranks have unequal shares of it."""
CHOSEN = (
    "llama",
    "mistral, window",
    "phi3, part of a head",
    "qwen2, tied",
    "qwen3, other heads",
    "olmo2, no groups",
    "mixtral",
    "qwen3_moe, plain layers",
    "smollm3",
    "granite, multipliers",
    "gemma",
    "gemma2, tight caps",
    "gemma3_text",
    "gpt_neox",
    "gpt2",
    "openelm",
)
"""A case of each family; the others differ in nothing that is split."""
ADAPTED = ("gpt2", "qwen3, other heads", "openelm", "granite, multipliers")
"""With biases, with fused projections, with norms of each head."""


def architecture_of(case: str) -> Architecture:
    family = family_of(case)
    keys = FAMILIES[family].keys
    config = {"model_type": family} | {keys.get(key, key): value for key, value in (SMALL | CASES[case]).items()}
    heads = {"num_query_heads": [4, 4, 8, 12], "num_kv_heads": [2, 2, 4, 6]}
    return read_architecture(OPENELM | heads if family == "openelm" else config).for_length(LONGEST)


def filled(model: nn.Module, seed: int = 0) -> Any:
    """With weights that all matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        spread = 1.2 if name.endswith("mlp.gate.weight") else 0.3
        parameter.data.normal_(0, spread, generator=generator)
    return model


def row() -> Any:
    """A prompt with two answers, and a text."""
    rng = np.random.default_rng(0)

    def segment(length: int, parent: int = -1) -> Segment:
        weights = np.ones(length, np.float32)
        weights[: 0 if parent >= 0 else 9] = 0
        return Segment(rng.integers(0, V, length), weights, parent)

    return make_row([Sample("a", (segment(9), segment(5, 0), segment(12, 0))), Sample("b", (segment(20),))])


def loss_of(said: Predictions) -> Tensor:
    """Everything that has a gradient counts, each place otherwise."""
    weights = torch.linspace(-1, 2, len(said.logps))
    terms = [one for one in (said.logps, said.entropy, said.log_z, said.kl) if one is not None and one.requires_grad]
    loss = sum((one * weights * (number + 1)).sum() for number, one in enumerate(terms))
    return loss if said.router_logits is None else loss + said.router_logits.square().sum() * 0.01


def far_apart(one: Any, two: Any, group: Group) -> list[str]:
    """Where two modules, of which the second is split, differ in what they say of a row or in a gradient; and where
    ranks of the second do, in a single bit."""
    found = []
    says = [module(row()) for module in (one, two)]
    for name, ours, theirs in zip(Predictions._fields, *says, strict=True):
        if ours is not None and not torch.allclose(ours.float(), theirs.float(), rtol=1e-5, atol=2e-5):
            found.append(f"{name}: {(ours.float() - theirs.float()).abs().max():.2g}")
    found += [] if all_same(says[1].logps.detach(), group) else ["log-probabilities of ranks"]
    for said in says:
        loss_of(said).backward()
    trained = 0
    for (name, ours), theirs in zip(one.named_parameters(), two.parameters(), strict=True):
        if ours.grad is None:
            assert theirs.grad is None and not ours.requires_grad
            continue
        trained += 1
        what, gradient = held_of(theirs), theirs.grad.clone()
        if not what.is_split and not what.is_share and not all_same(gradient, group):
            found.append(f"{name} of ranks")
        gradient = whole(group.add_up(gradient) if what.is_share else gradient, what, group)
        assert gradient.shape == ours.shape
        if (gradient - ours.grad).abs().max() > 2e-5 * ours.grad.abs().max():
            found.append(f"{name}: {(gradient - ours.grad).abs().max() / ours.grad.abs().max():.2g}")
    assert trained
    return found


def all_same(x: Tensor, group: Group) -> bool:
    return all(torch.equal(x, other) for other in group.each(x))


def wanting(model: Decoder) -> Decoder:
    model.with_log_z, model.with_entropy, model.with_collisions = True, "learnt", True
    model.with_routing = model.architecture.experts is not None
    return model


def of_family(case: str, group: Group) -> list[str]:
    one, two = (wanting(filled(Decoder(architecture_of(case)))) for _ in range(2))
    size = sum(parameter.numel() for parameter in one.parameters())
    split(two, group)
    assert sum(parameter.numel() for parameter in two.parameters()) < 0.6 * size
    found = far_apart(one, two, group)
    prompts, how = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 4]], {"max_new_tokens": 8, "completions": 3, "seed": 1}
    sampled = [generate(model, prompts, temperature=1.0, **how) for model in (one, two)]
    return found if sampled[0] == sampled[1] else [*found, "samples"]


def of_adapter(case: str, method: Any, group: Group) -> list[str]:
    models = []
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if "moe" in case:
        targets = ["q_proj", "o_proj", "gate_up_proj", "down_proj"]
    for _ in range(2):
        model = filled(Decoder(architecture_of(case)))
        add_adapter(model, Adapter(method=method, r=3, alpha=5, targets=targets))
        for number, parameter in enumerate(adapter_state(model).values()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)) * 0.1)
        models.append(wanting(model))
    split(models[1], group)
    found = far_apart(*models, group)
    for ours, theirs in zip(*(adapter_state(model).values() for model in models), strict=True):
        assert torch.equal(ours, whole(theirs, held_of(theirs), group))
    return found


def of_teacher(k: int | None, group: Group) -> list[str]:
    """Its table is larger than the student's, and what it knows of it smaller."""
    modules = []
    for _ in range(2):
        teacher = Teacher(read_architecture({"model_type": "gemma2"} | SMALL | CASES["gemma2"] | {"vocab_size": 131}))
        filled(teacher, 1).requires_grad_(False)
        teacher.k, teacher.temperature, teacher.tokens = k, 1.5, 95
        modules.append(StudentAndTeacher(wanting(filled(Decoder(architecture_of("gemma2")))), teacher, temperature=1.5))
    split(modules[1], group)
    return far_apart(*modules, group)


def of_reference(group: Group) -> list[str]:
    """Whose base is the policy's."""
    modules = []
    for _ in range(2):
        policy = filled(Decoder(architecture_of("llama")))
        add_adapter(policy, Adapter(method="lora", r=3, targets=["q_proj", "down_proj"]))
        twin = frozen_twin(filled(policy, 2))
        modules.append(PolicyAndReference(filled(policy, 3), twin))
    one, two = modules
    split(two, group)
    assert two.policy.model.layers[0].mlp.up_proj.weight is two.reference.model.layers[0].mlp.up_proj.weight
    apart = (one.divergence(row()) - two.divergence(row())).abs().max()
    return [] if apart < 1e-5 and one.divergence(row()).abs().max() > 0.1 else [f"divergence: {apart:.2g}"]


SCRIPT = """
import json, sys
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/model"]
import torch.distributed as dist
from test_tensor_parallel import *

dist.init_process_group("gloo")
group = Group(int(sys.argv[2]), 2, dist.group.WORLD)
found = {case: of_family(case, group) for case in CHOSEN}
for method in ("lora", "dora"):
    found |= {f"{case}, {method}": of_adapter(case, method, group) for case in ADAPTED}
found["experts, lora"] = of_adapter("qwen3_moe", "lora", group)
found |= {f"teacher {k}": of_teacher(k, group) for k in (None, 5)}
found["reference"] = of_reference(group)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[str]]]:
    """Of each rank: where it is not as one process is, by case."""
    said = on_two_ranks(SCRIPT, tmp_path_factory.mktemp("split"), Path(__file__).parents[1])
    return [json.loads(text) for text in said]


@pytest.mark.slow
def test_two_ranks_say_what_one_says_and_learn_what_it_learns(found: list[dict[str, list[str]]]) -> None:
    """Log-probabilities, entropies, log Z and routers, their gradients by every weight, and what is sampled."""
    for of_rank in found:
        assert {case: wrong for case, wrong in of_rank.items() if wrong} == {}
        assert len(of_rank) == len(CHOSEN) + 2 * len(ADAPTED) + 4
    assert {family_of(case) for case in CHOSEN} == set(FAMILIES)


def test_what_cannot_be_split_evenly_is_refused_by_name() -> None:
    with pytest.raises(InputError) as refused:
        check_divides(architecture_of("gemma, one head"), 3)
    said = "cannot be split evenly: give a divisor of it"
    assert refused.value.mistakes == [
        f"fabric.tensor_parallel: 3: the model's heads, 4, {said}",
        f"fabric.tensor_parallel: 3: the model's heads of keys and values, 1, {said}",
    ]
    with pytest.raises(InputError, match=r"inner width of an expert, 20, cannot"):
        check_divides(architecture_of("qwen3_moe"), 8)
    with pytest.raises(InputError, match=r"heads of keys and values, 2 in layer 0, cannot"):
        check_divides(architecture_of("openelm"), 8)
    check_divides(architecture_of("llama"), 2)


def test_a_part_that_no_entry_of_the_plan_names_is_refused() -> None:
    model = Decoder(architecture_of("llama"))
    model.model.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"model\.extra\.weight: no entry of the plan"):
        split(model, Group(0, 2))

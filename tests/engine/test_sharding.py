"""What becomes of models that processes share, in one process that believes to be the first of them: torch's `fake`
process group does nothing when it is asked to exchange."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import TINY_CONFIG
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.testing._internal.distributed.fake_pg import FakeStore

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.groups import Adapter, Fabric, Quantize
from litrecipe.engine.sharding import distribute
from litrecipe.evaluation.scoring import loglikelihoods
from litrecipe.model.critic import ActorAndCritic, critic_beside
from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import _Batch
from litrecipe.model.families import read_architecture
from litrecipe.model.hydra import BaseJudge
from litrecipe.model.quantize import NF4Linear
from litrecipe.model.row import Row, Sample, Segment, make_row

MeshOf = Callable[[int], DeviceMesh]


@pytest.fixture
def mesh_of() -> Iterator[MeshOf]:
    def of(size: int) -> DeviceMesh:
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        return dist.init_device_mesh("cpu", (size, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))

    yield of
    dist.destroy_process_group()


def row_of(tokens: int = 20) -> Row:
    weights = np.ones(tokens, dtype=np.float32)
    weights[0] = 0
    return make_row([Sample("x", (Segment(np.arange(tokens), weights),))])


def test_the_score_of_a_critic_is_fp32_beside_a_transformer_in_bf16(mesh_of: MeshOf) -> None:
    policy = Decoder(read_architecture(TINY_CONFIG))
    policy.init_weights(seed=0)
    module = ActorAndCritic(policy.to(torch.bfloat16), critic_beside(policy))
    distribute(module, mesh_of(2), Fabric(strategy="fsdp", precision="bf16-true"))
    made = module(row_of())
    (made.values.sum() + made.predictions.logps.sum()).backward()
    found = module.critic.score.weight.grad, module.critic.model.embed_tokens.weight.grad
    assert [one.dtype for one in found if one is not None] == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("double_quant", [True, False])
def test_what_restores_a_weight_is_not_rounded_and_goes_where_that_is(
    double_quant: bool, mesh_of: MeshOf, tiny_model: Path
) -> None:
    files, quantize = open_model(str(tiny_model)), Quantize(method="nf4", double_quant=double_quant)
    settings = {"quantize": quantize, "adapter": Adapter(method="lora", r=4)}
    alone, shared = load_model(files, **settings), load_model(files, shared=True, **settings)  # type: ignore[arg-type]
    config = Fabric(strategy="fsdp", precision="bf16-mixed", param_dtype="bfloat16")
    distribute(shared, mesh_of(1), config)
    layers = shared.model.layers[0], alone.model.layers[0]
    assert isinstance(layers[0], FSDPModule)
    layers[0].unshard()
    one, other = (layer.self_attn.q_proj.base for layer in layers)
    assert isinstance(one, NF4Linear) and isinstance(other, NF4Linear)
    assert torch.equal(one.dense_weight(torch.float32), other.dense_weight(torch.float32))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for name in ("weight", "scales"):
            there = torch.empty_like(getattr(one, name), device="cuda")
            setattr(one, name, torch.nn.Parameter(there, requires_grad=False))
        assert one.dense_weight(torch.float32).device.type == "cuda"
    state = one.quant_state
    parts = [state.absmax, state.code, *([state.offset, state.state2.absmax] if double_quant else [])]
    assert {part.device.type for part in parts} == {"cuda"}


def test_a_model_reads_where_it_works_wherever_its_weights_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `fabric.cpu_offload` on a GPU."""
    model, read = Decoder(read_architecture(TINY_CONFIG)), list[str]()
    model.model.works_on = torch.device("cuda")

    def asked(row: Row) -> None:
        read.append(row.tokens.device.type)
        raise InterruptedError

    monkeypatch.setattr(model, "forward", asked)
    with FakeTensorMode(allow_non_fake_inputs=True):
        read.append(BaseJudge(model, torch.zeros(1, 48), None).device.type)
        read.append(_Batch(model, deque(), None).cache.layers[0].device.type)
    model.model.works_on = torch.device("meta")
    with pytest.raises(InterruptedError):
        loglikelihoods(model, [((1, 2), (3,))], batch_tokens=99, max_length=99)
    assert read == ["cuda", "cuda", "meta"]

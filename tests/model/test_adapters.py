"""Adapters: equal to peft's own computation, exact when off, merged without a trace, read by peft."""

import json
from pathlib import Path

import pytest
import torch
from processes import on_two_ranks
from small import CONFIG, decoder, relative
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, Quantize
from litrecipe.model.adapters import (
    adapter_config,
    adapter_off,
    adapter_state,
    add_adapter,
    describe_parameters,
    load_adapter_state,
    merge_adapter,
)
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.reward import RewardModel

METHODS = ["lora", "dora"]
TOKENS = torch.arange(3, 40)


def adapted(method="lora", **changes):
    """A decoder whose adapter says something: B is zero when it is fresh."""
    model = decoder(**changes)
    add_adapter(model, Adapter(method=method, r=4, alpha=8), seed=1)
    shake(model)
    return model


def shake(model):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05, generator=generator)
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand(parameter.shape, generator=generator))
    return model


def step(model, tokens=TOKENS):
    """Logits, and the gradients of some scalar of them."""
    model.zero_grad()
    logits = model.logits(tokens)
    logits.log_softmax(-1)[:, 5].sum().backward()
    return logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def with_peft(model, method, **settings):
    """The same model under peft's own layers and forward pass."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = Adapter().targets
    inject_adapter_in_model(
        LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=method == "dora", **settings), model
    )
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_equals_pefts_own_forward_and_gradients(method, bias):
    flags = {"attention_bias": bias, "mlp_bias": bias}
    ours = adapted(method, **flags).double()
    theirs = with_peft(decoder(**flags), method).double()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    theirs.load_state_dict(ours.state_dict())
    theirs.requires_grad_(False)
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_" in name)
    (logits, gradients), (expected, expected_gradients) = step(ours), step(theirs)
    assert relative(logits, expected) < 1e-6  # norms and rotations are fp32 inside
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert relative(gradient, expected_gradients[name]) < 1e-6, name


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_gradients_equal_finite_differences(dora, bias, dropped):
    """With DoRA's norms held fixed, as its backward pass takes them."""
    from litrecipe.model.lora_linear import _LowRank

    torch.manual_seed(0)
    base = nn.Linear(5, 7, bias=bias, dtype=torch.float64).requires_grad_(False)
    wide = {"dtype": torch.float64, "requires_grad": True}
    x, a, b = torch.randn(2, 3, 5, **wide), torch.randn(2, 5, **wide), torch.randn(7, 2, **wide)
    z = torch.randn(2, 3, 5, **wide) if dropped else None
    magnitude, norms = (torch.randn(7, **wide), torch.rand(7, dtype=torch.float64) + 1) if dora else (None, None)
    assert torch.autograd.gradcheck(
        lambda *args: _LowRank.apply(*args, norms, base, base.bias, 0.7), (x, z, a, b, magnitude)
    )


def test_rslora_scales_by_the_root_of_the_rank():
    updates = []
    for rslora in (False, True):
        model = decoder()
        before = model.model.layers[0].mlp.up_proj.weight.clone()
        add_adapter(model, Adapter(method="lora", r=4, alpha=8, rslora=rslora), seed=1)
        shake(model)
        merge_adapter(model)
        updates.append(model.model.layers[0].mlp.up_proj.weight - before)
    assert relative(updates[1], 2 * updates[0]) < 1e-5  # 8 / √4 against 8 / 4


@pytest.mark.parametrize("method", METHODS)
def test_dropout_falls_on_the_adapters_input_in_training_only(method):
    model = decoder()
    add_adapter(model, Adapter(method=method, r=4, alpha=8, dropout=0.5), seed=1)
    shake(model)
    layer = model.model.layers[1].mlp.up_proj
    x = torch.randn(6, 64)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    dropped = nn.functional.dropout(x, 0.5)
    product = x @ layer.base_layer.weight.T + layer.scale * dropped @ layer.a.T @ layer.b.T
    if method == "dora":
        product = product * layer.magnitude / (layer.base_layer.weight + layer.scale * layer.b @ layer.a).norm(dim=1)
    assert relative(y, product) < 1e-6
    assert relative(model.eval().logits(TOKENS), adapted(method).logits(TOKENS)) == 0


@pytest.mark.parametrize("targets", [["all-linear"], ["lm_head"], ["q_proj", "qproj", "wq"]])
def test_unknown_targets_are_all_named(targets):
    model = decoder(tie_word_embeddings=False)
    with pytest.raises(InputError) as caught:
        add_adapter(model, Adapter(method="lora", targets=targets))
    wrong = [target for target in targets if target != "q_proj"]
    there = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert caught.value.mistakes == [f"adapter.targets: {t}: no such layer: the model has {there}" for t in wrong]
    assert all(type(module) is not nn.Linear or not hasattr(module, "lora_A") for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_is_trained_and_it_is_fp32(method, dtype):
    model = decoder().to(dtype)
    add_adapter(model, Adapter(method=method, r=4, targets=["q_proj", "down_proj"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 2 * (3 if method == "dora" else 2)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else dtype), name
    assert type(model.lm_head) is nn.Linear


def test_a_fresh_adapter_follows_from_its_seed_alone():
    states = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(noise)
        model = decoder()
        add_adapter(model, Adapter(method="lora", r=4), seed=seed)
        states.append(adapter_state(model))
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, tensor in first.items():
        if name.endswith("lora_B.weight"):
            assert not tensor.any()
            continue
        bound = tensor.shape[1] ** -0.5
        assert 0.9 * bound < tensor.abs().max() <= bound
        assert not torch.equal(tensor, other[name])


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_adapter_changes_nothing(method):
    model = decoder()
    expected = model.logits(TOKENS)
    add_adapter(model, Adapter(method=method, r=4))
    assert torch.equal(model.logits(TOKENS), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_magnitudes_are_row_norms_of_the_loaded_weights(dtype):
    model = decoder().to(dtype)
    add_adapter(model, Adapter(method="dora", r=4))
    layer = model.model.layers[0].self_attn.q_proj
    torch.testing.assert_close(layer.magnitude.detach(), layer.base_layer.weight.float().norm(dim=1))
    assert layer.magnitude.requires_grad


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_on_a_model_without_memory(method):
    with torch.device("meta"):
        model = Decoder(read_architecture(CONFIG))
    add_adapter(model, Adapter(method=method, r=4))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert describe_parameters(model) == describe_parameters(adapted(method))
    with FakeTensorMode():
        model = Decoder(read_architecture(CONFIG))
        add_adapter(model, Adapter(method=method, r=4))
        model.logits(torch.empty(7, dtype=torch.int64)).sum().backward()
    assert describe_parameters(model) == describe_parameters(adapted(method))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_counted_by_kind(method):
    model = adapted(method)
    attention, mlp = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64), 2 * 3 * 64 * 128
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    inputs = 2 * (6 * 64 + 128)
    adapter = 4 * (rows + inputs) + (rows if method == "dora" else 0)
    everything = 120 * 64 + attention + mlp + 5 * 64 + adapter
    assert describe_parameters(model) == {
        "embedding": (120 * 64, 0),
        "attention": (attention, 0),
        "mlp": (mlp, 0),
        "norm": (5 * 64, 0),
        "adapter": (adapter, adapter),
        "all": (everything, adapter),
    }


@pytest.mark.parametrize("method", METHODS)
def test_mixed_precision_is_as_near_to_fp32_as_pefts(method):
    ours, theirs = adapted(method), with_peft(decoder(), method)
    exact, exact_gradients = step(ours)
    theirs.load_state_dict(ours.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        (logits, gradients), (expected, _) = step(ours), step(theirs)
    assert logits.dtype == torch.bfloat16
    ours_off, theirs_off = ((x.float() - exact).pow(2).mean().sqrt() for x in (logits, expected))
    assert 0 < ours_off < 1.2 * theirs_off
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), exact_gradients[name].flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("method", METHODS)
def test_an_fp32_adapter_on_a_bf16_base(method):
    model = adapted(method)
    exact, exact_gradients = step(model)
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.bfloat16()
    logits, gradients = step(model)
    assert logits.dtype == torch.bfloat16
    assert relative(logits.float(), exact) < 0.05
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert torch.cosine_similarity(gradient.flatten(), exact_gradients[name].flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("method", METHODS)
def test_recomputed_blocks_give_the_same_gradients(method):
    model = adapted(method)
    _, expected = step(model)
    model.activation_checkpointing = True
    _, gradients = step(model)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)


@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss(method):
    model = decoder(initializer_range=0.2)
    add_adapter(model, Adapter(method=method, r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(model.logits(TOKENS[:-1]), TOKENS[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("method", METHODS)
def test_off_is_the_base_bit_for_bit(method):
    expected = decoder().logits(TOKENS)
    model = adapted(method)
    on = model.logits(TOKENS)
    assert not torch.equal(on, expected)
    with adapter_off(model):
        assert torch.equal(model.logits(TOKENS), expected)
        assert all(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)
    with pytest.raises(ZeroDivisionError), adapter_off(model), adapter_off(model):
        1 / 0  # noqa: B018
    assert torch.equal(model.logits(TOKENS), on)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_merged_equals_unmerged(method, bias):
    model = adapted(method, attention_bias=bias, mlp_bias=bias)
    expected = model.logits(TOKENS)
    names = {name for name, _ in decoder(attention_bias=bias, mlp_bias=bias).named_parameters()}
    merge_adapter(model)
    assert relative(model.logits(TOKENS), expected) < 1e-5
    assert {name for name, _ in model.named_parameters()} == names
    assert all(type(module) is nn.Linear for module in model.modules() if isinstance(module, nn.Linear))


@pytest.mark.parametrize(("method", "quantized"), [("lora", "nf4"), ("dora", "nf4"), ("lora", "int8")])
def test_merging_on_a_quantised_base_goes_into_its_restored_weights(method, quantized):
    from litrecipe.model.quantize import quantize_linears

    model = decoder()
    quantize_linears(model, Quantize(method=quantized))
    add_adapter(model, Adapter(method=method, r=4, alpha=8, targets=["q_proj", "up_proj"]), seed=1)
    expected = shake(model).logits(TOKENS)
    merge_adapter(model)
    assert relative(model.logits(TOKENS), expected) < 1e-5
    assert {name: p.dtype for name, p in model.named_parameters()} == {
        name: torch.float32 for name, _ in decoder().named_parameters()
    }
    half = decoder()
    quantize_linears(half, Quantize(method=quantized))
    add_adapter(half, Adapter(method=method, r=4, alpha=8, targets=["q_proj", "up_proj"]), seed=1)
    merge_adapter(shake(half), dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert torch.equal(half.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight.bfloat16())


@pytest.mark.parametrize("method", METHODS)
def test_state_goes_out_and_in(method):
    model = adapted(method)
    other = decoder()
    add_adapter(other, Adapter(method=method, r=4, alpha=8), seed=5)
    load_adapter_state(other, adapter_state(model))
    assert torch.equal(other.logits(TOKENS), model.logits(TOKENS))


def test_a_reward_models_score_belongs_to_its_adapter():
    config = Adapter(method="lora", r=4, targets=["q_proj"])
    model = RewardModel(read_architecture(CONFIG)).bfloat16()
    with pytest.raises(InputError, match=r"adapter\.targets: score: no such layer"):
        add_adapter(model, Adapter(method="lora", targets=["score"]))
    add_adapter(model, config)
    assert model.score.weight.requires_grad and model.score.weight.dtype == torch.float32
    assert describe_parameters(model)["head"] == (64, 64)
    state = adapter_state(model)
    assert torch.equal(state["base_model.model.score.weight"], model.score.weight)
    assert len(state) == 1 + 2 * 2
    written = adapter_config(config, "org/base", with_score=True)
    assert (written["task_type"], written["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert "modules_to_save" not in adapter_config(config, "org/base")


def test_all_that_is_wrong_with_a_state_is_named():
    model = adapted()
    state = adapter_state(model)
    prefix = "base_model.model.model.layers.0.self_attn"
    state["extra"] = torch.zeros(1)
    del state[f"{prefix}.q_proj.lora_A.weight"]
    state[f"{prefix}.k_proj.lora_B.weight"] = torch.zeros(32, 3)
    with pytest.raises(InputError) as caught:
        load_adapter_state(model, state)
    assert caught.value.mistakes == [
        f"adapter: {prefix}.q_proj.lora_A.weight: missing from the file",
        "adapter: extra: not in this model's adapter",
        f"adapter: {prefix}.k_proj.lora_B.weight: shape [32, 3]: must be [32, 4]",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_peft_reads_what_we_write(tmp_path, method):
    """A folder of our tensors and our config, on transformers' model of the same weights."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    model = adapted(method)
    config = adapter_config(Adapter(method=method, r=4, alpha=8), base="org/base")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(adapter_state(model), tmp_path / "adapter_model.safetensors")
    llama = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).eval()
    llama.load_state_dict(dict(decoder().named_parameters()), strict=False)
    theirs = PeftModel.from_pretrained(llama, str(tmp_path))
    assert get_peft_model_state_dict(theirs).keys() == adapter_state(model).keys()
    with torch.no_grad():
        assert relative(model.logits(TOKENS), theirs(TOKENS[None]).logits[0]) < 1e-5


def test_two_sharded_processes_give_the_gradients_of_one(tmp_path):
    """FSDP2 on gloo, a group a layer: LoRA, DoRA, and both on NF4; what is saved must be what was gathered."""
    on_two_ranks(f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{WORKER}", tmp_path)


WORKER = "import test_adapters\ntest_adapters.sharded_worker()"


def sharded_worker() -> None:
    """One of two ranks: every rank sees the same tokens, so the mean of the gradients is the gradient."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from litrecipe.model.quantize import quantize_linears

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for method in METHODS:
        for quantized in ("none", "nf4"):
            alone, sharded = decoder(), decoder()
            for model in (alone, sharded):
                if quantized != "none":
                    quantize_linears(model, Quantize(method=quantized))
                add_adapter(model, Adapter(method=method, r=4, alpha=8), seed=1)
                shake(model)
            mesh = init_device_mesh("cpu", (2,))
            for layer in sharded.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(sharded, mesh=mesh)
            optimizers = [
                torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (alone, sharded)
            ]
            for _ in range(3):  # the later steps see what the earlier ones changed
                gradients = []
                for model, optimizer in zip((alone, sharded), optimizers, strict=True):
                    optimizer.zero_grad()
                    predictions = model(row())
                    predictions.logps.sum().backward()
                    gradients.append({n: whole(p.grad) for n, p in model.named_parameters() if p.requires_grad})
                    optimizer.step()
                for name, gradient in gradients[1].items():
                    assert relative(gradient, gradients[0][name]) < 1e-5, (method, quantized, name)
            state = {name: whole(tensor) for name, tensor in adapter_state(sharded).items()}
            for name, tensor in adapter_state(alone).items():
                torch.testing.assert_close(state[name], tensor)
    dist.destroy_process_group()


def row():
    """The tokens as one conversation, all of it learnt."""
    import numpy as np

    from litrecipe.model.row import Sample, Segment, make_row

    weights = np.ones(len(TOKENS), np.float32)
    weights[0] = 0
    return make_row([Sample("a", (Segment(TOKENS.numpy(), weights),))])


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

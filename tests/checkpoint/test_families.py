"""Folders of every family: read as transformers saves them, written so that it reads them, adapters for peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import open_model
from litrecipe.config.groups import Adapter
from litrecipe.model.families import FAMILIES

FLAGS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 4, "query_pre_attn_scalar": 24},
    "gemma3_text": {"head_dim": 16, "tie_word_embeddings": True, "sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "phi3": {"sliding_window": 4},
    "qwen3_moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "smollm3": {"no_rope_layers": [1, 0]},
}


@pytest.fixture(params=[family for family in FAMILIES if family != "openelm"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def load_in_transformers(folder: Path) -> Any:
    """The model, which must take every tensor and miss none."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def test_there_and_back(family: str, tmp_path: Path, make_llama, their_logits, our_logits) -> None:
    theirs = make_llama(tmp_path / "theirs", family=family, **FLAGS.get(family, {}))
    files = open_model(str(tmp_path / "theirs"))
    ours = load_model(files)
    torch.testing.assert_close(our_logits(ours), their_logits(theirs), atol=1e-4, rtol=1e-5)
    save_model(tmp_path / "ours", ours, files.tokenizer_dir)
    again = load_in_transformers(tmp_path / "ours")
    torch.testing.assert_close(their_logits(again), our_logits(ours), atol=1e-4, rtol=1e-5)
    assert open_model(str(tmp_path / "ours")).architecture == ours.architecture


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_reads_our_adapter(family: str, method: Any, tmp_path: Path, make_llama, their_logits, our_logits) -> None:
    from peft import PeftModel

    theirs = make_llama(tmp_path / "theirs", family=family, **FLAGS.get(family, {}))
    files, settings = open_model(str(tmp_path / "theirs")), Adapter(method=method, r=4, alpha=8)
    if method == "dora" and files.architecture.experts:
        settings.targets = settings.targets[:4]  # experts have LoRA only
    ours = load_model(files, adapter=settings)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    save_adapter(tmp_path / "adapter", ours, settings, str(tmp_path / "theirs"), files.tokenizer_dir)
    before = their_logits(theirs)
    adapted = PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(their_logits(adapted), our_logits(ours), atol=1e-4, rtol=1e-5)
    assert (their_logits(adapted) - before).abs().max() > 0.1
    again = load_model(open_model(str(tmp_path / "adapter")))
    assert torch.equal(our_logits(again), our_logits(ours))

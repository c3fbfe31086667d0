"""Shrunken models as transformers saves them, and logits to compare."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

TOKENS = torch.tensor([5, 3, 90, 41, 2, 7, 7, 60, 13, 88])


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITRECIPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make_llama():
    """Saves a random Llama (hidden 64, 2 layers, 120 tokens) with transformers and returns it.

    `family` makes it another's model, `labels` a sequence classifier.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    def make(
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        shard: str = "5GB",
        family: str = "llama",
        labels: int | None = None,
        **changes: Any,
    ):
        shrunken = {
            "vocab_size": 120,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        if labels is not None:
            shrunken["num_labels"] = labels
        if family == "mistral":
            shrunken["sliding_window"] = None
        kind = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
        torch.manual_seed(0)
        model = kind.from_config(AutoConfig.for_model(family, **{**shrunken, **changes}))
        for parameter in model.parameters():  # biases of 0 and norms of 1 would hide mistakes
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        return kind.from_pretrained(folder, dtype=torch.float32).eval()

    return make


@pytest.fixture
def their_logits():
    """(T, V) logits of a transformers model on a few tokens."""
    return torch.no_grad()(lambda model: model(TOKENS[None]).logits[0])


@pytest.fixture
def our_logits():
    """(T, V) logits of a Decoder on the same tokens."""
    return torch.no_grad()(lambda model: model.logits(TOKENS))

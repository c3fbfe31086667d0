"""Decoders so small that a test takes no time, and who counts what is computed. Any test may import this: conftest.py
puts this folder on the path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from litrecipe.config.groups import Quantize
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 120,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def decoder(quantized: str = "none", *, seed: int = 0, spread: float | None = None, **changes: Any) -> Decoder:
    """A Llama of CONFIG with `changes`, with fresh weights.

    `spread` draws every weight, norms too, with this deviation: with 0.3 all of them matter to the logits.
    """
    model = Decoder(read_architecture(CONFIG | changes))
    model.init_weights(seed=seed)
    if spread is not None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data.normal_(0, spread, generator=generator)
    if quantized != "none":
        from litrecipe.model.quantize import quantize_linears

        quantize_linears(model, Quantize(method=quantized))  # type: ignore[arg-type]
    return model


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, by the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


class Largest(TorchDispatchMode):
    """Most elements of any tensor made, products with something of size V, and logits that are kept beside their
    exponentials."""

    def __init__(self) -> None:
        super().__init__()
        self.elements, self.products, self.kept = 0, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        self.products += func.overloadpacket is torch.ops.aten.mm
        self.kept += func.overloadpacket is torch.ops.aten.exp and result.ndim == 2
        return result

"""What `litrecipe model info` shows; reads no weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from rich.table import Table

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.engine.memory import NF4_BYTES
from litrecipe.model.adapters import describe_parameters
from litrecipe.model.architecture import Architecture, Rope
from litrecipe.model.decoder import Decoder


def architecture_table(a: Architecture) -> Table:
    """Shapes and constants."""
    table = Table("architecture", "", box=None, title_justify="left")
    shapes = [a.shape(layer) for layer in range(a.num_layers)]
    rows = {
        "family": a.family,
        "layers": a.num_layers,
        "hidden size": a.hidden_size,
        "MLP size": _range(shape.intermediate_size for shape in shapes),
        "heads": f"{_range(shape.num_heads for shape in shapes)} of {a.head_dim}, "
        f"{_range(shape.num_kv_heads for shape in shapes)} for keys and values",
        "vocabulary": f"{a.vocab_size:,}, head {'tied to the embedding' if a.tie_embeddings else 'of its own'}",
        "context": f"{a.max_positions:,} tokens",
        "RoPE": "; ".join(map(_rope, a.ropes)) or "none: positions are learnt",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _range(numbers: Iterable[int]) -> str:
    """The one that all layers have, or the least and the most."""
    least, *_, most = sorted({*numbers}) * 2
    return str(most) if least == most else f"{least} to {most}"


def _rope(rope: Rope) -> str:
    scaling = rope.scaling
    said = f"base {rope.theta:g}" + (f", {scaling['rope_type']} scaling by {scaling['factor']:g}" if scaling else "")
    return said + (f", the first {100 * rope.share:g} % of a head" if rope.share != 1 else "")


def parameter_table(files: ModelFiles) -> Table:
    """Counts by part."""
    with torch.device("meta"):
        counts = describe_parameters(Decoder(files.architecture))
    table = Table("parameters", "", "", box=None)
    table.columns[1].justify = table.columns[2].justify = "right"
    whole = counts["all"].total
    for kind, count in sorted(counts.items(), key=lambda item: item[1].total):
        table.add_row(kind, f"{count.total:,}", f"{100 * count.total / whole:.1f} %")
    if files.adapter:
        table.add_row("adapter", f"{sum(math.prod(e.shape) for e in files.adapter.weights.entries):,}", "on top")
    return table


def memory_table(a: Architecture) -> Table:
    """Bytes of the weights by precision, and of the KV cache."""
    with torch.device("meta"):
        sizes = Counter[str]()
        for name, parameter in Decoder(a).named_parameters():
            quantised = parameter.ndim == 2 and name.startswith("model.layers.")
            sizes["linear" if quantised else "rest"] += parameter.numel()
    table = Table("memory", "GB", "", box=None)
    table.columns[1].justify = "right"
    for name, linear, rest in (("fp32", 4, 4), ("bf16", 2, 2), ("int8", 1, 2), ("nf4", NF4_BYTES, 2)):
        table.add_row(name, f"{(sizes['linear'] * linear + sizes['rest'] * rest) / 1e9:.3f}", _note(name))
    cache = 2 * a.cached_numbers
    whole = cache * a.max_positions / 1e9
    table.add_row("KV cache", f"{whole:.3f}", f"bf16, {a.max_positions:,} tokens; {cache:,} bytes a token")
    return table


def _note(precision: str) -> str:
    return "linear layers; the rest in bf16" if precision in ("int8", "nf4") else "all weights"

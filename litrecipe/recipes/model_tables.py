"""What `litrecipe model info` shows; reads no weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import torch
from rich.table import Table

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.progress import counted
from litrecipe.engine.memory import NF4_BYTES, can_be_quantised
from litrecipe.model.adapters import describe_parameters
from litrecipe.model.architecture import Architecture, Rope, count_parameters
from litrecipe.model.decoder import Decoder, Trunk
from litrecipe.model.reward import RewardModel

MOMENTS = 2
"""Numbers that AdamW keeps of a weight, in its precision, as its gradient is."""


def architecture_table(a: Architecture) -> Table:
    """Shapes and constants."""
    table = Table("architecture", "", box=None, title_justify="left")
    shapes = [a.shape(layer) for layer in range(a.num_layers)]
    rows = {
        "family": a.family,
        "layers": a.num_layers,
        "hidden size": a.hidden_size,
        "MLP size": _range(shape.intermediate_size for shape in shapes),
        "experts": _experts(a),
        "heads": f"{_range(shape.num_heads for shape in shapes)} of {a.head_dim}, "
        f"{_range(shape.num_kv_heads for shape in shapes)} for keys and values",
        "vocabulary": f"{a.vocab_size:,}, head {'tied to the embedding' if a.tie_embeddings else 'of its own'}",
        "context": f"{a.max_positions:,} tokens",
        "windows": _windows(a),
        "RoPE": "; ".join(map(_rope, a.ropes)) or "none: positions are learnt",
    }
    if a.experts is not None and not a.experts.dense_layers:
        del rows["MLP size"]
    for name, value in rows.items():
        if value:
            table.add_row(name, str(value))
    return table


def _range(numbers: Iterable[int]) -> str:
    """The one that all layers have, or the least and the most."""
    least, *_, most = sorted({*numbers}) * 2
    return str(most) if least == most else f"{least} to {most}"


def _experts(a: Architecture) -> str:
    if a.experts is None:
        return ""
    plain = len(a.experts.dense_layers)
    beside = f", in {a.num_layers - plain} of {counted(a.num_layers, 'layer')}" if plain else ""
    return f"{a.experts.chosen} of {a.experts.count} for each token, of size {a.experts.size}{beside}"


def _windows(a: Architecture) -> str:
    """What layers that do not look at everything look at."""
    windows = Counter(a.kind(layer).window for layer in range(a.num_layers))
    said = (
        f"{count} of {counted(a.num_layers, 'layer')} see the last {counted(window, 'token', ',')}"
        for window, count in windows.items()
        if window is not None
    )
    return "; ".join(said)


def _rope(rope: Rope) -> str:
    scaling = rope.scaling
    said = f"base {rope.theta:g}" + (f", {scaling['rope_type']} scaling by {scaling['factor']:g}" if scaling else "")
    return said + (f", the first {100 * rope.share:g} % of a head" if rope.share != 1 else "")


def parameter_table(files: ModelFiles) -> Table:
    """Counts by part, and how many work on a token where not all do."""
    counts = describe_parameters(_without_memory(files))
    table = Table("parameters", "", "", box=None)
    table.columns[1].justify = table.columns[2].justify = "right"
    whole = counts["all"].total
    for kind, count in sorted(counts.items(), key=lambda item: item[1].total):
        table.add_row(kind, f"{count.total:,}", f"{100 * count.total / whole:.1f} %")
    if files.architecture.experts is not None:
        active = count_parameters(files.architecture, is_reward_model=files.is_reward_model, active=True)
        table.add_row("active", f"{active:,}", f"{100 * active / whole:.1f} %")
    if files.adapter:
        table.add_row("adapter", f"{sum(math.prod(e.shape) for e in files.adapter.weights.entries):,}", "on top")
    return table


def memory_table(files: ModelFiles) -> Table:
    """Bytes of the weights by precision, alone and where AdamW trains them all, and of the KV cache."""
    a, sizes = files.architecture, Counter[str]()
    for name, parameter in _without_memory(files).named_parameters():
        sizes["matrices" if can_be_quantised(name, parameter) else "rest"] += parameter.numel()
    table = Table("memory", "GB", "trained", "", box=None)
    table.columns[1].justify = table.columns[2].justify = "right"
    for name, matrix, rest in (("fp32", 4, 4), ("bf16", 2, 2), ("int8", 1, 2), ("nf4", NF4_BYTES, 2)):
        size = (sizes["matrices"] * matrix + sizes["rest"] * rest) / 1e9
        if name in ("fp32", "bf16"):
            note = "all weights; trained: with gradients and AdamW's moments, before activations"
            table.add_row(name, f"{size:.3f}", f"{(2 + MOMENTS) * size:.3f}", note)
        else:
            table.add_row(
                name, f"{size:.3f}", "", "matrices of the layers, which only adapters train; the rest in bf16"
            )
    cache = 2 * a.cached_numbers
    whole = cache * a.max_positions / 1e9
    table.add_row(
        "KV cache", f"{whole:.3f}", "", f"bf16, {a.max_positions:,} tokens; {cache:,} bytes a token{_kept(a)}"
    )
    return table


def _kept(a: Architecture) -> str:
    return ", also in layers with a window" if _windows(a) else ""


def _without_memory(files: ModelFiles) -> Trunk:
    with torch.device("meta"):
        return (RewardModel if files.is_reward_model else Decoder)(files.architecture)

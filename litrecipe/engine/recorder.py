"""The flight recorder: what went into every step and what came out, exactly.

One line of `flight.jsonl` a step: the sample ids, a hash of what is in them, a hash of the random number
generator before the step, loss and gradient norm as hexadecimal floats (bit for bit). Two runs that agree here did the
same thing; where they first differ says why.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from litrecipe.config.errors import InputError
from litrecipe.engine.rundir import read_records
from litrecipe.model.row import Sample

REASONS = {
    "samples": "other samples, or another order: look at data, train.seed and train.global_batch_size (of runs that "
    "sample: rollout_batch_size or prompts_per_round, completions_per_prompt and minibatches)",
    "batch": "the same samples, other tokens or weights: look at tokenizer, chat template, data.max_length, data.mask "
    "(of runs that sample: temperature, max_new_tokens, rewards)",
    "rng": "another state of the random numbers: look at train.seed, dropout, and what was resumed",
    "loss": "the same input, another loss: look at the model's weights, precision, devices and versions",
    "grad_norm": "the same loss, another gradient: look at adapter, fabric.strategy, packing and versions",
}
"""Recorded fields in the order in which they cause one another, and what a first difference there means."""


def hash_samples(samples: Sequence[Sample]) -> str:
    """Of tokens, weights, shape of the trees and extras."""
    digest = hashlib.blake2b(digest_size=8)
    for sample in samples:
        for segment in sample.segments:
            digest.update(segment.parent.to_bytes(4, "little", signed=True))
            digest.update(segment.tokens.astype("int64").tobytes())
            digest.update(segment.weights.astype("float32").tobytes())
        for name in sorted(sample.extra):
            values = np.asarray(sample.extra[name])
            kind = "int64" if np.issubdtype(values.dtype, np.integer) else "float32"
            digest.update(name.encode() + values.astype(kind).tobytes())
    return digest.hexdigest()


def hash_rng() -> str:
    """Of the generators that dropout draws from: the CPU's, and that of the GPU if there is one."""
    digest = hashlib.blake2b(torch.get_rng_state().numpy().tobytes(), digest_size=8)
    if torch.cuda.is_available():
        digest.update(torch.cuda.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


NAMED = 256
"""Samples of a step that are named; a pretraining's steps may have thousands, whose names would outgrow its weights."""


def names_of(samples: Sequence[Sample]) -> list[str]:
    """Their ids; of more than `NAMED` the first ones, with a hash of the others."""
    names = [sample.id for sample in samples]
    if len(names) <= NAMED:
        return names
    others = hashlib.blake2b("\0".join(names[NAMED:]).encode(), digest_size=8).hexdigest()
    return [*names[:NAMED], f"{len(names) - NAMED} more: {others}"]


def flight_record(step: int, samples: Sequence[Sample], rng: str, loss: float, grad_norm: float) -> dict[str, Any]:
    """One line of flight.jsonl; `rng` is `hash_rng()` from before the step."""
    return {
        "step": step,
        "samples": names_of(samples),
        "batch": hash_samples(samples),
        "rng": rng,
        "loss": float(loss).hex(),
        "grad_norm": float(grad_norm).hex(),
    }


def diff(a: Path, b: Path, tolerance: float = 0.0) -> list[str]:
    """What first differs between two runs, in words; empty when nothing does.

    `tolerance` is relative and applies to loss and gradient norm; with 0 they must agree to the bit.
    """
    runs = []
    for folder in (a, b):
        path = folder / "flight.jsonl"
        if not path.exists():
            raise InputError(f"{path}: no such file: give two run directories")
        runs.append({record["step"]: record for record in read_records(path)})
    first, second = runs
    for step in sorted(first.keys() & second.keys()):
        for field, reason in REASONS.items():
            x, y = first[step][field], second[step][field]
            if not _same(field, x, y, tolerance):
                return [f"step {step}: {field} differs: {_compare(x, y)}", reason]
    only = sorted(first.keys() ^ second.keys())
    if only:
        holder = a if only[0] in first else b
        return [f"step {only[0]}: only in {holder}", "one run is longer: look at train.max_steps and train.epochs"]
    return []


def _same(field: str, x: Any, y: Any, tolerance: float) -> bool:
    if field in ("loss", "grad_norm") and tolerance:
        left, right = float.fromhex(x), float.fromhex(y)
        return abs(left - right) <= tolerance * max(abs(left), abs(right))
    return bool(x == y)


def _compare(x: Any, y: Any) -> str:
    """Two values that differ; lists from where they part."""
    if not isinstance(x, list):
        return f"{_show(x)} and {_show(y)}"
    place = next((i for i, (left, right) in enumerate(zip(x, y, strict=False)) if left != right), min(len(x), len(y)))
    return f"{len(x)} and {len(y)}, from number {place + 1} on {_show(x[place:])} and {_show(y[place:])}"


def _show(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(value[:4]) + (", …]" if len(value) > 4 else "]")
    return f"{float.fromhex(value):.9g}" if str(value).startswith(("0x", "-0x")) else str(value)

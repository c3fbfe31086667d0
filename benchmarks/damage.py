"""Checkpoints, models and shards that are damaged in one place: which must be found before anything is built on them.

Cut, with a bit flipped, or gone; where it happens is drawn at random. Hit are weights and optimizer of training state,
its counters, manifests, final models and adapters, tokenizers, shards and their index.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Damaged:
    """One damaged file, and the command that reads it."""

    name: str
    command: list[Any]
    must_say: str
    falls_back: bool = False
    """Whether the run is to go on from the checkpoint before it, and end as the others did."""


def cut(path: Path, chance: random.Random) -> None:
    """Leave some of the beginning."""
    with path.open("r+b") as file:
        file.truncate(chance.randrange(path.stat().st_size))


def flip(path: Path, chance: random.Random) -> None:
    """Change one bit."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def remove(path: Path, chance: random.Random) -> None:
    """Take it away."""
    path.unlink()


WAYS: dict[str, Callable[[Path, random.Random], None]] = {"cut": cut, "flipped": flip, "gone": remove}


class Originals:
    """What is damaged: runs that are finished, and shards; each damage is done to a copy."""

    def __init__(self, work: Path, run: Callable[..., Any], flags: list[Any], texts: Path, model: Path) -> None:
        """`run` runs litrecipe to a good end; `flags` are those of a fine-tuning of 6 steps with checkpoints at 2, 4
        and 6."""
        self.work, self.flags, self.model = work, flags, model
        self.full, self.lora, self.shards = work / "full", work / "lora", work / "shards"
        run(*flags, "--out_dir", self.full)
        run(*flags, "--adapter.method", "lora", "--out_dir", self.lora)
        run("data", "prepare", texts, "--tokenizer", model, "--out", self.shards, "--workers", 1)

    def copy(self, original: Path, number: int) -> Path:
        """A copy to be damaged."""
        place = self.work / f"damaged-{number}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(original, place / original.name)
        return place / original.name


PLACES = [
    *(("full", "checkpoints/step-00000004/weights-00000.safetensors", way) for way in WAYS),
    *(("full", "checkpoints/step-00000004/optimizer-00000.safetensors", way) for way in WAYS),
    *(("full", "checkpoints/step-00000004/state.json", way) for way in WAYS),
    *(("full", "checkpoints/step-00000004/manifest.json", way) for way in ("cut", "gone")),
    *(("full", "final/model.safetensors", way) for way in WAYS),
    *(("full", f"final/{name}", "flipped") for name in ("tokenizer.json", "config.json")),
    ("full", "final/manifest.json", "cut"),
    *(("lora", "final/adapter_model.safetensors", way) for way in WAYS),
    *(("shards", "chunk-0-0.bin", way) for way in WAYS),
    ("shards", "index.json", "cut"),
]
"""What, which file of it, and how."""
NEWEST = ["weights-00000.safetensors", "optimizer-00000.safetensors", "state.json", "manifest.json"]
"""Files of the newest checkpoint, without which a run goes on from the one before it."""


def damaged(originals: Originals, seed: int) -> Iterator[Damaged]:
    """All of them, one after the other."""
    chance = random.Random(seed)
    for number, (what, name, way) in enumerate(PLACES):
        copy = originals.copy(getattr(originals, what), number)
        WAYS[way](copy / name, chance)
        if name.startswith("checkpoints"):
            command = [*originals.flags, "--out_dir", copy.parent / "resumed"]
            command += ["--checkpoint.resume", (copy / name).parent]
        elif what == "shards":
            command = ["pretrain", "--model", originals.model, "--data.train", copy, "--train.max_steps", 1]
            command += ["--out_dir", copy.parent / "run", "--fabric.accelerator", "cpu"]
        else:
            command = ["generate", "--model", copy, "--prompt", "hello", "--fabric.accelerator", "cpu"]
        # Without its state.json a folder is not taken for a checkpoint.
        file = name.rpartition("/")[2]
        said = "no checkpoint" if (file, way) == ("state.json", "gone") else file
        yield Damaged(f"{what}/{name} {way}", command, said)
    for number, name in enumerate(NEWEST, start=len(PLACES)):
        copy = originals.copy(originals.full, number)
        way = chance.choice(list(WAYS) if name != "manifest.json" else ["cut", "gone"])
        WAYS[way](copy / "checkpoints" / "step-00000006" / name, chance)
        shutil.rmtree(copy / "final")
        command = [*originals.flags, "--out_dir", copy, "--checkpoint.resume", "auto"]
        yield Damaged(f"full/checkpoints/step-00000006/{name} {way}", command, name, falls_back=True)

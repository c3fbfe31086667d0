"""Files that somebody might have made to do harm: none may run code, reach out of its folder, or fill memory when it is
read. conftest.py puts this folder on the path."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ESCAPED = "escaped"
"""What an attack would leave in its folder if it came through."""


@dataclass(frozen=True)
class Attack:
    """One hostile input, and a command that reads it."""

    kind: str
    name: str
    command: list[Any]
    must_say: str
    """A part of the line that refuses it."""
    lines: int | None = 1
    """How many lines there are; None: some, as there are several mistakes."""


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.folder / ESCAPED}'",)


def attacks(folder: Path, model: Path, *, without_bombs: bool = False) -> Iterator[Attack]:
    """All of them, in folders of their own; `model` is a Hugging Face folder."""
    makers = [pickles, templates, archives, recipes, links, tokenizers, configs]
    for make in [*makers, *([] if without_bombs else [bombs])]:
        place = folder / make.__name__
        place.mkdir(parents=True)
        yield from make(place, model)


def copy_of(model: Path, place: Path, *, without: str = "") -> Path:
    """A folder like the model's, to be changed."""
    shutil.copytree(model, place, ignore=shutil.ignore_patterns(without) if without else None)
    return place


def generate(source: Path) -> list[Any]:
    """A command that loads a model."""
    return ["generate", "--model", source, "--prompt", "hello", "--raw", "--fabric.accelerator", "cpu"]


def finetune(model: Path, data: object, place: Path) -> list[Any]:
    """A command that reads data."""
    flags = ["--data.cache_dir", place / "cache", "--train.max_steps", 1, "--fabric.accelerator", "cpu"]
    return ["finetune", "--model", model, "--data.train", data, "--out_dir", place / "run", *flags]


def prepare(model: Path, data: Path, place: Path) -> list[Any]:
    """A command that reads documents."""
    return ["data", "prepare", data, "--tokenizer", model, "--out", place / "shards", "--workers", 1]


def pickles(place: Path, model: Path) -> Iterator[Attack]:
    """A payload wherever others keep pickles."""
    payload = pickle.dumps(Payload(place))
    torch_file = io.BytesIO()
    with zipfile.ZipFile(torch_file, "w") as archive:  # as torch.save writes it
        archive.writestr("archive/data.pkl", payload)
    weights = copy_of(model, place / "bin", without="*.safetensors")
    (weights / "pytorch_model.bin").write_bytes(torch_file.getvalue())
    yield Attack("pickle", "pytorch_model.bin", generate(weights), "a pickle can run code")
    disguised = copy_of(model, place / "disguised")
    (disguised / "model.safetensors").write_bytes(payload)
    yield Attack("pickle", "model.safetensors", generate(disguised), "model.safetensors: ")
    adapter = place / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(model), "r": 4, "lora_alpha": 8}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["q_proj"]}))
    (adapter / "adapter_model.bin").write_bytes(torch_file.getvalue())
    yield Attack("pickle", "adapter_model.bin", generate(adapter), "adapter_model.safetensors: missing")
    data = place / "data"
    data.mkdir()
    (data / "train.pt").write_bytes(torch_file.getvalue())
    yield Attack("pickle", "train.pt", finetune(model, data / "train.pt", place), "train.pt: .pt: data files end in")
    yield Attack("pickle", "a folder of .pt", finetune(model, data, place), "no data files in it")
    np.save(place / "train.npy", np.array([Payload(place)], dtype=object), allow_pickle=True)
    yield Attack("pickle", "train.npy", finetune(model, place / "train.npy", place), "train.npy: .npy: data files end")
    (place / "train.parquet").write_bytes(payload)
    yield Attack("pickle", "train.parquet", finetune(model, place / "train.parquet", place), "train.parquet:1: ")
    shards = place / "litdata"
    shards.mkdir()
    chunk = np.array([1, 12, 12 + len(payload)], dtype="<u4").tobytes() + payload
    (shards / "chunk-0-0.bin").write_bytes(chunk)
    index = {"chunks": [{"filename": "chunk-0-0.bin", "chunk_size": 1, "chunk_bytes": len(chunk), "dim": None}]}
    (shards / "index.json").write_text(json.dumps(index | {"config": {"data_format": ["pickle"], "compression": None}}))
    pretrain = ["pretrain", "--model", model, "--data.train", shards, "--out_dir", place / "run"]
    yield Attack("pickle", "shards of pickles", pretrain, "index.json: pickle: ")
    checkpoint = place / "step-00000001"
    checkpoint.mkdir()
    (checkpoint / "optimizer.pt").write_bytes(torch_file.getvalue())
    resume = [*finetune(model, "toy:units?n=8", place), "--checkpoint.resume", checkpoint]
    yield Attack("pickle", "optimizer.pt", resume, "step-00000001")


def templates(place: Path, model: Path) -> Iterator[Attack]:
    """Chat templates that look for a way out, or never end."""
    sources = {
        "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "globals": f"{{{{ cycler.__init__.__globals__.os.system('touch {place / ESCAPED}') }}}}",
        "files": "{% include '/etc/passwd' %}",
        "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "recursion": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "memory": "{% set x = 'x' * 1000000 %}{{ x|replace('x', x) }}",
        "lists": "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}{{ c }}",
        "numbers": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    }
    for name, source in sources.items():
        hostile = copy_of(model, place / name)
        (hostile / "chat_template.jinja").write_text(source)
        yield Attack("template", name, finetune(hostile, "toy:units?n=8", place), "chat_template.jinja")


def archives(place: Path, model: Path) -> Iterator[Attack]:
    """A zip that would write beside the folder it is taken apart in."""
    for name in ("data.zip", "model.zip", "train.jsonl.gz", "train.parquet"):
        with zipfile.ZipFile(place / name, "w") as archive:
            archive.writestr(f"../{ESCAPED}", "{}")
    for name in ("data.zip", "train.jsonl.gz", "train.parquet"):
        yield Attack("zip", name, finetune(model, place / name, place), name)
    yield Attack("zip", "model.zip", generate(place / "model.zip"), "model.zip: neither a folder")


def recipes(place: Path, model: Path) -> Iterator[Attack]:
    """YAML that makes objects of Python, and YAML that grows."""
    touch = f"['touch {place / ESCAPED}']"
    nested = "x"
    for name in "abcdefgh":
        nested = f"[&{name} [{nested}], {', '.join([f'*{name}'] * 8)}]"
    texts = {
        "apply": f"out_dir: !!python/object/apply:os.system {touch}\n",
        "new": f"out_dir: !!python/object/new:os.system {touch}\n",
        "module": "out_dir: !!python/module:os\n",
        "name": "model: {source: !!python/name:os.system }\n",
        "function": "out_dir: !function os.system\n",
        "aliases": f"adapter: {{targets: {nested}}}\n",
        "nested": "a: " + "[" * 100_000 + "]" * 100_000,
    }
    for name, text in texts.items():
        (place / f"{name}.yaml").write_text(text)
        command = [*finetune(model, "toy:units?n=8", place), "--config", place / f"{name}.yaml"]
        yield Attack("yaml", name, command, f"{name}.yaml", lines=None if name == "aliases" else 1)


def links(place: Path, model: Path) -> Iterator[Attack]:
    """Links by which a folder from somebody else takes files of this machine along."""
    secret = place / "secret.jsonl"
    secret.write_text(json.dumps({"prompt": "the password", "completion": "is this"}) + "\n")
    data = place / "data"
    data.mkdir()
    (data / "train.jsonl").symlink_to(secret)
    cure = "a link out of its folder"
    yield Attack("link", "in a folder of data", finetune(model, data, place), cure)
    documents = prepare(model, data, place)
    yield Attack("link", "in a folder of documents", [*documents, "--columns", "{text: prompt}"], cure)
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors"):
        linked = copy_of(model, place / name, without=name)
        target = model / name if (model / name).exists() else secret
        (linked / name).symlink_to(target)
        yield Attack("link", name, generate(linked), cure)


def tokenizers(place: Path, model: Path) -> Iterator[Attack]:
    """Tokenizers that make much of little."""
    state = json.loads((model / "tokenizer.json").read_text())
    double = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    between = {"type": "Replace", "pattern": {"Regex": ""}, "content": "e" * 1_000_000}
    sequence: Any = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    for _ in range(200):
        sequence = {"type": "Sequence", "pretokenizers": [sequence]}
    changes: dict[str, Any] = {
        "a normalizer that doubles": {"normalizer": {"type": "Sequence", "normalizers": [double] * 40}},
        "a normalizer that fills in": {"normalizer": between},
        "nesting": {"pre_tokenizer": sequence},
    }
    for name, change in changes.items():
        hostile = copy_of(model, place / name)
        (hostile / "tokenizer.json").write_text(json.dumps(state | change))
        yield Attack("tokenizer", name, generate(hostile), "tokenizer.json")
    deep = copy_of(model, place / "deep")
    (deep / "tokenizer.json").write_text("[" * 1_000_000)
    yield Attack("tokenizer", "brackets", generate(deep), "tokenizer.json")


def bombs(place: Path, model: Path) -> Iterator[Attack]:
    """Small files of large content: 4 GiB each, or more."""
    import pyarrow as pa
    import zstandard
    from pyarrow import parquet

    zeros = bytes(2**26)  # packed once; either format may be repeated
    for name in ("line.jsonl", "whole.json", "text.txt"):
        (place / f"{name}.gz").write_bytes(gzip.compress(zeros, 1) * 64)
        (place / f"{name}.zst").write_bytes(zstandard.ZstdCompressor().compress(zeros) * 64)
    text = "x" * 2**22
    repeated = pa.DictionaryArray.from_arrays(pa.array(np.zeros(100_000, dtype=np.int32)), pa.array([text]))
    table = pa.table({"prompt": repeated, "completion": repeated})
    parquet.write_table(table, place / "rows.parquet", compression="zstd", use_dictionary=True)
    for name in ("line.jsonl.gz", "whole.json.gz", "line.jsonl.zst", "whole.json.zst", "rows.parquet"):
        yield Attack("bomb", name, finetune(model, place / name, place), name)
    yield Attack("bomb", "text.txt.gz", prepare(model, place / "text.txt.gz", place), "text.txt.gz")


def configs(place: Path, model: Path) -> Iterator[Attack]:
    """Models that say they are larger than any machine."""
    config = json.loads((model / "config.json").read_text())
    sizes = {"num_hidden_layers": 10**9, "vocab_size": 10**12, "hidden_size": 2**40, "num_attention_heads": 2**40}
    for key, value in sizes.items():
        hostile = copy_of(model, place / key)
        (hostile / "config.json").write_text(json.dumps(config | {key: value}))
        yield Attack("config", key, generate(hostile), str(hostile))
    hostile = copy_of(model, place / "deep")
    (hostile / "config.json").write_text('{"a":' * 100_000)
    yield Attack("config", "nesting", generate(hostile), "config.json")

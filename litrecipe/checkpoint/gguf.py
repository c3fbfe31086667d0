"""GGUF files (llama.cpp) as tensors with Hugging Face names and a Hugging Face config.

Format: magic, version, counts, key-value pairs, tensor table, aligned tensor data. The header is read here rather than
by the `gguf` package because that reader takes seconds for a large vocabulary and does not end on some damaged files;
the package knows the quantised types and turns them into numbers. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import math
import mmap
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from litrecipe.checkpoint.hub import published_sha256
from litrecipe.checkpoint.manifest import check_digest, sha256_of
from litrecipe.config.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Kinds of value → struct codes, which are numpy's as well."""
STRING, ARRAY = 8, 9
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
"""llama.cpp's names of modules → Hugging Face's; those of a block stand behind `blk.N.`."""
AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""Names of Gemma's norms from the second generation on."""
ROPE_FACTORS = "rope_freqs.weight"
INSTEAD = "use another model, or this one's Hugging Face folder"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all published Llama 3.x models share; only `factor` differs between them."""


@dataclass(frozen=True)
class Dialect:
    """How llama.cpp stores the models of a family."""

    family: str
    """`model_type` in Hugging Face's `config.json`."""
    class_name: str
    names: dict[str, str] = field(default_factory=dict)
    """What modules are called where they are called otherwise."""
    turns_neighbours: bool = False
    """Whether rows of q and k are in the order of neighbouring pairs."""
    norms_count_from_one: bool = False
    """Whether norms are stored with the 1 that is added to them."""
    own_keys: Callable[[Mapping[str, Any], dict[str, Any]], dict[str, Any]] = lambda meta, config: {}
    """From metadata without the family's name before its keys, and the common config: what the config has besides."""


def _gemma3(meta: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """What the file does not hold is alike in all published models (Gemma 3 report, 2503.19786) but for the scalar of
    27B, whose queries are scaled by hidden size over heads."""
    per_head = config["hidden_size"] // config["num_attention_heads"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": 10000.0,
        "sliding_window": meta.get("attention.sliding_window", 1024),
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": per_head if config["num_hidden_layers"] == 62 else config["head_dim"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


DIALECTS = {
    "llama": Dialect("llama", "LlamaForCausalLM", turns_neighbours=True),
    "gemma3": Dialect("gemma3_text", "Gemma3ForCausalLM", AROUND, norms_count_from_one=True, own_keys=_gemma3),
}
"""`general.architecture` → dialect."""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor of the table; `start` and `stop` are places in the file."""

    kind: int
    """ggml's number of the type."""
    shape: tuple[int, ...]
    """As torch has it, rows first."""
    start: int
    stop: int


class GgufWeights:
    """A GGUF file of one of `DIALECTS`. Raises InputError naming it when it is damaged or of another architecture."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths = [path]
        if importlib.util.find_spec("gguf") is None:
            raise InputError(f"{path}: reading GGUF needs a package: pip install 'litrecipe[gguf]'")
        with path.open("rb") as handle:
            try:
                self._data = memoryview(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ))
            except ValueError as error:  # an empty file cannot be mapped
                raise InputError(f"{path}: {error}: fetch it again") from error
        try:
            self.metadata, self._table, header_size = _read_header(self._data)
            self.config = self._read_config()
        except (struct.error, ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
            raise InputError(f"{path}: truncated or damaged GGUF file ({error}): fetch it again") from error
        self.header_digest = sha256(self._data[:header_size]).hexdigest()
        """Names everything but the weights."""

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face name → shape."""
        return {name: self._table[own].shape for name, own in self._own_names.items()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors in fp32. Raises InputError when the file is not the one the hub said it is."""
        self.check()
        for name in self._own_names:
            yield name, self.rows(name)

    def check(self, part: int = 0, parts: int = 1) -> None:
        """Check the digest of the file, if this is the first part."""
        if part == 0 and (expected := published_sha256(self.path)):
            check_digest(self.path, sha256_of(self.path), expected)

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Some rows of a tensor, in fp32."""
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        own = self._own_names[name]
        entry, stored = self._table[own], self._rows(name)
        is_vector, asked = len(entry.shape) == 1, slice(start, stop)
        stored = stored if is_vector else stored[asked]
        kind = GGMLQuantizationType(entry.kind)
        try:
            values = dequantize(stored, kind) if len(stored) else np.empty(0, np.float32)
        except NotImplementedError as error:  # the package's word for a type of block that it knows by name only
            raise InputError(f"{self.path}: {own}: type {kind.name} cannot be read: use Q8_0 or F16") from error
        if not np.isfinite(values).all():
            raise InputError(f"{self.path}: {own}: holds values that are not finite: fetch the file again")
        if self.dialect.norms_count_from_one and name.endswith("norm.weight"):
            values = values - 1
        shape = entry.shape if is_vector else (len(stored), *entry.shape[1:])
        found = torch.from_numpy(np.array(values, dtype=np.float32)).view(shape)
        return found[asked] if is_vector else found

    def stored(self, name: str) -> bytes:
        """A tensor's bytes as they are stored."""
        entry = self._table[self._own_names[name]]
        return bytes(self._data[entry.start : entry.stop])

    @cached_property
    def _own_names(self) -> dict[str, str]:
        """Hugging Face name → name in the file."""
        names = NAMES | self.dialect.names
        return {_hf_name(name, names): name for name in self._table if name != ROPE_FACTORS}

    def _rows(self, name: str) -> np.ndarray:
        """A tensor's bytes, a row of numbers a row, in Hugging Face's order.

        llama.cpp turns neighbouring pairs (2i, 2i + 1) of a Llama's head where Hugging Face turns (i, i + D/2), so its
        files have the rows of q and k interleaved.
        """
        entry = self._table[self._own_names[name]]
        is_rotated = self.dialect.turns_neighbours and _is_projection(name)
        count = entry.shape[0] if len(entry.shape) > 1 or is_rotated else 1
        rows = np.frombuffer(self._data, np.uint8, entry.stop - entry.start, entry.start).reshape(count, -1)
        if not is_rotated:
            return rows
        heads = self.config["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)

    def _read_config(self) -> dict[str, Any]:
        """The `config.json` this file would have had."""
        meta = self.metadata
        own = meta.get("general.architecture")
        if own not in DIALECTS:
            known = " and ".join(DIALECTS)
            raise InputError(f"{self.path}: general.architecture: {own}: only {known} are read: {INSTEAD}")
        self.dialect = DIALECTS[own]
        if meta.get(f"{own}.expert_count"):
            raise InputError(f"{self.path}: {own}.expert_count: no mixtures of experts are read: {INSTEAD}")
        keys = {
            "hidden_size": f"{own}.embedding_length",
            "intermediate_size": f"{own}.feed_forward_length",
            "num_hidden_layers": f"{own}.block_count",
            "num_attention_heads": f"{own}.attention.head_count",
            "max_position_embeddings": f"{own}.context_length",
            "rms_norm_eps": f"{own}.attention.layer_norm_rms_epsilon",
        }
        wrong = [key for key in keys.values() if not isinstance(meta.get(key), int | float) or meta[key] <= 0]
        last = f"blk.{meta.get(keys['num_hidden_layers'], 1) - 1}.attn_norm.weight"
        wrong += [key for key in ("token_embd.weight", last) if not wrong and key not in self._table]
        if wrong:
            raise InputError(*(f"{self.path}: {key}: missing, or not one positive number: {INSTEAD}" for key in wrong))
        config: dict[str, Any] = {key: meta[name] for key, name in keys.items()}
        heads = config["num_attention_heads"]
        kv_heads = meta.get(f"{own}.attention.head_count_kv", heads)
        if not isinstance(kv_heads, int):
            raise InputError(f"{self.path}: {own}.attention.head_count_kv: layers differ: {INSTEAD}")
        head_dim = meta.get(f"{own}.attention.key_length", config["hidden_size"] // heads)
        if meta.get(f"{own}.rope.dimension_count", head_dim) != head_dim:
            raise InputError(f"{self.path}: {own}.rope.dimension_count: only a part of each head turns: {INSTEAD}")
        # The file keeps fp32 numbers: 1e-5 has become 9.999999747378752e-06.
        config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
        theta = float(f"{meta.get(f'{own}.rope.freq_base', 10000.0):.9g}")
        config |= {"num_key_value_heads": kv_heads, "head_dim": head_dim}
        own_meta = {key.removeprefix(f"{own}."): value for key, value in meta.items()}
        return {
            "architectures": [self.dialect.class_name],
            "model_type": self.dialect.family,
            "vocab_size": self._table["token_embd.weight"].shape[0],
            **config,
            "rope_theta": theta,
            "rope_scaling": self._read_rope_scaling(own, theta, head_dim),
            "tie_word_embeddings": "output.weight" not in self._table,
            "attention_bias": "blk.0.attn_q.bias" in self._table,
            "mlp_bias": "blk.0.ffn_gate.bias" in self._table,
            "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._eos_ids(),
            "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
            "torch_dtype": "float32",
            **self.dialect.own_keys(own_meta, config),
        }

    def _eos_ids(self) -> int | list[int] | None:
        """Ends of a text, a turn and a message, where the file names them."""
        names = ("eos", "eot", "eom")
        found = (self.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in names)
        ids = list(dict.fromkeys(id for id in found if id is not None))
        return ids[0] if len(ids) == 1 else ids or None

    def _read_rope_scaling(self, own: str, theta: float, head_dim: int) -> dict[str, Any] | None:
        """The scaling of the metadata, or Llama 3's, which llama.cpp stores as one divisor a frequency."""
        kind = self.metadata.get(f"{own}.rope.scaling.type", "none")
        if ROPE_FACTORS in self._table:
            entry = self._table[ROPE_FACTORS]
            divisors = np.frombuffer(self._data[entry.start : entry.stop], np.float32)
            scaling = {"rope_type": "llama3", "factor": float(divisors.max()), **LLAMA3_ROPE}
            if divisors.shape != (head_dim // 2,) or not np.allclose(
                divisors, _llama3_divisors(theta, scaling, head_dim)
            ):
                raise InputError(f"{self.path}: {ROPE_FACTORS}: not the scaling of Llama 3: {INSTEAD}")
            return scaling
        if kind == "linear":
            return {"rope_type": "linear", "factor": self.metadata[f"{own}.rope.scaling.factor"]}
        if kind != "none":
            raise InputError(
                f"{self.path}: {own}.rope.scaling.type: {kind}: only none, linear and Llama 3's are read: {INSTEAD}"
            )
        return None


def _llama3_divisors(theta: float, scaling: dict[str, Any], head_dim: int) -> np.ndarray:
    """(head_dim / 2,): by how much Llama 3.1's scaling divides each frequency."""
    frequencies = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - kept) / scaling["factor"] + kept)


def _is_projection(name: str) -> bool:
    """Of queries or keys."""
    return ".q_proj." in name or ".k_proj." in name


def _hf_name(own: str, names: Mapping[str, str]) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`; unknown names stay as they are."""
    match = re.fullmatch(r"(blk\.(?P<layer>\d+)\.)?(?P<module>\w+)\.(?P<leaf>weight|bias)", own)
    if not match or match["module"] not in names:
        return own
    prefix = f"model.layers.{match['layer']}." if match["layer"] else ""
    return f"{prefix}{names[match['module']]}.{match['leaf']}"


class _Cursor:
    """Reads a header from front to back. Raises struct.error or ValueError beyond its end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def numbers(self, code: str, count: int) -> list[Any]:
        """`count` little-endian numbers of a struct code."""
        dtype = np.dtype(code).newbyteorder("<")
        values = np.frombuffer(self.data, dtype, count, self.at) if count else np.empty(0)
        self.at += dtype.itemsize * count
        return values.tolist()

    def number(self, code: str) -> Any:
        """One number."""
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        """A length and as many bytes of UTF-8."""
        stop = self.number("Q") + self.at
        if stop > len(self.data):
            raise ValueError("a string runs over the end of the file")
        value = str(self.data[self.at : stop], "utf-8")
        self.at = stop
        return value

    def value(self) -> Any:
        """A value behind its kind: a number, a string, or a list of either."""
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.number(SCALARS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            return [self.text() for _ in range(count)]
        return self.numbers(SCALARS[kind], count)


def _read_header(data: memoryview) -> tuple[dict[str, Any], dict[str, GgufTensor], int]:
    """Metadata, tensor table, and where the header ends."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    cursor = _Cursor(data)
    magic, version, tensor_count, pair_count = bytes(data[:4]), *struct.unpack_from("<IQQ", data, 4)
    cursor.at = 24
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"starts with {magic!r}, version {version}; little-endian versions 2 and 3 can be read")
    metadata = {cursor.text(): cursor.value() for _ in range(pair_count)}
    places = []
    for _ in range(tensor_count):
        name = cursor.text()
        shape = tuple(reversed(cursor.numbers("Q", cursor.number("I"))))
        places.append((name, shape, cursor.number("I"), cursor.number("Q")))
    alignment = metadata.get("general.alignment", 32)
    start_of_data = -(-cursor.at // alignment) * alignment
    table = {}
    for name, shape, kind, offset in places:
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        if not shape or shape[-1] % block or name in table:
            raise ValueError(f"{name}: rows of {shape[-1:]} in blocks of {block}")
        start = start_of_data + offset
        table[name] = GgufTensor(kind, shape, start, start + math.prod(shape) // block * block_bytes)
        if table[name].stop > len(data):
            raise ValueError(f"{name}: ends at byte {table[name].stop} of {len(data)}")
    return metadata, table, cursor.at

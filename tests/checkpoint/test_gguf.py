"""GGUF files as llama.cpp writes them: tensors, config and tokenizer come back, and damage is named."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import full_disk

from litrecipe.checkpoint.gguf import DIALECTS, GgufWeights
from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.decoding import generate
from litrecipe.model.row import Sample, Segment, make_row

Kind = gguf.GGMLQuantizationType
LLAMA_CPP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = LLAMA_CPP_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
BYTES = [chr(c) for c in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]]
"""The alphabet of byte-level BPE, a character a byte (in no particular order)."""
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *BYTES, "th", "the", "Ġthe", "12", "<tool>"]
VOCAB = 272


def llama_cpp_name(name: str, names: dict[str, str]) -> str:
    module, _, leaf = name.rpartition(".")
    if module.startswith("model.layers."):
        _, _, layer, module = module.split(".", 3)
        return f"blk.{layer}.{names[module]}.{leaf}"
    return f"{names[module]}.{leaf}"


def llama_cpp_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """The two halves of a head's rows, shuffled together."""
    first, second = np.split(values.reshape(heads, -1, *values.shape[1:]), 2, axis=1)
    return np.stack([first, second], axis=2).reshape(values.shape)


def write_gguf(
    path: Path, model: Any, kind: Kind = Kind.F32, *, tensors: dict[str, np.ndarray] | None = None, **meta: Any
) -> None:
    """Write a transformers Llama or Gemma 3 as a GGUF file; matrices in `kind`, the rest in F32, as llama.cpp does."""
    config = model.config
    is_gemma = config.model_type == "gemma3_text"
    writer = gguf.GGUFWriter(str(path), "gemma3" if is_gemma else "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    ropes = config.rope_parameters
    if is_gemma:
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base((ropes["full_attention"] if is_gemma else ropes)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model(meta.pop("vocabulary", "gpt2"))
    writer.add_tokenizer_pre(meta.pop("pre", "smollm"))
    spare = VOCAB - len(TOKENS)
    writer.add_token_list(meta.pop("token_list", [*TOKENS, *(f"<unused {i}>" for i in range(spare))]))
    writer.add_token_types(meta.pop("token_types", [3] * 3 + [1] * (len(TOKENS) - 4) + [4] + [5] * spare))
    writer.add_token_merges(["t h", "th e", "Ġ the", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(meta.pop("unk_token_id", 0))
    writer.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    for key, value in meta.items():
        getattr(writer, f"add_{key}")(value)
    state = model.state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if is_gemma and name.endswith("norm.weight"):
            values = values + 1
        if ".q_proj." in name and not is_gemma:
            values = llama_cpp_rows(values, config.num_attention_heads)
        if ".k_proj." in name and not is_gemma:
            values = llama_cpp_rows(values, config.num_key_value_heads)
        own = kind if values.ndim == 2 else Kind.F32
        own_name = llama_cpp_name(name, GEMMA_NAMES if is_gemma else LLAMA_CPP_NAMES)
        writer.add_tensor(own_name, gguf.quants.quantize(np.ascontiguousarray(values), own), raw_dtype=own)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounded(model: Any, kind: Kind) -> Any:
    """The same transformers model with the matrices a file of `kind` holds."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                values = gguf.quants.dequantize(gguf.quants.quantize(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(values.copy()))
    return model


@pytest.fixture
def make_gguf(tmp_path: Path, make_llama):
    def make(kind: Kind = Kind.F32, *, meta: dict[str, Any] | None = None, tensors: Any = None, **changes: Any):
        model = make_llama(tmp_path / "hf", **{"vocab_size": VOCAB, **changes})
        write_gguf(tmp_path / "model.gguf", model, kind, tensors=tensors, **(meta or {}))
        return model, tmp_path / "model.gguf"

    return make


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1, Kind.Q4_0, Kind.BF16], ids=lambda k: k.name)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_every_type_gives_the_right_logits(make_gguf, their_logits, our_logits, kind: Kind, tied: bool) -> None:
    theirs, path = make_gguf(kind, tie_word_embeddings=tied)
    files = open_model(str(path))
    assert files.architecture.tie_embeddings is tied
    ours = load_model(files)
    torch.testing.assert_close(our_logits(ours), their_logits(rounded(theirs, kind)), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True},
        {"head_dim": 32, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 123456.7}, "rms_norm_eps": 1e-6},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_flags(make_gguf, their_logits, our_logits, changes: dict[str, Any]) -> None:
    theirs, path = make_gguf(**changes)
    torch.testing.assert_close(
        our_logits(load_model(open_model(str(path)))), their_logits(theirs), atol=1e-4, rtol=1e-5
    )


def test_gemma_3(make_gguf, their_logits, our_logits) -> None:
    """Eight layers, so that one is global; norms are stored with their 1, and what the file lacks is known."""
    theirs, path = make_gguf(
        Kind.Q8_0,
        family="gemma3_text",
        num_hidden_layers=8,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=4,
        tie_word_embeddings=True,
    )
    files = open_model(str(path))
    assert files.architecture.family == "gemma3_text"
    assert [files.architecture.kind(layer).window for layer in range(8)] == [4] * 5 + [None] + [4] * 2
    ours = load_model(files)
    torch.testing.assert_close(our_logits(ours), their_logits(rounded(theirs, Kind.Q8_0)), atol=1e-4, rtol=1e-5)


def test_queries_of_the_largest_gemma_3_are_scaled_otherwise() -> None:
    own_keys = DIALECTS["gemma3"].own_keys
    config = {"hidden_size": 5376, "num_attention_heads": 32, "num_hidden_layers": 62, "head_dim": 128}
    assert own_keys({}, config)["query_pre_attn_scalar"] == 168
    assert own_keys({"attention.sliding_window": 512}, config | {"num_hidden_layers": 26}) == {
        "hidden_activation": "gelu_pytorch_tanh",
        "rope_local_base_freq": 10000.0,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 128,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


PIECES = {"▁": -3.0, "t": -4.0, "h": -5.0, "e": -6.0, "a": -7.0, "th": -1.0, "he": -2.0, "▁th": -0.5, "the": -0.25}
PIECES |= {"▁the": -9.0, "▁▁": -8.0}
"""Tokens of SentencePiece with their scores."""


@pytest.mark.parametrize("prefix", [True, False])
def test_sentence_piece_joins_what_scores_highest(make_gguf, prefix: bool) -> None:
    """th scores higher than he, then the than ▁th, and ▁the is left. What has no token is bytes."""
    bytes_of = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokens = [*special, *PIECES, "<turn>", *bytes_of, "<spare>"]
    kinds = [3] * 4 + [1] * len(PIECES) + [4] + [6] * 256 + [5]
    scores = [-1000.0] * 4 + list(PIECES.values()) + [-1000.0] * 258
    _, path = make_gguf(
        vocab_size=len(tokens),
        meta={
            "vocabulary": "llama",
            "pre": "default",
            "token_list": tokens,
            "token_types": kinds,
            "token_scores": scores,
            "unk_token_id": 3,
            "add_space_prefix": prefix,
        },
    )
    tokenizer = Tokenizer.load(open_model(str(path)).tokenizer_dir)
    id_of = {token: id for id, token in enumerate(tokens)}
    assert tokenizer.adds_bos
    ids = tokenizer.encode("the<turn>ate  é")
    first = ["▁the"] if prefix else ["the"]
    behind = ["▁"] if prefix else []
    rest = ["<turn>", *behind, "a", "t", "e", "▁▁", "<0xC3>", "<0xA9>"]
    assert ids == [id_of[token] for token in [*first, *rest]]
    assert tokenizer.decode(ids).replace(" ", "") == "the<turn>ateé"


def llama3(factor: float) -> dict[str, Any]:
    low_high = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, **low_high}


def llama_cpp_divisors(theirs: Any) -> np.ndarray:
    """rope_freqs.weight, from what transformers made of the scaling."""
    plain = 5e5 ** -(np.arange(0, 16, 2) / 16)
    return (plain / theirs.model.rotary_emb.inv_freq.numpy()).astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_recovered(
    make_gguf, make_llama, tmp_path: Path, their_logits, our_logits, factor: float
) -> None:
    scaled = make_llama(tmp_path / "scaled", vocab_size=VOCAB, rope_parameters=llama3(factor))
    tensors = {"rope_freqs.weight": llama_cpp_divisors(scaled)}
    theirs, path = make_gguf(rope_parameters=llama3(factor), tensors=tensors)
    files = open_model(str(path))
    assert files.architecture.ropes[0].scaling == {k: v for k, v in llama3(factor).items() if k != "rope_theta"}
    torch.testing.assert_close(our_logits(load_model(files)), their_logits(theirs), atol=1e-4, rtol=1e-5)


def test_scaling_that_is_not_known_is_refused(make_gguf) -> None:
    for keys in (
        {"tensors": {"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)}},
        {"meta": {"rope_scaling_type": gguf.RopeScalingType.YARN}},
    ):
        _, path = make_gguf(**keys)
        with pytest.raises(InputError, match=f"{path}: .*: use another model, or this one's Hugging Face folder"):
            open_model(str(path))


def test_tokenizer_files(make_gguf) -> None:
    from transformers import AutoTokenizer

    _, path = make_gguf()
    folder = open_model(str(path)).tokenizer_dir
    ours, theirs = Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_ids, ours.pad_id) == (1, (2,), 2)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == (1, 2, 2, 0)
    for text in ("the 12the", " 7 ½", "  12345", "naïve 😀 <tool>\n\n"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text
    id_of = {token: id for id, token in enumerate(TOKENS)}
    assert ours.encode("the 12 the") == [id_of[t] for t in ("the", "Ġ", "1", "2", "Ġthe")]  # digits stand alone
    assert ours.encode("a<tool>") == [id_of["a"], id_of["<tool>"]]
    messages = [{"role": "user", "content": "the"}]
    assert theirs.apply_chat_template(messages)["input_ids"] == ours.encode_prompt(messages) == [id_of["the"], 2]
    assert open_model(str(path)).tokenizer_dir == folder


def test_a_cache_without_room_is_named(make_gguf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the tokenizer, and for what is remembered of the weights."""
    monkeypatch.setenv("LITRECIPE_CACHE", str(tmp_path / "cache"))
    _, path = make_gguf()
    cure = "make room, or name another folder by \\$LITRECIPE_CACHE"
    with full_disk(2000), pytest.raises(InputError, match=f"^{tmp_path}/cache: File too large: {cure}"):
        open_model(str(path))
    files = open_model(str(path))
    with full_disk(10), pytest.raises(InputError, match=f"^{tmp_path}/cache: File too large: {cure}"):
        files.weights_hash()


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("smollm", ["the", " ", "1", "2", "1", "2", "!?", "\n\n", " the", "'", "S"]),
        ("gpt-2", ["the", " 1212", "!?", "\n\n", " the", "'", "S"]),
        ("llama-bpe", ["the", " ", "121", "2", "!?\n\n", " the", "'S"]),
        ("default", ["the", " ", "121", "2", "!?", "\n\n", " the", "'", "S"]),
    ],
)
def test_pre_tokenizers_cut_as_the_models_do(make_gguf, pre: str, pieces: list[str]) -> None:
    _, path = make_gguf(meta={"pre": pre, "add_bos_token": False})
    backend = Tokenizer.load(open_model(str(path)).tokenizer_dir).backend
    text = "the 1212!?\n\n the'S"
    cuts = [text[a:b] for _, (a, b) in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert "".join(cuts) == text
    assert cuts == pieces


def test_bos_is_added_where_the_file_says_so(make_gguf) -> None:
    for value in (True, False):
        _, path = make_gguf(meta={"add_bos_token": value})
        assert Tokenizer.load(open_model(str(path)).tokenizer_dir).adds_bos is value


def test_other_tokenizers_and_architectures_are_refused(make_gguf, tmp_path: Path) -> None:
    for meta in ({"vocabulary": "bert"}, {"pre": "tekken"}):
        _, path = make_gguf(meta=meta)
        with pytest.raises(InputError, match=f"{path}: tokenizer.ggml.*: use the model's Hugging Face folder"):
            open_model(str(path))
    _, path = make_gguf(meta={"expert_count": 8})
    with pytest.raises(InputError, match=f"{path}: llama.expert_count: .*: use another"):
        open_model(str(path))
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(InputError, match=f"{path}: general.architecture: mamba: .*: use another"):
        open_model(str(path))


def test_a_missing_package_is_named(make_gguf, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = make_gguf()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'litrecipe\[gguf\]'"):
        open_model(str(path))


def test_values_that_are_not_finite_are_refused(make_gguf) -> None:
    _, path = make_gguf()
    whole = bytearray(path.read_bytes())
    whole[-4:] = struct.pack("<f", math.nan)
    path.write_bytes(whole)
    with pytest.raises(InputError, match=f"{path}: .*: holds values that are not finite"):
        load_model(open_model(str(path)))


def test_a_file_that_is_not_what_the_hub_published_is_refused(make_gguf) -> None:
    _, path = make_gguf()
    record = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{'c' * 40}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n1700000000.0\n")
    load_model(open_model(str(path)))
    record.write_text(f"{'c' * 40}\n{'a' * 64}\n1700000000.0\n")
    with pytest.raises(InputError, match=f"{path}: its sha256 is not aaaa"):
        load_model(open_model(str(path)))


@pytest.fixture(scope="module")
def small_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The header of a file and a little data."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for key in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{key}")(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "b", "c"])
    writer.add_token_types([1, 1, 3])
    writer.add_tensor("token_embd.weight", np.arange(6, dtype=np.float32).reshape(3, 2))
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(2, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_is_found(small_file: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = small_file.read_bytes()
    # The last tensor ends 24 bytes before the file does, which is padded to 32.
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 25))])
    with pytest.raises(InputError, match=str(cut)):
        GgufWeights(cut)


@settings(max_examples=300, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_the_header_never_ends_in_a_traceback(
    small_file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    whole = bytearray(small_file.read_bytes())
    bit = data.draw(st.integers(0, 8 * (len(whole) - 64) - 1))
    whole[bit // 8] ^= 1 << bit % 8
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole)
    try:
        for _name, tensor in GgufWeights(damaged).tensors():
            assert tensor.isfinite().all()
    except InputError as error:
        assert all(line.startswith(str(damaged)) for line in error.mistakes)


@pytest.fixture
def whole_file(make_gguf) -> Path:
    """A small model with everything a file has."""
    return make_gguf()[1]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_the_metadata_never_ends_in_a_traceback(
    whole_file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    whole = bytearray(whole_file.read_bytes())
    bit = data.draw(st.integers(0, 8 * 1400 - 1))  # what stands before the tokens
    whole[bit // 8] ^= 1 << bit % 8
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(whole)
    try:
        load_model(open_model(str(damaged)))
    except InputError as error:
        assert all(line.startswith(str(damaged)) for line in error.mistakes)


@pytest.fixture(scope="module")
def smollm2(real_model: Path):
    """The real model, its tokenizer and its files."""
    files = open_model(str(real_model))
    return load_model(files), Tokenizer.load(files.tokenizer_dir), files


TEXTS = ["The capital of France is Paris.", " 7 ½ naïve 😀\n\n  12345 = x", "def f(x):\n    return x ** 2\n"]


@pytest.mark.real_model
def test_the_real_model_equals_transformers(smollm2, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer, files = smollm2
    save_model(tmp_path / "hf", model, files.tokenizer_dir)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == their_tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0]
            torch.testing.assert_close(model.logits(torch.tensor(ids)), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.real_model
def test_the_real_model_answers(smollm2) -> None:
    model, tokenizer, _ = smollm2
    ids = tokenizer.encode_prompt([{"role": "user", "content": "What is the capital of France?"}])
    (answer,) = generate(model, [ids], max_new_tokens=20, stop_ids=tokenizer.eos_ids)
    assert tokenizer.decode(answer.tokens) == "The capital of France is Paris."


@pytest.mark.slow
@pytest.mark.real_model
def test_the_real_model_has_the_known_perplexity(smollm2, shared: Path) -> None:
    file = shared / "data" / "pretrain" / "wikitext2.test.txt.gz"
    if not file.exists():
        pytest.skip("no WikiText-2 in the shared data")
    model, tokenizer, _ = smollm2
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        ids = np.array(tokenizer.encode(handle.read(60_000)))
    learnt = np.ones(1024, dtype=np.float32)
    learnt[0] = 0
    total = 0.0
    with torch.no_grad():
        for window in ids[: 8 * 1024].reshape(8, 1024):
            total -= float(model(make_row([Sample("window", (Segment(window, learnt),))])).logps.sum())
    assert math.exp(total / 8184) == pytest.approx(23.6, abs=0.1)


@pytest.mark.real_model
def test_the_real_models_config(smollm2) -> None:
    *_, files = smollm2
    a = files.architecture
    assert (a.num_layers, a.hidden_size, a.intermediate_size, a.num_heads, a.num_kv_heads) == (30, 576, 1536, 9, 3)
    assert (a.ropes[0].theta, a.norm_eps, a.max_positions, a.vocab_size) == (1e5, 1e-5, 8192, 49152)
    assert a.tie_embeddings and (a.bos_id, a.eos_ids, a.pad_id) == (1, (2,), 2)
    state = json.loads((files.tokenizer_dir / "tokenizer.json").read_text())
    assert [step["type"] for step in state["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert state["post_processor"] is None  # no BOS


# -- Gemma 3 ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma3() -> Any:
    """Gemma 3 270M, its tokenizer and its files: `scripts/fetch_model.py --gemma` fetches it."""
    path = Path(__file__).parents[2] / ".models" / "gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        pytest.skip("Gemma 3 is not here: run scripts/fetch_model.py --gemma")
    files = open_model(str(path))
    return load_model(files), Tokenizer.load(files.tokenizer_dir), path


@pytest.mark.slow
@pytest.mark.real_model
def test_gemma_3_continues_text(gemma3) -> None:
    model, tokenizer, _ = gemma3
    start = tokenizer.encode("def fibonacci(n):\n    ")
    (found,) = generate(model, [[tokenizer.bos_id, *start]], max_new_tokens=24)
    assert tokenizer.decode(found.tokens).startswith("if n == 0:\n        return 0\n    elif n == 1:\n        return 1")


@pytest.mark.slow
@pytest.mark.real_model
def test_gemma_3_equals_transformers(gemma3) -> None:
    """Tokens and logits, of more tokens than a window has."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer, path = gemma3
    text = Path(__file__).read_text()[:6000]
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ids = tokenizer.encode(text)
    assert ids == theirs(text, add_special_tokens=False)["input_ids"] and tokenizer.decode(ids) == text
    right = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer.bos_id, *ids[:600]])
    with torch.no_grad():
        torch.testing.assert_close(model.logits(tokens), right(tokens[None]).logits[0], atol=5e-4, rtol=0)

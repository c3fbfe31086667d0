from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers, pre_tokenizers

from litrecipe.config import stop
from litrecipe.data import encoding
from litrecipe.data.encoding import SEAM, SPLITS_BEFORE_SPACES, Encoder, cut, may_cut, token_dtype
from litrecipe.data.formats import RESERVED
from litrecipe.data.readers import read_rows
from litrecipe.data.tokenizer import Tokenizer

LLAMA3 = max(SPLITS_BEFORE_SPACES, key=len)
TEXT = st.text(st.sampled_from("ab I's 9.\n\r\t\u00a0é你🤗<|im_end|>"), max_size=60)


def backend_of(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def splitting(folder: Path, name: str) -> tokenizers.Tokenizer:
    """The tokenizer of a folder with another way of splitting words."""
    backend = backend_of(folder)
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = {
        "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "digits": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "llama3": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), plain]),
    }[name]()
    return backend


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litrecipe.data.encoding.PIECE", 3)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["gpt2", "digits", "llama3"])
def test_a_text_in_pieces_has_the_tokens_of_the_whole(name: str, chatml_folder: Path) -> None:
    backend = splitting(chatml_folder, name)
    backend.normalizer = normalizers.NFC()
    tokenizer = Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"})
    encoder = Encoder(tokenizer, eos=tokenizer.eos_ids)
    assert may_cut(tokenizer.backend)

    @settings(max_examples=150, deadline=None)
    @given(text=TEXT)
    def holds(text: str) -> None:
        assert encoder([text]).tokens.tolist() == [*tokenizer.encode(text), *tokenizer.eos_ids]

    holds()
    text = "the quick brown fox jumps over the lazy dog " * 9
    assert len(cut(text)) > 30 and encoder([text]).tokens.tolist()[:-1] == tokenizer.encode(text)


def test_real_texts_in_pieces_have_the_tokens_of_the_whole(
    shared: Path, chatml_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrecipe.data.encoding.PIECE", 9000)
    rows = read_rows(str(shared / "data" / "pretrain" / "python_peps.jsonl.gz"))
    texts = [next(rows)[0]["text"][:60000] for _ in range(6)]
    tokenizer = Tokenizer(splitting(chatml_folder, "digits"), special_tokens={})
    encoded = Encoder(tokenizer)(texts)
    assert max(len(cut(text)) for text in texts) > 2
    assert encoded.tokens.tolist() == [id for text in texts for id in tokenizer.encode(text)]
    assert encoded.lengths.tolist() == [len(tokenizer.encode(text)) for text in texts]


@given(text=st.text(st.sampled_from("ab  .\n"), max_size=80))
def test_pieces_make_the_text_and_begin_at_seams(text: str) -> None:
    pieces = cut(text)
    assert "".join(pieces) == text
    places = np.cumsum([len(piece) for piece in pieces])[:-1].tolist()
    assert set(places) <= {seam.start() for seam in SEAM.finditer(text)}


def with_prefix(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def with_a_phrase(backend: tokenizers.Tokenizer) -> None:
    backend.add_tokens(["lazy dog"])


def of_pairs(backend: tokenizers.Tokenizer) -> None:
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")


@pytest.mark.parametrize(
    ("folder", "change"),
    [("llama2", None), ("chatml", with_prefix), ("chatml", with_a_phrase), ("chatml", of_pairs)],
)
def test_where_a_cut_could_change_tokens_nothing_is_cut(folders: dict[str, Path], folder: str, change: Any) -> None:
    backend = backend_of(folders[folder])
    if change is not None:
        change(backend)
    assert not may_cut(backend)
    text = "a lazy dog and a lazy dog " * 2000
    tokenizer = Tokenizer(backend, special_tokens={})
    assert Encoder(tokenizer)([text]).tokens.tolist() == tokenizer.encode(text)


def test_tokens_are_as_small_as_their_ids(chatml_folder: Path) -> None:
    backend = backend_of(chatml_folder)
    assert token_dtype(backend) == np.uint16
    backend.add_tokens([f"word{number}" for number in range(2**16 - backend.get_vocab_size())])
    assert token_dtype(backend) == np.uint16
    backend.add_tokens(["one more"])
    assert token_dtype(backend) == np.int32


def test_what_marks_control_tokens_is_no_text(tokenizer: Tokenizer) -> None:
    """`documents.py` refuses such texts, as these characters would be lost without a word."""
    assert tokenizer.encode(f"a{RESERVED[0]}b") == tokenizer.encode("ab")


def test_a_worker_says_where_it_is_and_goes_on(chatml_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    encoder = Encoder(Tokenizer(backend_of(chatml_folder), special_tokens={}))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), encoding._begin, (encoder,)) as pool:
        os.kill(pool.submit(os.getpid).result(), stop.WHERE)
        assert len(pool.submit(encoding._encode, ["one", "two"]).result().lengths) == 2
    assert "most recent call first" in capfd.readouterr().err

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import full_disk

from litrecipe.config.errors import InputError
from litrecipe.data.formats import RESERVED, Conversation
from litrecipe.data.new_tokenizer import BOS, CHAT, EOS, PAD
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.recipes.data import train_tokenizer

SENTENCES = ["the food was great .", "the service was slow , the food was cold .", "i love this place !"] * 3
CONTROL = ["<|turn|>", "<|done|>"]
TEXTS = st.text(max_size=20).filter(lambda text: not any(mark in text for mark in RESERVED))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 300 ids with two control tokens of a template."""
    here = tmp_path_factory.mktemp("new")
    texts = here / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": one}) + "\n" for one in SENTENCES))
    assert train_tokenizer([str(texts)], str(here / "tokenizer"), 300, CONTROL) == 0
    return here / "tokenizer"


def peer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_ids_begin_with_what_no_text_holds(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    ids = [tokenizer.backend.token_to_id(token) for token in (BOS, EOS, PAD, *CONTROL)]
    assert ids == list(range(5)) and tokenizer.control_ids == set(ids)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (0, (1,), 2)
    assert tokenizer.adds_bos and not tokenizer.has_template
    assert tokenizer.backend.get_vocab_size() == 300


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_any_text_comes_back_and_transformers_has_the_same_ids(folder: Path, text: str) -> None:
    """Of what nobody wrote as a control token; those are plain text here and control tokens there."""
    tokenizer, other = Tokenizer.load(folder), peer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == other.encode(text, add_special_tokens=False)
    assert [tokenizer.bos_id, *tokenizer.encode(text)] == other.encode(text)
    assert other.decode(other.encode(text), skip_special_tokens=True) == text


def test_transformers_knows_the_special_tokens(folder: Path) -> None:
    other = peer(folder)
    assert (other.bos_token_id, other.eos_token_id, other.pad_token_id) == (0, 1, 2)
    assert other.encode(f"hi{EOS}{CONTROL[0]}", add_special_tokens=False)[-2:] == [1, 3]


def test_a_text_is_learnt_from_its_first_token_to_its_end(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    said = [{"role": "assistant", "content": SENTENCES[0]}]
    [(ids, learnt)] = tokenizer.encode_batch([Conversation(said, "file:1", "text")])  # type: ignore[misc]
    assert ids.tolist() == [0, *tokenizer.encode(SENTENCES[0]), 1]
    assert not learnt[0] and learnt[1:].all()


def test_often_seen_words_are_one_token_and_the_same_texts_give_the_same(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert [tokenizer.decode([one]) for one in tokenizer.encode("the food was")] == ["the", " food", " was"]
    texts = tmp_path / "texts.txt"  # in another layout and order
    texts.write_text("".join(f"{one}\n" for one in reversed(SENTENCES)))
    train_tokenizer([str(texts)], str(tmp_path / "again"), 300, CONTROL)
    assert (tmp_path / "again" / "tokenizer.json").read_text() == (folder / "tokenizer.json").read_text()


def test_it_is_what_the_library_itself_learns(tmp_path: Path) -> None:
    """Of two files; digits are split as SmolLM2 splits them."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    texts = [f"{one} in {number}" for number, one in enumerate(SENTENCES, start=1990)]
    for name, rows in (("a", texts[::2]), ("b", texts[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    sources = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    train_tokenizer(sources, str(tmp_path / "ours"), 310, CONTROL, split_digits=True, min_frequency=3)
    peer = Tokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    specials = [AddedToken(token, special=True, normalized=False) for token in (BOS, EOS, PAD, *CONTROL)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": 310, "min_frequency": 3, "show_progress": False}
    peer.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=specials, initial_alphabet=alphabet, **settings))
    ours = json.loads((tmp_path / "ours" / "tokenizer.json").read_text())
    theirs = json.loads(peer.to_str())
    assert ours["model"] == theirs["model"] and len(ours["model"]["merges"]) > 40
    assert ours["pre_tokenizer"] == theirs["pre_tokenizer"] and ours["added_tokens"] == theirs["added_tokens"]


def test_digits_are_tokens_of_their_own_on_request(tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"body": "1984 1984 1984"}) + "\n")
    for split in (True, False):
        out = tmp_path / f"split-{split}"
        train_tokenizer([str(texts)], str(out), 300, [], split_digits=split, column="body")
        tokenizer = Tokenizer.load(out)
        assert (len(tokenizer.encode("1984")) == 4) == split
        assert tokenizer.decode(tokenizer.encode("7 in 1984")) == "7 in 1984"


def test_a_chat_has_a_template_whose_turns_end(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("user assistant hello\n")
    train_tokenizer([str(texts)], str(tmp_path / "out"), 300, CONTROL, chat=True)
    tokenizer = Tokenizer.load(tmp_path / "out")
    start, end = (tokenizer.backend.token_to_id(token) for token in CHAT)
    assert (start, end, tokenizer.eos_ids) == (3, 4, (1, end))
    turns = [{"role": "user", "content": "hello"}]
    said = peer(tmp_path / "out").apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render(turns, add_generation_prompt=True) == said
    assert tokenizer.encode_prompt(turns)[0] == start


def test_all_turns_of_conversations_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "chats.jsonl"
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "clock", "arguments": {}}}]}
    turns = [
        {"role": "user", "content": "zyzzyva zyzzyva"},
        calls,
        {"role": "tool", "content": "quokka quokka"},
        {"role": "assistant", "content": "zyzzyva"},
    ]
    rows.write_text(json.dumps({"messages": turns}) + "\n")
    train_tokenizer([str(rows)], str(tmp_path / "out"), 1000, [])
    tokenizer = Tokenizer.load(tmp_path / "out")
    assert [len(tokenizer.encode(word)) for word in (" zyzzyva", " quokka")] == [1, 1]
    told = capsys.readouterr()
    found = tokenizer.backend.get_vocab_size()
    assert found < 1000
    assert f"{found} tokens of the 1000 asked for: the texts hold no more pairs, from 3 texts" in told.out + told.err


@pytest.mark.parametrize(
    ("size", "special", "mistake"),
    [
        (258, [], "--vocab_size: 258: 256 bytes and 3 tokens are 259: give more"),
        (300, ["<a>", "<a>"], "--special: <a> <a>: give each once"),
        (300, [EOS], f"--special: {EOS}: give each once, none of <s>, </s> and <pad>"),
    ],
)
def test_what_makes_no_tokenizer_is_refused(size: int, special: list[str], mistake: str, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("hello\n")
    with pytest.raises(InputError) as error:
        train_tokenizer([str(texts)], str(tmp_path / "out"), size, special)
    assert error.value.mistakes[0].startswith(mistake) and not (tmp_path / "out").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("hello\n")
    with full_disk(2000), pytest.raises(InputError, match=r"out: .*File too large: make room, or name a folder"):
        train_tokenizer([str(texts)], str(tmp_path / "out"), 300, [])
    assert list(tmp_path.iterdir()) == [texts]


def test_mistakes_of_texts_are_told_and_nothing_is_written_over(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"texts: .*nowhere\.jsonl"):
        train_tokenizer([str(tmp_path / "nowhere.jsonl")], str(tmp_path / "out"), 300, [])
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"text": 7}) + "\n")
    with pytest.raises(InputError, match=r"texts\.jsonl:1: .*content is int"):
        train_tokenizer([str(texts)], str(tmp_path / "out"), 300, [])
    assert not (tmp_path / "out").exists()
    texts.write_text(json.dumps({"text": "seven"}) + "\n")
    with pytest.raises(InputError, match="was not written by litrecipe"):
        train_tokenizer([str(texts)], str(tmp_path), 300, [])

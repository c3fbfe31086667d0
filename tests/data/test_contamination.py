from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litrecipe.config.errors import InputError
from litrecipe.config.prepare import Decontaminate
from litrecipe.data.contamination import check_against, read_evaluation_texts
from litrecipe.data.duplicates import WORD

QUESTION = "Which of these fourteen words stands in the middle of a very long question, dear?"


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_words_in_a_row_are_found_whatever_stands_between_them(tmp_path: Path) -> None:
    against = write(tmp_path / "asked.jsonl", {"id": 1}, {"q": {"text": QUESTION}, "choices": ["yes", "no"]})
    texts = read_evaluation_texts(Decontaminate([against]))
    assert (texts.texts, texts.too_short) == (3, 2)
    spread = QUESTION.upper().replace(" ", " -- ")
    found, *missed = texts([f"He said: {spread} And left.", QUESTION.replace("stands", "is"), "", "yes no yes"])
    assert found == (
        "has “which of these fourteen words stands in the middle of a very long” in common with "
        f"{tmp_path / 'asked.jsonl'}:2"
    )
    assert missed == ["", "", ""]


def test_a_short_text_is_looked_for_as_a_whole(tmp_path: Path) -> None:
    nine, seven = " ".join(QUESTION.split()[:9]), "only seven words are in this text"
    texts = read_evaluation_texts(Decontaminate([write(tmp_path / "a.jsonl", {"a": nine, "b": seven})]))
    assert texts.too_short == 1
    assert texts([f"so {nine} it is", seven, " ".join(nine.split()[1:])]) == [
        f"has “{nine.lower()}” in common with {tmp_path / 'a.jsonl'}:1",
        "",
        "",
    ]


@settings(max_examples=200, deadline=None)
@given(
    asked=st.lists(st.sampled_from("abc"), min_size=8, max_size=20), said=st.lists(st.sampled_from("abcd"), max_size=60)
)
def test_found_is_what_a_search_word_by_word_finds(
    asked: list[str], said: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "searched.jsonl"
    texts = read_evaluation_texts(Decontaminate([write(path, {"text": " ".join(asked)})], ngram=10))
    n = min(10, len(asked))
    grams = {tuple(asked[start : start + n]) for start in range(len(asked) - n + 1)}
    common = any(tuple(said[start : start + n]) in grams for start in range(len(said) - n + 1))
    assert bool(texts([" ".join(said)])[0]) == common


def test_tasks_name_files_in_their_own_way(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text(QUESTION)
    write(tmp_path / "set" / "test.jsonl" if (tmp_path / "set").mkdir() is None else tmp_path, {"text": QUESTION})
    write(tmp_path / "set" / "train.jsonl", {"text": "x " * 20})
    specs = [f"perplexity:{tmp_path / 'wiki.txt'}?window=9&windows=2", f"preference:{tmp_path / 'set'}"]
    texts = read_evaluation_texts(Decontaminate(specs))
    assert texts.where == [f"{tmp_path / 'wiki.txt'}:1", f"{tmp_path / 'set' / 'test.jsonl'}:1"]
    train = read_evaluation_texts(Decontaminate([f"exact_match:{tmp_path / 'set'}?split=train"]))
    assert train.where == [f"{tmp_path / 'set' / 'train.jsonl'}:1"]
    assert len(read_evaluation_texts(Decontaminate(["exact_match:toy:units?n=4&seed=0"])).where) == 4


def test_sets_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"decontaminate\.against: .*nowhere\.jsonl: no such file"):
        check_against(Decontaminate([f"exact_match:{tmp_path / 'nowhere.jsonl'}"]))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=r"bad\.jsonl:1: not valid JSON"):
        read_evaluation_texts(Decontaminate([str(tmp_path / "bad.jsonl")]))


def test_long_texts_are_searched_in_bounded_time(tmp_path: Path) -> None:
    """A text of known words only, which is hashed at each of its places."""
    against = write(tmp_path / "a.jsonl", {"text": QUESTION})
    texts = read_evaluation_texts(Decontaminate([against]))
    words = WORD.findall(QUESTION.lower())
    said = " ".join(np.random.default_rng(0).choice(words, 200_000))
    assert texts([said])[0] == ""
    assert texts([f"{said} {QUESTION}"])[0] != ""

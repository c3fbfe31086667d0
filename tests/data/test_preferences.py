"""Rows of preference files as the public sets write them."""

from __future__ import annotations

import gzip
import json

import pytest

from litrecipe.data.formats import RowError
from litrecipe.data.preferences import MismatchError, parse_preference

ASKED = [{"role": "user", "content": "Q"}]


def said(*texts):
    return tuple({"role": "assistant", "content": text} for text in texts)


def message(role, text):
    return {"role": role, "content": text}


ROWS = {
    "text": {"prompt": "Q", "chosen": "good", "rejected": "bad"},
    "messages": {"prompt": ASKED, "chosen": [*said("good")], "rejected": [*said("bad")]},
    "whole conversations": {"chosen": [*ASKED, *said("good")], "rejected": [*ASKED, *said("bad")]},
    "whole conversations beside their prompt": {
        "prompt": "Q",
        "chosen": [*ASKED, *said("good")],
        "rejected": [*ASKED, *said("bad")],
    },
    "HH": {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Q"}],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "Alpaca": {"instruction": "Q", "output": "good", "chosen": "good", "rejected": "bad"},
    "Intel orca": {"system": "", "question": "Q", "chosen": "good", "rejected": "bad"},
}


@pytest.mark.parametrize("name", list(ROWS))
def test_a_pair(name):
    found = parse_preference(ROWS[name], "f:1")
    assert (found.prompt, found.answers) == (ASKED, said("good", "bad"))
    assert (found.scores, found.label, found.where) == (None, None, "f:1")


def test_what_stands_before_the_question():
    row = {"system": "S", "instruction": "Q", "input": "with this", "chosen": "a", "rejected": "b"}
    assert parse_preference(row, "").prompt == [message("system", "S"), message("user", "Q\nwith this")]


def test_history_and_a_speaker_who_speaks_twice():
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nAssistant: there\n\nHuman: Q\n\nAssistant:"
    found = parse_preference({"chosen": f"{start} good", "rejected": f"{start} bad"}, "")
    assert found.prompt == [message("user", "Hi"), *said("Hello\n\nthere"), *ASKED]
    assert found.answers == said("good", "bad")


RANKED = {
    "as it stands": ({"prompt": "Q", "answers": ["a", "b", "c"]}, "abc", None),
    "by scores": ({"prompt": "Q", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}, "bca", (3, 2, 1)),
    "by ranks": ({"prompt": "Q", "responses": ["a", "b", "c"], "ranks": [2, 0, 1]}, "bca", (0, -1, -2)),
    "ties keep their order": ({"prompt": "Q", "answers": ["a", "b"], "scores": [1, 1]}, "ab", (1, 1)),
    "UltraFeedback": (
        {
            "instruction": "Q",
            "completions": [{"response": "a", "overall_score": 4.5}, {"response": "b", "overall_score": 7}],
        },
        "ba",
        (7, 4.5),
    ),
    "messages with ranks": (
        {"prompt": "Q", "answers": [{"text": "a", "rank": 1}, {"text": "b", "rank": 0}]},
        "ba",
        (0, -1),
    ),
    "AlpacaEval": ({"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 2}, "ba", (1, 0)),
    "AlpacaEval, weighted": (
        {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 1.25},
        "ab",
        (0.5, 0),
    ),
    "scores of a pair": (
        {"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 9, "score_rejected": 4},
        "ab",
        (9, 4),
    ),
    "a margin": ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": 0.5}, "ab", (0.5, 0)),
}


@pytest.mark.parametrize("name", list(RANKED))
def test_best_first(name):
    row, order, scores = RANKED[name]
    found = parse_preference(row, "")
    assert (found.answers, found.scores) == (said(*order), scores)


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_single_answers_with_a_label(label):
    found = parse_preference({"prompt": "Q", "completion": "a", "label": label}, "")
    assert (found.answers, found.label) == (said("a"), bool(label))


def test_other_column_names():
    row = {"ask": "Q", "win": "good", "lose": "bad", "chosen_model": "x"}
    found = parse_preference(row, "", {"prompt": "ask", "chosen": "win", "rejected": "lose"})
    assert (found.prompt, found.answers) == (ASKED, said("good", "bad"))


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "Q", "chosen": "a"}, "columns prompt, chosen: known are chosen"),
        ({"chosen": "a", "rejected": "b"}, "no prompt: give one"),
        ({"prompt": "Q", "chosen": 3, "rejected": "b"}, "no list of objects"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "content is int: give text"),
        ({"prompt": [*ASKED, *said("x")], "chosen": "a", "rejected": "b"}, "assistant after assistant"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 2}, "swap them"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "margin": "wide"}, "margin: 'wide': not a number"),
        ({"prompt": "Q", "answers": ["a"]}, "needs two answers or more"),
        ({"prompt": "Q", "answers": ["a", "b"], "scores": [1]}, "scores: not one for each of the 2 answers"),
        ({"prompt": "Q", "answers": [{"words": "a"}, {"words": "b"}]}, "an answer has words, none of content"),
        ({"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 1.5}, "drop what is undecided"),
        ({"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 0}, "1 is the first output"),
        ({"prompt": "Q", "completion": "a", "label": "yes"}, "label: 'yes': give true"),
        ({"prompt": "Q", "chosen": "a\ufdd0", "rejected": "b"}, "not text"),
    ],
)
def test_what_is_wrong_is_told(row, why):
    with pytest.raises(RowError, match=why) as caught:
        parse_preference(row, "")
    assert not isinstance(caught.value, MismatchError)


def test_answers_to_different_prompts_are_told_apart_from_other_mistakes():
    row = {"chosen": [*ASKED, *said("a")], "rejected": [message("user", "P"), *said("b")]}
    with pytest.raises(MismatchError, match="different prompts"):
        parse_preference(row, "")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("alpacaeval_gpt4_test", 1538),
        ("hh_harmless_base_test", 2312),
        ("llamafactory_dpo_en_demo", 300),
        ("llmbar", 419),
        ("oasst_en100_ranked", 754),
        ("rasbt_politeness", 1100),
    ],
)
def test_public_sets(shared, name, count):
    with gzip.open(shared / "data" / "pref" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        found = [parse_preference(json.loads(line), f"{name}:{n}") for n, line in enumerate(file, start=1)]
    assert len(found) == count
    assert all(len(one.answers) == 2 and one.prompt[-1]["role"] == "user" for one in found)

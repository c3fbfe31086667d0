"""The parts of the built-in tasks that need no model."""

from __future__ import annotations

import gzip
import json
import math

import pytest

from litrecipe.config.errors import InputError
from litrecipe.evaluation.tasks import ExactMatch, Perplexity, _questions, _ratio, _texts, _windows, same_answer


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        (" Paris\n", "Paris", True),
        ("paris", "Paris", False),
        ('{"b": 2, "a": [1.0]}', '{"a":[1],"b":2}', True),
        ('{"a": 1}', '{"a": "1"}', False),
        ("true", "1", False),
        ("9007199254740993", "9007199254740992", False),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1', '{"a": 1}', False),
        ("NaN", "NaN", True),
    ],
)
def test_same_answer(answer, reference, same) -> None:
    assert same_answer(answer, reference) is same


def test_windows_do_not_overlap_and_each_predicts() -> None:
    assert _windows(list(range(10)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert _windows(list(range(9)), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_ratio_of_equal_counts_is_a_mean_with_its_standard_error() -> None:
    ratio, error = _ratio([1.0, 0.0, 0.0, 1.0], [1, 1, 1, 1])
    assert ratio == 0.5
    assert error == pytest.approx(math.sqrt(1 / 3) / 2)  # sample deviation sqrt(4/4·1/3) over sqrt(4)
    assert _ratio([3.0], [2]) == (1.5, None)


def test_perplexity_options() -> None:
    task = Perplexity.parse("perplexity:toy:units?window=1024&windows=8")
    assert (task.source, task.window, task.windows) == ("toy:units", 1024, 8)


def test_all_mistakes_of_a_spec_are_told(tmp_path) -> None:
    with pytest.raises(InputError) as caught:
        Perplexity.parse(f"perplexity:{tmp_path / 'gone.txt'}?window=1&size=3&windows=x")
    assert [line.split(": ", 2)[2] for line in caught.value.mistakes[:3]] == [
        "window=1: give a whole number, at least 2",
        "size: no such option: there are window, windows, split and files",
        "windows=x: give a whole number, at least 1",
    ]
    assert "gone.txt" in caught.value.mistakes[3]
    with pytest.raises(InputError, match="toy:unit"):
        ExactMatch.parse("exact_match:toy:unit")


def test_text_files_are_taken_as_they_stand(tmp_path) -> None:
    text = " = Title = \n\n Line one \r\n\n\nLast é"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "row one"}) + "\n" + json.dumps({"text": "row two"}) + "\n")
    assert list(_texts(str(tmp_path / "a.txt"))) == list(_texts(str(tmp_path / "b.txt.gz"))) == [text]
    assert list(_texts(str(tmp_path / "c.jsonl"))) == ["row one", "row two"]
    assert list(_texts(f"{tmp_path}?files=*.txt*")) == [text, text]
    with pytest.raises(
        InputError, match=r"toy:units.train:1: columns messages, answer: perplexity needs a column `text`"
    ):
        list(_texts("toy:units?n=1"))


def test_a_folder_with_splits_is_measured_on_its_test_split(tmp_path) -> None:
    for name in ("train", "test", "validation"):
        row = {"text": name, "prompt": "which split?", "completion": name}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    assert list(_texts(Perplexity.parse(f"perplexity:{tmp_path}?windows=3").source)) == ["test"]
    chosen = Perplexity.parse(f"perplexity:{tmp_path}?split=validation&files=*.jsonl&window=64")
    assert (list(_texts(chosen.source)), chosen.window) == (["validation"], 64)
    assert [question.reference for question in _questions(ExactMatch.parse(f"exact_match:{tmp_path}").source)] == [
        "test"
    ]
    with pytest.raises(InputError, match="options are split"):
        ExactMatch.parse(f"exact_match:{tmp_path}?split=nowhere")


def test_questions_of_every_layout(tmp_path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "said"}]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "said"}], "answer": "meant"},
        {"messages": [{"role": "user", "content": "q"}], "answer": {"a": 1}},
        {"prompt": "q", "answer": 7},
        {"prompt": "q", "completion": "said"},
        {"instruction": "q", "output": "said"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = _questions(str(path))
    assert [question.reference for question in questions] == ["said", "meant", '{"a": 1}', "7", "said", "said"]
    assert all(question.prompt == [{"role": "user", "content": "q"}] for question in questions)


def test_rows_without_a_question_are_named(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "no question"}\n{"question": "q"}\n')
    with pytest.raises(InputError) as caught:
        _questions(str(path))
    assert [mistake.split(": ")[0] for mistake in caught.value.mistakes] == [f"{path}:1", f"{path}:2"]

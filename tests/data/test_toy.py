from __future__ import annotations

import json

import pytest

from litrecipe.config.errors import InputError
from litrecipe.data.toy import CONVERSIONS, TASKS, toy_rows


def prompts(source: str) -> list[str]:
    return [row.get("prompt") or row["messages"][0]["content"] for row, _ in toy_rows(source)]


@pytest.mark.parametrize("task", TASKS)
def test_rows_depend_on_the_source_alone(task: str) -> None:
    source = f"toy:{task}?n=50&seed=3"
    assert list(toy_rows(source)) == list(toy_rows(source))
    assert prompts(source) != prompts(f"toy:{task}?n=50&seed=4")
    assert prompts(source) == prompts(f"toy:{task}?n=60&seed=3")[:50]


@pytest.mark.parametrize("task", TASKS)
def test_train_and_test_share_no_prompt_whatever_their_seeds(task: str) -> None:
    train = {prompt for seed in range(3) for prompt in prompts(f"toy:{task}?n=1500&seed={seed}")}
    test = {prompt for seed in range(3) for prompt in prompts(f"toy:{task}?n=400&seed={seed}&split=test")}
    assert len(train) > 1500 and len(test) > 400
    assert not train & test


@pytest.mark.parametrize("task", TASKS)
def test_prompts_do_not_repeat(task: str) -> None:
    assert len(set(prompts(f"toy:{task}?n=600"))) == 600


def test_units_are_converted_right() -> None:
    factors = {(unit, wanted): factor for unit, wanted, factor in CONVERSIONS}
    for row, _ in toy_rows("toy:units?n=300"):
        prompt, answer = row["messages"][0]["content"], row["messages"][1]["content"]
        words = prompt.replace("?", " ").replace(".", " ").split()
        value = next(word for word in words if word.isdigit())
        unit = words[words.index(value) + 1]
        result, wanted = answer.split()
        assert wanted in words
        assert int(result) == int(value) * factors[unit, wanted]
        assert row["answer"] == answer


def test_fields_hold_what_the_sentence_says() -> None:
    for row, _ in toy_rows("toy:fields?n=300"):
        sentence = row["messages"][0]["content"]
        answer = json.loads(row["messages"][1]["content"])
        assert list(answer) == ["name", "age", "city"]
        assert all(str(value) in sentence for value in answer.values())
        assert row["answer"] == row["messages"][1]["content"]


def test_sums_are_right_and_of_numbers_of_so_many_digits() -> None:
    for digits in (1, 3, 9):
        for row, _ in toy_rows(f"toy:addition?n=30&digits={digits}"):
            a, b = row["prompt"].removesuffix("=").split("+")
            assert len(a) == len(b) == digits and a[0] != "0"
            assert row["completion"] == row["answer"] == str(int(a) + int(b))
    assert list(toy_rows("toy:addition?n=30&digits=3")) == list(toy_rows("toy:addition?n=30"))


def test_a_sum_and_its_mirror_are_held_out_together() -> None:
    train, test = (
        {tuple(sorted(prompt[:-1].split("+"))) for prompt in prompts(f"toy:addition?n={n}&digits=2&split={split}")}
        for split, n in (("train", 5000), ("test", 1200))
    )
    assert len(train) < 5000 and len(test) < 1200, "no sum is there with its mirror"
    assert not train & test


def test_wrong_sums_are_wrong() -> None:
    for row, _ in toy_rows("toy:addition-pairs?n=50"):
        assert row["chosen"] == str(sum(map(int, row["prompt"][:-1].split("+")))) != row["rejected"]


def test_digits_are_an_option_of_addition_alone() -> None:
    with pytest.raises(InputError, match="digits: no such option; there are n, seed, split"):
        list(toy_rows("toy:units?digits=3"))
    for digits in ("0", "10", "x"):
        with pytest.raises(InputError, match=f"digits={digits}: give a whole number from 1 to 9"):
            list(toy_rows(f"toy:addition?digits={digits}"))


def test_places_name_task_split_and_row() -> None:
    assert [where for _, where in toy_rows("toy:units?n=2&split=test")] == ["toy:units-test:1", "toy:units-test:2"]


def test_every_mistake_in_a_source_is_said() -> None:
    with pytest.raises(InputError) as caught:
        list(toy_rows("toy:unit?n=0&sed=1&split=dev"))
    assert len(caught.value.mistakes) == 4
    assert "did you mean units?" in caught.value.mistakes[0]
    assert "n=0" in caught.value.mistakes[1]
    assert "did you mean seed?" in caught.value.mistakes[2]
    assert "split=dev" in caught.value.mistakes[3]


@pytest.mark.parametrize("key", ["n", "seed"])
def test_a_number_too_long_for_python(key: str) -> None:
    with pytest.raises(InputError, match=f"{key}=1{{5000}}: give a whole number .*18 digits"):
        list(toy_rows(f"toy:units?{key}={'1' * 5000}"))


def test_more_rows_than_there_are_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="gives at most"):
        list(toy_rows("toy:units?n=100000"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_most_rows_a_split_promises_can_be_had(split: str) -> None:
    with pytest.raises(InputError) as caught:
        list(toy_rows(f"toy:units?n=100000&split={split}"))
    most = int(caught.value.mistakes[0].split("at most ")[1].split()[0])
    assert len(list(toy_rows(f"toy:units?n={most}&split={split}"))) == most

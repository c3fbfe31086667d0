"""Rows of every kind as prompts, what is dropped and said, and what is held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.comparisons import load_comparisons
from litrecipe.data.openings import parse_prompt
from litrecipe.data.prompts import load_prompts, read_prompts
from litrecipe.data.tokenizer import Tokenizer

USER = {"role": "user", "content": "What is 7?"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAID = {"role": "assistant", "content": "Seven."}


def opening(row, **data):
    return parse_prompt(row, "f:1", Data(**data))


@pytest.fixture
def write(tmp_path: Path):
    def write(*rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def load(source, tokenizer, *, new=8, positions=512, seed=0, **data):
    given = Data(train=source, **data)
    return load_prompts(given, tokenizer, max_new_tokens=new, max_positions=positions, seed=seed)


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"prompt": "What is 7?"}, [USER]),
        ({"prompt": "What is 7?", "system": "Be brief."}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"prompt": "What is 7?", "completion": None, "answer": "7"}, [USER]),
        ({"prompt": "What is 7?", "messages": [SYSTEM, USER, SAID]}, [USER]),
        ({"question": "What is 7?", "answer": "#### 7"}, [USER]),
        ({"question": "What is 7?", "system": "Be brief."}, [SYSTEM, USER]),
        ({"conversations": [{"from": "human", "value": "What is 7?"}], "system": "Be brief."}, [SYSTEM, USER]),
        ({"instruction": "What is", "input": "7?"}, [{"role": "user", "content": "What is\n7?"}]),
        ({"instruction": "What is 7?", "output": "Seven."}, [USER]),
        ({"messages": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"messages": [SYSTEM, USER, SAID]}, [SYSTEM, USER]),
        ({"messages": [USER, SAID, USER, SAID]}, [USER, SAID, USER]),
        ({"conversations": [{"from": "human", "value": "What is 7?"}]}, [USER]),
        ({"conversations": [{"from": "human", "value": "What is 7?"}, {"from": "gpt", "value": "Eh."}]}, [USER]),
        ({"prompt": "What is 7?", "chosen": "Seven.", "rejected": "8"}, [USER]),
        ({"chosen": [SYSTEM, USER, SAID], "rejected": [SYSTEM, USER, SAID | {"content": "8"}]}, [SYSTEM, USER]),
        (
            {"chosen": "\n\nHuman: What is 7?\n\nAssistant: 7", "rejected": "\n\nHuman: What is 7?\n\nAssistant: 8"},
            [USER],
        ),
        ({"prompt": "What is 7?", "answers": ["7"]}, [USER]),
        ({"instruction": "What is 7?", "output_1": "7", "output_2": "8", "preference": 1}, [USER]),
    ],
)
def test_what_a_row_asks(row, asked):
    found = opening(row)
    assert found.messages == found.said == asked and found.text is None
    assert found.row == row and found.where == "f:1"


def test_a_row_is_not_changed_by_reading_it():
    parts = [{"type": "text", "text": "What is 7?"}]
    row = {"messages": [{"role": "user", "content": parts}, SAID]}
    assert opening(row).messages == [USER]
    assert row == {"messages": [{"role": "user", "content": parts}, SAID]}


def test_columns_may_have_other_names():
    row = {"query": "What is 7?", "gold": 7}
    found = opening(row, columns={"prompt": "query"})
    assert found.messages == [USER] and found.row == row
    text = opening({"review": "It was", "prompt": "unused"}, columns={"text": "review"}, format="text")
    assert text.said == "It was" and text.messages == []


def test_tools_are_given_to_the_template():
    tools = [{"name": "add"}]
    assert opening({"messages": [USER], "tools": json.dumps(tools)}).tools == tools
    assert opening({"prompt": "What is 7?", "tools": tools}).tools == tools
    assert opening({"prompt": "What is 7?", "tools": tools}).conversation("7").tools == tools


@pytest.mark.parametrize(
    ("row", "mistake"),
    [
        ({"url": "x"}, "columns url: known are prompt, messages,"),
        ({"prompt": 7}, "message 1 (user): content is int: give text"),
        ({"prompt": [USER, SAID]}, "message 3: assistant after assistant"),
        ({"messages": "hello"}, "messages is no list of objects"),
        ({"messages": [SAID]}, "message 1: assistant after start"),
        ({"chosen": "Seven.", "rejected": "Eight."}, "no prompt: give one"),
    ],
)
def test_wrong_rows(row, mistake):
    with pytest.raises(InputError) as caught:
        opening(row)
    assert mistake in str(caught.value)


def test_all_wrong_rows_are_told_at_once(write):
    source = write({"prompt": 1}, {"prompt": "a"}, {"odd": 1})
    with pytest.raises(InputError) as caught:
        list(read_prompts(source, Data()))
    assert [line.split(": ")[0] for line in caught.value.mistakes] == [f"{source}:1", f"{source}:3"]
    with pytest.raises(InputError, match=r"data.columns: promt: did you mean"):
        list(read_prompts(source, Data(columns={"promt": "q"})))


def test_tokens_open_the_turn_of_the_assistant(write, tokenizer):
    (prompt,) = load(write({"messages": [SYSTEM, USER]}), tokenizer).train
    assert prompt.tokens.tolist() == tokenizer.encode_prompt([SYSTEM, USER])
    assert tokenizer.decode(prompt.tokens, skip_special=False).endswith("<|im_start|>assistant\n")


def test_prompts_are_those_of_preference_learning(write, tokenizer):
    """DPO's samples begin with what is sampled from here."""
    source = write({"prompt": "What is 7?", "chosen": "Seven.", "rejected": "Eight."})
    (prompt,) = load(source, tokenizer).train
    sample = load_comparisons(Data(train=source), tokenizer, seed=0).train[0]
    assert prompt.tokens.tolist() == sample.segments[0].tokens.tolist()


def test_a_text_is_continued_as_it_stands(write, tokenizer, folders):
    """After BOS where the tokenizer puts one; control tokens in it stay text."""
    (prompt,) = load(write({"text": "It was <|im_end|>"}), tokenizer).train
    assert prompt.tokens.tolist() == tokenizer.encode("It was <|im_end|>")
    assert tokenizer.backend.token_to_id("<|im_end|>") not in prompt.tokens
    bare = Tokenizer.load(folders["llama2"])
    bare.has_template = False
    bare.adds_bos = True
    (prompt,) = load(write({"prompt": "It was"}), bare).train
    assert prompt.tokens.tolist() == [bare.bos_id, *bare.encode("It was")]


def test_what_is_dropped_is_counted_and_said(write, tokenizer):
    """A prompt of n tokens stays with data.max_length n and a model that reads n more than a completion."""
    rows = [{"prompt": "What is 7?"}, {"prompt": " "}, {"prompt": "What is 7?", "answer": 7}, {"prompt": "x " * 60}]
    rows.append({"chosen": [USER, SAID], "rejected": [USER | {"content": "What is 8?"}, SAID]})
    source = write(*rows)
    n = len(tokenizer.encode_prompt([USER]))
    found = load(source, tokenizer, positions=n + 8, max_length=n)
    counts = found.report.train
    assert [prompt.where for prompt in found.train] == [f"{source}:1", f"{source}:3"]
    assert (counts.rows, counts.samples, counts.tokens) == (5, 2, 2 * n)
    said = str(found.report)
    assert said == (
        f"train {source}: 2 prompts of 5 rows, {2 * n} tokens; dropped as empty: 1 (rows.jsonl:2); dropped, longer "
        "than data.max_length: 1 (rows.jsonl:4); dropped with answers to different prompts: 1 (rows.jsonl:5); asked "
        "before: 1 (rows.jsonl:3)"
    )
    with pytest.raises(InputError, match=r"data.train: no prompt is left .*no room for a completion: 2"):
        load(source, tokenizer, positions=n + 7, max_length=n)


def test_equal_prompts_are_held_out_together(write, tokenizer):
    source = write(*({"prompt": f"What is {n // 2}?", "answer": n} for n in range(40)))
    found = load(source, tokenizer, val_fraction=0.25, seed=3)
    train, val = ({prompt.row["answer"] // 2 for prompt in part} for part in (found.train, found.val))
    assert len(found.train) == 30 and len(found.val) == 10 and not train & val
    assert found.report.held_out == 10
    again = load(source, tokenizer, val_fraction=0.25, seed=4)
    assert [prompt.where for prompt in again.val] != [prompt.where for prompt in found.val]


def test_held_out_data_of_its_own(write, tokenizer):
    val = write({"prompt": "What is 8?"}, name="val.jsonl")
    found = load(write({"prompt": "What is 7?"}), tokenizer, val=val)
    assert [prompt.where for prompt in found.val] == [f"{val}:1"]
    assert str(found.report).splitlines()[1].startswith(f"val   {val}: 1 prompt, ")


def test_the_fingerprint_tells_prompts_their_order_and_what_answers_are_judged_by(write, tokenizer):
    one, other = {"prompt": "What is 7?", "answer": "7"}, {"prompt": "What is 8?", "answer": "8"}
    prints = [
        load(write(*rows), tokenizer).fingerprint
        for rows in ((one, other), (other, one), (one,), (one, other | {"answer": "9"}))
    ]
    assert len(set(prints)) == 4
    assert load(write(one, other), tokenizer).fingerprint == prints[0]


@pytest.mark.parametrize("task", ["units", "fields"])
def test_toy_tasks_ask_and_keep_the_answer(tokenizer, task):
    found = load(f"toy:{task}?n=5", tokenizer, positions=2048)
    assert len(found.train) == 5
    for prompt in found.train:
        assert prompt.messages == prompt.row["messages"][:-1]
        assert prompt.row["answer"] == prompt.row["messages"][-1]["content"]
    pairs = load(f"toy:{task}-pairs?n=5", tokenizer, positions=2048)
    assert [prompt.tokens.tolist() for prompt in pairs.train] == [prompt.tokens.tolist() for prompt in found.train]


def test_what_a_template_refuses_is_told_with_its_place(write, folders):
    bare = Tokenizer.load(folders["chatml"])
    source = write({"prompt": "a"}, {"prompt": "b"})
    bare.template._template = bare.template._template.environment.from_string("{{ raise_exception('never') }}")
    with pytest.raises(InputError) as caught:
        load(source, bare)
    assert caught.value.mistakes == [
        f"{source}:{line}: the chat template refuses this conversation: never" for line in (1, 2)
    ]


def test_rows_are_read_without_torch():
    import subprocess
    import sys

    code = "import sys, litrecipe.data.openings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

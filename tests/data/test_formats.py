from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.formats import COLUMNS, Conversation, RowError, check_rows, parse_row, read_conversations
from litrecipe.data.readers import Mistakes

ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "Because."}
SYSTEM = {"role": "system", "content": "Be brief."}


def parse(row: dict[str, Any], **data: Any) -> Conversation:
    return parse_row(row, "file:1", Data(**data))


@pytest.mark.parametrize(
    ("row", "layout", "messages"),
    [
        ({"messages": [SYSTEM, ASK, SAY, ASK, SAY]}, "messages", [SYSTEM, ASK, SAY, ASK, SAY]),
        ({"conversations": [ASK, SAY]}, "sharegpt", [ASK, SAY]),
        ({"prompt": "Why?", "completion": "Because."}, "prompt_completion", [ASK, SAY]),
        ({"prompt": [SYSTEM, ASK], "completion": [SAY]}, "messages", [SYSTEM, ASK, SAY]),
        ({"instruction": "Why?", "input": "", "output": "Because."}, "alpaca", [ASK, SAY]),
        (
            {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."},
            "alpaca",
            [SYSTEM, {"role": "user", "content": "Add.\n1 2"}, {"role": "assistant", "content": "3"}],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "Why?"},
                    {"from": "gpt", "value": "Because."},
                ]
            },
            "sharegpt",
            [SYSTEM, ASK, SAY],
        ),
        ({"text": "Once upon a time"}, "text", [{"role": "assistant", "content": "Once upon a time"}]),
    ],
)
def test_layouts_are_recognised_by_their_keys(row: dict[str, Any], layout: str, messages: list[dict[str, Any]]) -> None:
    conversation = parse(row)
    assert (conversation.layout, conversation.messages, conversation.where) == (layout, messages, "file:1")


def test_columns_give_other_names_and_format_decides() -> None:
    row = {"question": "Why?", "answer": "Because."}
    assert parse(row, columns={"prompt": "question", "completion": "answer"}).messages == [ASK, SAY]
    row = {"instruction": "Why?", "output": "Because.", "text": "all of it"}
    assert parse(row, format="text").messages[0]["content"] == "all of it"
    assert parse({"chat": [ASK, SAY]}, columns={"messages": "chat"}).messages == [ASK, SAY]


def test_a_table_of_several_layouts_is_read_by_what_is_filled_in() -> None:
    row = {"messages": None, "prompt": "Why?", "completion": "Because.", "text": None}
    assert parse(row).messages == [ASK, SAY]


def test_tools_and_other_columns_are_kept() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": ""}
    row = {"messages": [ASK, call, result, SAY], "tools": json.dumps([{"name": "f"}]), "answer": "Because."}
    conversation = parse(row)
    assert conversation.tools == [{"name": "f"}]
    assert conversation.extra["answer"] == "Because."
    assert conversation.messages[1] == {"role": "assistant", "tool_calls": call["tool_calls"]}
    assert conversation.empty_turn is None


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert parse({"messages": [{"role": "user", "content": parts}, SAY]}).messages == [ASK, SAY]


def test_an_empty_turn_is_noticed() -> None:
    empty = {"role": "assistant", "content": " \n"}
    assert parse({"messages": [ASK, empty]}).empty_turn == empty
    assert parse({"messages": [ASK, SAY]}).empty_turn is None


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": 1}, "columns question: known are messages"),
        ({}, "columns none"),
        ({"messages": "hi"}, "messages is no list of objects"),
        ({"messages": []}, "no messages"),
        ({"messages": [{"role": "user"}]}, "message 1 has no 'content'"),
        ({"messages": [{"content": "x"}]}, "message 1 has no 'role'"),
        ({"messages": [{"role": None, "content": "x"}]}, "message 1 has no 'role'"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "role 'bot': known are"),
        ({"messages": [ASK, SAY, ASK]}, "the last turn is the user's"),
        ({"messages": [ASK, ASK, SAY]}, "message 2: user after user"),
        ({"messages": [SAY]}, "message 1: assistant after start"),
        ({"messages": [ASK, SYSTEM, SAY]}, "message 2: system after user"),
        ({"messages": [ASK, {"role": "assistant", "content": 7}]}, "content is int"),
        ({"messages": [ASK, {"role": "assistant", "content": [{"type": "image"}]}]}, "not text"),
        ({"messages": [ASK, {"role": "assistant", "content": "a\ud800"}]}, "not text (a lone surrogate"),
        ({"messages": [ASK, {"role": "assistant", "content": "a\ufdd0"}]}, "not text (a lone surrogate"),
        ({"prompt": "x", "completion": None}, "column 'completion' is missing or null"),
        ({"prompt": 7, "completion": "x"}, "content is int"),
        ({"conversations": [{"from": "human"}]}, "turn 1 has from"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "from='alien'"),
        ({"messages": [ASK, SAY], "tools": "{"}, "tools are not valid JSON"),
        ({"messages": [ASK, SAY], "tools": ["f"]}, "tools are no list of objects"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row)
    assert said in str(caught.value)


def test_a_missing_column_of_a_given_format_is_named() -> None:
    with pytest.raises(RowError, match=r"column 'answer' is missing or null \(it has question\)"):
        parse({"question": "x"}, format="prompt_completion", columns={"prompt": "question", "completion": "answer"})


@pytest.mark.parametrize(
    ("columns", "format", "said"),
    [
        (
            {"promt": "question"},
            "auto",
            "promt: did you mean {prompt: question}? our names come first, and are messages",
        ),
        ({"question": "prompt"}, "auto", "question: did you mean {prompt: question}? our names come first"),
        ({"qqq": "question"}, "auto", "qqq: our names come first"),
        ({"prompt": "question"}, "alpaca", "prompt: our names come first, and are instruction, input, output, system"),
    ],
)
def test_columns_without_effect_are_refused(tmp_path: Path, columns: dict[str, str], format: Any, said: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "Why?", "completion": "Because."}) + "\n")
    with pytest.raises(InputError) as caught:
        check_rows(Data(train=str(path), columns=columns, format=format))
    [mistake] = caught.value.mistakes
    assert mistake.startswith(f"data.columns: {said}")


def test_all_mistakes_of_train_and_val_come_at_once(tmp_path: Path) -> None:
    good = json.dumps({"messages": [ASK, SAY]})
    (tmp_path / "train.jsonl").write_text(f"{good}\n{{\n{json.dumps({'messages': [ASK]})}\n")
    (tmp_path / "val.jsonl").write_text("[]\n")
    with pytest.raises(InputError) as caught:
        check_rows(Data(train=f"{tmp_path}/train.jsonl", val=f"{tmp_path}/val.jsonl"))
    places = [mistake.partition(": ")[0] for mistake in caught.value.mistakes]
    assert places == [f"{tmp_path}/train.jsonl:2", f"{tmp_path}/train.jsonl:3", f"{tmp_path}/val.jsonl:1"]


def test_sources_that_are_not_there_are_named_by_their_keys(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        check_rows(Data(train=str(tmp_path / "train.jsonl"), val="toy:unit"))
    keys = [mistake.partition(": ")[0] for mistake in caught.value.mistakes]
    assert keys == ["data.train", "data.val"]


def test_checked_rows_are_counted_and_not_checked_again(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": [ASK, SAY]}) + "\n")
    data = Data(train=str(path))
    assert check_rows(data) == check_rows(data) == 1
    path.write_text(path.read_text() * 2)
    assert check_rows(data) == 2
    path.write_text("{")
    with pytest.raises(InputError):
        check_rows(data)


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": [ASK, SAY]}) + "\n")
    with pytest.raises(InputError, match=rf"^data\.cache_dir: {path}/x: Not a directory: .* name a folder"):
        check_rows(Data(train=str(path), cache_dir=f"{path}/x"))


def test_another_version_checks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": [ASK, SAY]}) + "\n")
    for version in ("1", "2"):
        monkeypatch.setattr("litrecipe.data.formats.__version__", version)
        check_rows(Data(train=str(path), cache_dir=str(tmp_path / "cache")))
    assert len([p for p in (tmp_path / "cache" / "checked").iterdir() if not p.suffix]) == 2


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("alpaca_random9k", {}, 9229),
        ("oasst_en100_threads", {}, 100),
        ("gsm8k_train", {"prompt": "question", "completion": "answer"}, 7473),
        ("gpteacher_roleplay", {"output": "response"}, 1923),
    ],
)
def test_public_data_sets_are_read_whole(shared: Path, name: str, columns: dict[str, str], rows: int) -> None:
    mistakes = Mistakes()
    source = str(shared / "data" / "sft" / f"{name}.jsonl.gz")
    assert sum(1 for _ in read_conversations(source, Data(columns=columns), mistakes)) == rows
    assert mistakes.shown == []


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text(max_size=3)
    | st.sampled_from(["user", "assistant", "human", "gpt"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "tool_calls"]), inner, max_size=4
        )
    ),
    max_leaves=8,
)
COLUMN_NAMES = sorted({name for names in COLUMNS.values() for name in names})


@settings(max_examples=400, deadline=None)
@given(row=st.dictionaries(st.sampled_from(COLUMN_NAMES), JSON, max_size=5))
def test_no_row_is_so_wrong_that_it_is_not_said(row: dict[str, Any]) -> None:
    try:
        conversation = parse(row)
    except RowError as error:
        assert str(error)
    else:
        assert all(isinstance(message.get("content", ""), str) for message in conversation.messages)
        assert conversation.messages[-1]["role"] == "assistant"
        silent = [message for message in conversation.messages if not str(message.get("content") or "").strip()]
        assert conversation.empty_turn in (None, *silent)
        assert conversation.empty_turn or all(m["role"] == "tool" or m.get("tool_calls") for m in silent)

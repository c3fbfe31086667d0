from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.comparisons import load_comparisons
from litrecipe.data.report import check_conversations, leaks, look_at, render, repeats
from litrecipe.data.supervised import load_supervised
from litrecipe.data.tokenizer import Tokenizer


def row(asked: str, said: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def test_a_sample_shows_its_tokens_and_what_is_learnt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [row("Hi <|im_end|> [bold]x[/bold]", "Yes 🤖!")])
    sample = load_supervised(Data(train=source), tokenizer, seed=0).train[0]
    title, text, _ = render(sample, tokenizer).renderables
    assert title.plain == f"{source}:1"
    assert text.plain == (
        "<|im_start|>system\nYou help.<|im_end|>\n"
        "<|im_start|>user\nHi <|im_end|> [bold]x[/bold]<|im_end|>\n<|im_start|>assistant\n⟦Yes 🤖!<|im_end|>\n⟧"
    )
    learnt = "".join(text.plain[span.start : span.end] for span in text.spans if "green" in str(span.style))
    assert learnt == "⟦Yes 🤖!<|im_end|>\n⟧"


@pytest.mark.parametrize(
    ("one", "titles"),
    [
        ({"prompt": "Why?", "chosen": "So it is.", "rejected": "No."}, ["chosen", "rejected"]),
        ({"prompt": "Why?", "chosen": "So it is.", "rejected": "No.", "margin": 2}, ["chosen (2)", "rejected (0)"]),
        ({"prompt": "Why?", "completions": ["A", "B", "C"], "scores": [1, 3, 2]}, ["answer 1 (3)", "answer 3 (1)"]),
        ({"prompt": "Why?", "completion": "So.", "label": False}, ["bad"]),
    ],
)
def test_answers_stand_side_by_side(
    tokenizer: Tokenizer, tmp_path: Path, one: dict[str, Any], titles: list[str]
) -> None:
    source = write(tmp_path / "x.jsonl", [one])
    sample = load_comparisons(Data(train=source), tokenizer, seed=0).train[0]
    console = Console(width=120, file=io.StringIO())
    console.print(render(sample, tokenizer))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("Why?") == 1 and shown.count("⟦") == len(sample.segments) - 1
    [header] = [line for line in shown.splitlines() if titles[0] in line]
    assert all(title in header for title in titles)


def test_repeats_and_leaks_are_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row("Why?", "So."), row("why? ", "so."), row("Why?", "So."), row("How?", "Thus.")]
    train = look_at(write(tmp_path / "train.jsonl", rows), Data(), tokenizer).keys
    val = [row("Why?", "So."), row("WHY?", "so.\n"), row("Why?", "Never."), row("Who?", "Me.")]
    held_out = look_at(write(tmp_path / "val.jsonl", val), Data(), tokenizer).keys

    def lines(trouble: Any) -> list[str]:
        return [where.rpartition(":")[2] for where in trouble.first]

    assert lines(repeats(train.exact, train.places)) == ["3"]
    assert lines(repeats(train.loose, train.places)) == ["2", "3"]
    assert lines(leaks(held_out.exact, held_out.places, train.exact)) == ["1"]
    assert lines(leaks(held_out.loose, held_out.places, train.loose)) == ["1", "2"]
    assert lines(leaks(held_out.prompts, held_out.places, train.prompts)) == ["1", "2", "3"]


def test_turns_that_differ_in_their_calls_are_no_repeats(tokenizer: Tokenizer, tmp_path: Path) -> None:
    template = tmp_path / "calls.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ m.tool_calls }}<|im_end|>{% endfor %}")
    calling = Tokenizer(tokenizer.backend, special_tokens={}, chat_template=template.read_text())
    rows = [
        {"messages": [{"role": "user", "content": "Go."}, {"role": "assistant", "tool_calls": [{"name": name}]}]}
        for name in ("left", "right", "left")
    ]
    keys = look_at(write(tmp_path / "x.jsonl", rows), Data(), calling).keys
    for column in (keys.exact, keys.loose):
        assert repeats(column, keys.places).first == [f"{tmp_path}/x.jsonl:3"]


def test_template_trouble_is_found(chatml_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text("{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}")
    source = write(tmp_path / "x.jsonl", [row("a", "b")])
    found = look_at(source, Data(), Tokenizer.load(chatml_folder, str(template)))
    assert found.endless.count == 1 and found.double_bos.count == 1
    found = look_at(source, Data(), Tokenizer.load(chatml_folder))
    assert found.endless.count == 0 and found.double_bos.count == 0


def test_one_endless_turn_among_several_is_found(chatml_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "bad.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}{% if loop.last %}{{ eos_token }}{% endif %}\n{% endfor %}"
    )
    messages = [*row("a", "b")["messages"], *row("c", "d")["messages"]]
    source = write(tmp_path / "x.jsonl", [{"messages": messages}])
    with pytest.raises(InputError, match=r"message 2 \(assistant\)"):
        look_at(source, Data(), Tokenizer.load(chatml_folder, str(template)))
    template.write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert look_at(source, Data(), Tokenizer.load(chatml_folder, str(template))).endless.count == 1


def printed(tables: list[Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_tell_lengths_and_shares(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row(f"{n}", "b" * n) for n in range(1, 10)] + [row("x", "y " * 200), row("x", "")]
    data = Data(train=write(tmp_path / "train.jsonl", rows), max_length=100)
    train = look_at(data.train, data, tokenizer)
    assert len(train.lengths) == 10 and max(train.lengths) > 100
    told = printed(check_conversations(data, tokenizer, seed=0))
    assert "data.train" in told and "9.1 %: 1 (train.jsonl:10)" in told and "9.1 %: 1 (train.jsonl:11)" in told
    assert f"{max(train.lengths):,}" in told
    assert "held out" not in told


def test_leakage_is_told_for_val_and_for_a_split(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row("same", "answer")] * 10
    source = write(tmp_path / "train.jsonl", rows)
    told = printed(check_conversations(Data(train=source, val=source), tokenizer, seed=0))
    assert "data.val" in told and "100.0 %: 10" in told
    told = printed(check_conversations(Data(train=source, val_fraction=0.2), tokenizer, seed=0))
    assert "held out: 2 samples" in told and "100.0 %: 2" in told

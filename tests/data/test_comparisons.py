"""Preferences as trees of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.comparisons import (
    ComparisonCounts,
    common_prefix,
    encode_preferences,
    load_comparisons,
    make_comparison,
    prompt_of,
)
from litrecipe.data.preferences import parse_preference
from litrecipe.data.prepared import hold_out
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.row import make_row

USER, OTHER = ({"role": "user", "content": text} for text in ("What is 7?", "What is 8?"))


def said(text):
    return [{"role": "assistant", "content": text}]


def samples_of(rows, tokenizer, max_length=1000):
    """The samples of some rows, and what became of the rows."""
    counts = ComparisonCounts("f")
    preferences = [parse_preference(row, f"f:{n}") for n, row in enumerate(rows, start=1)]
    made = [make_comparison(one, max_length, counts) for one in encode_preferences(preferences, tokenizer, counts)]
    return [sample for sample in made if sample], counts


def pair(prompt="What is 7?", chosen="Seven 🤗.", rejected="Eight."):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_the_prompt_once_and_each_answer_as_a_branch(tokenizer):
    (sample,), counts = samples_of([pair()], tokenizer)
    prompt, chosen, rejected = sample.segments
    assert [segment.parent for segment in sample.segments] == [-1, 0, 0]
    asked = tokenizer.encode_prompt([{"role": "user", "content": "What is 7?"}])
    assert prompt.tokens.tolist() == asked and not prompt.weights.any()
    for segment, text in ((chosen, "Seven 🤗."), (rejected, "Eight.")):
        assert tokenizer.decode(segment.tokens, skip_special=False).strip() == f"{text}<|im_end|>"
        assert segment.tokens.tolist().count(tokenizer.backend.token_to_id("<|im_end|>")) == 1
        assert segment.weights.all()
    assert np.isnan(sample.extra["scores"]).tolist() == [True, True]
    found = (counts.rows, counts.samples, counts.prompt_tokens, counts.chosen_tokens, counts.rejected_tokens)
    assert found == (1, 1, len(asked), len(chosen.tokens), len(rejected.tokens))


def test_branches_continue_the_prompt_as_if_it_stood_before_each(tokenizer):
    """A branch's tokens are those of the whole conversation, and its predictions start with its first token."""
    (sample,), _ = samples_of([pair()], tokenizer)
    row = make_row([sample])
    whole = tokenizer.encode_batch([parse_preference(pair(), "").conversation(1)])[0][0].tolist()
    prompt, _, rejected = sample.segments
    assert [*prompt.tokens, *rejected.tokens] == whole[: len(prompt.tokens) + len(rejected.tokens)]
    start = row.spans[2].start
    assert row.positions[start] == len(prompt.tokens)
    mine = row.segment == 2
    assert row.target[mine].tolist() == rejected.tokens.tolist()
    assert row.predict_from[mine].tolist() == [len(prompt.tokens) - 1, *range(start, row.spans[2].stop - 1)]


def test_answers_that_begin_alike_share_only_the_prompt(tokenizer):
    (sample,), _ = samples_of([pair(chosen="Seven is odd", rejected="Seven is even")], tokenizer)
    prompt, chosen, rejected = sample.segments
    assert chosen.tokens[0] == rejected.tokens[0]
    assert len(prompt.tokens) == len(tokenizer.encode_prompt([{"role": "user", "content": "What is 7?"}]))


def test_earlier_turns_of_the_assistant_are_not_learnt(tokenizer):
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "What is 7?"},
    ]
    (sample,), _ = samples_of([pair(prompt=history)], tokenizer)
    assert not sample.segments[0].weights.any()
    assert "Hello" in tokenizer.decode(sample.segments[0].tokens)


def test_ranked_answers_and_their_scores(tokenizer):
    row = {"prompt": "What is 7?", "answers": ["Six", "Seven", "Six", " ", "Odd"], "scores": [1, 3, 0.5, 9, 2]}
    (sample,), counts = samples_of([row], tokenizer)
    texts = [tokenizer.decode(segment.tokens).strip() for segment in sample.segments[1:]]
    assert texts == ["Seven", "Odd", "Six"]  # without the empty one and the one that says what a better one says
    assert sample.extra["scores"].tolist() == [3, 2, 1]
    assert counts.samples == 1 and not counts.identical.count and not counts.empty.count


@pytest.mark.parametrize("label", [True, False])
def test_a_single_answer_with_a_label(tokenizer, label):
    (sample,), _ = samples_of([{"prompt": "What is 7?", "completion": "Seven", "label": label}], tokenizer)
    assert len(sample.segments) == 2
    assert {name: values.tolist() for name, values in sample.extra.items()} == {"label": [float(label)]}


def test_cutting_keeps_the_start_and_the_prompt(tokenizer):
    (whole,), _ = samples_of([pair(chosen="Seven " * 20)], tokenizer)
    prompt, chosen, rejected = whole.segments
    limit = len(prompt.tokens) + 5
    (cut,), counts = samples_of([pair(chosen="Seven " * 20)], tokenizer, limit)
    assert cut.segments[0].tokens.tolist() == prompt.tokens.tolist()
    assert cut.segments[1].tokens.tolist() == chosen.tokens[:5].tolist()
    assert cut.segments[2].tokens.tolist() == rejected.tokens[:5].tolist()
    assert counts.truncated.count == 1


def test_what_cannot_be_compared_is_dropped_and_counted(tokenizer):
    rows = [
        pair(),
        pair(chosen=" "),
        pair(rejected=""),
        pair(prompt=" "),
        pair(chosen="Same", rejected="Same"),
        pair(chosen="What is the capital? A", rejected="What is the capital? B"),
        pair(prompt="What is the capital of France? " * 9),
        {"prompt": "Q", "completion": "", "label": True},
    ]
    prompt = len(tokenizer.encode_prompt([{"role": "user", "content": "What is 7?"}]))
    samples, counts = samples_of(rows, tokenizer, prompt + 4)
    assert [sample.id for sample in samples] == ["f:1"]
    assert (counts.rows, counts.samples) == (8, 1)
    assert (counts.empty.count, counts.identical.count, counts.no_room.count) == (4, 2, 1)
    for words in ("1 sample of 8 rows", "dropped as empty: 4 (f:2, f:3, f:4, f:8)", "same answer twice: 2 (f:5, f:6)"):
        assert words in str(counts)


def test_without_a_template_prompt_and_answer_are_plain_text(chatml_folder):
    backend = tokenizers.Tokenizer.from_file(str(chatml_folder / "tokenizer.json"))
    plain = Tokenizer(backend, special_tokens={"eos_token": "<|endoftext|>"})
    (sample,), _ = samples_of([pair("The quick brown", " fox", " dog")], plain)
    prompt, chosen, rejected = sample.segments
    assert prompt.tokens.tolist() == plain.encode("The quick brown")
    for segment, text in ((chosen, " fox"), (rejected, " dog")):
        assert segment.tokens.tolist() == [*plain.encode(text), plain.eos_ids[0]]


def test_a_template_that_refuses_is_told_row_by_row(chatml_folder, tmp_path):
    template = tmp_path / "never.jinja"
    template.write_text("{{ raise_exception('never') }}")
    with pytest.raises(InputError, match=r"f:1: .*never") as caught:
        samples_of([pair(), pair()], Tokenizer.load(chatml_folder, str(template)))
    assert len(caught.value.mistakes) == 2


def test_only_the_rows_that_a_template_refuses_are_named(chatml_folder, tmp_path):
    template = tmp_path / "polite.jinja"
    template.write_text(
        "{% for m in messages %}{% if 'bad' in m.content %}{{ raise_exception('rude') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [pair(), pair(chosen="bad"), pair(), pair(rejected="bad"), pair()]
    with pytest.raises(InputError) as caught:
        samples_of(rows, Tokenizer.load(chatml_folder, str(template)))
    assert [mistake.split(": ")[0] for mistake in caught.value.mistakes] == ["f:2", "f:4"]


def test_a_source_is_read_and_kept(tokenizer, tmp_path):
    rows = [pair(), pair(chosen="", rejected="x"), {"chosen": [USER, *said("a")], "rejected": [OTHER, *said("b")]}]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, again = (load_comparisons(Data(train=str(path)), tokenizer, seed=0) for _ in range(2))
    assert len(first.train) == len(again.train) == 1
    assert first.train[0].id == f"{path}:1"
    assert [segment.parent for segment in again.train[0].segments] == [-1, 0, 0]
    assert np.isnan(again.train[0].extra["scores"]).all()
    assert str(first.report) == str(again.report)
    told = "1 sample of 3 rows", "dropped as empty: 1 (pairs.jsonl:2)", "different prompts: 1 (pairs.jsonl:3)"
    assert all(words in str(first.report) for words in told)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([pair(), {"prompt": "Q"}], r"pairs\.jsonl:2: columns prompt: known are chosen"),
        ([pair(), {"prompt": "Q", "completion": "a", "label": True}], r"pairs\.jsonl:2: single answers with a label"),
        ([pair(chosen="Same", rejected="Same")], r"data\.train: nothing in it can be learnt .* same answer twice: 1"),
    ],
)
def test_sources_that_cannot_be_trained_on(tokenizer, tmp_path, rows, why):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=why):
        load_comparisons(Data(train=str(path)), tokenizer, seed=0)


@pytest.mark.parametrize("name", ["chatml", "tagged", "llama2"])
def test_templates_of_all_kinds(folders, name):
    """Prompt and branch together are the conversation up to the last token that is learnt."""
    tokenizer = Tokenizer.load(folders[name])
    (sample,), _ = samples_of([pair()], tokenizer)
    for place in (0, 1):
        ids, mask = tokenizer.encode_batch([parse_preference(pair(), "").conversation(place)])[0]
        joined = np.concatenate([sample.segments[0].tokens, sample.segments[place + 1].tokens])
        weights = np.concatenate([sample.segments[0].weights, sample.segments[place + 1].weights])
        stop = np.flatnonzero(mask)[-1] + 1
        assert joined.tolist() == ids[:stop].tolist()
        assert weights.tolist() == mask[:stop].tolist()


@pytest.mark.parametrize(
    ("sequences", "length"),
    [([[1, 2, 3], [1, 2, 4]], 2), ([[1, 2], [1, 2, 3]], 2), ([[1], [2]], 0), ([[], [1]], 0), ([[1, 2]], 2)],
)
def test_common_prefix(sequences, length):
    assert common_prefix(sequences) == length


@pytest.mark.real_model
def test_public_pairs_have_the_tokens_that_trl_trains_on(shared, real_model):
    tokenizer = Tokenizer.load(open_model(str(real_model)).tokenizer_dir)
    lines = (shared / "data" / "bench" / "pref64.jsonl").read_text(encoding="utf-8").splitlines()
    samples, counts = samples_of([json.loads(line) for line in lines], tokenizer, 512)
    assert len(samples) == 64
    assert (counts.prompt_tokens, counts.chosen_tokens, counts.rejected_tokens) == (4007, 7063, 4639)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=40), st.floats(0.01, 0.99), st.integers(0, 3))
def test_what_is_the_same_is_held_out_together(groups: list[int], fraction: float, seed: int) -> None:
    same = [bytes([group]) for group in groups]
    if len(set(groups)) < 2:
        with pytest.raises(InputError, match="one prompt cannot be split"):
            hold_out(len(groups), fraction, seed, same)
        return
    kept, held_out = hold_out(len(groups), fraction, seed, same)
    assert sorted([*kept, *held_out]) == list(range(len(groups)))
    assert len(kept) and len(held_out)
    assert not {groups[place] for place in kept} & {groups[place] for place in held_out}
    fewest = len(held_out) - max(groups.count(group) for group in groups)
    assert fewest < max(1, round(fraction * len(groups)))  # no more groups than the share asks for


def test_a_share_is_held_out_by_prompt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": f"Say {n // 4}.", "chosen": f"It is {n}.", "rejected": "No."} for n in range(40)]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = load_comparisons(Data(train=str(path), val_fraction=0.2), tokenizer, seed=0)
    assert data.val is not None and len(data.val) == 8
    prompts = [{prompt_of(part[place]) for place in range(len(part))} for part in (data.train, data.val)]
    assert not prompts[0] & prompts[1]

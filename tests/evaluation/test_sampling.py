"""Answers: stop strings, and text as it appears."""

from __future__ import annotations

import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.evaluation import sampling
from litrecipe.evaluation.sampling import TextStream, complete, plain_prompt

PROMPTS = ["The quick", "How do I ready a guinea pig cage for its new occupants?", "a", "🎈", "Answer: yes no", "12 km"]


def stream(tiny, text: str, stop: list[str]) -> tuple[list[str], TextStream]:
    answer = TextStream(tiny.tokenizer, stop)
    pieces = []
    for token in tiny.tokenizer.encode(text):
        pieces.append(answer.add(token))
        if answer.stopped:
            break
    return [*pieces, answer.end()], answer


@pytest.mark.parametrize("text", ["plain words", "é 🎈 你好 — ok", " leading space", "trailing  "])
def test_streamed_text_is_the_text(tiny, text) -> None:
    pieces, answer = stream(tiny, text, [])
    assert "".join(pieces) == answer.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_ends_before_the_first_stop_string(tiny) -> None:
    pieces, answer = stream(tiny, "one two\nthree <END> four", ["<END>", "zzz"])
    assert "".join(pieces) == answer.text == "one two\nthree "
    assert answer.stopped
    _, answer = stream(tiny, "abcabd", ["bd", "ca"])
    assert answer.text == "ab"


def test_what_may_begin_a_stop_string_is_held_back(tiny) -> None:
    answer = TextStream(tiny.tokenizer, ["\n\nUser:"])
    given = "".join(answer.add(token) for token in tiny.tokenizer.encode("yes\n\nUs"))
    assert given == "yes"
    assert answer.end() == "\n\nUs"
    assert not answer.stopped


def test_answers_do_not_depend_on_the_batch(tiny) -> None:
    prompts = [plain_prompt(tiny.tokenizer, prompt) for prompt in PROMPTS]
    settings = Generate(max_new_tokens=20, stop=["e"])
    together = complete(tiny.model, tiny.tokenizer, prompts, settings)
    alone = [complete(tiny.model, tiny.tokenizer, [prompt], settings)[0] for prompt in prompts]
    assert together == alone
    assert all("e" not in answer.text for answer in together)


def test_sampling_stops_soon_after_a_stop_string(tiny) -> None:
    """The answer without a stop string is longer than the one that ends at its third character."""
    prompt = plain_prompt(tiny.tokenizer, "The quick")
    [free] = complete(tiny.model, tiny.tokenizer, [prompt], Generate(max_new_tokens=30))
    [cut] = complete(tiny.model, tiny.tokenizer, [prompt], Generate(max_new_tokens=30, stop=[free.text[2]]))
    assert cut.text == free.text[: free.text.index(free.text[2])]
    assert len(cut.tokens) < len(free.tokens)
    assert cut.tokens == free.tokens[: len(cut.tokens)]


def test_pieces_are_the_answer(tiny) -> None:
    pieces: list[str] = []
    prompt = plain_prompt(tiny.tokenizer, "The quick")
    [answer] = complete(tiny.model, tiny.tokenizer, [prompt], Generate(max_new_tokens=12), on_text=pieces.append)
    assert "".join(pieces) == answer.text
    assert len(pieces) > 3


def test_sampling_with_a_seed_repeats_itself(tiny) -> None:
    prompts = [plain_prompt(tiny.tokenizer, "The quick")] * 4

    def sample(seed: int) -> list[str]:
        settings = Generate(max_new_tokens=12, temperature=1.5, seed=seed)
        return [answer.text for answer in complete(tiny.model, tiny.tokenizer, prompts, settings)]

    assert sample(1) == sample(1) != sample(2)
    assert len(set(sample(1))) > 1


def test_sampled_answers_do_not_depend_on_the_batches(tiny) -> None:
    prompts = [plain_prompt(tiny.tokenizer, prompt) for prompt in PROMPTS] * 2
    settings = Generate(max_new_tokens=12, temperature=1.0, stop=["e"])
    together = complete(tiny.model, tiny.tokenizer, prompts, settings)
    assert complete(tiny.model, tiny.tokenizer, prompts, settings, batch_tokens=60) == together
    assert complete(tiny.model, tiny.tokenizer, prompts[:3], settings) == together[:3]
    assert together[: len(PROMPTS)] != together[len(PROMPTS) :]


def test_an_answer_that_met_a_stop_string_leaves_the_batch(tiny, monkeypatch) -> None:
    """The first forward pass reads the prompts, each later one a token of every answer that goes on."""
    prompts = [plain_prompt(tiny.tokenizer, prompt) for prompt in PROMPTS]
    read = []
    decode = tiny.model.decode
    monkeypatch.setattr(tiny.model, "decode", lambda tokens, step: read.append(len(tokens)) or decode(tokens, step))
    answers = complete(tiny.model, tiny.tokenizer, prompts, Generate(max_new_tokens=40, stop=["e", "o", "a"]))
    lengths = sorted(len(answer.tokens) for answer in answers)
    assert lengths[-1] > 2 * lengths[2]
    assert read[0] == sum(map(len, prompts))
    assert read[1:] == [sum(length > step for length in lengths) for step in range(1, lengths[-1])]


def test_how_an_answer_ended(tiny) -> None:
    """By an end token, by a control token among the stop strings, by a stop string, or by the limit."""
    prompts = [plain_prompt(tiny.tokenizer, prompt) for prompt in PROMPTS]
    hot = {"max_new_tokens": 200, "temperature": 3.0}
    eos, control = tiny.tokenizer.eos_ids[0], "<|im_start|>"
    [start] = tiny.tokenizer.encode(control, specials=True)
    ended = complete(tiny.model, tiny.tokenizer, prompts * 4, Generate(**hot))
    assert {(answer.ended, answer.stop_id) for answer in ended} == {("eos", eos), ("length", None)}
    assert all(len(answer.tokens) == 200 for answer in ended if answer.ended == "length")
    stopped = complete(tiny.model, tiny.tokenizer, prompts * 4, Generate(**hot, stop=["e", control]))
    kinds = {(answer.ended, answer.stop_id) for answer in stopped}
    assert kinds >= {("stop", start), ("stop", None)} and kinds <= {("stop", start), ("stop", None), ("eos", eos)}


def test_several_answers_to_each_prompt(tiny) -> None:
    prompts = [plain_prompt(tiny.tokenizer, prompt) for prompt in PROMPTS]
    settings = Generate(max_new_tokens=12, temperature=1.0)
    thrice = [prompt for prompt in prompts for _ in range(3)]
    answers = complete(tiny.model, tiny.tokenizer, prompts, settings, completions=3, batch_tokens=90)
    assert answers == complete(tiny.model, tiny.tokenizer, thrice, settings)
    streams = list(range(len(thrice)))[::-1]
    backwards = complete(tiny.model, tiny.tokenizer, thrice[::-1], settings, streams=streams)
    assert backwards == answers[::-1]


def test_the_cache_keeps_to_its_places(tiny, monkeypatch) -> None:
    read = []
    decode = tiny.model.decode
    monkeypatch.setattr(
        tiny.model, "decode", lambda tokens, step: read.append(len(step.places)) or decode(tokens, step)
    )
    complete(tiny.model, tiny.tokenizer, [[5] * 10] * 9, Generate(max_new_tokens=11), batch_tokens=3 * (10 + 11))
    assert max(read) == 3


def test_progress_is_told_by_answers(tiny, monkeypatch) -> None:
    told = []
    monkeypatch.setattr(sampling, "track", lambda items, label, total: told.append((label, total)) or items)
    complete(tiny.model, tiny.tokenizer, [[5], [6]], Generate(max_new_tokens=2), completions=2, progress="asking")
    assert told == [("asking", 4)]


def test_a_prompt_that_leaves_no_room(tiny) -> None:
    with pytest.raises(InputError, match=r"max_new_tokens: 20: .* has 250 tokens and the model reads 256: at most 6"):
        complete(tiny.model, tiny.tokenizer, [[5] * 250], Generate(max_new_tokens=20))
    with pytest.raises(InputError, match="shorten the prompt"):
        complete(tiny.model, tiny.tokenizer, [[5] * 300], Generate(max_new_tokens=20))

from __future__ import annotations

from collections import Counter

import pytest
import torch

from litrecipe.config.errors import InputError
from litrecipe.model.architecture import read_architecture
from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import choose, generate

CONTEXT = 48
CONFIG = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": CONTEXT,
}


@pytest.fixture(scope="module")
def model() -> Decoder:
    model = Decoder(read_architecture(CONFIG))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (n,), generator=generator).tolist() for n in (3, 11, 1, 20, 7, 42, 11)]


@torch.no_grad()
def greedily(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The definition: the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model.logits(torch.tensor(tokens))[-1].argmax()))
    return tokens[len(prompt) :]


def test_batched_equals_one_by_one_and_the_definition(model: Decoder, prompts: list[list[int]]) -> None:
    batched = generate(model, prompts, max_new_tokens=20)
    assert batched == [generate(model, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert batched == [greedily(model, prompt, min(20, CONTEXT - len(prompt))) for prompt in prompts]


def test_stop_ids_end_an_answer_and_are_not_part_of_it(model: Decoder, prompts: list[list[int]]) -> None:
    whole = generate(model, prompts, max_new_tokens=20)
    ((often, _),) = Counter(token for answer in whole for token in set(answer)).most_common(1)
    stops = {often, whole[0][4]}
    expected = [answer[: next((i for i, t in enumerate(answer) if t in stops), len(answer))] for answer in whole]
    assert len({len(answer) for answer in expected}) > 2
    assert generate(model, prompts, max_new_tokens=20, stop_ids=stops) == expected


def test_sampling_does_not_depend_on_neighbours(model: Decoder, prompts: list[list[int]]) -> None:
    settings = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 20, "top_p": 0.9}
    sampled = generate(model, prompts, seed=5, **settings)  # type: ignore[arg-type]
    assert generate(model, prompts[:2], seed=5, **settings) == sampled[:2]  # type: ignore[arg-type]
    assert generate(model, prompts, seed=6, **settings) != sampled  # type: ignore[arg-type]
    twins = generate(model, [prompts[0], prompts[0]], seed=5, **settings)  # type: ignore[arg-type]
    assert twins[0] == sampled[0]
    assert twins[1] != twins[0]


def test_tokens_are_told_as_they_come(model: Decoder, prompts: list[list[int]]) -> None:
    told: list[tuple[int, int]] = []

    def tell(index: int, token: int) -> bool:
        told.append((index, token))
        return False

    answers = generate(model, prompts, max_new_tokens=5, on_token=tell)
    assert [[token for index, token in told if index == i] for i in range(len(prompts))] == answers
    assert [index for index, _ in told[: len(prompts)]] == list(range(len(prompts)))


def test_telling_may_end_it(model: Decoder, prompts: list[list[int]]) -> None:
    told: list[int] = []

    def stop_at_three(index: int, token: int) -> bool:
        told.append(token)
        if len(told) == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts[:1], max_new_tokens=9, on_token=stop_at_three)
    assert told == generate(model, prompts[:1], max_new_tokens=3)[0]


def test_answers_that_are_told_to_end_leave_the_batch(model: Decoder, prompts: list[list[int]], monkeypatch) -> None:
    """Prompt i ends after i + 1 tokens; the tokens are those of a batch in which nobody ends early."""
    whole = generate(model, prompts[:5], max_new_tokens=8)
    sizes: list[int] = []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda tokens, *rest: sizes.append(len(tokens)) or decode(tokens, *rest))
    left = [1, 2, 3, 4, 5]

    def count_down(index: int, token: int) -> bool:
        left[index] -= 1
        return left[index] == 0

    assert generate(model, prompts[:5], max_new_tokens=8, on_token=count_down) == [
        answer[: index + 1] for index, answer in enumerate(whole)
    ]
    assert sizes == [5, 5, 5, 2, 1]


def test_a_stream_and_a_seed_are_two_things(model: Decoder, prompts: list[list[int]]) -> None:
    def sample(seed: int, *streams: int) -> list[list[int]]:
        same = [prompts[0]] * len(streams)
        return generate(model, same, max_new_tokens=12, temperature=1.0, seed=seed, streams=streams)

    assert sample(0, 5, 2) == sample(0, 5) + sample(0, 2)
    assert len({tuple(*sample(seed, stream)) for seed in (0, 2, 5) for stream in (0, 2, 5)}) == 9


def test_an_answer_ends_where_the_context_does(model: Decoder) -> None:
    prompt = [5] * (CONTEXT - 4)
    assert [len(a) for a in generate(model, [prompt, [5]], max_new_tokens=100)] == [4, CONTEXT - 1]


def test_prompts_that_cannot_be_read_are_named(model: Decoder) -> None:
    with pytest.raises(InputError) as error:
        generate(model, [[1], [], [1] * CONTEXT], max_new_tokens=2)
    assert [mistake.split(":")[0] for mistake in error.value.mistakes] == ["prompt 1", "prompt 2"]
    assert str(CONTEXT) in error.value.mistakes[1]


def test_nothing_to_do(model: Decoder) -> None:
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, [[1], [2]], max_new_tokens=0) == [[], []]


def frequencies(logits: torch.Tensor, **settings: float) -> torch.Tensor:
    """Share of each token under a fine grid of draws: an exact integral over the draw, to 1 in 10,000."""
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    chosen = choose(logits.expand(10_000, -1), draws, **settings)  # type: ignore[arg-type]
    return chosen.bincount(minlength=logits.shape[-1]) / 10_000


def test_tokens_are_drawn_from_their_distribution() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    logits = probabilities.log()
    assert choose(logits[None], torch.tensor([0.99]), 0.0).tolist() == [1]
    torch.testing.assert_close(frequencies(logits, temperature=1.0), probabilities, atol=2e-4, rtol=0)
    cold = probabilities**2 / (probabilities**2).sum()
    torch.testing.assert_close(frequencies(logits, temperature=0.5), cold, atol=2e-4, rtol=0)
    two = torch.tensor([0, 4 / 7, 0, 3 / 7, 0])
    torch.testing.assert_close(frequencies(logits, temperature=1.0, top_k=2), two, atol=2e-4, rtol=0)
    three = torch.tensor([0, 0.4, 0, 0.3, 0.15]) / 0.85
    torch.testing.assert_close(frequencies(logits, temperature=1.0, top_p=0.75), three, atol=2e-4, rtol=0)
    both = frequencies(logits, temperature=1.0, top_k=3, top_p=0.7)
    torch.testing.assert_close(both, two, atol=2e-4, rtol=0)
    one = frequencies(logits, temperature=1.0, top_p=0.0)
    assert one.tolist() == [0, 1, 0, 0, 0]
    assert frequencies(logits, temperature=1.0, top_k=99).count_nonzero() == 5


def test_a_token_that_cannot_come_never_comes() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for draw in (0.0, 0.5, 1 - 1e-16):
        assert choose(logits, torch.tensor([draw], dtype=torch.float64), 1.0).item() in (0, 2)

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from litrecipe.config.errors import InputError
from litrecipe.model import decoding, laid_out
from litrecipe.model.cache import CacheStep, KVCache
from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import Sampled, choose, generate, sample
from litrecipe.model.families import read_architecture
from litrecipe.model.laid_out import LaidOut

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


@pytest.fixture(autouse=True, params=["the model's layers", "laid out"])
def layers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that is said here holds for both ways of computing."""
    monkeypatch.setattr(laid_out, "COMPLETIONS", 1)
    monkeypatch.setattr(laid_out, "TOKENS", 1 if request.param == "laid out" else 10**9)
    return request.param


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


def tokens_of(model: Decoder, prompts: list[list[int]], **settings: Any) -> list[list[int]]:
    """The completions' tokens alone."""
    return [found.tokens for found in generate(model, prompts, **settings)]


@pytest.fixture
def steps(layers: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int], KVCache]]:
    """Filled while sampling: of each forward pass the positions of sequences that went on, lengths of prompts that were
    read, and the cache as (rows, slots)."""
    seen: list[Any] = []
    owner, begin = LaidOut if layers == "laid out" else Decoder, KVCache.resize
    decode = owner.decode

    def watch(self: Any, tokens: torch.Tensor, step: CacheStep) -> torch.Tensor:
        prompts = [span.stop - span.start for span in step.spans]
        assert len(tokens) == step.count + sum(prompts)
        seen.append((step.positions[: step.count].tolist(), prompts, caches[-1]))
        return decode(self, tokens, step)

    def resize(cache: KVCache, rows: int, slots: int) -> None:
        caches.append((rows, slots))
        begin(cache, rows, slots)

    caches: list[tuple[int, int]] = []
    monkeypatch.setattr(owner, "decode", watch)
    monkeypatch.setattr(KVCache, "resize", resize)
    return seen


SAMPLED: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "top_k": 20, "top_p": 0.9, "seed": 5}


def test_batched_equals_one_by_one_and_the_definition(model: Decoder, prompts: list[list[int]]) -> None:
    batched = tokens_of(model, prompts, max_new_tokens=20)
    assert batched == [tokens_of(model, [prompt], max_new_tokens=20)[0] for prompt in prompts]
    assert batched == [greedily(model, prompt, min(20, CONTEXT - len(prompt))) for prompt in prompts]


@pytest.mark.parametrize("cache_tokens", [1, 60, 100, 200])
@pytest.mark.parametrize("settings", [{"max_new_tokens": 12}, SAMPLED], ids=["greedy", "sampled"])
def test_a_small_cache_changes_nothing(model: Decoder, prompts: list[list[int]], cache_tokens: int, settings) -> None:
    stops = range(0, 61, 7)
    whole = generate(model, prompts, stop_ids=stops, completions=3, **settings)
    assert len({len(found.tokens) for found in whole}) > 3
    small = generate(model, prompts, stop_ids=stops, completions=3, cache_tokens=cache_tokens, **settings)
    assert small == whole


def test_completions_of_a_prompt_are_those_of_its_copies(model: Decoder, prompts: list[list[int]]) -> None:
    copies = [list(prompt) for prompt in prompts for _ in range(3)]
    assert generate(model, prompts, completions=3, **SAMPLED) == generate(model, copies, **SAMPLED)


def test_a_prompt_is_read_once_for_its_completions(model: Decoder, prompts: list[list[int]], steps) -> None:
    """However few rows there are, and however often its completions wait for one another."""
    for cache_tokens in (None, 120, 1):
        steps.clear()
        generate(model, prompts, completions=4, stop_ids=range(0, 61, 5), cache_tokens=cache_tokens, **SAMPLED)
        assert sorted(n for _, read, _ in steps for n in read) == sorted(map(len, prompts))


def test_the_batch_stays_full(model: Decoder, steps) -> None:
    """Nine prompts of two tokens, completion i of 1 + i % 3 tokens, with three rows of 2 + 3 - 1 slots.

    Those that get a token in each step are 012, 123 (0 has ended), 245 (1 and 3), 456 (2), 578 (4 and 6), 78 (5) and 8
    (7): the batch is full until nobody waits.
    """
    left = [1 + index % 3 for index in range(9)]

    def count_down(index: int, token: int) -> bool:
        left[index] -= 1
        return left[index] == 0

    found = generate(model, [[1, n] for n in range(9)], max_new_tokens=3, cache_tokens=12, on_token=count_down)
    assert [len(completion.tokens) for completion in found] == [1, 2, 3] * 3
    assert [len(going) + len(read) for going, read, _ in steps] == [3, 3, 3, 3, 3, 2, 1]
    assert [len(read) for _, read, _ in steps] == [3, 1, 2, 1, 2, 0, 0]
    assert {cache for *_, cache in steps} == {(3, 4)}


def test_the_cache_keeps_to_its_places(model: Decoder, prompts: list[list[int]], steps) -> None:
    """It grows in rows once those with long prompts have ended; a single sequence may need more than allowed."""
    generate(model, [*prompts, *([[1, 2]] * 9)], max_new_tokens=8, cache_tokens=60)
    caches = list(dict.fromkeys(cache for *_, cache in steps))
    assert caches[0] == (1, 47)  # 42 tokens and room for 6: the context ends there
    assert caches[-1][0] >= 4
    assert all(rows * slots <= 60 or rows == 1 for rows, slots in caches)
    assert all(len(going) + len(read) <= rows for going, read, (rows, _) in steps)
    steps.clear()
    generate(model, prompts, max_new_tokens=8)
    assert {cache for *_, cache in steps} == {(7, 47)}


def test_who_shares_the_model_goes_on_until_nobody_has_anything_left(
    model: Decoder, prompts: list[list[int]], steps
) -> None:
    """Its passes of nothing change nothing of what was sampled, and come to as many as another process makes."""
    asked: list[bool] = []

    def any_left(busy: bool) -> bool:
        asked.append(busy)
        return len(asked) <= 12

    expected = generate(model, prompts[:3], max_new_tokens=5)
    steps.clear()
    assert generate(model, prompts[:3], max_new_tokens=5, any_left=any_left) == expected
    assert asked == [True] * 5 + [False] * 8 and len(steps) == 12
    asked.clear()
    assert generate(model, [], max_new_tokens=5, any_left=any_left) == [] and asked == [False] * 13


def test_many_prompts_are_read_some_at_a_time(model: Decoder, monkeypatch, steps) -> None:
    monkeypatch.setattr(decoding, "READ_AT_ONCE", 25)
    prompts = [[3] * 30, *([[7, i] * 5 for i in range(4)])]
    whole = tokens_of(model, prompts, max_new_tokens=4)
    assert [read for _, read, _ in steps][:4] == [[30], [10, 10], [10, 10], []]
    assert whole == [greedily(model, prompt, 4) for prompt in prompts]


def test_stop_ids_end_a_completion_and_are_not_part_of_it(model: Decoder, prompts: list[list[int]]) -> None:
    whole = tokens_of(model, prompts, max_new_tokens=20)
    ((often, _),) = Counter(token for answer in whole for token in set(answer)).most_common(1)
    stops = {often, whole[0][4]}
    expected = []
    for answer in whole:
        end = next((i for i, token in enumerate(answer) if token in stops), None)
        expected.append(Sampled(answer, "length") if end is None else Sampled(answer[:end], "eos", answer[end]))
    assert len({len(found.tokens) for found in expected}) > 2
    assert {found.stop_id for found in expected} == {*stops, None}
    assert generate(model, prompts, max_new_tokens=20, stop_ids=stops) == expected


def test_sampling_does_not_depend_on_neighbours(model: Decoder, prompts: list[list[int]]) -> None:
    sampled = generate(model, prompts, **SAMPLED)
    assert generate(model, prompts[:2], **SAMPLED) == sampled[:2]
    assert generate(model, prompts, **SAMPLED | {"seed": 6}) != sampled
    twins = generate(model, [prompts[0], prompts[0]], **SAMPLED)
    assert twins[0] == sampled[0]
    assert twins[1] != twins[0]


def test_completions_come_as_they_end(model: Decoder, prompts: list[list[int]]) -> None:
    """Prompt i ends after i + 1 tokens; they come in that order, though long prompts are read first."""
    left = [1, 2, 3, 4, 5]

    def count_down(index: int, token: int) -> bool:
        left[index] -= 1
        return left[index] == 0

    coming = sample(model, prompts[:5], max_new_tokens=8, on_token=count_down)
    assert next(coming)[0] == 0
    assert left == [0, 1, 2, 3, 4]
    assert [index for index, _ in coming] == [1, 2, 3, 4]


def test_tokens_are_told_as_they_come(model: Decoder, prompts: list[list[int]]) -> None:
    told: list[tuple[int, int]] = []

    def tell(index: int, token: int) -> bool:
        told.append((index, token))
        return False

    answers = tokens_of(model, prompts, max_new_tokens=5, on_token=tell)
    assert [[token for index, token in told if index == i] for i in range(len(prompts))] == answers
    for step in range(5):
        assert sorted(index for index, _ in told[step * 7 : step * 7 + 7]) == list(range(7))


def test_telling_may_raise(model: Decoder, prompts: list[list[int]]) -> None:
    told: list[int] = []

    def stop_at_three(index: int, token: int) -> bool:
        told.append(token)
        if len(told) == 3:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        generate(model, prompts[:1], max_new_tokens=9, on_token=stop_at_three)
    assert told == tokens_of(model, prompts[:1], max_new_tokens=3)[0]


def test_completions_that_are_told_to_end_leave_the_batch(model: Decoder, prompts: list[list[int]], steps) -> None:
    """Prompt i ends after i + 1 tokens; the tokens are those of a batch in which nobody ends early."""
    whole = tokens_of(model, prompts[:5], max_new_tokens=8)
    left = [1, 2, 3, 4, 5]

    def count_down(index: int, token: int) -> bool:
        left[index] -= 1
        return left[index] == 0

    steps.clear()
    assert generate(model, prompts[:5], max_new_tokens=8, on_token=count_down) == [
        Sampled(answer[: index + 1], "stop") for index, answer in enumerate(whole)
    ]
    assert [len(going) + len(read) for going, read, _ in steps] == [5, 4, 3, 2, 1]


def test_a_stream_and_a_seed_are_two_things(model: Decoder, prompts: list[list[int]]) -> None:
    def draw(seed: int, *streams: int) -> list[list[int]]:
        same = [prompts[0]] * len(streams)
        return tokens_of(model, same, max_new_tokens=12, temperature=1.0, seed=seed, streams=streams)

    assert draw(0, 5, 2) == draw(0, 5) + draw(0, 2)
    assert len({tuple(*draw(seed, stream)) for seed in (0, 2, 5) for stream in (0, 2, 5)}) == 9


def test_a_seed_gives_what_it_always_gave(model: Decoder) -> None:
    """Recorded when the batch was not yet refilled, and all sums were taken in double precision."""
    assert tokens_of(model, [[1, 2, 3], [4]], max_new_tokens=8, temperature=1.0, seed=3) == [
        [51, 24, 16, 19, 50, 49, 37, 52],
        [27, 15, 6, 42, 23, 12, 30, 57],
    ]


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision(model: Decoder, prompts: list[list[int]], how: str) -> None:
    """Each token is the likeliest by logits in fp32, up to what bfloat16's eight bits leave open: 2^-8 a rounding of
    logits that lie about 1 below the highest, and a few roundings."""
    half = copy.deepcopy(model).bfloat16() if how == "weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        found = tokens_of(half, prompts, max_new_tokens=8, cache_tokens=100)
    for prompt, tokens in zip(prompts, found, strict=True):
        logits = model.logits(torch.tensor(prompt + tokens[:-1]))[len(prompt) - 1 :]
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert behind.max() < 8 * 2**-8


def test_a_completion_ends_where_the_context_does(model: Decoder) -> None:
    prompt = [5] * (CONTEXT - 4)
    found = generate(model, [prompt, [5]], max_new_tokens=100)
    assert [len(completion.tokens) for completion in found] == [4, CONTEXT - 1]
    assert {completion.ended for completion in found} == {"length"}


def test_a_signal_stops_sampling(model: Decoder, monkeypatch) -> None:
    """It is asked for before every forward pass."""
    polls = iter([False, False, False, True])

    def poll() -> None:
        if next(polls):
            raise SystemExit(85)

    told: list[int] = []

    def tell(index: int, token: int) -> bool:
        told.append(token)
        return False

    monkeypatch.setattr(decoding.stop, "poll", poll)
    with pytest.raises(SystemExit):
        generate(model, [[1]], max_new_tokens=9, on_token=tell)
    assert len(told) == 3


def test_prompts_that_cannot_be_read_are_named(model: Decoder) -> None:
    with pytest.raises(InputError) as error:
        generate(model, [[1], [], [1] * CONTEXT], max_new_tokens=2)
    assert [mistake.split(":")[0] for mistake in error.value.mistakes] == ["prompt 1", "prompt 2"]
    assert str(CONTEXT) in error.value.mistakes[1]


def test_nothing_to_do(model: Decoder) -> None:
    assert generate(model, [], max_new_tokens=5) == []
    assert generate(model, [[1], [2]], max_new_tokens=0, completions=2) == [Sampled([], "length")] * 4


@pytest.mark.real_model
def test_the_real_model_continues_as_in_transformers(real_model: Path, tmp_path: Path) -> None:
    """Greedily, with a cache for two at a time; transformers reads each prompt on its own."""
    from transformers import AutoModelForCausalLM

    from litrecipe.checkpoint.hf import save_model
    from litrecipe.checkpoint.load import load_model
    from litrecipe.checkpoint.source import open_model
    from litrecipe.data.tokenizer import Tokenizer

    files = open_model(str(real_model))
    ours, tokenizer = load_model(files), Tokenizer.load(files.tokenizer_dir)
    save_model(tmp_path / "hf", ours, files.tokenizer_dir)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    prompts = [tokenizer.encode(text) for text in ("The capital of France", "def f(x):", "Once upon a time, there was")]
    found = tokens_of(ours, prompts, max_new_tokens=16, cache_tokens=2 * (16 + max(map(len, prompts))))
    for prompt, tokens in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False}
        assert theirs.generate(ids, eos_token_id=None, **settings)[0, len(prompt) :].tolist() == tokens


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


@pytest.mark.parametrize("vocabulary", [1, 255, 256, 257, 700])
def test_a_draw_picks_by_the_running_sum(vocabulary: int) -> None:
    """The definition: the first token up to which, in double precision, more than the drawn share has come. Draws lie
    amid tokens, whose shares (above 1e-5) are far wider than the rounding of fp32, and at both ends; every third token
    cannot come."""
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3))
    logits[0 if vocabulary > 1 else 1 :: 3] = -torch.inf
    share = logits.double().div(0.7).softmax(-1)
    able = share.nonzero()[:, 0]
    draws = torch.cat((share.cumsum(-1)[able] - share[able] / 2, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)))
    wanted = torch.cat((able, able[[0, -1]]))
    assert torch.equal(choose(logits.expand(len(draws), -1), draws, 0.7), wanted)

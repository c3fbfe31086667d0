"""Text out of a decoder: batched, left-padded, with a key/value cache.

Shapes: B prompts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from litrecipe.config import stop
from litrecipe.config.errors import InputError
from litrecipe.model.cache import KVCache
from litrecipe.model.decoder import Decoder

OnToken = Callable[[int, int], bool]
"""Told the prompt's index and each token of its answer as it comes; says whether that token ends the answer."""


@torch.no_grad()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    streams: Sequence[int] | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """Continue each prompt; all prompts are decoded as one batch.

    Returns the new tokens of each, without the stop id that ended it. An answer also ends where `on_token` says so,
    after `max_new_tokens`, or where prompt and answer fill the model's context. Temperature 0 takes the likeliest
    token; otherwise each prompt draws from a stream of its own, derived from `seed` and its number in `streams`
    (default: its place), so that its answer does not depend on its neighbours.

    Raises InputError naming the prompts that are empty or leave no room in the context.
    """
    _check(prompts, model.architecture.max_positions)
    if not prompts or max_new_tokens < 1:
        return [[] for _ in prompts]
    embedding = model.model.embed_tokens.weight
    device = embedding.device
    room = [min(max_new_tokens, model.architecture.max_positions - len(prompt)) for prompt in prompts]
    longest = max(map(len, prompts))
    cache = KVCache(model.architecture, len(prompts), longest + max(room) - 1, embedding.dtype, device)
    tokens, positions = (part.to(device) for part in _pad_left(prompts, longest))
    draws = torch.stack([_draws(seed, stream, max(room)) for stream in streams or range(len(prompts))])
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))
    """Prompt of each row of the batch; a finished one stays until half of the batch can be dropped."""
    open_rows = set(rows)
    for step in range(max(room)):
        stop.poll()
        logits = model.decode(tokens, positions, cache).float()
        chosen = choose(logits, draws[rows, step], temperature, top_k, top_p)
        for index, token in zip(rows, chosen.tolist(), strict=True):
            if index not in open_rows:
                continue
            ended = token in stop_ids
            if not ended:
                answers[index].append(token)
                ended = len(answers[index]) == room[index]
                if on_token is not None and on_token(index, token):
                    ended = True
            if ended:
                open_rows.remove(index)
        if not open_rows:
            break
        tokens, positions = chosen[:, None].to(device), positions[:, -1:] + 1
        if 2 * len(open_rows) <= len(rows):
            kept = [place for place, index in enumerate(rows) if index in open_rows]
            rows = [rows[place] for place in kept]
            cache.keep(kept)
            tokens, positions = tokens[kept], positions[kept]
    return answers


def choose(logits: Tensor, draws: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The next token (B,) of each row of logits (B, V).

    `draws` (B,) in [0, 1) pick from the cumulative distribution at `temperature` (0: the likeliest token), cut to the
    `top_k` likeliest tokens (0: all) and then to the fewest likeliest ones that hold the probability `top_p`
    (1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if logits.device.type == "mps":
        logits = logits.cpu()  # mps has no fp64
    tokens = None
    if top_k > 0 or top_p < 1:
        logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    held = cumulative[:, -1:]
    if top_p < 1:
        last = torch.searchsorted(cumulative, held * top_p)
        held = cumulative.gather(1, last.clamp(max=cumulative.shape[-1] - 1))
    drawn = held * draws[:, None].to(held.device)
    picked = torch.searchsorted(cumulative, drawn, right=True).clamp(max=cumulative.shape[-1] - 1)
    return (picked if tokens is None else tokens.gather(1, picked))[:, 0]


def _check(prompts: Sequence[Sequence[int]], context: int) -> None:
    mistakes = [f"prompt {index}: empty: it needs at least one token" for index, p in enumerate(prompts) if not p]
    mistakes += [
        f"prompt {index}: {len(prompt)} tokens: the model's context is {context}, and an answer needs room: shorten it"
        for index, prompt in enumerate(prompts)
        if len(prompt) >= context
    ]
    if mistakes:
        raise InputError(*mistakes)


def _pad_left(prompts: Sequence[Sequence[int]], length: int) -> tuple[Tensor, Tensor]:
    """Tokens and positions (B, length); padding has negative positions and is never seen."""
    tokens = torch.zeros(len(prompts), length, dtype=torch.int64)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[length - len(prompt) :] = torch.tensor(prompt)
    padding = torch.tensor([[length - len(prompt)] for prompt in prompts])
    return tokens, torch.arange(length) - padding


def _draws(seed: int, stream: int, count: int) -> Tensor:
    """`count` uniform numbers of a stream, (count,) fp64."""
    state = int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> 1)
    return torch.rand(count, generator=torch.Generator().manual_seed(state), dtype=torch.float64)

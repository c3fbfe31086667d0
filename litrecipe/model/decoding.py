"""Text out of a decoder: a batch that stays full, with a key/value cache.

A finished sequence leaves the batch at once and the next one enters: its prompt is read in the same forward pass that
gives the others their next token, packed, and once for all its completions.

Shapes: B sequences, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from litrecipe.config import stop
from litrecipe.config.errors import InputError
from litrecipe.model.cache import CacheStep, KVCache
from litrecipe.model.decoder import Decoder
from litrecipe.model.laid_out import lay_out, pays

OnToken = Callable[[int, int], bool]
"""Told a completion's index and each of its tokens as it comes; says whether that token ends the completion."""
Ended = Literal["eos", "stop", "length"]
AnyLeft = Callable[[bool], bool]
"""Told whether this process has something left; says whether any of those has that share the model."""

READ_AT_ONCE = 2048
"""Tokens of prompts in one forward pass, unless a prompt is longer."""
GROWTH = 1.25
"""Times as many rows must fit before a cache is made anew."""
BLOCK = 256
"""Tokens of the vocabulary whose probabilities are added up before any is looked at alone."""


@dataclass(frozen=True)
class Sampled:
    """One completion."""

    tokens: list[int]
    """Without the stop id."""
    ended: Ended
    """By a stop id, because `on_token` said so, or for want of room."""
    stop_id: int | None = None
    """The stop id that ended it."""


def generate(model: Decoder, prompts: Sequence[Sequence[int]], **settings: Any) -> list[Sampled]:
    """What `sample` yields, in order: the completions of the first prompt, then of the second, and so on."""
    found = dict(sample(model, prompts, **settings))
    return [found[index] for index in range(len(found))]


@torch.no_grad()
def sample(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    completions: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    streams: Sequence[int] | None = None,
    cache_tokens: int | None = None,
    on_token: OnToken | None = None,
    any_left: AnyLeft | None = None,
) -> Iterator[tuple[int, Sampled]]:
    """Continue each prompt `completions` times; yields (index, completion) as they end.

    Completion c of prompt p has the index p · `completions` + c. It ends with one of `stop_ids`, where `on_token` says
    so, after `max_new_tokens`, or where it fills the model's context. Temperature 0 takes the likeliest token;
    otherwise each completion draws from a stream of its own, derived from `seed` and its number in `streams` (default:
    its index), so that it depends neither on its neighbours nor on when its turn comes.

    The cache has at most `cache_tokens` places, or as many as one sequence needs (None: room for all at once); each
    sequence gets those that the longest needs. Long prompts come first.

    Processes that share a model sample in step: each tells `any_left` before a pass whether it has something left, and
    goes on without while another has.

    Raises InputError naming the prompts that are empty or leave no room in the context.
    """
    context = model.architecture.max_positions
    _check(prompts, context)
    if max_new_tokens < 1:
        yield from ((index, Sampled([], "length")) for index in range(len(prompts) * completions))
        return
    waiting: deque[_Sequence] = deque()
    for place in sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place)):
        room = min(max_new_tokens, context - len(prompts[place]))
        for index in range(place * completions, (place + 1) * completions):
            stream = index if streams is None else streams[index]
            waiting.append(_Sequence(index, prompts[place], room, (seed, stream)))
    batch = _Batch(model, waiting, cache_tokens)
    while (busy := bool(batch.sequences or waiting)) or any_left is not None:
        if any_left is not None and not any_left(busy):
            return
        if not busy:
            batch.idle()
            continue
        stop.poll()
        logits = batch.read()
        draws = torch.tensor([sequence.draw for sequence in batch.sequences], dtype=torch.float64)
        chosen = choose(logits, draws, temperature, top_k, top_p).tolist()
        ended: dict[int, tuple[int, Sampled]] = {}
        for row, (sequence, token) in enumerate(zip(batch.sequences, chosen, strict=True)):
            found = sequence.take(token, stop_ids, on_token)
            if found is not None:
                ended[row] = sequence.index, found
        batch.drop(ended)
        yield from ended.values()


@dataclass
class _Sequence:
    """A completion under way."""

    index: int
    prompt: Sequence[int]
    room: int
    """Tokens it may have."""
    stream: tuple[int, int]
    """Seed and number of its draws."""
    tokens: list[int] = field(default_factory=list)

    @property
    def slots(self) -> int:
        """Of the cache; nobody looks at the last token."""
        return len(self.prompt) + self.room - 1

    @property
    def last(self) -> int:
        """The token that predicts the next."""
        return self.tokens[-1] if self.tokens else self.prompt[-1]

    @property
    def position(self) -> int:
        """Of that token."""
        return len(self.prompt) + len(self.tokens) - 1

    @cached_property
    def _draws(self) -> list[float]:
        return _draws(*self.stream, self.room).tolist()

    @property
    def draw(self) -> float:
        """Picks the next token."""
        return self._draws[len(self.tokens)]

    def take(self, token: int, stop_ids: Collection[int], on_token: OnToken | None) -> Sampled | None:
        """Go on with `token`; returns the completion if that ends it."""
        if token in stop_ids:
            return Sampled(self.tokens, "eos", token)
        self.tokens.append(token)
        if on_token is not None and on_token(self.index, token):
            return Sampled(self.tokens, "stop")
        return Sampled(self.tokens, "length") if len(self.tokens) == self.room else None


class _Batch:
    """The sequences under way, each in its row of a cache."""

    def __init__(self, model: Decoder, waiting: deque[_Sequence], cache_tokens: int | None) -> None:
        kind, stored = model.device.type, model.model.embed_tokens.weight.dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else stored
        self.waiting, self.cache_tokens = waiting, cache_tokens
        self.device = model.device
        self.cache = KVCache(model.own_architecture, dtype, self.device)
        self.spare: KVCache | None = None
        laid_out = lay_out(model) if pays(len(waiting), sum(sequence.room for sequence in waiting)) else None
        self.decode = model.decode if laid_out is None else laid_out.decode
        self.sequences: list[_Sequence] = []
        """By row."""

    def read(self) -> Tensor:
        """Let sequences enter, read what is new of all; returns the logits (B, V) of what comes next."""
        new = self._admit()
        under_way = len(self.sequences)
        prompts = [group[0].prompt for group in new]
        step = CacheStep(
            self.cache,
            [sequence.position for sequence in self.sequences],
            [len(prompt) for prompt in prompts],
            [len(group) for group in new],
        )
        tokens = [sequence.last for sequence in self.sequences] + [token for prompt in prompts for token in prompt]
        logits = self.decode(torch.tensor(tokens).to(self.device), step).float()
        for group in new:
            self.sequences += group
        if len(logits) < len(self.sequences):
            times = [1] * under_way + [len(group) for group in new]
            logits = logits.repeat_interleave(torch.tensor(times, device=logits.device), 0)
        return logits

    def idle(self) -> None:
        """A pass for the sake of other processes."""
        if self.spare is None:
            self.spare = KVCache(self.cache.architecture, self.cache.layers[0].dtype, self.device)
            self.spare.resize(1, 1)
        self.decode(torch.zeros(1, dtype=torch.int64, device=self.device), CacheStep(self.spare, [], [1]))

    def drop(self, ended: Collection[int]) -> None:
        """Some rows are free. The next completion of a prompt takes the row where the prompt stands, if it can; the
        gaps that remain are closed by the last rows."""
        free = []
        for row in ended:
            if self.waiting and self.waiting[0].prompt is self.sequences[row].prompt:
                self.sequences[row] = self.waiting.popleft()
            else:
                free.append(row)
        kept = len(self.sequences) - len(free)
        gaps = [row for row in free if row < kept]
        movers = sorted(set(range(kept, len(self.sequences))) - set(free))
        if movers:
            self.cache.copy(movers, gaps, max(self.sequences[row].position for row in movers))
        for gap, mover in zip(gaps, movers, strict=True):
            self.sequences[gap] = self.sequences[mover]
        del self.sequences[kept:]

    def _admit(self) -> list[list[_Sequence]]:
        """Fill the free rows; returns those whose prompts have to be read, by prompt."""
        self._make_room()
        new: list[list[_Sequence]] = []
        tokens, free = 0, self.cache.rows - len(self.sequences)
        while self.waiting and free:
            prompt = self.waiting[0].prompt
            holder = next((row for row, other in enumerate(self.sequences) if other.prompt is prompt), None)
            if holder is not None:
                self.cache.copy([holder], [len(self.sequences)], len(prompt) - 1)
                self.sequences.append(self.waiting.popleft())
            elif new and new[-1][0].prompt is prompt:
                new[-1].append(self.waiting.popleft())
            elif new and tokens + len(prompt) > READ_AT_ONCE:
                break
            else:
                new.append([self.waiting.popleft()])
                tokens += len(prompt)
            free -= 1
        return new

    def _make_room(self) -> None:
        """As many rows as may be, for those that wait; the first of them has the longest prompt."""
        if not self.waiting:
            return
        slots = max(sequence.slots for sequence in (*self.sequences, self.waiting[0]))
        rows = len(self.sequences) + len(self.waiting)
        if self.cache_tokens is not None:
            rows = min(rows, max(1, self.cache_tokens // slots))
        if rows >= GROWTH * self.cache.rows:
            self.cache.resize(rows, slots)


def choose(logits: Tensor, draws: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The next token (B,) of each row of logits (B, V), fp32.

    `draws` (B,) in [0, 1), fp64, pick from the cumulative distribution at `temperature` (0: the likeliest token), cut
    to the `top_k` likeliest tokens (0: all) and then to the fewest likeliest ones that hold the probability `top_p`
    (1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    if logits.device.type == "mps":
        logits = logits.cpu()  # mps has no fp64
    draws = draws[:, None].to(logits.device)
    if top_k == 0 and top_p == 1:
        return _pick((logits - logits.amax(-1, keepdim=True)).div_(temperature).exp_(), draws)
    logits, tokens = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))
    cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
    held = cumulative[:, -1:]
    if top_p < 1:
        last = torch.searchsorted(cumulative, held * top_p)
        held = cumulative.gather(1, last.clamp(max=cumulative.shape[-1] - 1))
    picked = torch.searchsorted(cumulative, held * draws, right=True).clamp(max=cumulative.shape[-1] - 1)
    return tokens.gather(1, picked)[:, 0]


def _pick(weights: Tensor, draws: Tensor) -> Tensor:
    """The token (B,) where the running sum of its row of weights (B, V) passes the share `draws` (B, 1) of the whole.

    Block by block, then token by token in one block: a running sum of all of them takes as long as the exponentials.
    """
    vocabulary = weights.shape[1]
    whole = vocabulary - vocabulary % BLOCK
    sums = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(-1)
    sums = torch.cat((sums, weights[:, whole:].sum(-1, keepdim=True)), 1).double()
    ends = sums.cumsum(-1)
    drawn = ends[:, -1:] * draws
    block = torch.searchsorted(ends, drawn, right=True).clamp(max=sums.shape[1] - 1)
    share = (drawn - (ends - sums).gather(1, block)) / sums.gather(1, block)
    tokens = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, tokens.clamp(max=vocabulary - 1)).masked_fill(tokens >= vocabulary, 0)
    ends = inside.double().cumsum(-1)
    drawn = ends[:, -1:] * share.clamp(0, 1 - 2**-53)  # so that no token without weight is picked
    place = torch.searchsorted(ends, drawn, right=True).clamp(max=BLOCK - 1)
    return tokens.gather(1, place)[:, 0].clamp(max=vocabulary - 1)


def _check(prompts: Sequence[Sequence[int]], context: int) -> None:
    mistakes = [f"prompt {index}: empty: it needs at least one token" for index, p in enumerate(prompts) if not p]
    mistakes += [
        f"prompt {index}: {len(prompt)} tokens: the model's context is {context}, and an answer needs room: shorten it"
        for index, prompt in enumerate(prompts)
        if len(prompt) >= context
    ]
    if mistakes:
        raise InputError(*mistakes)


def _draws(seed: int, stream: int, count: int) -> Tensor:
    """`count` uniform numbers of a stream, (count,) fp64."""
    state = int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0] >> 1)
    return torch.rand(count, generator=torch.Generator().manual_seed(state), dtype=torch.float64)

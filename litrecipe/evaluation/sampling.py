"""Prompts in, texts out: batches, stop strings, and text as it appears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.config.progress import track
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import generate


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    """Without special tokens, cut before the first stop string."""
    tokens: list[int]
    """As sampled, up to the one that completed a stop string; without the end token."""


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    settings: Generate,
    *,
    batch_tokens: int = 8192,
    progress: str | None = None,
    on_text: Callable[[str], None] | None = None,
) -> list[Completion]:
    """Continue every prompt until its end token, a stop string or the token limit; results in the order of `prompts`.

    Prompts of like length share a batch, whose cache holds at most `batch_tokens` tokens (or one prompt). With one
    prompt `on_text` is given the answer piece by piece, each piece certain to be in the final text. Raises InputError
    when a prompt leaves no room for `settings.max_new_tokens`.
    """
    _check_room(model, prompts, settings.max_new_tokens)
    answers = [Completion("", [])] * len(prompts)
    batches = _batches([len(prompt) for prompt in prompts], settings.max_new_tokens, batch_tokens)
    for batch in track(batches, f"{progress}: batch") if progress else batches:
        texts = _complete_batch(model, tokenizer, {index: prompts[index] for index in batch}, settings, on_text)
        for index, text in zip(batch, texts, strict=True):
            answers[index] = Completion(text.text, text.tokens)
    return answers


def _complete_batch(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: dict[int, list[int]],
    settings: Generate,
    on_text: Callable[[str], None] | None,
) -> list[TextStream]:
    """The answers to the prompts, which are given by their place among all prompts."""
    texts = [TextStream(tokenizer, settings.stop) for _ in prompts]

    def on_token(row: int, token: int) -> bool:
        give(texts[row].add(token))
        return texts[row].stopped

    def give(text: str) -> None:
        if on_text is not None and text:
            on_text(text)

    generate(
        model,
        list(prompts.values()),
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_ids=_stop_ids(tokenizer, settings.stop),
        seed=settings.seed,
        streams=list(prompts),
        on_token=on_token,
    )
    for text in texts:
        give(text.end())
    return texts


def _stop_ids(tokenizer: Tokenizer, stop: Sequence[str]) -> set[int]:
    """The end tokens, and the control tokens among the stop strings (the text of an answer does not show them)."""
    alone = [ids for ids in (tokenizer.encode(string, specials=True) for string in stop) if len(ids) == 1]
    return {*tokenizer.eos_ids, *(id for [id] in alone if id in tokenizer.control_ids)}


def plain_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text to be continued as it stands, after BOS where the tokenizer puts one."""
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    return bos + tokenizer.encode(text)


class TextStream:
    """The text of one answer while its tokens arrive, up to a stop string.

    Text is given out once it is certain: what may be the beginning of a stop string waits for the next token.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._decoder = tokenizer.decode_stream()
        self._stop = [string for string in stop if string]
        self._held = ""
        self.tokens: list[int] = []
        """Those taken."""
        self.text = ""
        """What is certain so far."""
        self.stopped = False
        """Whether a stop string appeared."""

    def add(self, token: int) -> str:
        """Take a token; returns the text that became certain."""
        self.tokens.append(token)
        return self._give(self._decoder.push(token), last=False)

    def end(self) -> str:
        """No more tokens: returns what was held back."""
        return "" if self.stopped else self._give(self._decoder.finish(), last=True)

    def _give(self, fresh: str, last: bool) -> str:
        held = self._held + fresh
        found = [place for place in map(held.find, self._stop) if place >= 0]
        self.stopped = bool(found)
        certain = min(found) if found else len(held) - (0 if last else self._undecided(held))
        self._held = held[certain:]
        self.text += held[:certain]
        return held[:certain]

    def _undecided(self, held: str) -> int:
        """Length of the longest end of `held` with which a stop string begins."""
        lengths = (n for string in self._stop for n in range(len(string) - 1, 0, -1) if held.endswith(string[:n]))
        return max(lengths, default=0)


def _check_room(model: Decoder, prompts: Sequence[list[int]], new_tokens: int) -> None:
    longest = max(map(len, prompts), default=0)
    reads = model.architecture.max_positions
    if longest + new_tokens > reads:
        cure = f"at most {reads - longest} are left" if longest < reads else "shorten the prompt"
        raise InputError(
            f"generate.max_new_tokens: {new_tokens}: "
            f"the longest prompt has {longest} tokens and the model reads {reads}: {cure}"
        )


def _batches(lengths: list[int], new_tokens: int, budget: int) -> list[list[int]]:
    """Indices, longest first, in batches of at most `budget` places of the cache."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * (lengths[batches[-1][0]] + new_tokens) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches

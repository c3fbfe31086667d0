"""Prompts in, texts out: stop strings, and text as it appears."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.config.progress import counted, track
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import AnyLeft, Ended, sample


@dataclass(frozen=True)
class Completion:
    """One answer."""

    text: str
    """Without special tokens, cut before the first stop string."""
    tokens: list[int]
    """As sampled, up to the one that completed a stop string; without the one that ended it by itself."""
    ended: Ended
    """By an end token, by a stop string, or for want of room."""
    stop_id: int | None = None
    """The token that ended it by itself: an end token, or a control token among the stop strings."""


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    settings: Generate,
    *,
    completions: int = 1,
    streams: Sequence[int] | None = None,
    batch_tokens: int = 8192,
    progress: str | None = None,
    on_text: Callable[[str], None] | None = None,
    any_left: AnyLeft | None = None,
) -> list[Completion]:
    """Continue every prompt until its end token, a stop string or the token limit, `completions` times.

    Results are in the order of `prompts`, those of one prompt together; `streams` numbers their random streams
    (default: their places). They are sampled as one batch that is refilled as answers end, with a cache of at most
    `batch_tokens` places (or those of one answer). With one answer `on_text` is given it piece by piece, each piece
    certain to be in the final text. `any_left` is for processes that share the model, see `sample`. Raises InputError
    when a prompt leaves no room for `settings.max_new_tokens`.
    """
    _check_room(model, prompts, settings.max_new_tokens)
    texts = [TextStream(tokenizer, settings.stop) for _ in range(len(prompts) * completions)]
    answers = [Completion("", [], "length")] * len(texts)

    def on_token(index: int, token: int) -> bool:
        give(texts[index].add(token))
        return texts[index].stopped

    def give(text: str) -> None:
        if on_text is not None and text:
            on_text(text)

    sampled = sample(
        model,
        prompts,
        completions=completions,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        stop_ids=_stop_ids(tokenizer, settings.stop),
        seed=settings.seed,
        streams=streams,
        cache_tokens=batch_tokens,
        on_token=on_token,
        any_left=any_left,
    )
    for index, found in track(sampled, progress, len(texts)) if progress else sampled:
        give(texts[index].end())
        by_string = found.ended == "eos" and found.stop_id not in tokenizer.eos_ids
        answers[index] = Completion(
            texts[index].text, found.tokens, "stop" if by_string else found.ended, found.stop_id
        )
    return answers


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
    """The default is nobody's wish: then answers end where the context does."""
    longest = max(map(len, prompts), default=0)
    reads = model.architecture.max_positions
    if longest + (1 if new_tokens == Generate.max_new_tokens else new_tokens) > reads:
        cure = f"at most {reads - longest} are left" if longest < reads else "shorten the prompt"
        raise InputError(
            f"generate.max_new_tokens: {new_tokens}: "
            f"the longest prompt has {counted(longest, 'token')} and the model reads {reads}: {cure}"
        )

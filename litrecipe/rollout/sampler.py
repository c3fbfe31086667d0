"""What writes completions: the policy itself, or another engine in its place.

Shapes: A completions, those of a prompt side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from litrecipe.config import groups
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.config.progress import counted
from litrecipe.data.prompts import Prompt
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import Ranks
from litrecipe.engine.sharding import gathered
from litrecipe.evaluation.sampling import complete
from litrecipe.model.decoder import Decoder
from litrecipe.model.decoding import AnyLeft
from litrecipe.rollout.sources import FUNCTION, Completions, find_function

ENDS = ("eos", "stop", "length")


class Sampler(Protocol):
    """Writes completions of prompts; all that methods know of generation."""

    def __call__(
        self, prompts: Sequence[Prompt], settings: Generate, completions: int, streams: Sequence[int], progress: str
    ) -> Completions:
        """`completions` of each prompt by the policy as it stands, side by side; at temperature 0 the likeliest.

        `streams` (A,) numbers their random streams: who draws from these and from `settings.seed` alone writes the same
        again when a run goes on. An engine that computes otherwise than the training gives the log-probabilities of the
        tokens as it drew them (`Completions.logps`), which the policy's loss is corrected by.
        """


@dataclass(frozen=True)
class OwnSampler:
    """The policy's own decoder. The training's forward pass computes the log-probabilities again, so it gives none."""

    policy: Decoder
    tokenizer: Tokenizer
    cache_tokens: int
    """Places of the cache."""
    any_left: AnyLeft | None = None
    """Of ranks that share the policy and sample in step."""

    def __call__(
        self, prompts: Sequence[Prompt], settings: Generate, completions: int, streams: Sequence[int], progress: str
    ) -> Completions:
        """Each completion has the token that ended it."""
        found = complete(
            self.policy,
            self.tokenizer,
            [prompt.tokens.tolist() for prompt in prompts],
            settings,
            completions=completions,
            streams=streams,
            batch_tokens=self.cache_tokens,
            progress=f"{progress}: completion",
            any_left=self.any_left,
        )
        return Completions(
            [prompt for prompt in prompts for _ in range(completions)],
            [one.text for one in found],
            [[*one.tokens, one.stop_id] if one.stop_id is not None else one.tokens for one in found],
            [one.ended for one in found],
        )


@dataclass(frozen=True)
class Engine:
    """Somebody else's sampler, held to what a `Sampler` promises."""

    name: str
    """Key and value that named it."""
    sampler: Sampler

    def __call__(
        self, prompts: Sequence[Prompt], settings: Generate, completions: int, streams: Sequence[int], progress: str
    ) -> Completions:
        """Raises InputError naming the prompt where a completion is none."""
        found = self.sampler(prompts, settings, completions, streams, progress)
        wanted = [prompt for prompt in prompts for _ in range(completions)]
        lists: list[Sequence[Any]] = [
            found.texts,
            found.tokens,
            found.ended,
            *([] if found.logps is None else [found.logps]),
        ]
        if any(len(one) != len(wanted) for one in lists):
            said = " / ".join(str(len(one)) for one in lists)
            raise InputError(
                f"{self.name}: returned {said} of {counted(len(wanted), 'completion')}: give all, side by side"
            )
        for place, prompt in enumerate(wanted):
            if why := self._mistake(found, place, settings.max_new_tokens):
                raise InputError(f"{self.name}: {prompt.where}: {why}")
        return replace(found, prompts=wanted)

    @staticmethod
    def _mistake(found: Completions, place: int, most: int) -> str | None:
        tokens, ended = found.tokens[place], found.ended[place]
        if not 0 < len(tokens) <= most + 1:
            return f"a completion of {counted(len(tokens), 'token')}: give 1 to {most}, and the one that ended it"
        if ended not in ENDS:
            return f"ended by {ended!r}: give one of {', '.join(ENDS)}"
        if found.logps is not None:
            logps = found.logps[place]
            if len(logps) != len(tokens) or not all(math.isfinite(logp) and logp <= 0 for logp in logps):
                said = f"log-probabilities: {len(logps)} of {counted(len(tokens), 'token')}"
                return f"{said}, all finite and at most 0: give these"
        return None


@dataclass(frozen=True)
class Gathered:
    """A sampler of a policy that ranks share: each has all of it for as long as it samples."""

    sampler: Sampler
    policy: Decoder
    fabric: groups.Fabric

    def __call__(
        self, prompts: Sequence[Prompt], settings: Generate, completions: int, streams: Sequence[int], progress: str
    ) -> Completions:
        """All ranks must call it."""
        with gathered(self.policy, self.fabric):
            return self.sampler(prompts, settings, completions, streams, progress)


def own_sampler(
    policy: Decoder, tokenizer: Tokenizer, cache_tokens: int, fabric: groups.Fabric, ranks: Ranks
) -> Sampler:
    """The policy's own decoder. Where ranks share the policy they sample in step, a block at a time, or gather it."""
    if not ranks.share_models:
        return OwnSampler(policy, tokenizer, cache_tokens)
    if fabric.gather_to_sample:
        return Gathered(OwnSampler(policy, tokenizer, cache_tokens), policy, fabric)
    return OwnSampler(policy, tokenizer, cache_tokens, lambda busy: ranks.most(int(busy)) > 0)


def make_sampler(
    key: str,
    spec: str | None,
    policy: Decoder,
    tokenizer: Tokenizer,
    cache_tokens: int,
    fabric: groups.Fabric,
    ranks: Ranks,
) -> Sampler:
    """The policy's own, or what the function of `function:MODULE:NAME` makes of policy and tokenizer: a `Sampler`.

    The policy it is given is the one that learns: it must be looked at anew at each call. Raises InputError naming
    `key` where there is no such function.
    """
    if spec is None:
        return own_sampler(policy, tokenizer, cache_tokens, fabric, ranks)
    if not spec.startswith(FUNCTION):
        raise InputError(f"{key}: {spec}: give {FUNCTION}MODULE:NAME, which makes an engine of policy and tokenizer")
    try:
        maker: Any = find_function(spec)
    except InputError as error:
        raise InputError(*(f"{key}: {mistake}" for mistake in error.mistakes)) from error
    engine = Engine(f"{key}: {spec}", maker(policy=policy, tokenizer=tokenizer))
    return Gathered(engine, policy, fabric) if ranks.share_models else engine

"""A policy at practice: it answers prompts, its answers are scored, and lessons are drawn from them.

Shapes: A completions of a rollout; P tokens of all of them, completion after completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litrecipe.config import stop
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.config.online import Online
from litrecipe.config.progress import counted
from litrecipe.data.prompts import Prompt
from litrecipe.engine.fabric import Ranks
from litrecipe.model.critic import ActorAndCritic
from litrecipe.model.reference import PolicyAndReference
from litrecipe.model.row import Row
from litrecipe.objectives.answers import REF_LOGPS
from litrecipe.rollout.experience import Rollout, measure
from litrecipe.rollout.lessons import ENTROPY, LOGPS, VALUES, Lesson
from litrecipe.rollout.rewards import Moments, Scorer, Scores
from litrecipe.rollout.sampler import Sampler
from litrecipe.rollout.sources import Completions

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Practice:
    """Samples from a module's policy, scores, and measures what policy, reference and critic say of each token."""

    module: PolicyAndReference
    """What is trained."""
    sampler: Sampler
    scorer: Scorer
    config: Online
    seed: int
    budget: int
    """Tokens of a row."""
    fabric: Fabric
    draw: Callable[[Any, dict[str, Tensor], Any, float, Moments], Lesson]
    """What the method makes of a scored rollout: `ppo_lesson` or `group_lesson`."""
    returns: Moments = field(default_factory=Moments, kw_only=True)
    """Of the returns so far, where the critic learns them normalised."""
    ranks: Ranks = field(init=False)

    def __post_init__(self) -> None:
        self.ranks = Ranks(self.fabric)

    def sample(self, prompts: Sequence[Prompt], streams: Sequence[int]) -> Completions:
        """`completions_per_prompt` completions of each prompt, each from a random stream of its own."""
        n = self.config.completions_per_prompt
        with self.at_rest():
            return self.sampler(prompts, self.settings, n, streams, "sampling")

    @property
    def settings(self) -> Generate:
        """How completions are sampled."""
        config = self.config
        return Generate(config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.stop, self.seed)

    def score(self, completions: Completions) -> Scores:
        """What the reward sources say."""
        with self.at_rest():
            return self.scorer(completions)

    def learn(self, rollout: Rollout, kl_coef: float) -> Lesson:
        """Log-probabilities by the forward pass of the training, not by that which sampled: the two differ in the last
        digits, and the ratio of new to old policy must start at 1. Then the method's advantages."""
        with self.at_rest():
            said = measure(
                self.ask,
                rollout.samples,
                budget=self.budget,
                device=self.fabric.device,
                ranks=self.ranks,
                progress="log-probabilities of the rollout",
            )
        return self.draw(rollout.scored, said, self.config, kl_coef, self.returns)

    def ask(self, row: Row) -> dict[str, Tensor]:
        """What is said of each prediction (P,) of a row."""
        module = self.module
        if isinstance(module, ActorAndCritic):
            predictions, values = module(row)
            said = {LOGPS: predictions.logps, VALUES: values}
        else:
            predictions = module(row)
            said = {LOGPS: predictions.logps}
        assert predictions.entropy is not None
        said[ENTROPY] = predictions.entropy
        if self.config.kl_coef:
            said[REF_LOGPS] = module.ref_logps(row)
        return said

    def finished(self) -> None:
        """A rollout was learnt: the reference follows the policy (2404.10719), if it is to."""
        if self.config.ref_ema:
            self.module.follow(self.config.ref_ema)

    def state_dict(self) -> dict[str, Any]:
        """What scorer and critic remember."""
        return {"scorer": self.scorer.state_dict(), "returns": asdict(self.returns)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there."""
        self.scorer.load_state_dict(state["scorer"])
        self.returns = Moments(**state["returns"])

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, nothing learns and nothing is dropped out; an evaluation goes on as one."""
        before = self.module.training
        self.module.eval()
        try:
            with torch.no_grad(), self.fabric.autocast():
                yield
        finally:
            self.module.train(before)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Inside, each of several ranks takes its own time over its own share, and stops only where all agree: asked in
        lockstep whether to stop, as evaluations are, those with more to do would wait for ever."""
        with nullcontext() if self.ranks.alone else stop.interruptible(lambda: None):
            yield


def check_rows(prompts: Sequence[Prompt], max_new_tokens: int, budget: int) -> None:
    """Raise InputError where a prompt with a completion may not fit a row of `budget` tokens."""
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    if len(longest.tokens) + max_new_tokens > budget:
        said = (
            f"{longest.where} has {counted(len(longest.tokens), 'token')}, and up to {max_new_tokens} more with a "
            "completion"
        )
        cure = "raise it, or leave out long prompts by data.max_length"
        raise InputError(f"train.micro_batch_tokens: {budget}: {said}: {cure}")

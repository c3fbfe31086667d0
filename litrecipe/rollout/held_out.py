"""How a policy does on prompts that it does not learn from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from litrecipe.config.groups import Generate
from litrecipe.config.online import OnlineEval
from litrecipe.data.prompts import Prompt
from litrecipe.objectives.advantages import pass_at_k
from litrecipe.rollout.experience import Scored, joined
from litrecipe.rollout.practice import Practice
from litrecipe.rollout.rewards import Scorer

STREAMS = 2**40
"""Number of the first random stream here, far from those of the rollouts."""


def measure_held_out(
    practice: Practice, prompts: Sequence[Prompt], config: OnlineEval, judge: Scorer | None = None
) -> dict[str, float]:
    """Scores of the likeliest answers, and of sampled ones where `samples` asks for them, with pass@k for k = 1, 2, 4…

    What a `judge` says of the same answers stands under `judge/`; success and pass@k are those of the rewards.

    The ranks share the prompts; all call this and get the same.
    """
    prompts = prompts[: config.prompts]
    told = _told(_scored(practice, prompts, 0.0, 1, judge), "", config.success)
    if config.samples:
        sampled = _scored(practice, prompts, practice.config.temperature, config.samples, judge)
        told |= _told(sampled, "sampled/", config.success)
        if config.success is not None:
            told |= passes(sampled[0].scores.total >= config.success, config.samples)
    return told


def _scored(
    practice: Practice, prompts: Sequence[Prompt], temperature: float, n: int, judge: Scorer | None
) -> list[Scored]:
    """Answers with what the rewards say of them, and the same answers with what a judge says."""
    mine = range(len(prompts))[practice.ranks.rank :: practice.ranks.world]
    settings = Generate(practice.config.max_new_tokens, temperature, stop=practice.config.stop, seed=practice.seed)
    streams = [STREAMS + place * n + number for place in mine for number in range(n)]
    with practice.at_rest(), practice.apart():
        asked = [prompts[place] for place in mine]
        with practice.ranks.apart():
            found = practice.sampler(asked, settings, n, streams, "answering held-out prompts")
        scores = [practice.scorer.plain()(found)]
        scores += [judge(found)] if judge is not None else []
    groups = torch.tensor(mine, dtype=torch.int64).repeat_interleave(n)
    return [joined(practice.ranks.agree(Scored(found, one, groups))).in_order() for one in scores]


def _told(by: list[Scored], prefix: str, success: float | None) -> dict[str, float]:
    scored, total = by[0], by[0].scores.total
    told = {
        f"{prefix}reward": float(total.mean()),
        f"{prefix}length": float(scored.lengths.float().mean()),
        f"{prefix}clipped_ratio": float(scored.truncated.float().mean()),
    }
    told |= {f"{prefix}rewards/{name}": mean for name, mean in scored.scores.means().items()}
    for judged in by[1:]:
        told[f"{prefix}judge/reward"] = float(judged.scores.total.mean())
        told |= {f"{prefix}judge/{name}": mean for name, mean in judged.scores.means().items()}
    if success is not None:
        told[f"{prefix}success"] = float((total >= success).float().mean())
    return told


def passes(right: Tensor, n: int) -> dict[str, float]:
    """pass@k, the mean over prompts of the chance that one of k samples is right; `right` (A,) has n a prompt."""
    counts = right.view(-1, n).sum(1).tolist()
    ks = [2**power for power in range(n.bit_length()) if 2**power <= n]
    return {f"pass@{k}": sum(pass_at_k(n, int(c), k) for c in counts) / len(counts) for k in ks}

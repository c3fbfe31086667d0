"""Best of N: several completions of each prompt in a file, the best of them chosen, and what choosing gains.

Shapes: N prompts, K completions of each.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.config.progress import track
from litrecipe.config.rounds import RejectionSampling
from litrecipe.data.prompts import Prompt
from litrecipe.engine.fabric import Ranks
from litrecipe.objectives.advantages import best_of, best_of_kl
from litrecipe.rollout.experience import Scored, joined
from litrecipe.rollout.rewards import Scorer
from litrecipe.rollout.sampler import Sampler
from litrecipe.rollout.table import records

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CUT, LOW, EMPTY, REPEATED = "cut at max_new_tokens", "below min_score", "empty", "said before"
"""Why a completion is not learnt though its prompt has room for more."""


@dataclass(frozen=True)
class CandidateFile:
    """JSON lines, one a completion, those of a prompt side by side; written in whole batches of prompts."""

    path: Path
    prompts: int
    config: RejectionSampling

    def done(self) -> int:
        """How many prompts are answered; what was written of a batch that is not whole is removed."""
        if not self.path.exists():
            return 0
        n, batch = self.config.completions_per_prompt, self.config.prompts_per_batch
        *lines, _ = self.path.read_bytes().split(b"\n")
        done = len(lines) // n
        if done < self.prompts:
            done -= done % batch
        os.truncate(self.path, sum(len(line) + 1 for line in lines[: done * n]))
        return done

    def add(self, scored: Scored) -> None:
        """A batch, in one piece."""
        lines = []
        for place, record in enumerate(records(0, scored.completions, scored.scores)):
            number = place % self.config.completions_per_prompt
            kept = {name: value for name, value in record.items() if name not in ("step", "kl")}
            lines.append(json.dumps({"candidate": number, **kept}, ensure_ascii=False) + "\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[list[dict[str, Any]]]:
        """The candidates of each prompt. Raises InputError where the file is damaged."""
        try:
            # Not splitlines: a completion may hold characters that it takes for an end.
            lines = [json.loads(line) for line in self.path.read_text(encoding="utf-8").split("\n") if line]
        except ValueError as error:
            raise InputError(f"{self.path}: {error}: damaged: remove it, and sample again") from error
        n = self.config.completions_per_prompt
        return [lines[first : first + n] for first in range(0, len(lines), n)]


def sample_candidates(
    file: CandidateFile,
    done: int,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    seed: int,
    fabric: Fabric,
) -> None:
    """Answer the prompts behind the first `done`, batch by batch; ranks share each.

    A completion depends on weights, seed, its number and what is sampled beside it, so what was interrupted goes on to
    the same candidates.
    """
    config, ranks = file.config, Ranks(fabric)
    n, size = config.completions_per_prompt, config.prompts_per_batch
    settings = Generate(config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.stop, seed)
    for first in track(range(done, len(prompts), size), "answering prompts: batch"):
        batch = prompts[first : first + size]
        mine = range(len(batch))[ranks.rank :: ranks.world]
        streams = [(first + place) * n + number for place in mine for number in range(n)]
        asked = [batch[place] for place in mine]
        with torch.no_grad(), fabric.autocast():
            with ranks.apart():
                found = sampler(asked, settings, n, streams, f"from prompt {first + 1} on")
            scores = scorer(found)
        groups = torch.tensor(mine, dtype=torch.int64).repeat_interleave(n)
        whole = joined(ranks.agree(Scored(found, scores, groups))).in_order()
        if ranks.writes:
            file.add(whole)
        ranks.agree(None)


@dataclass(frozen=True)
class Choice:
    """What is learnt."""

    rows: list[dict[str, Any]]
    """As `litrecipe finetune` takes them."""
    prompts: int
    """Prompts that have one."""
    left_out: dict[str, int]
    """Why → how many completions were passed over."""


def choose(
    prompts: Sequence[Prompt], candidates: Sequence[list[dict[str, Any]]], config: RejectionSampling, template: bool
) -> Choice:
    """The best completions of each prompt, the first of equals; `template`: whether the model has a chat template."""
    rows: list[dict[str, Any]] = []
    answered = 0
    left_out: Counter[str] = Counter()
    for prompt, found in zip(prompts, candidates, strict=True):
        best: dict[str, dict[str, Any]] = {}
        for one in sorted(found, key=lambda one: (-one["reward"], one["candidate"])):
            if len(best) == config.keep:
                break
            if why := _unfit(one, best, config):
                left_out[why] += 1
            else:
                best[one["completion"]] = one
        rows += [conversation(prompt, text, template) | {"reward": one["reward"]} for text, one in best.items()]
        answered += bool(best)
    return Choice(rows, answered, dict(sorted(left_out.items())))


def _unfit(one: dict[str, Any], best: dict[str, dict[str, Any]], config: RejectionSampling) -> str | None:
    if config.min_score is not None and one["reward"] < config.min_score:
        return LOW
    if config.truncated == "drop" and one["stop"] == "length":
        return CUT
    if not one["completion"].strip():
        return EMPTY
    return REPEATED if one["completion"] in best else None


def conversation(prompt: Prompt, answer: str, template: bool) -> dict[str, Any]:
    """A prompt with its answer as a row; a single question of a model without chat template stays plain text."""
    if prompt.layout == "prompt_completion" and not template:
        return {"prompt": prompt.messages[0]["content"], "completion": answer}
    tools = {"tools": prompt.tools} if prompt.tools else {}
    return {"messages": [*prompt.messages, {"role": "assistant", "content": answer}], **tools}


def gains(rewards: Tensor) -> list[dict[str, float]]:
    """What the best of n completions scores on average, for n = 1, 2, 4, … K, from rewards (N, K); unbiased.

    `stderr` is over prompts. `kl_bound` is what the KL of choosing so is at most (2401.01879), in nats; where many
    completions score alike it is far less.
    """
    prompts, k = rewards.shape
    counts = [*(2**power for power in range(k.bit_length()) if 2**power < k), k]
    told = []
    for n in counts:
        best = torch.stack([best_of(of_prompt, n) for of_prompt in rewards.double()])
        error = float(best.std() / prompts**0.5) if prompts > 1 else 0.0
        told.append({"n": n, "reward": float(best.mean()), "stderr": error, "kl_bound": best_of_kl(n)})
    return told

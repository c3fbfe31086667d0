"""How a policy that samples is measured on the way, and which one is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.errors import InputError
from litrecipe.config.files import write_json
from litrecipe.config.online import OnlineRecipe, Rewards, Sampling, longest_of
from litrecipe.data.prompts import PromptSet
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import Ranks, on_first_rank
from litrecipe.engine.rundir import read_records
from litrecipe.model.decoder import Decoder
from litrecipe.recipes.training import save_trained, task_runner
from litrecipe.rollout.held_out import measure_held_out
from litrecipe.rollout.practice import Practice
from litrecipe.rollout.rewards import Scorer
from litrecipe.rollout.sources import KEY, RewardSource, Weighted, check_columns_of, make_sources

if TYPE_CHECKING:
    from lightning_fabric import Fabric

REWARD, JUDGED = "eval_reward", "eval_judge/reward"
"""By what policies are compared."""


def keep_best(
    recipe: OnlineRecipe, policy: Decoder, files: ModelFiles, fabric: Fabric, step: int, metrics: dict[str, float]
) -> None:
    """Save the policy in `best/` when no evaluation of the run before this one gave a higher reward: that of the judge
    where there is one, who cannot be gamed by what is learnt."""
    folder = Path(recipe.out_dir)
    name = JUDGED if recipe.eval.sources else REWARD
    reward = metrics.get(name)
    before = on_first_rank(fabric, lambda: [one.get(name) for one in read_records(folder / "metrics.jsonl")])
    if reward is None or any(other is not None and other >= reward for other in before):
        return
    save_trained(folder / "best", policy, files, recipe)
    if fabric.global_rank == 0:
        kept = {key: metrics[key] for key in (REWARD, JUDGED) if key in metrics}
        write_json(folder / "best.json", {"step": step, **kept})


def judge_of(
    recipe: OnlineRecipe,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    fabric: Fabric,
    own: RewardSource | None = None,
) -> Scorer | None:
    """What `eval.sources` make of held-out answers, as they are; None where there are none."""
    config = Rewards(sources=recipe.eval.sources)
    if not config.sources:
        return None
    try:
        sources = sources_of(recipe, config, tokenizer, fabric, own)
        check_columns_of([one.source for one in sources], prompts.val)
    except InputError as error:
        raise InputError(*(line.replace(KEY, "eval.sources", 1) for line in error.mistakes)) from error
    return Scorer(sources, config, Sampling(), Ranks(fabric).agree)


def sources_of(
    recipe: OnlineRecipe, config: Rewards, tokenizer: Tokenizer, fabric: Fabric, own: RewardSource | None
) -> list[Weighted]:
    """What scores completions of a run, as `config` names it; `own` as `make_sources` takes it."""
    return make_sources(
        config,
        tokenizer,
        recipe.fabric,
        fabric.device,
        budget=recipe.train.micro_batch_tokens,
        longest=longest_of(recipe),
        own=own,
        ranks=Ranks(fabric),
    )


def examiner(
    recipe: OnlineRecipe,
    practice: Practice,
    prompts: PromptSet,
    tokenizer: Tokenizer,
    policy: Decoder,
    judge: Scorer | None,
) -> Callable[[], dict[str, float]] | None:
    """Answers held-out prompts, and runs `eval.tasks`; None where there are neither."""
    run_tasks = task_runner(policy, tokenizer, recipe)
    if not prompts.val:
        return run_tasks

    def examine() -> dict[str, float]:
        return measure_held_out(practice, prompts.val, recipe.eval, judge) | (run_tasks() if run_tasks else {})

    return examine

"""How a policy that samples is measured on the way, and which one is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.files import write_json
from litrecipe.config.online import OnlineRecipe
from litrecipe.data.prompts import PromptSet
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fit import on_first_rank
from litrecipe.engine.rundir import read_records
from litrecipe.model.decoder import Decoder
from litrecipe.recipes.training import save_trained, task_runner
from litrecipe.rollout.held_out import measure_held_out
from litrecipe.rollout.practice import Practice

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def keep_best(
    recipe: OnlineRecipe, policy: Decoder, files: ModelFiles, fabric: Fabric, step: int, metrics: dict[str, float]
) -> None:
    """Save the policy in `best/` when no evaluation of the run before this one gave a higher reward."""
    folder = Path(recipe.out_dir)
    reward = metrics.get("eval_reward")
    before = on_first_rank(fabric, lambda: [one.get("eval_reward") for one in read_records(folder / "metrics.jsonl")])
    if reward is None or any(other is not None and other >= reward for other in before):
        return
    save_trained(folder / "best", policy, files, recipe)
    if fabric.global_rank == 0:
        write_json(folder / "best.json", {"step": step, "eval_reward": reward})


def examiner(
    recipe: OnlineRecipe, practice: Practice, prompts: PromptSet, tokenizer: Tokenizer, policy: Decoder
) -> Callable[[], dict[str, float]] | None:
    """Answers held-out prompts, and runs `eval.tasks`; None where there are neither."""
    run_tasks = task_runner(policy, tokenizer, recipe)
    if not prompts.val:
        return run_tasks

    def examine() -> dict[str, float]:
        return measure_held_out(practice, prompts.val, recipe.eval) | (run_tasks() if run_tasks else {})

    return examine

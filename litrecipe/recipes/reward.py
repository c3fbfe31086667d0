"""`litrecipe align reward`: a reward model from preferences, full or with an adapter, on a plain or quantised base.

With `reward.sft_coef` it stays a language model too, and learns the chosen answers along: a hydra.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from litrecipe.checkpoint.load import load_hydra, load_reward_model
from litrecipe.checkpoint.reward import pad_for_rewards
from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.errors import InputError
from litrecipe.config.files import write_json
from litrecipe.config.groups import RewardRecipe
from litrecipe.config.progress import say
from litrecipe.data.comparisons import COMPARISONS
from litrecipe.data.readers import check_source
from litrecipe.data.source import RecordedSource, SampleList
from litrecipe.engine.fabric import Ranks, gather_data, make_fabric
from litrecipe.engine.fit import Job, fit
from litrecipe.evaluation.comparing import compare, summary
from litrecipe.evaluation.demonstrations import demonstrations_of, mean_and_spread
from litrecipe.evaluation.pictures import draw_comparison
from litrecipe.model.hydra import Hydra
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Row
from litrecipe.objectives.answers import LABEL
from litrecipe.objectives.loss import Objective
from litrecipe.objectives.reward import JointLoss, RewardLoss
from litrecipe.recipes.dry_run import show
from litrecipe.recipes.known import head_of, identity
from litrecipe.recipes.training import begin, load_to_train, make_ready, prepared, save_trained

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def main(recipe: RewardRecipe, *, dry_run: bool = False) -> int:
    """Build model, data and objective, and hand them to `fit`."""
    if recipe.reward.demonstrations:
        check_source("reward.demonstrations", recipe.reward.demonstrations)
    files, tokenizer = begin(recipe, dry_run=dry_run)
    pad_for_rewards(files.tokenizer_dir, files.architecture, chat_template=recipe.model.chat_template)
    if dry_run:
        return show(recipe, files, tokenizer, COMPARISONS)

    fabric = make_fabric(recipe.fabric)
    data = prepared(COMPARISONS, recipe, files, tokenizer)
    if LABEL in data.train[0].extra:
        raise InputError("data.train: single answers with a label: a reward model learns from pairs: use `align dpo`")
    model, objective = built(files, recipe)
    make_ready(model, recipe)
    demonstrations = demonstrations_of(recipe, tokenizer, data.train)

    def finish(folder: Path) -> None:
        model.eval()
        with fabric.autocast():
            statistics = mean_and_spread(
                rewards_of(model), demonstrations, recipe.train.micro_batch_tokens, fabric.device
            )
        save_trained(folder, model, files, recipe, statistics)
        if data.val is not None:
            say(f"how held-out pairs are told apart: {picture_of(recipe)}")

    return fit(
        Job(
            fabric=fabric,
            recipe=recipe,
            module=model,
            objective=objective,
            source=RecordedSource(data.train, recipe.train),
            save_final=finish,
            evaluate_tasks=partial(judge, rewards_of(model), data.val, recipe, fabric)
            if data.val is not None
            else None,
            identity=identity(recipe, files, tokenizer, data.train, reward=recipe.reward) | head_of(files),
        )
    )


def built(files: ModelFiles, recipe: RewardRecipe) -> tuple[RewardModel, Objective[Any]]:
    """What is trained, and on what."""
    if recipe.reward.sft_coef:
        return load_to_train(load_hydra, files, recipe), JointLoss(recipe.reward)
    return load_to_train(load_reward_model, files, recipe), RewardLoss(recipe.reward)


def rewards_of(model: RewardModel) -> Callable[[Row], Tensor]:
    """A model as something that gives the rewards (A,) of a row's answers, asked whole as sharding wants it."""
    return (lambda row: model(row).rewards) if isinstance(model, Hydra) else model


def picture_of(recipe: RewardRecipe) -> Path:
    """Where the picture of the last evaluation lies, with its numbers beside it."""
    return Path(recipe.out_dir) / "held_out.png"


def judge(reward: Callable[[Row], Tensor], val: SampleList, recipe: RewardRecipe, fabric: Fabric) -> dict[str, float]:
    """How well held-out pairs are told apart; numbers and pictures lie in the run directory as `held_out`."""
    ranks = Ranks(fabric)
    with fabric.autocast():
        pairs = compare(
            reward,
            val,
            budget=recipe.train.micro_batch_tokens,
            device=fabric.device,
            progress="held-out pairs: row",
            rank=ranks.rank,
            world=ranks.world,
            gather=partial(gather_data, fabric),
        )
    found = summary(pairs)
    if fabric.global_rank == 0:
        picture = picture_of(recipe)
        numbers: dict[str, Any] = {name: {"value": value, "stderr": error} for name, (value, error) in found.items()}
        write_json(picture.with_suffix(".json"), {"pairs": len(pairs), **numbers})
        draw_comparison(pairs, picture, f"{recipe.out_dir}: {len(pairs)} held-out pairs")
    values = {name: value for name, (value, _) in found.items()}
    return {"loss": values.pop("log_loss"), **values}

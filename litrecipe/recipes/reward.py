"""`litrecipe align reward`: a reward model from preferences, full or with an adapter, on a plain or quantised base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from litrecipe.checkpoint.load import load_reward_model
from litrecipe.checkpoint.reward import pad_for_rewards
from litrecipe.config.errors import InputError
from litrecipe.config.files import write_json
from litrecipe.config.groups import RewardRecipe
from litrecipe.config.progress import say
from litrecipe.data.comparisons import COMPARISONS
from litrecipe.data.readers import check_source
from litrecipe.data.source import RecordedSource, SampleList
from litrecipe.engine.fabric import checkpoint_writer, make_fabric
from litrecipe.engine.fit import Job, fit
from litrecipe.evaluation.comparing import compare, summary
from litrecipe.evaluation.demonstrations import demonstrations_of, mean_and_spread
from litrecipe.evaluation.pictures import draw_comparison
from litrecipe.model.reward import RewardModel
from litrecipe.objectives.answers import LABEL
from litrecipe.objectives.reward import RewardLoss
from litrecipe.recipes.dry_run import show
from litrecipe.recipes.model import load_to_train, save_trained
from litrecipe.recipes.training import begin, identity, make_ready, prepared

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
    model = load_to_train(load_reward_model, files, recipe)
    make_ready(model, recipe)
    demonstrations = demonstrations_of(recipe, tokenizer, data.train)

    def finish(folder: Path) -> None:
        model.eval()
        with fabric.autocast():
            statistics = mean_and_spread(model, demonstrations, recipe.train.micro_batch_tokens, fabric.device)
        save_trained(folder, model, files, recipe, statistics)
        if data.val is not None:
            judge(model, data.val, recipe, fabric)

    return fit(
        Job(
            fabric=fabric,
            recipe=recipe,
            module=model,
            objective=RewardLoss(recipe.reward),
            source=RecordedSource(data.train, recipe.train),
            val=data.val,
            save_final=finish,
            identity=identity(recipe, files, tokenizer, data.train, reward=recipe.reward),
        )
    )


def judge(model: RewardModel, val: SampleList, recipe: RewardRecipe, fabric: Fabric) -> None:
    """Say how well held-out pairs are told apart; numbers and pictures lie in the run directory as `held_out`."""
    writer = checkpoint_writer(fabric, sharded=False)
    with fabric.autocast():
        pairs = compare(
            model,
            val,
            budget=recipe.train.micro_batch_tokens,
            device=fabric.device,
            progress="held-out pairs: row",
            rank=fabric.global_rank,
            world=fabric.world_size,
            gather=writer.gather,
        )
    if fabric.global_rank:
        return
    found = summary(pairs)
    picture = Path(recipe.out_dir) / "held_out.png"
    numbers: dict[str, Any] = {name: {"value": value, "stderr": error} for name, (value, error) in found.items()}
    write_json(picture.with_suffix(".json"), {"pairs": len(pairs), **numbers})
    draw_comparison(pairs, picture, f"{recipe.out_dir}: {len(pairs)} held-out pairs")
    accuracy, error = found["accuracy"]
    within = f" ± {error:.3f}" if error is not None else ""
    say(
        f"held out: right in {accuracy:.3f}{within} of {len(pairs)} pairs (who takes the longer answer: "
        f"{found['length_accuracy'][0]:.3f}); see {picture}"
    )

"""`litrecipe align iterative-dpo`: rounds of sampling, pairing and DPO, after each of which the reference moves on."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.online import longest_of
from litrecipe.config.progress import warn
from litrecipe.config.rounds import IterativeDpoRecipe
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.checkpoints import refuse_other_run
from litrecipe.engine.fabric import Ranks, make_fabric
from litrecipe.engine.fit import Job, StepResult, fit
from litrecipe.engine.rundir import RunDir
from litrecipe.model.critic import OnlinePolicy
from litrecipe.model.reference import frozen_twin
from litrecipe.objectives.dpo import DPO, make_dpo
from litrecipe.recipes.dpo import advise
from litrecipe.recipes.dry_run_online import show_rounds
from litrecipe.recipes.examination import examiner, judge_of, keep_best
from litrecipe.recipes.known import known_by
from litrecipe.recipes.training import asked, begin, load_to_train, make_ready, nats_apart, save_trained, say_same
from litrecipe.rollout.pairs import Pairing, WinRates, gold_answers
from litrecipe.rollout.rewards import Scorer, make_judge
from litrecipe.rollout.sampler import own_sampler
from litrecipe.rollout.source import Rollouts
from litrecipe.rollout.sources import Weighted, check_light, make_sources

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def main(recipe: IterativeDpoRecipe, *, dry_run: bool = False) -> int:
    """Build policy, reference, prompts and what compares, and hand them to `fit`."""
    files, tokenizer = begin(recipe, dry_run=dry_run)
    config, rollouts, folder = recipe.iterative_dpo, recipe.iterative_dpo.as_rollouts(), Path(recipe.out_dir)
    advise(recipe.dpo)
    prompts = asked(recipe, config.max_new_tokens, files, tokenizer)
    golds: dict[str, list[int]] = {}
    if config.gold is not None:
        golds = gold_answers(prompts.train, config.gold, tokenizer, config.max_new_tokens)
        prompts = replace(prompts, train=[one for one in prompts.train if one.where in golds])
    objective = make_dpo(recipe.dpo, tokenizer.control_ids)
    assert isinstance(objective, DPO)  # kto is refused
    needs_copy = objective.needs_reference and config.holds_to_start and not has_fresh_adapter(recipe, files)
    if recipe.rewards.sources:  # otherwise a judge compares
        check_light(recipe.rewards, prompts.train)
    if dry_run:
        return show_rounds(recipe, files, tokenizer, prompts, frozen_copy=needs_copy)

    fabric = make_fabric(recipe.fabric)
    sources = judging(recipe, tokenizer, fabric)
    judge = judge_of(recipe, tokenizer, prompts, fabric)
    known = known_by(recipe, files, tokenizer, prompts, dpo=recipe.dpo)
    refuse_other_run(RunDir(folder), recipe.checkpoint.resume, known)
    policy = load_to_train(load_model, files, recipe)
    module = OnlinePolicy(policy, frozen_twin(policy) if needs_copy else None)
    make_ready(policy, recipe)
    policy.with_collisions = objective.needs_collisions
    ranks = Ranks(fabric)
    practice = Pairing(
        module,
        own_sampler(policy, tokenizer, config.cache_tokens, recipe.fabric, ranks),
        Scorer(sources, recipe.rewards, config, ranks.agree),
        rollouts,
        recipe.train.seed,
        recipe.train.micro_batch_tokens,
        fabric,
        rounds=config,
        golds=golds,
        folder=folder / "pairs",
        needs_reference=objective.needs_reference,
    )
    source = Rollouts(practice, prompts.train, rollouts, recipe.train, folder, ranks, "iterative_dpo")

    def after_step(step: int, result: StepResult) -> None:
        at = source.at
        is_reference = step == 1 or (at.minibatch == 1 and not config.holds_to_start)
        if is_reference and objective.needs_reference:
            check_start(result, recipe, at.rollout)
        if at.minibatch == at.minibatches and not config.online:
            save_trained(folder / "rounds" / f"{at.rollout:02d}", policy, files, recipe)

    return fit(
        Job(
            fabric=fabric,
            recipe=recipe,
            module=module,
            objective=objective,
            source=source,
            save_final=lambda final: save_trained(final, policy, files, recipe),
            evaluate_tasks=examiner(recipe, practice, prompts, tokenizer, policy, judge),
            told=source.told,
            after_step=after_step,
            evaluated=partial(keep_best, recipe, policy, files, fabric),
            online=True,
            identity=known,
        )
    )


def has_fresh_adapter(recipe: IterativeDpoRecipe, files: ModelFiles) -> bool:
    """Whether the model that the run starts from is the base with its adapter off."""
    return recipe.adapter.method != "none" and files.adapter is None


def judging(recipe: IterativeDpoRecipe, tokenizer: Tokenizer, fabric: Fabric) -> list[Weighted]:
    """What scores completions: the judge, by how often one wins, or the reward sources."""
    config, budget = recipe.iterative_dpo, recipe.train.micro_batch_tokens
    asked: dict[str, Any] = {"budget": budget, "longest": longest_of(recipe), "ranks": Ranks(fabric)}
    if config.judge is None:
        return make_sources(recipe.rewards, tokenizer, recipe.fabric, fabric.device, **asked)
    judge = make_judge(config.judge, tokenizer, recipe.fabric, fabric.device, **asked)
    return [Weighted(WinRates(config.judge, judge, config.candidates), 1.0)]


def check_start(result: StepResult, recipe: IterativeDpoRecipe, number: int) -> None:
    """Say whether the policy began its round as its own reference: then all log-ratios were 0 and DPO's loss log 2."""
    off = nats_apart(result, recipe.dpo, recipe.fabric.precision)
    if off:
        warn(
            f"round {number}: policy and reference are the same model and yet differ by {off:.3g} nats an answer, so "
            f"the loss was {result.loss:.4f}: set adapter.dropout to 0, or try fabric.precision 32-true"
        )
    elif number == 1:
        say_same(result, recipe.dpo)

"""What the recipes that sample from the model they train do alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.online import Online, OnlineRecipe, method_of
from litrecipe.config.progress import say, warn
from litrecipe.data.prepared import prepare
from litrecipe.data.source import RecordedSource
from litrecipe.data.supervised import SUPERVISED
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.checkpoints import refuse_other_run
from litrecipe.engine.fabric import Ranks, make_fabric
from litrecipe.engine.fit import Job, StepResult, fit
from litrecipe.engine.optim import Role
from litrecipe.engine.rundir import RunDir
from litrecipe.model.average import Average
from litrecipe.model.decoder import Decoder
from litrecipe.model.reference import PolicyAndReference, frozen_twin
from litrecipe.objectives.loss import Objective
from litrecipe.recipes.dry_run_online import show_online
from litrecipe.recipes.examination import examiner, judge_of, keep_best, sources_of
from litrecipe.recipes.known import known_by
from litrecipe.recipes.training import (
    asked,
    begin,
    load_to_train,
    make_ready,
    save_trained,
)
from litrecipe.rollout.lessons import Lesson
from litrecipe.rollout.practice import Practice, check_rows
from litrecipe.rollout.rewards import Moments, Scorer
from litrecipe.rollout.sampler import make_sampler
from litrecipe.rollout.source import Rollouts
from litrecipe.rollout.sources import RewardSource, check_light


@dataclass
class Course:
    """What one method adds: how its module is built, what it makes of a rollout, and what it minimises."""

    build: Callable[[Decoder, Decoder | None], PolicyAndReference]
    """The module to train, from the policy and its reference (None: the policy with its adapter off, or none)."""
    draw: Callable[[Any, dict[str, Any], Any, float, Moments], Lesson]
    objective: Objective[Any]
    roles: Callable[[PolicyAndReference], list[Role]] = lambda _: []
    rests: Callable[[int], list[str]] = lambda _: []
    save_beside: Callable[[Path, PolicyAndReference, Moments], None] = lambda _, __, ___: None
    """Writes what else was trained into the folder of the policy, given the moments of the returns."""
    own_source: Callable[[Decoder, Tokenizer, Ranks], RewardSource | None] = lambda _, __, ___: None
    """What the reward source `hydra` stands for, on the device that the policy will be on."""


def practise(recipe: OnlineRecipe, course: Callable[[ModelFiles], Course], *, dry_run: bool) -> int:
    """Build policy, reference, prompts and reward sources, and hand them to `fit`."""
    files, tokenizer = begin(recipe, dry_run=dry_run)
    name, config = method_of(recipe)
    prompts = asked(recipe, config.max_new_tokens, files, tokenizer)
    check_rows(prompts.train, config.max_new_tokens, recipe.train.micro_batch_tokens)
    chosen = course(files)
    check_light(recipe.rewards, prompts.train)
    if dry_run:
        return show_online(recipe, files, tokenizer, prompts, frozen_copy=needs_copy(files, recipe))

    fabric = make_fabric(recipe.fabric)
    budget = recipe.train.micro_batch_tokens
    known = known_by(recipe, files, tokenizer, prompts)
    policy = load_to_train(load_model, files, recipe)
    ranks = Ranks(fabric)
    own = chosen.own_source(policy, tokenizer, ranks)
    sources = sources_of(recipe, recipe.rewards, tokenizer, fabric, own)
    judge = judge_of(recipe, tokenizer, prompts, fabric, own)
    module = chosen.build(policy, frozen_twin(policy) if needs_copy(files, recipe) else None)
    make_ready(policy, recipe)
    policy.with_entropy = "learnt" if config.entropy_coef else "measured"
    scorer = Scorer(sources, recipe.rewards, config, ranks.agree)
    key = f"{name}.sampler"
    sampler = make_sampler(key, config.sampler, policy, tokenizer, config.cache_tokens, recipe.fabric, ranks)
    practice = Practice(module, sampler, scorer, config, recipe.train.seed, budget, fabric, chosen.draw)
    source = Rollouts(
        practice, prompts.train, config, recipe.train, Path(recipe.out_dir), ranks, name, recipe.eval.success
    )

    known |= add_plain_text(source, recipe, config, tokenizer)
    refuse_other_run(RunDir(recipe.out_dir), recipe.checkpoint.resume, known)
    average = Average(policy, config.policy_ema) if config.policy_ema is not None else None
    check = Once(check_start)

    def finish(folder: Path) -> None:
        save_trained(folder, policy, files, recipe)
        chosen.save_beside(folder, module, practice.returns)
        if average is not None:
            with average.in_place():
                save_trained(folder / "ema", policy, files, recipe)

    def refuses(metrics: dict[str, float]) -> str | None:
        ratio, most = metrics.get("policy/ratio", 1.0), config.max_ratio
        if most is None or ratio <= most:
            return None
        return f"the ratio of new to old policy is {ratio:.3g} on average, above {name}.max_ratio {most:g}: not learnt"

    def after_step(_: int, result: StepResult) -> None:
        result.metrics["policy/skipped"] = float(result.refused is not None)
        if source.at.minibatch == 1:
            check(result)
        source.after_step(result.metrics.get("policy/approxkl", 0.0))
        if average is not None:
            average.follow()

    def carried() -> dict[str, nn.Parameter]:
        return (module.moving() if config.ref_ema else {}) | (average.begin() if average else {})

    return fit(
        Job(
            fabric=fabric,
            recipe=recipe,
            module=module,
            objective=chosen.objective,
            source=source,
            save_final=finish,
            evaluate_tasks=examiner(recipe, practice, prompts, tokenizer, policy, judge),
            roles=chosen.roles(module),
            rests=chosen.rests,
            refuses=refuses,
            told=source.told,
            carried=carried,
            after_step=after_step,
            evaluated=partial(keep_best, recipe, policy, files, fabric),
            online=True,
            identity=known,
        )
    )


def needs_copy(files: ModelFiles, recipe: OnlineRecipe) -> bool:
    """Whether the reference is a frozen twin of the policy. Its base is as good under an adapter that starts from
    nothing, unless the reference moves."""
    _, config = method_of(recipe)
    has_fresh_adapter = recipe.adapter.method != "none" and files.adapter is None
    return config.kl_coef > 0 and (not has_fresh_adapter or config.ref_ema > 0)


def add_plain_text(source: Rollouts, recipe: OnlineRecipe, config: Online, tokenizer: Tokenizer) -> dict[str, str]:
    """Let conversations be learnt along, as many a step as completions; returns what must stay the same of them."""
    if config.ptx_data is None:
        return {}
    data = replace(recipe.data, train=config.ptx_data, val=None, val_fraction=0.0, columns={})
    texts = prepare(SUPERVISED, data, tokenizer, seed=recipe.train.seed)
    say(str(texts.report))
    size = config.rollout_batch_size // config.minibatches
    endless = replace(recipe.train, global_batch_size=size, epochs=None, max_steps=1)
    source.beside = RecordedSource(texts.train, endless)
    return {"ptx_data": texts.train.fingerprint}


class Once:
    """Does something the first time that it is asked to."""

    def __init__(self, act: Callable[[StepResult], None]) -> None:
        self.act, self.done = act, False

    def __call__(self, result: StepResult) -> None:
        if not self.done:
            self.done = True
            self.act(result)


def check_start(result: StepResult) -> None:
    """Say whether the policy that learns says what the one that sampled said: then all ratios are 1."""
    off = abs(result.metrics.get("policy/ratio_max", 1.0) - 1)
    spread = (2 * result.metrics.get("policy/approxkl", 0.0)) ** 0.5
    if max(off, spread) <= 1e-4:
        say(f"start: the policy says of its completions what it said when it sampled them (ratio 1 ± {off:.0e})")
        return
    warn(
        f"start: of its own completions the policy says something else than when it sampled them: the ratio of both is "
        f"up to {1 + off:.4f} and should be 1: set adapter.dropout to 0, or try fabric.precision 32-true"
    )

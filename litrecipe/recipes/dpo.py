"""`litrecipe align dpo`: preference optimisation with recorded pairs or labels, full or with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config.errors import InputError
from litrecipe.config.groups import REFERENCE_FREE, SORTING, Dpo, DpoRecipe, Reference
from litrecipe.config.progress import warn
from litrecipe.data.comparisons import COMPARISONS
from litrecipe.data.reference_logps import with_reference
from litrecipe.data.remembered import KnownSamples, WithExtras
from litrecipe.data.samples import SampleSet
from litrecipe.data.source import RecordedSource, SampleList
from litrecipe.engine.checkpoints import refuse_other_run
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, StepResult, fit
from litrecipe.engine.rundir import RunDir
from litrecipe.model.decoder import Decoder
from litrecipe.model.reference import PolicyAndReference, frozen_twin
from litrecipe.objectives.answers import LABEL
from litrecipe.objectives.dpo import make_dpo
from litrecipe.recipes.dry_run import show
from litrecipe.recipes.known import identity, start
from litrecipe.recipes.training import (
    adapter_of,
    alone,
    begin,
    load_to_train,
    make_ready,
    nats_apart,
    prepared,
    save_trained,
    say_same,
    task_runner,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def main(recipe: DpoRecipe, *, dry_run: bool = False) -> int:
    """Build policy, reference, data and objective, and hand them to `fit`."""
    files, tokenizer = begin(recipe, dry_run=dry_run)
    reference = choose_reference(recipe, files)
    advise(recipe.dpo)
    if dry_run:
        return show(recipe, files, tokenizer, COMPARISONS, reference=reference)

    fabric = make_fabric(recipe.fabric)
    data = prepared(COMPARISONS, recipe, files, tokenizer)
    check_answers(data.train, recipe)
    known = identity(recipe, files, tokenizer, data.train, dpo=recipe.dpo) | start(files)
    refuse_other_run(RunDir(recipe.out_dir), recipe.checkpoint.resume, known)
    policy = load_to_train(load_model, files, recipe)
    train: SampleList = data.train
    val: SampleList | None = data.val
    if reference == "cache":
        # Ranks that share a model cannot each ask it about other samples: for that time it is whole on all of them.
        asked = load_to_train(load_model, files, alone(recipe)) if policy.fill else policy
        remember = remembering(asked, files, recipe, fabric)
        del asked
        train, val = remember(data.train), data.val and remember(data.val)
        del remember
    module = beside_reference(policy, reference)
    make_ready(policy, recipe)
    objective = make_dpo(recipe.dpo, tokenizer.control_ids)
    policy.with_collisions = objective.needs_collisions
    moving = module if isinstance(module, PolicyAndReference) and reference == "moving" else None
    return fit(
        Job(
            fabric=fabric,
            recipe=recipe,
            module=module,
            objective=objective,
            source=RecordedSource(train, recipe.train),
            val=val,
            save_final=lambda folder: save_trained(folder, policy, files, recipe),
            evaluate_tasks=task_runner(policy, tokenizer, recipe),
            carried=moving.moving if moving else dict,
            after_step=partial(follow, moving, recipe.dpo) if moving else None,
            check_first=partial(check_start, recipe=recipe, files=files) if reference else None,
            identity=known,
        )
    )


def choose_reference(recipe: DpoRecipe, files: ModelFiles) -> Reference | None:
    """What `dpo.reference` comes to; None for losses without one. Raises InputError for what would be wrong."""
    dpo = recipe.dpo
    if all(loss in REFERENCE_FREE for loss in dpo.mix or [dpo.loss]):
        return None
    has_fresh_adapter = recipe.adapter.method != "none" and files.adapter is None
    # KTO asks for answers to other prompts, which change with every step: nothing to keep on disk.
    recorded = dpo.loss != "kto" or bool(dpo.mix)
    if dpo.reference == "auto":
        # What is kept is computed before the model is sharded, by one device that would have to hold all of it.
        cached = recorded and not recipe.fabric.is_sharded
        return "cache" if cached else "adapter_off" if has_fresh_adapter else "copy"
    if dpo.reference == "cache" and not recorded:
        raise InputError("dpo.reference: cache: kto pairs answers with other prompts in every step: use auto")
    if dpo.reference == "adapter_off" and not has_fresh_adapter:
        why = (
            f"{files.source} is a trained adapter: without it the policy would be held to its base, which it never was"
            if files.adapter
            else "there is no adapter"
        )
        raise InputError(f"dpo.reference: adapter_off: {why}: use cache or copy")
    return dpo.reference


def advise(dpo: Dpo) -> None:
    """Say when β is far from what a loss of log-probabilities per token needs."""
    per_token = [loss for loss in dpo.mix or [dpo.loss] if loss in ("simpo", "sigmoid_norm")]
    if per_token and dpo.beta < 1:
        usual = {"simpo": "2 to 10", "sigmoid_norm": "about 5"}[per_token[0]]
        warn(f"dpo.beta {dpo.beta:g}: {per_token[0]} compares log-probabilities per token, where {usual} is usual")


def check_answers(train: SampleSet, recipe: DpoRecipe) -> None:
    """Raise InputError where the data has more or fewer answers to a prompt than the loss can take."""
    losses = list(recipe.dpo.mix or [recipe.dpo.loss])
    if LABEL in train[0].extra and losses != ["kto"]:
        cure = "data.train has single answers with a label: use kto, or give pairs"
        raise InputError(f"dpo.loss: {', '.join(losses)}: {cure}")
    if SORTING.intersection(losses):
        listed = next(
            (sample.id for sample in map(train.__getitem__, range(len(train))) if len(sample.segments) > 3), None
        )
        if listed:
            cure = f"{listed} has more than two answers: use another loss, or give pairs"
            raise InputError(f"dpo.loss: {', '.join(losses)}: {cure}")


def remembering(
    policy: Decoder, files: ModelFiles, recipe: DpoRecipe, fabric: Fabric
) -> Callable[[KnownSamples], WithExtras]:
    """What gives samples their log-probabilities under the policy as it is now, from disk where they were asked before.

    Where other processes train with this one each of them must call it: they share the work.
    """
    policy.to(fabric.device).eval()
    now = PolicyAndReference(policy, policy if files.adapter or recipe.adapter.method == "none" else None)
    known_by: list[Any] = [files.weights_hash(), asdict(recipe.quantize), recipe.fabric.precision, fabric.device.type]
    known_by.append(start(files))
    if recipe.model.init == "random":
        known_by.append(recipe.train.seed)

    def remember(samples: KnownSamples) -> WithExtras:
        with fabric.autocast():
            return with_reference(
                samples,
                lambda row: now.ref_logps(row.to(fabric.device)),
                known_by,
                recipe.data,
                recipe.train.micro_batch_tokens,
                fabric.global_rank,
                fabric.world_size,
            )

    return remember


def beside_reference(policy: Decoder, reference: Reference | None) -> nn.Module:
    """What is trained: the policy, with its reference where that is not on disk."""
    if reference in (None, "cache"):
        return policy
    return PolicyAndReference(policy, None if reference == "adapter_off" else frozen_twin(policy))


def follow(module: PolicyAndReference, dpo: Dpo, step: int, _: StepResult) -> None:
    """Move the reference when it is time (TR-DPO, 2404.09656)."""
    if step % dpo.ref_every == 0:
        module.follow(dpo.ref_alpha)


def check_start(result: StepResult, recipe: DpoRecipe, files: ModelFiles) -> None:
    """Say whether the policy began as its reference: then all log-ratios were 0 and DPO's loss was log 2."""
    off = nats_apart(result, recipe.dpo, recipe.fabric.precision)
    if not off:
        say_same(result, recipe.dpo)
        return
    adapter = adapter_of(recipe, files)
    dropout = "adapter.dropout is above 0; " if adapter and adapter.dropout else ""
    warn(
        f"start: policy and reference are the same model and yet differ by {off:.3g} nats an answer, so the loss was "
        f"{result.loss:.4f} and not that of equals (log 2 = 0.6931 for sigmoid): {dropout}the policy will be pulled "
        "towards something it never was; try dpo.reference copy, or fabric.precision 32-true"
    )

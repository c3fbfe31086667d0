"""`litrecipe pretrain`: training on a stream of documents, from fresh weights or on, in one stage or several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import nn

from litrecipe.checkpoint.load import load_model
from litrecipe.config.errors import InputError
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.config.progress import counted, say, warn
from litrecipe.data.pretraining import HeldOut, open_stream
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, fit
from litrecipe.engine.legs import Leg
from litrecipe.engine.optim import Treatment, plain_treatment
from litrecipe.engine.spikes import SpikeGuard
from litrecipe.model.architecture import Architecture
from litrecipe.model.decoder import Decoder
from litrecipe.objectives.routing import with_routers
from litrecipe.recipes.distilling import Lesson, lesson, open_teaching
from litrecipe.recipes.dry_run_pretrain import show_plan, show_pretraining
from litrecipe.recipes.known import identity
from litrecipe.recipes.training import begin, load_to_train, make_ready, save_trained, task_runner


def main(recipe: PretrainRecipe, *, dry_run: bool = False, plan: bool = False) -> int:
    """Build model, stream and objective, and hand them to `fit`."""
    if plan:
        return show_plan(recipe)
    files, tokenizer = begin(recipe, dry_run=dry_run)
    files = replace(files, architecture=as_asked(recipe, files.architecture, tokenizer))
    teaching = open_teaching(recipe.distil, tokenizer)
    if dry_run:
        return show_pretraining(recipe, files, tokenizer, teaching)

    fabric = make_fabric(recipe.fabric)
    stream = open_stream(recipe, tokenizer)
    for line in stream.report():
        say(line)
    tell_of(recipe, files.architecture)
    known = identity(recipe, files, tokenizer, None) | {"pretrain.z_loss": str(recipe.pretrain.z_loss)}
    if teaching:
        known |= teaching.known_by
        for name, part in recipe.parts.items():
            if part.distil.teacher is not None:
                teaching.check_reach(part.data.max_length, f"stages.{name}." if name else "")
    model = load_to_train(load_model, files, recipe)
    make_ready(model, recipe)
    z_loss = recipe.pretrain.z_loss
    what = lesson(model, stream.source.samples, stream.val, recipe, teaching, fabric, known, z_loss)
    if recipe.distil.cache:
        stream.source.keep(what.train)
    guard = recipe.pretrain
    return fit(
        Job(
            fabric=fabric,
            recipe=recipe,
            module=what.module,
            objective=with_routers(what.objective, model, recipe.router),
            source=stream.source,
            val=what.val,
            save_final=lambda folder: save_trained(folder, model, files, recipe),
            evaluate_tasks=task_runner(model, tokenizer, recipe),
            measured=lambda metrics: bits_per_byte(metrics, stream.val),
            told=stream.source.told,
            treatment=partial(treatment, recipe, files.architecture.hidden_size),
            legs=legs_of(recipe, model, what, [stage.steps for stage in stream.source.stages]),
            guard=None if guard.spike_sigmas is None else SpikeGuard(guard.spike_sigmas, guard.spike_window),
            flops=None if recipe.adapter.method != "none" else lambda s: what.flops(model.architecture, s),
            looking=what.looking,
            identity=known,
        )
    )


def tell_of(recipe: PretrainRecipe, architecture: Architecture) -> None:
    """What a recipe asks for that its user may not have meant."""
    longest = max(part.data.max_length for part in recipe.parts.values())
    if longest > architecture.max_positions:
        say(f"context: grows from {architecture.max_positions} to {longest} tokens")
    base, width = recipe.optim.mup_base_width, architecture.hidden_size
    if base not in (None, width) and architecture.logit_divisor == 1:
        warn(
            f"optim.mup_base_width: {base}: the rate carries over in part: this model's logits are not divided by "
            f"{width}/{base}, as `logits_scaling` of model_type granite would, and move the faster the wider it is"
        )
    for name, part in recipe.parts.items():
        steps, where = part.train.batch_warmup_steps, f"stages.{name}." if name else ""
        if part.train.max_steps is not None and steps > part.train.max_steps:
            warn(
                f"{where}train.batch_warmup_steps {steps}: there are {counted(part.train.max_steps, 'step')}: batches "
                "stay small"
            )


def as_asked(recipe: PretrainRecipe, architecture: Architecture, tokenizer: Tokenizer) -> Architecture:
    """The architecture as the recipe trains it. Raises InputError for sequences that its positions cannot reach."""
    longest = max(part.data.max_length for part in recipe.parts.values())
    if architecture.learned_positions and longest > architecture.max_positions:
        raise InputError(
            f"data.max_length: {longest}: the model has learnt positions, {architecture.max_positions} of them: give "
            "that or less"
        )
    if not architecture.ropes and any(part.model.rope_theta is not None for part in recipe.parts.values()):
        raise InputError("model.rope_theta: this model's positions do not turn: remove it")
    if recipe.model.init == "pretrained":
        return architecture
    # A config.json without weights was written for another tokenizer, perhaps.
    ends = tokenizer.eos_ids or architecture.eos_ids
    asked = replace(architecture, bos_id=tokenizer.bos_id, eos_ids=ends, pad_id=tokenizer.pad_id)
    if recipe.model.init_std is not None:
        asked = replace(asked, initializer_range=recipe.model.init_std)
    if (base := recipe.optim.mup_base_width) is not None:
        asked = replace(asked, inner_init=math.sqrt(base / asked.hidden_size))
    if recipe.model.scaled_init is not None:
        asked = replace(asked, scaled_init=recipe.model.scaled_init)
    return asked


def treatment(recipe: PretrainRecipe, width: int, name: str, parameter: nn.Parameter) -> Treatment:
    """Vectors do not decay, nor does the embedding if it should not; the layers' matrices learn by their width."""
    plain, base = plain_treatment(name, parameter), recipe.optim.mup_base_width
    decays = plain.decays and (recipe.optim.decay_embeddings or "embed_" not in name)
    is_inner = base is not None and parameter.dim() >= 2 and ".layers." in name
    return Treatment(decays, base / width if base is not None and is_inner else 1.0)


def legs_of(recipe: PretrainRecipe, model: Decoder, what: Lesson, steps: Sequence[int]) -> list[Leg]:
    """A leg for each stage, which turns positions and learns as it says, from the teacher or without."""
    taught = [part.distil.teacher is not None for part in recipe.parts.values()]

    def begin(place: int, part: PretrainRecipe) -> None:
        model.reach(part.data.max_length, part.model.rope_theta)
        what.go_on(taught[place], again=any(taught[place:]))

    return [
        Leg(name, count, part.optim.lr, part.schedule, part.train.micro_batch_tokens, partial(begin, place, part))
        for place, ((name, part), count) in enumerate(zip(recipe.parts.items(), steps, strict=True))
    ]


def bits_per_byte(metrics: dict[str, float], val: HeldOut | None) -> dict[str, float]:
    """What is measured on the held-out text, in a unit that no tokenizer decides: bits for each byte of UTF-8.

    Each predicted token counts as many bytes as a token of that text has on average.
    """
    if val is None or val.bytes_per_token is None:
        return {}
    return {"bits_per_byte": metrics.get("nll", metrics["loss"]) / math.log(2) / val.bytes_per_token}

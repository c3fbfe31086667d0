"""`litrecipe align rejection-sampling`: sample several answers, keep the best of each prompt, fine-tune on those."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.manifest import write_text
from litrecipe.checkpoint.source import ModelFiles
from litrecipe.config import stop
from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json, write_json
from litrecipe.config.online import LoraAdapter, longest_of
from litrecipe.config.progress import counted, say
from litrecipe.config.rounds import RejectionSampling, RejectionSamplingRecipe
from litrecipe.data.prompts import Prompt, PromptSet
from litrecipe.data.supervised import SUPERVISED
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.checkpoints import other_settings
from litrecipe.engine.fabric import Ranks, make_fabric, on_first_rank
from litrecipe.engine.rundir import RunDir
from litrecipe.evaluation.pictures import draw_best_of
from litrecipe.recipes.dry_run_online import show_rejection_sampling
from litrecipe.recipes.finetune import tune
from litrecipe.recipes.known import known_by
from litrecipe.recipes.training import asked, begin, load_to_train, prepared
from litrecipe.rollout.candidates import CandidateFile, choose, gains, sample_candidates
from litrecipe.rollout.rewards import Scorer
from litrecipe.rollout.sampler import own_sampler
from litrecipe.rollout.sources import check_light, make_sources

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CHOOSING = ("keep", "min_score", "truncated", "only_sample")
"""Keys that may change after sampling."""
BOUND = "kl_bound is an upper bound of the KL to the model that was sampled from, not the KL"


def main(recipe: RejectionSamplingRecipe, *, dry_run: bool = False) -> int:
    """Sample and choose, then fine-tune."""
    files, tokenizer = begin(recipe, dry_run=dry_run)
    config, folder = recipe.rejection_sampling, Path(recipe.out_dir)
    only_asked = replace(recipe, data=replace(recipe.data, val=None, val_fraction=0.0))
    prompts = asked(only_asked, config.max_new_tokens, files, tokenizer)
    if text := next((one.where for one in prompts.train if one.text is not None), None):
        raise InputError(f"data.train: {text}: a text to be continued: give questions, whose answers can be learnt")
    check_light(recipe.rewards, prompts.train)
    if dry_run:
        return show_rejection_sampling(recipe, files, tokenizer, prompts)

    fabric = make_fabric(recipe.fabric)
    file = CandidateFile(folder / "candidates.jsonl", len(prompts.train), config)
    with ExitStack() as lock:
        on_first_rank(fabric, lambda: lock.enter_context(RunDir(folder).held()))
        done = on_first_rank(
            fabric, lambda: begin_or_go_on(file, recipe, known_here(recipe, files, tokenizer, prompts))
        )
        if done < len(prompts.train):
            answer(recipe, files, tokenizer, prompts.train, file, done, fabric)
        on_first_rank(fabric, lambda: keep_best(file, prompts.train, folder, tokenizer.has_template))
    if config.only_sample:
        return 0
    learnt = replace(recipe, data=replace(recipe.data, train=str(folder / "sft.jsonl"), columns={}))
    return tune(recipe, prepared(SUPERVISED, learnt, files, tokenizer), files, tokenizer, fabric)


def known_here(
    recipe: RejectionSamplingRecipe, files: ModelFiles, tokenizer: Tokenizer, prompts: PromptSet
) -> dict[str, str]:
    """What must be the same when sampling goes on; neither how is chosen nor how is trained."""
    keys = {name: getattr(RejectionSampling, name) for name in CHOOSING}
    sampling = replace(recipe, rejection_sampling=replace(recipe.rejection_sampling, **keys))
    known = known_by(sampling, files, tokenizer, prompts)
    return {name: value for name, value in known.items() if not name.startswith("adapter.")}


def begin_or_go_on(file: CandidateFile, recipe: RejectionSamplingRecipe, known: dict[str, str]) -> int:
    """How many prompts are answered. Raises InputError where those are of another run, or not asked to go on."""
    about = file.path.with_suffix(".json")
    if not file.path.exists():
        write_json(about, {"identity": known})
        return 0
    if recipe.checkpoint.resume is None:
        cure = "continue with --checkpoint.resume auto, or name another --out_dir"
        raise InputError(f"out_dir: {recipe.out_dir}: holds candidates already: {cure}")
    if mistakes := other_settings(file.path, read_json(about)["identity"], known):
        raise InputError(*mistakes)
    done = file.done()
    say(f"{file.path}: {done} of {counted(file.prompts, 'prompt')} are answered")
    return done


def answer(
    recipe: RejectionSamplingRecipe,
    files: ModelFiles,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    file: CandidateFile,
    done: int,
    fabric: Fabric,
) -> None:
    """Let the model that training will start from answer; it is gone before that is loaded."""
    config, budget, ranks = recipe.rejection_sampling, recipe.train.micro_batch_tokens, Ranks(fabric)
    sources = make_sources(
        recipe.rewards, tokenizer, recipe.fabric, fabric.device, budget=budget, longest=longest_of(recipe), ranks=ranks
    )
    scorer = Scorer(sources, recipe.rewards, config, ranks.agree)
    bare = replace(recipe, adapter=LoraAdapter(method="none"))
    policy = load_to_train(load_model, files, bare).eval()
    policy = ranks.place(policy, recipe.fabric) if policy.fill else policy.to(fabric.device)
    try:
        # Ranks are not in lockstep while they sample: of several, they agree on stopping between batches.
        with stop.deferred(), stop.interruptible(stop.requested if fabric.world_size == 1 else lambda: None):
            sample_candidates(
                file,
                done,
                own_sampler(policy, tokenizer, config.cache_tokens, recipe.fabric, ranks),
                prompts,
                scorer,
                recipe.train.seed,
                fabric,
            )
    except stop.Stopped as stopped:
        name = signal.Signals(stopped.signal_number).name
        say(f"stopped by {name}: the same command with --checkpoint.resume auto goes on with {file.path}")
        raise


def keep_best(file: CandidateFile, prompts: Sequence[Prompt], folder: Path, template: bool) -> None:
    """Write what is learnt, and what choosing gains. Raises InputError where nothing is good enough."""
    found = file.read()
    choice = choose(prompts, found, file.config, template)
    left_out = "; ".join(f"{count} {why}" for why, count in choice.left_out.items())
    told = (
        f"{len(choice.rows)} of {counted(len(found) * file.config.completions_per_prompt, 'completion')} are learnt, "
        "of "
    )
    told += f"{choice.prompts} of {counted(len(found), 'prompt')}" + (f" (left out: {left_out})" if left_out else "")
    curve = gains(torch.tensor([[one["reward"] for one in of_prompt] for of_prompt in found]))
    summary: dict[str, Any] = {"prompts": len(found), "learnt": len(choice.rows), "note": BOUND, "curve": curve}
    write_json(folder / "best_of.json", summary)
    draw_best_of(curve, folder / "best_of.png", f"best of n, {len(found)} prompts")
    first, last = curve[0], curve[-1]
    bound = f"at most {last['kl_bound']:.3g} nats off"
    say(f"reward {first['reward']:.4g}, best of {last['n']}: {last['reward']:.4g}, {bound}")
    if not choice.rows:
        raise InputError(f"rejection_sampling: {told}: lower min_score, or give more room (max_new_tokens)")
    write_text(folder / "sft.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in choice.rows))
    say(f"{folder / 'sft.jsonl'}: {told}")

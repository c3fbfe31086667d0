"""A child of budget.py: what policies say to held-out prompts, what gold and proxy think of it, and how far they went.

    python benchmarks/judged.py PLAN.json OUT.json

PLAN names the `reference`, the `gold` and `proxy` reward models, the `prompts`, `max_new_tokens`, a `seed`, and the
`policies`: run directories' checkpoints, or model folders. OUT has, of each policy, one number a prompt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from litrecipe.checkpoint import state
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import ModelFiles, open_model
from litrecipe.config.groups import Data, Fabric, Generate
from litrecipe.config.schema import load_run
from litrecipe.data.prompts import Prompt, load_prompts
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fabric import Ranks, make_fabric
from litrecipe.model.adapters import add_adapter
from litrecipe.model.decoder import Decoder
from litrecipe.model.reference import PolicyAndReference
from litrecipe.rollout.experience import Scored, by_completion, measure, samples_of
from litrecipe.rollout.rewards import Scores
from litrecipe.rollout.sampler import OwnSampler
from litrecipe.rollout.sources import ModelSource, load_source

BUDGET = 8192
"""Tokens of a row, and places of the cache."""


@torch.no_grad()
def policy_of(files: ModelFiles, source: Path) -> Decoder:
    """The model with the weights, or the adapter, of a run's checkpoint; a model folder as it is."""
    if state.step_of(source) < 0:
        return load_model(open_model(str(source))).eval().requires_grad_(False)
    policy = load_model(files)
    recipe = load_run(source.parents[1])
    if recipe is not None and recipe.adapter.method != "none":
        add_adapter(policy, recipe.adapter)
    saved = state.Saved(source).tensors("weights")
    names = {name.removeprefix("policy."): name for name in saved.names() if not name.startswith("critic.")}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(saved.read(names[name]))
    return policy.eval().requires_grad_(False)


def judge(
    module: PolicyAndReference,
    tokenizer: Tokenizer,
    prompts: list[Prompt],
    judges: dict[str, ModelSource],
    settings: Generate,
    ranks: Ranks,
) -> dict[str, Any]:
    """One completion a prompt, each from the stream of its prompt: the same for every policy."""
    found = OwnSampler(module.policy, tokenizer, BUDGET)(prompts, settings, 1, range(len(prompts)), "answering")
    scores = {name: one(found) for name, one in judges.items()}
    nothing = Scores(torch.zeros(len(found)), {}, {})
    scored = Scored(found, nothing, torch.arange(len(found)))
    samples, _ = samples_of(scored, 0, BUDGET)
    said = measure(
        lambda row: {"kl": module.divergence(row)},
        samples,
        budget=BUDGET,
        device="cpu",
        ranks=ranks,
        progress="divergence",
    )
    kl = by_completion(said["kl"], scored.lengths).tolist()
    ended = [end == "eos" for end in found.ended]
    return scores | {"kl": kl, "length": scored.lengths.tolist(), "ended": ended, "texts": found.texts}


def main(plan: dict[str, Any]) -> dict[str, Any]:
    """What the plan asks for, by policy."""
    fabric = Fabric(accelerator="cpu")
    files = open_model(plan["reference"])
    tokenizer = Tokenizer.load(files.tokenizer_dir)
    reference = load_model(files).eval().requires_grad_(False)
    judges = {name: load_source(f"model:{plan[name]}", tokenizer, fabric, "cpu") for name in ("gold", "proxy")}
    settings = Generate(plan["max_new_tokens"], temperature=1.0, seed=plan["seed"])
    prompts = load_prompts(
        Data(train=plan["prompts"]),
        tokenizer,
        max_new_tokens=settings.max_new_tokens,
        max_positions=files.architecture.max_positions,
        seed=0,
    ).train
    ranks = Ranks(make_fabric(fabric))
    found = {}
    for name, source in plan["policies"].items():
        module = PolicyAndReference(policy_of(files, Path(source)), reference)
        found[name] = judge(module, tokenizer, prompts, judges, settings, ranks)
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

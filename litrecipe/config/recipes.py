"""Which verb reads which recipe."""

from __future__ import annotations

from litrecipe.config.groups import DpoRecipe, EvaluateRecipe, FinetuneRecipe, GenerateRecipe, RewardRecipe
from litrecipe.config.online import GrpoRecipe, PpoRecipe, RlooRecipe
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.prepare import PrepareRecipe
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.config.rounds import IterativeDpoRecipe, RejectionSamplingRecipe

RECIPES: dict[str, type] = {
    "finetune": FinetuneRecipe,
    "align reward": RewardRecipe,
    "align dpo": DpoRecipe,
    "align ppo": PpoRecipe,
    "align grpo": GrpoRecipe,
    "align rloo": RlooRecipe,
    "align iterative-dpo": IterativeDpoRecipe,
    "align rejection-sampling": RejectionSamplingRecipe,
    "align pipeline": PipelineRecipe,
    "pretrain": PretrainRecipe,
    "data prepare": PrepareRecipe,
    "evaluate": EvaluateRecipe,
    "generate": GenerateRecipe,
    "chat": GenerateRecipe,
}
"""Verb → the dataclass its recipes are read into. Of several that know as many keys of a file, it is the first."""

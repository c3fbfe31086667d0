"""The groups of keys of methods that sample from the model they train.

As in `groups.py`: every field is one key, the string under it its documentation, and defaults live here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from litrecipe.config.groups import Adapter, Eval, GentleOptim, ScheduleName, TrainingRecipe

KLEstimator = Literal["k1", "k2", "k3"]
Layout = Literal["separate", "lora", "joined", "hydra"]
Aggregate = Literal["token", "sequence", "constant"]


@dataclass
class Rewards:
    """What scores a completion."""

    sources: dict[str, float] = field(default_factory=dict)
    """Sources and their weights: `{model:runs/reward: 1.0, numeric?column=answer: 0.5, function:mine:brief: 0.1}`. A
    reward model (a run or folder), a Python function, or `exact`, `regex`, `json`, `numeric`, `length`, `repetition`,
    `sentiment` (see the tutorial on reward functions). With `ppo.layout` hydra also `hydra`, the score of the base,
    which alone is the default there."""
    clip: float | None = None
    """Largest absolute score, before penalties; null switches clipping off."""
    scale: Literal["none", "running"] = "none"
    """`running` divides scores by their standard deviation over the run so far (2307.04964)."""
    combine: Literal["sum", "normalise"] = "sum"
    """`sum` weighs and adds the sources; `normalise` first gives each mean 0 and spread 1 over the rollout."""


@dataclass
class Sampling:
    """How completions are sampled, and what is taken off their scores."""

    completions_per_prompt: int = 1
    """Completions of each prompt."""
    max_new_tokens: int = 128
    """Longest completion in tokens."""
    temperature: float = 1.0
    """Of sampling."""
    top_k: int = 0
    """Sample among the k likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion."""
    missing_eos: float | None = None
    """Penalty for a completion that was cut at `max_new_tokens` (null: none)."""
    missing_eos_mode: Literal["subtract", "set"] = "subtract"
    """`subtract` takes the penalty from the score, `set` makes its negative the score."""
    cache_tokens: int = 8192
    """Tokens that completions under way and their prompts may hold together: so many are sampled at once. On a GPU more
    are faster."""
    soft_limit: int = 0
    """Tokens before `max_new_tokens` in which a penalty grows to 1 (DAPO, 2503.14476; 0: none)."""


@dataclass
class Online(Sampling):
    """What all policy gradients on sampled completions share."""

    rollout_batch_size: int = 64
    """Completions of one rollout, over all ranks."""
    minibatches: int = 1
    """Optimizer steps in which a rollout is gone through once."""
    epochs: int = 1
    """How often it is gone through."""
    temperature: float = 1.0
    """Of sampling, and of every log-probability."""
    top_k: int = 0
    """Sample among the k likeliest tokens (0: all); needs `biased_sampling`."""
    top_p: float = 1.0
    """Sample among the likeliest tokens that hold this probability; below 1 needs `biased_sampling`."""
    biased_sampling: bool = False
    """Allow top_k and top_p, after which the ratio of new to old policy is no longer that of what was sampled from."""
    sampler: str | None = None
    """`function:MODULE:NAME`, which makes of policy and tokenizer another engine that samples (null: our own)."""
    importance_cap: float = 2.0
    """Largest weight of a token that such an engine drew more rarely than the policy would have."""
    truncated: Literal["learn", "mask"] = "learn"
    """`mask` leaves completions that were cut out of the loss."""
    kl_coef: float = 0.05
    """Weight of the KL divergence to the reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL goes: into each token's reward, or beside the policy's loss."""
    kl_estimator: KLEstimator = "k1"
    """Of the KL as a loss: `k1`, `k2` or `k3`; in the reward it is k1."""
    kl_target: float | None = None
    """KL of a whole completion, in nats, towards which `kl_coef` is steered (1909.08593; null: it is fixed)."""
    kl_horizon: int = 10000
    """Completions over which `kl_coef` is steered."""
    max_kl: float | None = None
    """Leave out what remains of a rollout once the policy is this far from the one that sampled it, nats a token."""
    max_ratio: float | None = 10.0
    """Take no step on a minibatch in which the ratio of new to old policy is larger than this on average."""
    clip: float = 0.2
    """How far the ratio of new to old policy counts."""
    clip_high: float | None = None
    """The same upwards (null: as `clip`; DAPO: 0.28)."""
    dual_clip: float | None = None
    """For what was worse than expected the loss is at most this times the advantage (1912.09729; try 3)."""
    aggregate: Aggregate = "token"
    """What counts alike in a step: each `token`, each completion (`sequence`), or, Dr. GRPO's, completions divided by a
    `constant`, `max_new_tokens`."""
    entropy_coef: float = 0.0
    """Bonus for the policy's entropy."""
    zero_variance: Literal["keep", "drop", "resample"] = "keep"
    """Groups whose completions all score alike: learn from them, drop them, or sample other prompts instead."""
    min_pass_rate: float = 0.0
    """Ask a prompt no more once a smaller share of its completions scored `eval.success`: it is too hard."""
    max_pass_rate: float = 1.0
    """The same once a larger share did: it is too easy."""
    ref_ema: float = 0.0
    """After each rollout the reference becomes this much policy (2404.10719; try 3 over the number of rollouts)."""
    policy_ema: float | None = None
    """Decay a step of a mean of the policy, saved beside it as `final/ema` (null: none)."""
    ptx_coef: float = 0.0
    """Weight of the loss on `ptx_data` (InstructGPT's PPO-ptx)."""
    ptx_data: str | None = None
    """Conversations that are learnt along with the rollouts, as many a step as completions."""

    @property
    def filters(self) -> bool:
        """Whether prompts are left out by their pass rate."""
        return self.min_pass_rate > 0 or self.max_pass_rate < 1


@dataclass
class Ppo(Online):
    """Proximal policy optimisation (1707.06347), as it is done with language models."""

    layout: Layout = "lora"
    """`separate` models; `lora`: policy and critic are adapters on one base, which is also the reference; `joined`: one
    adapter with two heads; `hydra`: as lora, and the base is the reward model too (2309.00754)."""
    epochs: int = 4
    """How often a rollout is gone through."""
    gamma: float = 1.0
    """Discount a token."""
    lam: float = 0.95
    """λ of generalised advantage estimation (1506.02438); 1 is unbiased."""
    normalise_advantages: bool = True
    """Give the advantages of a rollout mean 0 and variance 1."""
    whiten_rewards: bool = False
    """Divide a rollout's token rewards by their standard deviation."""
    normalise_values: bool = False
    """Let the critic learn returns of mean 0 and spread 1 over the run so far; `value_clip` is then in these units."""
    value_clip: float | None = 0.2
    """How far values may move from those of the rollout, in units of the value (null: as far as they like)."""
    value_coef: float = 0.1
    """Weight of the value loss; where policy and critic share no weights only `value_lr` matters."""
    value_lr: float | None = None
    """The critic's learning rate (null: that of the policy)."""
    value_schedule: ScheduleName | None = None
    """Schedule of the critic's learning rate (null: as `schedule`)."""
    value_warmup_steps: int | None = None
    """Its steps of linear warm-up (null: as `schedule.warmup_steps`)."""
    value_grad_clip: float | None = 1.0
    """Largest norm of the critic's gradient, which is clipped apart from the policy's."""
    critic: str = "auto"
    """What the critic starts from: a reward model, the `policy` with a head of zeros, or `auto`: the first reward model
    of `rewards.sources` if it fits, else the policy. One that is an adapter starts from an adapter on the same base
    with the same settings; that of a hydra from its score."""
    critic_warmup: int = 0
    """Steps in which only the critic learns."""


@dataclass
class Grpo(Online):
    """Policy gradients with the mean of a group of completions as baseline (2402.03300)."""

    rollout_batch_size: int = 64
    """Completions of one rollout, over all ranks."""
    completions_per_prompt: int = 8
    """Completions of each prompt: the group."""
    kl_coef: float = 0.0
    """Weight of the KL divergence to the reference."""
    kl_in: Literal["reward", "loss"] = "loss"
    """Where the KL goes: into each token's reward, or beside the policy's loss."""
    kl_estimator: KLEstimator = "k3"
    """Of the KL as a loss: `k1`, `k2` or `k3`; in the reward it is k1."""
    aggregate: Aggregate = "sequence"
    """What counts alike in a step: each `token`, each completion (`sequence`), or, Dr. GRPO's, completions divided by a
    `constant`, `max_new_tokens`."""
    advantage: Literal["group", "centered", "leave_one_out", "batch", "group_batch"] = "group"
    """`group`: score less the group's mean, over its standard deviation; `centered`: without the latter (Dr. GRPO);
    `leave_one_out`: less the mean of the others (RLOO); `batch`: whitened over the rollout (REINFORCE++);
    `group_batch`: less the group's mean, then whitened."""
    loss: Literal["clip", "cispo", "mirror"] = "clip"
    """`clip` (PPO's), `cispo` (2506.13585), or `mirror`: nothing is clipped, and the KL to the last iterate is added
    (MDLOO, 2407.21075)."""
    ratio: Literal["token", "sequence_mean", "sequence"] = "token"
    """New over old policy for each token, or one for the completion: the geometric mean of its tokens' (GSPO), or their
    product."""
    mirror_coef: float = 0.1
    """`mirror`: weight of the KL to the last iterate."""


@dataclass
class Rloo(Grpo):
    """Policy gradients with the other completions of a prompt as baseline (2402.14740)."""

    completions_per_prompt: int = 4
    """Completions of each prompt: the group."""
    kl_coef: float = 0.05
    """Weight of the KL divergence to the reference."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL goes: into each completion's reward, or beside the policy's loss."""
    kl_estimator: KLEstimator = "k1"
    """Of the KL as a loss: `k1`, `k2` or `k3`; in the reward it is k1."""
    advantage: Literal["group", "centered", "leave_one_out", "batch", "group_batch"] = "leave_one_out"
    """As `grpo.advantage`."""
    ratio: Literal["token", "sequence_mean", "sequence"] = "sequence"
    """As `grpo.ratio`."""


@dataclass
class LoraAdapter(Adapter):
    """Low-rank adapters (peft)."""

    method: Literal["none", "lora", "dora"] = "lora"
    """`none` trains all weights; `lora` (2106.09685) and `dora` (2402.09353) train an adapter."""


@dataclass
class OnlineEval(Eval):
    """Evaluation while training."""

    every: int | None = None
    """Steps between evaluations on `data.val`, the first before the first step (null: only at the end)."""
    prompts: int = 64
    """At most this many held-out prompts."""
    samples: int = 0
    """Completions sampled of each besides the greedy one, for the mean score and pass@k."""
    success: float | None = None
    """Score from which on a completion counts as right; gives the success rate and pass@k (null: neither)."""
    sources: dict[str, float] = field(default_factory=dict)
    """Sources as in `rewards.sources` that judge held-out answers and teach nothing, for `eval_judge/reward`; the best
    policy is then that which they like best."""


@dataclass
class OnlineRecipe(TrainingRecipe):
    """What every verb that samples has."""

    adapter: LoraAdapter = field(default_factory=LoraAdapter)
    optim: GentleOptim = field(default_factory=GentleOptim)
    eval: OnlineEval = field(default_factory=OnlineEval)
    rewards: Rewards = field(default_factory=Rewards)


@dataclass
class PpoRecipe(OnlineRecipe):
    """PPO: a policy and a critic learn from what the policy samples; full, LoRA or DoRA, or as a hydra."""

    out_dir: str = "runs/ppo"
    ppo: Ppo = field(default_factory=Ppo)


@dataclass
class GrpoRecipe(OnlineRecipe):
    """Policy gradients on groups of completions: GRPO and its kin, full, LoRA or DoRA."""

    out_dir: str = "runs/grpo"
    grpo: Grpo = field(default_factory=Grpo)


@dataclass
class RlooRecipe(OnlineRecipe):
    """Policy gradients with the other completions as baseline: RLOO, MDLOO, full, LoRA or DoRA."""

    out_dir: str = "runs/rloo"
    rloo: Rloo = field(default_factory=Rloo)


def method_of(recipe: OnlineRecipe) -> tuple[str, Online]:
    """Name and values of the group of a recipe's method."""
    return next((name, value) for name, value in vars(recipe).items() if isinstance(value, Online))


def sampling_of(recipe: TrainingRecipe) -> tuple[str, Sampling]:
    """Name and values of the group of a recipe that says how completions are sampled."""
    return next((name, value) for name, value in vars(recipe).items() if isinstance(value, Sampling))


def longest_of(recipe: TrainingRecipe) -> int:
    """Tokens of the longest sequence that a recipe may read: a sample, or a prompt with its completion."""
    sampled = [value.max_new_tokens for value in vars(recipe).values() if isinstance(value, Sampling)]
    return recipe.data.max_length + max(sampled, default=0)

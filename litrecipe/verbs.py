"""What litrecipe can be asked to do: what each verb reads, and where its code is, which is imported when it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from litrecipe.line import Option


@dataclass(frozen=True)
class RecipeVerb:
    """A verb that reads a recipe."""

    summary: str
    kind: str
    """`module:name` of the recipe's dataclass, below `litrecipe.config`."""
    code: str
    """`module:function` below `litrecipe`, called with the recipe and the options."""
    rows: str = ""
    """`module:function` below `litrecipe` that reads the rows of `data.train` and `data.val`: they are looked at before
    anything heavy is imported."""
    preemptible: bool = False
    """Answers SIGTERM and SIGUSR1 with exit code 85, from its first moment on."""
    options: dict[str, Option] = field(default_factory=dict)
    """Options that are no keys of the recipe."""
    words: str = ""
    """The key, a list, of words that belong to no flag."""


@dataclass(frozen=True)
class PlainVerb:
    """A verb that takes names of files and folders."""

    summary: str
    code: str
    """`module:function` below `litrecipe`, called with the arguments by name."""
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arguments as `argparse` takes them."""


@dataclass(frozen=True)
class SubmitVerb:
    """A verb before others, `submit finetune …`, that reads what they read."""

    summary: str
    code: str
    """`module:function` below `litrecipe`, called with the other verb's name, with what reads its recipe, which may be
    given flags more than the line has, and with the options."""
    options: dict[str, Option] = field(default_factory=dict)


DRY_RUN: dict[str, Option] = {
    "dry_run": (bool, False, "show recipe, parameters, memory, steps and one sample; write nothing")
}
RUN = {"help": "a run directory"}
OUT = {"help": "the folder to write"}

CONVERSATIONS, PREFERENCES = "data.formats:read_conversations", "data.preferences:read_preferences"
PROMPTS = "data.openings:read_prompts"

VERBS: dict[str, RecipeVerb | PlainVerb | SubmitVerb] = {
    "pretrain": RecipeVerb(
        "train a model on text, from nothing or on, in stages",
        "pretrain:PretrainRecipe",
        "recipes.pretrain:main",
        preemptible=True,
        options={**DRY_RUN, "plan": (bool, False, "show how many tokens would be best for this model; train nothing")},
    ),
    "finetune": RecipeVerb(
        "fine-tune a model: full, LoRA or DoRA",
        "groups:FinetuneRecipe",
        "recipes.finetune:main",
        CONVERSATIONS,
        True,
        DRY_RUN,
    ),
    "align reward": RecipeVerb(
        "train a reward model on preferences", "groups:RewardRecipe", "recipes.reward:main", PREFERENCES, True, DRY_RUN
    ),
    "align dpo": RecipeVerb(
        "train on preferences directly: DPO and its kin",
        "groups:DpoRecipe",
        "recipes.dpo:main",
        PREFERENCES,
        True,
        DRY_RUN,
    ),
    "align ppo": RecipeVerb(
        "learn from sampled answers by PPO", "online:PpoRecipe", "recipes.ppo:main", PROMPTS, True, DRY_RUN
    ),
    "align grpo": RecipeVerb(
        "learn from groups of sampled answers: GRPO and its kin",
        "online:GrpoRecipe",
        "recipes.grpo:main",
        PROMPTS,
        True,
        DRY_RUN,
    ),
    "align rloo": RecipeVerb(
        "the same with the other answers as baseline: RLOO, MDLOO",
        "online:RlooRecipe",
        "recipes.grpo:main",
        PROMPTS,
        True,
        DRY_RUN,
    ),
    "align iterative-dpo": RecipeVerb(
        "rounds of DPO on pairs of sampled answers",
        "rounds:IterativeDpoRecipe",
        "recipes.iterative_dpo:main",
        PROMPTS,
        True,
        DRY_RUN,
    ),
    "align rejection-sampling": RecipeVerb(
        "fine-tune on the best of several sampled answers",
        "rounds:RejectionSamplingRecipe",
        "recipes.rejection_sampling:main",
        PROMPTS,
        True,
        DRY_RUN,
    ),
    "align pipeline": RecipeVerb(
        "run recipes as stages, each fed by those before it",
        "pipeline:PipelineRecipe",
        "recipes.pipeline:main",
        preemptible=True,
        options=DRY_RUN,
    ),
    "evaluate": RecipeVerb(
        "measure a model on tasks", "groups:EvaluateRecipe", "recipes.evaluate:main", preemptible=True
    ),
    "generate": RecipeVerb("answer one prompt", "groups:GenerateRecipe", "recipes.generate:main"),
    "chat": RecipeVerb("talk with a model", "groups:GenerateRecipe", "recipes.chat:main"),
    "submit": SubmitVerb(
        "run a verb as a job on a Slurm cluster: `submit finetune ...`",
        "cluster.submit:main",
        {
            "dry_run": (bool, False, "write, check and show the job; submit nothing"),
            "sweep": (list, [], "`KEY=V1,V2,...`: a run for each value; several make a grid"),
        },
    ),
    "recipes ls": PlainVerb("list the recipes that ship with litrecipe", "hub:ls"),
    "recipes show": PlainVerb(
        "print a recipe",
        "hub:show",
        {
            "name": {"help": "a name of `recipes ls`, its end if that is unique, or a file"},
            "--resolved": {"action": "store_true", "help": "with `extends` and all defaults filled in"},
        },
    ),
    "recipes cp": PlainVerb(
        "copy a recipe to change it",
        "hub:copy",
        {"name": {"help": "a name of `recipes ls`"}, "file": {"help": "the file to write; must not exist"}},
    ),
    "recipes validate": PlainVerb(
        "check recipes, and build their models without weights",
        "hub:validate",
        {"names": {"nargs": "*", "metavar": "NAME", "help": "recipes or files (default: the whole hub)"}},
    ),
    "data check": RecipeVerb("look for trouble in training data", "groups:DataRecipe", "recipes.data:check"),
    "data preview": RecipeVerb(
        "show samples with what is learnt of them",
        "groups:DataRecipe",
        "recipes.data:preview",
        options={"n": (int, 3, "how many samples")},
    ),
    "data prepare": RecipeVerb(
        "turn text into token shards for pretraining",
        "prepare:PrepareRecipe",
        "recipes.data:prepare",
        preemptible=True,
        words="sources",
    ),
    "data train-tokenizer": PlainVerb(
        "learn a byte-level BPE tokenizer from texts, for models from scratch",
        "recipes.data:train_tokenizer",
        {
            "texts": {"nargs": "+", "help": "whatever `data.train` takes"},
            "out": OUT,
            "--vocab_size": {"type": int, "default": 32000, "help": "ids at most (default: 32000)"},
            "--special": {"nargs": "+", "default": [], "help": "control tokens of a chat template"},
            "--split_digits": {"action": "store_true", "help": "make each digit a token of its own"},
            "--chat": {"action": "store_true", "help": "ChatML's control tokens and template"},
            "--min_frequency": {"type": int, "default": 0, "help": "merge no pairs that are seen less often"},
            "--column": {"default": "text", "help": "the column of text, where rows are texts (default: text)"},
        },
    ),
    "model import": PlainVerb(
        "turn a GGUF file or a hub model into a Hugging Face folder",
        "recipes.model:import_model",
        {"src": {"help": "a GGUF file, a hub id or a Hugging Face folder"}, "out": OUT},
    ),
    "model export": PlainVerb(
        "write the newest checkpoint of a run as a Hugging Face or adapter folder",
        "recipes.model:export",
        {"run": RUN, "out": OUT},
    ),
    "model merge": PlainVerb(
        "merge a run's adapter into its base model",
        "recipes.model:merge",
        {"run": {"help": "a run directory or an adapter folder"}, "out": OUT},
    ),
    "model info": PlainVerb(
        "tell what a model is made of", "recipes.model:info", {"src": {"help": "whatever `--model` takes"}}
    ),
    "runs ls": PlainVerb(
        "list runs",
        "cluster.listing:ls",
        {"folder": {"nargs": "?", "default": "runs", "help": "where they lie (default: runs)"}},
    ),
    "runs diff": PlainVerb(
        "find the first step in which two runs differ, and why",
        "recipes.runs:diff",
        {
            "a": RUN,
            "b": RUN,
            "--tolerance": {"type": float, "default": 0.0, "help": "difference of numbers that is no difference"},
        },
    ),
}

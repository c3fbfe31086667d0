"""The front door: which verb, which recipe, and one line for each mistake.

The verb is looked at first, and only its parser is built; its code is imported when it runs. Until then nothing heavy
is imported, so help and mistakes come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from typing import Any

from litrecipe import __version__
from litrecipe.config.errors import WRONG_INPUT, InputError

Option = tuple[type, Any, str]
"""Type (bool or int), default, meaning."""


@dataclasses.dataclass(frozen=True)
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
    options: dict[str, Option] = dataclasses.field(default_factory=dict)
    """Options that are no keys of the recipe."""
    words: str = ""
    """The key, a list, of words that belong to no flag."""


@dataclasses.dataclass(frozen=True)
class PlainVerb:
    """A verb that takes names of files and folders."""

    summary: str
    code: str
    """`module:function` below `litrecipe`, called with the arguments by name."""
    arguments: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Arguments as `argparse` takes them."""


DRY_RUN: dict[str, Option] = {
    "dry_run": (bool, False, "show recipe, parameters, memory, steps and one sample; write nothing")
}
RUN = {"help": "a run directory"}
OUT = {"help": "the folder to write"}

CONVERSATIONS, PREFERENCES = "data.formats:read_conversations", "data.preferences:read_preferences"
PROMPTS = "data.openings:read_prompts"

VERBS: dict[str, RecipeVerb | PlainVerb] = {
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
        "recipes.runs:ls",
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 wrong input, 85 pre-empted, 130 Ctrl-C."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; tokenizers refuse what is not Unicode
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        if code == 0 and (fabric := sys.modules.get("litrecipe.engine.fabric")):
            fabric.leave()
        sys.stdout.flush()
    except InputError as error:
        if is_first_of_node():
            for mistake in error.mistakes:
                print(f"litrecipe: error: {' '.join(mistake.splitlines())}", file=sys.stderr)
        return WRONG_INPUT
    except RuntimeError as error:
        if (fabric := sys.modules.get("litrecipe.engine.fabric")) and fabric.is_left_alone(error):
            return fabric.left_alone(error)
        if "torchvision::nms" not in str(error):
            raise
        print(f"litrecipe: error: torchvision: does not fit this torch: {TORCHVISION_CURE}", file=sys.stderr)
        return WRONG_INPUT
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `litrecipe recipes show … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def is_first_of_node() -> bool:
    """Whether this process tells what is wrong: the others of its machine see the same files and find the same."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0) == 0


TORCHVISION_CURE = "litrecipe runs without it: `pip uninstall torchvision`"


def run(argv: list[str]) -> int:
    """Find the verb and run it."""
    if not argv:
        print(help_of(""), file=sys.stderr)
        return WRONG_INPUT
    if argv[0] in ("-h", "--help", "help"):
        print(help_of(""))
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"litrecipe {__version__}")
        return 0
    for words in (1, 2):
        name = " ".join(argv[:words])
        if name in VERBS:
            verb, rest = VERBS[name], argv[words:]
            return run_recipe(name, verb, rest) if isinstance(verb, RecipeVerb) else run_plain(name, verb, rest)
    return _no_verb(argv)


def help_of(group: str) -> str:
    """All verbs, or those of one group (`model `), a line each."""
    from litrecipe.config.describe import two_columns

    verbs = {name: verb.summary for name, verb in VERBS.items() if name.startswith(group)}
    return "\n".join(
        [
            f"usage: litrecipe {group or 'VERB '}...",
            "",
            "Pretrain, fine-tune, align and evaluate language models from one YAML recipe.",
            "",
            *two_columns(verbs.items(), max(map(len, verbs))),
            "",
            "`litrecipe VERB --help` tells more about one, `litrecipe --version` the version.",
        ]
    )


def _no_verb(argv: list[str]) -> int:
    first, second = argv[0], argv[1] if len(argv) > 1 else ""
    group = [name.split()[1] for name in VERBS if name.startswith(f"{first} ")]
    if group and second in ("-h", "--help"):
        print(help_of(f"{first} "))
        return 0
    if group:
        near = get_close_matches(second, group, n=1)
        cure = f"did you mean `litrecipe {first} {near[0]}`?" if near else f"give one of {', '.join(group)}"
        raise InputError(f"{first}: {second or 'missing'}: {cure}")
    known = list(dict.fromkeys(name.split()[0] for name in VERBS))
    near = get_close_matches(first, known, n=1, cutoff=0.5)
    cure = f"did you mean `litrecipe {near[0]}`?" if near else f"give one of {', '.join(known)}"
    raise InputError(f"{first}: no such verb: {cure}")


def call(code: str, *arguments: Any, **options: Any) -> int:
    """Import `module:function` and call it."""
    from litrecipe.config.progress import patience

    with patience("loading libraries"):
        function = found(code)
    return int(function(*arguments, **options))


def found(code: str) -> Any:
    """`module:function` below `litrecipe`, imported."""
    name, _, function = code.partition(":")
    return getattr(import_module(f"litrecipe.{name}"), function)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise InputError(f"{self.prog.removeprefix('litrecipe ')}: {message}: see `{self.prog} --help`")


def run_plain(name: str, verb: PlainVerb, argv: list[str]) -> int:
    """Run a verb that takes names."""
    parser = _Parser(prog=f"litrecipe {name}", description=verb.summary, allow_abbrev=False)
    for argument, keywords in verb.arguments.items():
        parser.add_argument(argument, **({"metavar": argument.upper()} if argument[0] != "-" else {}) | keywords)
    try:
        arguments = parser.parse_args(argv)
    except SystemExit:  # --help was printed
        return 0
    return call(verb.code, **vars(arguments))


def run_recipe(name: str, verb: RecipeVerb, argv: list[str]) -> int:
    """Run a verb that reads a recipe."""
    from litrecipe.config import schema, stop

    kind = found(f"config.{verb.kind}")
    line = Line(schema.keys(kind), verb.options, verb.words)
    line.read(argv)
    if line.help is not None:
        print(_help(name, kind, verb, line.help))
        return 0
    if verb.preemptible:
        stop.install()
    try:
        recipe = schema.load(kind, line.configs, line.flags, whole=not line.mistakes)
    except InputError as error:
        raise InputError(*line.mistakes, *error.mistakes) from None
    if line.mistakes:
        raise InputError(*line.mistakes)
    if hasattr(recipe, "wanted"):
        look_at_stages(recipe)
    elif verb.rows:
        look_at_rows(recipe.data, verb.rows)
    try:
        if hasattr(recipe, "train") and not any(line.options.values()):
            from litrecipe.engine import launch

            if several := launch.ranks_to_start(recipe.fabric):
                return launch.run_ranks([sys.executable, "-m", "litrecipe", *name.split(), *argv], several)
        return call(verb.code, recipe, **line.options)
    finally:
        if verb.preemptible:
            stop.let_go()


def look_at_rows(data: Any, rows: str) -> None:
    """Raise InputError for rows that a verb cannot read; `rows` as in `RecipeVerb`."""
    from litrecipe.data.formats import check_rows
    from litrecipe.data.preferences import misplaced

    try:
        check_rows(data, found(rows))
    except InputError as error:
        raise misplaced(data, wants_preferences=rows == PREFERENCES) or error from None


def look_at_stages(recipe: Any) -> None:
    """The same for all stages of a pipeline that are still to run; what they have to write themselves is left out."""
    mistakes: list[str] = []
    for name in recipe.wanted:
        stage = recipe.stages[name]
        verb = VERBS[stage.verb]
        assert isinstance(verb, RecipeVerb)
        if not verb.rows or recipe.remembered(name).get("done"):
            continue
        given = {key: getattr(stage.recipe.data, key) or "" for key in ("train", "val")}
        there = {key: "" if recipe.is_to_come(text) else recipe.located(text) for key, text in given.items()}
        try:
            look_at_rows(dataclasses.replace(stage.recipe.data, **there), verb.rows)
        except InputError as error:
            mistakes += stage.placed(name, error.mistakes)
    if mistakes:
        raise InputError(*mistakes)


def _help(name: str, kind: Any, verb: RecipeVerb, group: str) -> str:
    from litrecipe.config.describe import group_help, recipe_help

    groups = [field.name for field in dataclasses.fields(kind) if dataclasses.is_dataclass(field.default_factory)]
    if group in groups:
        return group_help(name, kind, group)
    if group:
        near = get_close_matches(group, groups, n=1)
        cure = f"did you mean `--help {near[0]}`?" if near else f"give one of {', '.join(groups)}"
        raise InputError(f"--help: {group}: no such group: {cure}")
    options = {"--config RECIPE": "a file, or a name of `litrecipe recipes ls`; may be repeated, later ones win"}
    for option, (_, default, words) in verb.options.items():
        options[f"--{option}"] = words if default is False else f"{words} (default: {default})"
    if verb.words:
        options[f"{verb.words.upper()} ..."] = f"short for --{verb.words}"
    if "model" in groups:
        options["--model M"] = "short for --model.source M"
    options["--help [GROUP]"] = "this, or the keys of one group"
    return recipe_help(name, f"{verb.summary[0].upper()}{verb.summary[1:]}.", kind, options)


class Line:
    """A command line taken apart: recipes, flags, and options that are no keys."""

    def __init__(self, keys: dict[str, Any], options: dict[str, Option], words: str = "") -> None:
        """`words` is the key of words that belong to no flag, if they have one."""
        self.keys = keys
        self.words = words
        self.kinds = {option: kind for option, (kind, _, _) in options.items()}
        self.options = {option: default for option, (_, default, _) in options.items()}
        self.configs: list[str] = []
        self.flags: list[tuple[str, str]] = []
        self.help: str | None = None
        self.mistakes: list[str] = []

    def read(self, argv: list[str]) -> None:
        """Go through the line once; what is wrong is added to `mistakes`."""
        rest = list(reversed(argv))
        words = []
        while rest:
            word = rest.pop()
            if word in ("-h", "--help"):
                self.help = rest.pop() if rest and not rest[-1].startswith("-") else ""
                return
            if not word.startswith("--") and self.words:
                words.append(word)
                continue
            if not word.startswith("--"):
                self.mistakes.append(f"{word}: belongs to no flag: a recipe is given as `--config {word}`")
                continue
            name, equals, value = word[2:].partition("=")
            if not name:
                self.mistakes.append(f"{word}: names no key: write `--KEY VALUE`")
                continue
            has_value = bool(equals) or (bool(rest) and not rest[-1].startswith("--") and rest[-1] != "-h")
            if near := self._misspelt(name):
                self.mistakes.append(f"--{name}: no such flag: did you mean `--{near}`?")
                if has_value and not equals:
                    rest.pop()
                continue
            if not has_value and not self._is_switch(name):
                self.mistakes.append(f"--{name}: has no value: write `--{name} VALUE` (or `--{name}=--VALUE`)")
                continue
            if not equals:
                value = rest.pop() if has_value else "true"
            self._take(name, value)
        if words:
            self.flags.append((self.words, json.dumps(words)))

    def _misspelt(self, name: str) -> str | None:
        """The flag that a word is likely to stand for, if it is neither a flag nor a key."""
        flags = ["config", "model", "help", *self.kinds]
        if name in self.keys or name.replace("-", "_") in flags or any(key.startswith(f"{name}.") for key in self.keys):
            return None
        return next(iter(get_close_matches(name.replace("-", "_"), flags, n=1, cutoff=0.75)), None)

    def _is_switch(self, name: str) -> bool:
        return bool in (self.keys.get(name), self.kinds.get(name.replace("-", "_")))

    def _take(self, name: str, value: str) -> None:
        option = name.replace("-", "_")
        if name == "config":
            self.configs.append(value)
        elif option not in self.kinds:
            self.flags.append(("model.source" if name == "model" else name, value))
        elif self.kinds[option] is bool and value in ("true", "false"):
            self.options[option] = value == "true"
        elif self.kinds[option] is int and value.isdecimal() and int(value) > 0:
            self.options[option] = int(value)
        else:
            wanted = "true or false" if self.kinds[option] is bool else "a whole number above 0"
            self.mistakes.append(f"--{option}: {value}: give {wanted}")


if __name__ == "__main__":
    sys.exit(main())

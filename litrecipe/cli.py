"""The front door: which verb, which recipe, and one line for each mistake.

The verb is looked at first, and only its parser is built; its code is imported when it runs. Until then nothing heavy
is imported, so help and mistakes come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from typing import Any, TypeGuard

from litrecipe import __version__
from litrecipe.config import stop
from litrecipe.config.errors import WRONG_INPUT, InputError
from litrecipe.config.progress import tell_mistakes
from litrecipe.line import Line
from litrecipe.verbs import PREFERENCES, VERBS, PlainVerb, RecipeVerb, SubmitVerb


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code: 0 done, 2 wrong input, 85 pre-empted, 130 Ctrl-C."""
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # as in arguments; tokenizers refuse what is not Unicode
    try:
        code = run(list(sys.argv[1:] if argv is None else argv))
        if code == 0:
            _leave()
        sys.stdout.flush()
    except stop.Stopped:
        _leave()
        raise
    except InputError as error:
        tell_mistakes(error.mistakes)
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
    except OSError as error:
        from litrecipe.checkpoint.manifest import is_disk_full

        if not is_disk_full(error):
            raise
        tell_mistakes([f"disk full: {error}: make room, and run the same again"])
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # perhaps it is what has no room
        return WRONG_INPUT
    return code


def _leave() -> None:
    if fabric := sys.modules.get("litrecipe.engine.fabric"):
        fabric.leave()


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
            if isinstance(verb, SubmitVerb):
                return run_submit(verb, rest)
            return run_recipe(name, verb, rest) if isinstance(verb, RecipeVerb) else run_plain(name, verb, rest)
    return _no_verb(argv)


def help_of(group: str) -> str:
    """All verbs, those of one group (`model `), or those that can be submitted (`submit `), a line each."""
    from litrecipe.config.describe import two_columns

    is_submit = group == "submit "
    verbs = {
        name: verb.summary
        for name, verb in VERBS.items()
        if (is_submittable(verb) if is_submit else name.startswith(group))
    }
    return "\n".join(
        [
            f"usage: litrecipe {group}{'VERB ' if is_submit or not group else ''}...",
            "",
            VERBS["submit"].summary if is_submit else PROGRAM,
            "",
            *two_columns(verbs.items(), max(map(len, verbs))),
            "",
            f"`litrecipe {group if is_submit else ''}VERB --help` tells more about one"
            + (
                ": the keys of its recipe, among them `slurm`." if is_submit else ", `litrecipe --version` the version."
            ),
        ]
    )


PROGRAM = "Pretrain, fine-tune, align and evaluate language models from one YAML recipe."


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
    line = read_line(name, verb, argv)
    if line is None:
        return 0
    if verb.preemptible:
        stop.install()
    recipe = read_recipe(verb, line)
    try:
        if hasattr(recipe, "train") and not any(line.options.values()):
            from litrecipe.engine import launch

            if several := launch.ranks_to_start(recipe.fabric):
                return launch.run_ranks([sys.executable, "-m", "litrecipe", *name.split(), *argv], several)
        return call(verb.code, recipe, **line.options)
    except BrokenPipeError as error:
        if not verb.preemptible:
            raise
        raise RuntimeError("a pipe broke in the midst of a run, which is not over") from error
    finally:
        if verb.preemptible:
            stop.let_go()


def run_submit(submit: SubmitVerb, argv: list[str]) -> int:
    """Take the line of another verb, and hand its recipe to the cluster instead."""
    name, verb = submitted(submit, argv)
    if verb is None:
        print(help_of("submit "))
        return 0
    line = read_line(f"submit {name}", verb, argv[len(name.split()) :])
    if line is None:
        return 0
    return call(submit.code, name, lambda flags: read_submitted(verb, line, flags), **line.options)


def is_submittable(verb: object) -> TypeGuard[RecipeVerb]:
    """Whether a verb can be stopped and goes on, so that a cluster may run it."""
    return isinstance(verb, RecipeVerb) and verb.preemptible


def submitted(submit: SubmitVerb, argv: list[str]) -> tuple[str, RecipeVerb | None]:
    """The verb that a line names, with the options of submitting; none where help is asked for."""
    for name in (" ".join(argv[:1]), " ".join(argv[:2])):
        verb = VERBS.get(name)
        if is_submittable(verb):
            return name, dataclasses.replace(verb, options=submit.options)
    if argv and argv[0] in ("-h", "--help"):
        return "", None
    known = [name for name, verb in VERBS.items() if is_submittable(verb)]
    given = " ".join(word for word in argv[:2] if not word.startswith("-"))
    near = get_close_matches(given, known, n=1)
    cure = f"did you mean `litrecipe submit {near[0]}`?" if near else f"give one of {', '.join(known)}"
    raise InputError(f"submit: {given or 'missing'}: no verb that can be submitted: {cure}")


def read_line(name: str, verb: RecipeVerb, argv: list[str]) -> Line | None:
    """A verb's line taken apart; None where it asks for help, which is printed."""
    from litrecipe.config import schema

    kind = found(f"config.{verb.kind}")
    line = Line(schema.keys(kind), verb.options, verb.words)
    line.read(argv)
    if line.help is not None:
        print(_help(name, kind, verb, line.help))
        return None
    return line


def read_submitted(verb: RecipeVerb, line: Line, flags: Iterable[tuple[str, str]]) -> Any:
    """The recipe of a line that is submitted, with flags over it, and one's own defaults under it."""
    from litrecipe.config.slurm import fetch_as_jobs
    from litrecipe.config.slurm_defaults import with_defaults

    return read_recipe(verb, line, flags, lambda recipe: fetch_as_jobs(recipe.slurm), over=with_defaults)


def read_recipe(
    verb: RecipeVerb,
    line: Line,
    flags: Iterable[tuple[str, str]] = (),
    before_rows: Callable[[Any], None] = lambda _: None,
    **more: Any,
) -> Any:
    """The recipe of a line, with flags over it, and `more` of what `schema.load` takes; its rows are looked at.

    Raises InputError with all mistakes of both.
    """
    from litrecipe.config import schema

    try:
        kind = found(f"config.{verb.kind}")
        recipe = schema.load(kind, line.configs, [*line.flags, *flags], whole=not line.mistakes, **more)
    except InputError as error:
        raise InputError(*line.mistakes, *error.mistakes) from None
    if line.mistakes:
        raise InputError(*line.mistakes)
    before_rows(recipe)
    if hasattr(recipe, "wanted"):
        look_at_stages(recipe)
    elif verb.rows:
        look_at_rows(recipe.data, verb.rows)
    return recipe


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
    from litrecipe.config.describe import group_help, key_help, recipe_help

    groups = [field.name for field in dataclasses.fields(kind) if dataclasses.is_dataclass(field.default_factory)]
    if group in groups:
        return group_help(name, kind, group)
    keys = [field.name for field in dataclasses.fields(kind)]
    if group in keys:
        return key_help(name, kind, group)
    if group:
        near = get_close_matches(group, keys, n=1)
        cure = f"did you mean `--help {near[0]}`?" if near else f"give one of {', '.join(keys)}"
        raise InputError(f"--help: {group}: no such group: {cure}")
    options = {"--config RECIPE": "a file, or a name of `litrecipe recipes ls`; may be repeated, later ones win"}
    for option, (_, default, words) in verb.options.items():
        options[f"--{option}"] = words if not default else f"{words} (default: {default})"
    if verb.words:
        options[f"{verb.words.upper()} ..."] = f"short for --{verb.words}"
    if "model" in groups:
        options["--model M"] = "short for --model.source M"
    options["--help [GROUP]"] = "this, or the keys of one group"
    return recipe_help(name, f"{verb.summary[0].upper()}{verb.summary[1:]}.", kind, options)


if __name__ == "__main__":
    sys.exit(main())

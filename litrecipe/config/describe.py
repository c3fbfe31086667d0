"""Help for people: groups with one line each, and the keys of one group with their defaults."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from textwrap import wrap
from typing import Any, get_type_hints

from litrecipe.config.pretrain import OF_A_STAGE, PretrainRecipe
from litrecipe.config.stages import GIVEN, VERBS


def recipe_help(verb: str, summary: str, kind: type, options: dict[str, str]) -> str:
    """The short help of a verb that takes a recipe: its options, its groups, and the keys outside groups."""
    hints, docs = get_type_hints(kind), key_docs(kind)
    groups = {name: inspect.getdoc(hint) or "" for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    single = {f"--{name}": docs[name] for name in hints if name not in groups}
    width = max(map(len, (*options, *groups, *single)))
    return "\n".join(
        [
            f"usage: litrecipe {verb} [--config RECIPE]... [--KEY VALUE]...",
            "",
            summary,
            "",
            "options:",
            *two_columns(options.items(), width),
            "",
            f"groups of keys (`litrecipe {verb} --help GROUP` shows one); a flag beats a file:",
            *two_columns(groups.items(), width),
            "",
            "keys outside groups:",
            *two_columns(single.items(), width),
        ]
    )


def group_help(verb: str, kind: Any, name: str) -> str:
    """All keys of one group with type, default and documentation; `name` is a group of `kind`."""
    from jsonargparse import ArgumentParser

    group = get_type_hints(kind)[name]
    hints, docs = get_type_hints(group), key_docs(group)
    parser = ArgumentParser(prog=f"litrecipe {verb}", usage=f"%(prog)s [--{name}.KEY VALUE]...", add_help=False)
    keys = parser.add_argument_group(name, inspect.getdoc(group))
    for key, default in vars(group()).items():
        keys.add_argument(f"--{name}.{key}", type=hints[key], default=default, help=docs[key].replace("%", "%%"))
    return str(parser.format_help()).rstrip()


def key_help(verb: str, kind: Any, name: str) -> str:
    """A key outside groups; of `stages` all that one may hold."""
    default = next(field for field in dataclasses.fields(kind) if field.name == name)
    said = wrap(" ".join(key_docs(kind)[name].split()), 96)
    if name != "stages":
        shown = "" if default.default is dataclasses.MISSING else f" (default: {default.default})"
        return "\n".join([f"usage: litrecipe {verb} [--{name} VALUE]", "", *said, *([shown.strip()] if shown else [])])
    held = stage_docs(kind)
    rows = two_columns(held.items(), max(map(len, held)))
    return "\n".join(
        [f"usage: litrecipe {verb} [--stages.NAME.KEY VALUE]...", "", *said, "", "a stage may hold:", *rows]
    )


def stage_docs(kind: type) -> dict[str, str]:
    """What a stage of a pretraining or a pipeline may hold → what it is."""
    if kind is PretrainRecipe:
        hints = get_type_hints(kind)
        return {f"{group}.{key}": key_docs(hints[group])[key] for group, keys in OF_A_STAGE.items() for key in keys}
    return {
        "verb": f"What is run: {', '.join(VERBS)}.",
        "extends": "A recipe of that verb, which the stage goes by where it says nothing itself.",
        "KEY": f"Any key of the verb's recipe (`litrecipe VERB --help`), but {' and '.join(map('.'.join, GIVEN))}.",
    }


def key_docs(kind: type) -> dict[str, str]:
    """Key → the string that stands under it in its dataclass, or in one that this extends."""
    from docstring_parser import parse_from_object

    kinds = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    return {param.arg_name: param.description or "" for base in kinds for param in parse_from_object(base).params}


def two_columns(pairs: Iterable[tuple[str, str]], width: int) -> list[str]:
    """Lines of names and what they mean, the latter wrapped."""
    lines = []
    for name, words in pairs:
        first, *rest = wrap(" ".join(words.split()), 94 - width) or [""]
        lines += [f"  {name:{width}}  {first}".rstrip(), *(" " * (width + 4) + line for line in rest)]
    return lines

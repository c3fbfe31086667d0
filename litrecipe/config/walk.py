"""A tree of nodes held against a dataclass: what is right becomes a value, what is wrong a line with a cure."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from litrecipe.config.checks import ONE_SOURCE, Mistake, check
from litrecipe.config.merge import Mistakes, Node, plain, read_yaml, show

Recipe = TypeVar("Recipe")


def held_against(
    kind: type[Recipe], tree: Node, mistakes: Mistakes, *, whole: bool = True, prefix: str = "", where: str = ""
) -> tuple[Recipe, dict[str, str]]:
    """Build a recipe and look at its values; returns it, and key → `file:line: ` for what was written.

    All that is wrong is added to `mistakes`; but for what is missing where this is not the `whole` line. Names of keys
    begin with `prefix`, and what nobody wrote is missing `where` that stands.
    """
    walk = Walk(kind, prefix)
    recipe = walk.group(kind, tree, prefix)
    mistakes += walk.mistakes
    if not mistakes.unread:  # of a recipe that could not be read whole, nobody knows what is missing
        mistakes += walk.told([one for one in check(recipe) if whole or one[1] != "missing"], where)
    return recipe, walk.where


def keys(kind: type) -> dict[str, Any]:
    """Full name → type of every key of a recipe."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if dataclasses.is_dataclass(hint):
            found |= {f"{name}.{key}": inner for key, inner in get_type_hints(hint).items()}
        else:
            found[name] = hint
    return found


class Walk:
    """Holds a recipe against its dataclass; gathers what is wrong and remembers where keys were written."""

    def __init__(self, kind: type, prefix: str = "") -> None:
        """`prefix` begins the full name of every key (`stages.sft.`)."""
        self.prefix = prefix
        self.keys = {f"{prefix}{key}": hint for key, hint in keys(kind).items()}
        self.mappings = [key for key, hint in self.keys.items() if get_origin(hint) is dict]
        hints = get_type_hints(kind).items()
        self.groups = [f"{prefix}{name}" for name, hint in hints if dataclasses.is_dataclass(hint)]
        self.mistakes: list[str] = []
        self.wrong: set[str] = set()
        self.meant: set[str] = set()
        """What wrong names are likely to stand for."""
        self.where: dict[str, str] = {}
        self.emptied: dict[str, str] = {}
        """Group → a mapping of it of which `null` has taken away all."""

    def group(self, kind: type[Recipe], node: Node, prefix: str) -> Recipe:
        """Build a dataclass from what is right; what is wrong keeps its default."""
        hints = get_type_hints(kind)
        values: dict[str, Any] = {}
        for name, child in node.value.items():
            key = f"{prefix}{name}"
            self.where[key] = child.where
            if name not in hints:
                self._unknown(key, child)
            elif dataclasses.is_dataclass(hints[name]):
                values[name] = self._subgroup(hints[name], child, key)
            else:
                try:
                    values[name] = _convert(hints[name], child)
                    if values[name] == {} and child.value:
                        self.emptied[prefix] = f"{child.where}{key}: {show(child)}"
                except _Misfit as misfit:
                    self.wrong.add(key)
                    is_several = hints[name] is str and isinstance(child.value, list | dict)
                    cure = ONE_SOURCE if is_several and name == "train" else f"give {misfit}"
                    self.mistakes.append(f"{child.where}{key}: {show(child)}: {cure}")
        return kind(**values)

    def told(self, found: Iterable[Mistake], where: str = "") -> Iterator[str]:
        """What a check found as lines, but for values that are wrong as they are written; what nobody wrote stands
        `where` that is."""
        for name, value, cure in found:
            key = f"{self.prefix}{name}"
            # A wrong name very often means the right one: do not say that the latter is missing as well.
            if key in self.wrong or (key in self.meant and key not in self.where):
                continue
            of = self.emptied.get(f"{key.rpartition('.')[0]}.") if value == "missing" else None
            why = f" ({of}: leaves none)" if of else ""
            yield f"{self.where.get(key, where)}{key}: {value}: {cure}{why}"

    def _subgroup(self, kind: Any, node: Node, key: str) -> Any:
        if node.is_group:
            return self.group(kind, node, f"{key}.")
        if node.is_flag or node.value is not None:
            names = [f"{key}.{field.name}" for field in dataclasses.fields(kind)]
            self.wrong.update(names)
            shown = ", ".join(f"`{name}`" for name in names[:3]) + (", …" if len(names) > 3 else "")
            self.mistakes.append(f"{node.where}{key}: {show(node)}: is a group: set its keys: {shown}")
        return kind()

    def _unknown(self, key: str, node: Node) -> None:
        near = nearest(key, [*self.groups, *self.mappings]) if node.is_group else []
        if near and set(near) <= set(self.mappings):
            self.meant.update(near)
            self.mistakes.append(f"{node.where}{key}: {show(node)}: no such key: {_meant(near)}")
            return
        for name, leaf in leaves(key, node):
            self.mistakes.append(f"{leaf.where}{name}: {show(leaf)}: no such key: {self._hint(name, leaf)}")

    def _hint(self, name: str, node: Node) -> str:
        if name in self.keys:
            return "write the group and the key on two lines, the key indented"
        near = nearest(name, self.groups if node.is_group else list(self.keys))
        self.meant.update(near)
        if near:
            return _meant(near)
        known = [key.removeprefix(self.prefix) for key in self.keys]
        group = name.removeprefix(self.prefix).partition(".")[0]
        of_group = [key for key in known if key.startswith(f"{group}.")]
        outside = [key for key in known if "." not in key]
        groups = [key.removeprefix(self.prefix) for key in self.groups]
        return f"there are {', '.join(of_group or [*groups, *outside])}"


def leaves(key: str, node: Node) -> Iterator[tuple[str, Node]]:
    """Full name and node of every key of a tree; the tree's own name is `key`."""
    if node.is_group and node.value:
        for name, child in node.value.items():
            yield from leaves(f"{key}.{name}", child)
    else:
        yield key, node


def _meant(keys: Iterable[str]) -> str:
    return f"did you mean {' or '.join(f'`{key}`' for key in keys)}?"


class _Misfit(Exception):
    """A value is not of its key's type; the message says what would be."""


def _convert(hint: Any, node: Node) -> Any:
    """The value of a node as the type `hint`; raises _Misfit."""
    if node.is_flag:
        node = _read_flag(hint, node.text or "")
    kind, arguments, value = get_origin(hint) or hint, get_args(hint), node.value
    if kind is Literal and node.text in arguments:
        return node.text
    if kind is types.NoneType and value is None:
        return None
    if kind is str and node.text is not None and value is not None:
        return node.text
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if kind is float:
            return float(value)
        if value == int(value) and abs(value) < 2**63:
            return int(value)
    if kind is list and isinstance(value, list):
        return [_item(hint, arguments[0], item) for item in value]
    if kind is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(_item(hint, argument, item) for argument, item in zip(arguments, value, strict=True))
    if kind is dict and isinstance(value, dict):
        # `key: null` takes away what a recipe below gives; `key:` with nothing after it is a slip.
        return {key: _item(hint, arguments[1], item) for key, item in value.items() if not _is_null(item)}
    if kind in (types.UnionType, Union):
        for member in arguments:
            try:
                return _convert(member, node)
            except _Misfit:
                continue
    raise _Misfit(describe(hint))


def _is_null(node: Node) -> bool:
    return node.value is None and node.text == "null"


def _item(whole: Any, hint: Any, node: Node) -> Any:
    """A part of a list or mapping; what is said of a wrong one is what the whole should be."""
    try:
        return _convert(hint, node)
    except _Misfit:
        raise _Misfit(f"{describe(whole)} ({show(node)} is not one)") from None


def _read_flag(hint: Any, text: str) -> Node:
    """A flag's text, read as its type wants it: text as it stands, lists also as `a,b`, all else as YAML.

    In a file nothing after a key means null; after a flag it is a variable of the shell that is not set.
    """
    members = (get_args(hint) if get_origin(hint) in (types.UnionType, Union) else None) or (hint,)
    if str in members:
        return Node(None if text == "null" and types.NoneType in members else text, text=text)
    is_list = any(get_origin(member) in (list, tuple) for member in members)
    if is_list and not text.startswith("[") and text != "null":
        return Node([Node(plain(part.strip()), text=part.strip()) for part in text.split(",") if part.strip()])
    if not text.strip():
        raise _Misfit("a value, or null")
    broken = Mistakes()
    node = read_yaml(text, None, broken)
    return Node(text, text=text) if broken else node


def describe(hint: Any) -> str:
    """A type in words."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return arguments[0] if len(arguments) == 1 else f"one of {', '.join(arguments)}"
    if kind in (types.UnionType, Union):
        return " or ".join(describe(member) for member in arguments)
    if kind is list:
        if get_origin(arguments[0]) is Literal:
            return f"a list out of {', '.join(get_args(arguments[0]))}"
        return "a list of words: [a, b]"
    if kind is tuple:
        return f"a list of {len(arguments)} {describe(arguments[0]).removeprefix('a ')}s"
    if kind is dict:
        words, example = ("numbers", "1.0") if arguments[1] is float else ("words", "b")
        return f"a mapping of words to {words}: {{a: {example}}}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}[kind]


FARTHEST_GROUP = 1.5
"""What a key in another group is away at most, in letters: a right key in a wrong group is near."""


def nearest(name: str, known: Sequence[str]) -> list[str]:
    """The known names likeliest meant by a wrong one, all that are equally near; none when all are far."""
    distances = {candidate: _distance(name, candidate) for candidate in known}
    best = min(distances.values(), default=math.inf)
    farthest = FARTHEST_GROUP + 0.3 * len(name.rpartition(".")[2])
    return [candidate for candidate, distance in distances.items() if distance == best][:3] if best <= farthest else []


def _distance(name: str, known: str) -> float:
    """Edits between two full names; the group counts at most `FARTHEST_GROUP`."""
    group, _, leaf = name.lower().replace("-", "_").rpartition(".")
    known_group, _, known_leaf = known.rpartition(".")
    # `batch_size` for global_batch_size, `lora_alpha` for alpha
    is_end = f"_{leaf}".endswith(f"_{known_leaf}") or f"_{known_leaf}".endswith(f"_{leaf}")
    between_leaves = min(_edits(leaf, known_leaf), 1) if is_end else _edits(leaf, known_leaf)
    return min(_edits(group, known_group), FARTHEST_GROUP) + between_leaves


def _edits(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours that make `a` into `b`."""
    rows = [list(range(len(b) + 1))]
    for i, letter in enumerate(a, start=1):
        row = [i]
        for j, other in enumerate(b, start=1):
            row.append(min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other)))
            if i > 1 and j > 1 and letter == b[j - 2] and other == a[i - 2]:
                row[-1] = min(row[-1], rows[-2][j - 2] + 1)
        rows.append(row)
    return rows[-1][-1]

"""Recipes as they are written: YAML with line numbers, `extends`, several files and flags laid over one another.

Everything is kept as `Node`s, which remember where they were written, until `schema` knows which type a key has.
Plain scalars follow YAML 1.2: `1e-4` is a number; `no`, `1:30` and dates are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from litrecipe.config.errors import InputError

SCHEMA_VERSION = 1
"""The version of the keys in `groups`; raise it, and teach `migrate`, when a key changes its name or meaning."""

INTEGER = re.compile(r"[-+]?[0-9]+(_[0-9]+)*")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(_[0-9]+)*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
WORDS: dict[str, bool | None] = {"": None, "~": None, "null": None, "Null": None, "NULL": None}
WORDS |= {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
IN_HUB = "hub:"
"""Begins what is named by its place in the hub."""
LONGEST_INTEGER = 40
"""Characters; longer ones would not fit 64 bits, and Python refuses to read very long ones."""


@dataclass(frozen=True)
class Node:
    """A value and where it was written."""

    value: Any
    """A scalar, a list of nodes, or a dict of nodes."""
    where: str = ""
    """`recipe.yaml:12: `, or nothing for a flag."""
    text: str | None = None
    """A scalar as it was written, for keys whose type is text."""
    is_flag: bool = False
    """From the command line: only `text` counts, and the type of the key decides how it is read."""

    @property
    def is_group(self) -> bool:
        """Whether this is a mapping."""
        return isinstance(self.value, dict)


class Mistakes(list[str]):
    """Lines gathered while reading."""

    unread = False
    """Whether something is missing as a whole: a file, or what it extends."""

    def without(self, line: str) -> None:
        """Note that something could not be read at all."""
        self.append(line)
        self.unread = True


def merge(configs: Sequence[str | Path], flags: Iterable[tuple[str, str]], mistakes: Mistakes, verb: str = "") -> Node:
    """Lay the files over one another, later ones on top, and the flags (full key, text) over all.

    What cannot be read is added to `mistakes` and left out. A name that fits several recipes of the hub means the one
    of the `verb` (`finetune`, `align dpo`), if there is one.
    """
    tree = Node({})
    for config in configs:
        path = find(str(config), None, mistakes, verb=verb)
        if path is not None:
            tree = overlay(tree, read_recipe(path, mistakes, verb=verb))
    for key, text in flags:
        node = Node(None, text=text, is_flag=True)
        for part in reversed(key.split(".")):
            node = Node({part: node})
        tree = overlay(tree, node)
    return tree


def overlay(base: Node, top: Node) -> Node:
    """`top` over `base`, key by key. A group without keys (`train:` and nothing below) changes nothing."""
    if not base.is_group or (not top.is_group and (top.is_flag or top.value is not None)):
        return top
    if not top.is_group:
        return base
    merged = dict(base.value)
    for key, node in top.value.items():
        merged[key] = overlay(merged[key], node) if key in merged else node
    return Node(merged, top.where or base.where)


def read_recipe(path: Path, mistakes: Mistakes, chain: tuple[Path, ...] = (), verb: str = "") -> Node:
    """A recipe file laid over what it `extends`; the stages of a pipeline may extend recipes as well."""
    recipe = read_file(path, mistakes)
    chain = (*chain, path.resolve())
    stages = recipe.value.get("stages")
    if stages is not None and stages.is_group:
        for name, stage in stages.value.items():
            if stage.is_group and "extends" in stage.value:
                of_stage = stage.value.get("verb", Node("")).text or ""
                key = f"stages.{name}.extends"
                stages.value[name] = _extended(stage, key, path, mistakes, chain, of_stage, without=OF_A_RUN)
    return _extended(recipe, "extends", path, mistakes, chain, verb)


OF_A_RUN = (("out_dir",), ("out",), ("checkpoint", "resume"))
"""Keys that say where a run is, not what: a stage does not take them over."""


def _extended(
    recipe: Node,
    key: str,
    path: Path,
    mistakes: Mistakes,
    chain: tuple[Path, ...],
    verb: str,
    without: Iterable[tuple[str, ...]] = (),
) -> Node:
    """A recipe, or a stage, of the file `path` over what it `extends`, but for the keys `without`."""
    if "extends" not in recipe.value:
        return recipe
    extends = recipe.value.pop("extends")
    if not isinstance(extends.text, str) or extends.value is None:
        mistakes.without(f"{extends.where}{key}: {show(extends)}: give the name of one recipe, or a file")
        return recipe
    base = find(extends.text, path.parent, mistakes, f"{extends.where}{key}: ", verb)
    if base is None:
        return recipe
    if base.resolve() in chain:
        circle = " → ".join(displayed(link) for link in (*chain, base))
        mistakes.without(f"{extends.where}{key}: {extends.text}: a recipe cannot extend itself ({circle})")
        return recipe
    below = read_recipe(base, mistakes, chain, verb)
    for *groups, name in without:
        owner = below
        for group in groups:
            owner = owner.value.get(group, Node({})) if owner.is_group else Node({})
        if owner.is_group:
            owner.value.pop(name, None)
    return overlay(below, recipe)


def read_file(path: Path, mistakes: Mistakes) -> Node:
    """One YAML file, at the present schema version; an empty group when it cannot be read."""
    text = read_text(path, mistakes)
    if text is None:
        return Node({})
    root = read_yaml(text, displayed(path), mistakes)
    if root.value is None:
        return Node({})
    if not root.is_group:
        mistakes.without(f"{root.where}{show(root)}: a recipe is made of `key: value` lines")
        return Node({})
    return migrate(root, mistakes)


def read_own(path: Path) -> dict[str, Any]:
    """A recipe that this program wrote, every scalar as text; by libyaml where it is there, many times as fast.

    Raises InputError where it is not as it was written.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{path}: {' '.join(str(error).split())}: not as it was written: restore it") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no keys: not as it was written: restore it")
    return value


def read_text(path: Path, mistakes: Mistakes) -> str | None:
    """A file as it is written."""
    name = displayed(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        mistakes.without(f"{name}: not text: byte {error.start} is not UTF-8: save the file as UTF-8")
    except OSError as error:
        mistakes.without(f"{name}: {error.strerror}: give a recipe file that can be read")
    return None


def migrate(recipe: Node, mistakes: Mistakes) -> Node:
    """Bring a file of an older schema version to the present keys. There is one version so far."""
    version = recipe.value.get("schema_version")
    if version is not None and type(version.value) in (int, float) and version.value > SCHEMA_VERSION:
        mistakes.without(
            f"{version.where}schema_version: {show(version)}: this program knows up to {SCHEMA_VERSION}: "
            "use a newer litrecipe"
        )
        return Node({})
    return recipe


def read_yaml(text: str, name: str | None, mistakes: Mistakes) -> Node:
    """YAML text as nodes. `name` stands before the line number in messages (None: one line, a flag)."""
    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        return (root and _Reader(name, mistakes).node(root, "")) or Node(None)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}: " if name and mark else ""
        mistakes.without(f"{line}YAML: {error.problem or error.context}: mend it here or on the line before")
    except yaml.reader.ReaderError as error:
        mistakes.without(f"{name}: YAML: character {error.position}: {error.reason}: remove it")
    except RecursionError:
        mistakes.without(f"{name}: YAML: nested too deeply: a recipe has groups of keys, no more")
    return Node(None)


class _Reader:
    """Turns PyYAML's nodes into ours."""

    def __init__(self, name: str | None, mistakes: Mistakes) -> None:
        self.name = name
        self.mistakes = mistakes
        self.seen: set[int] = set()

    def node(self, node: yaml.Node, key: str) -> Node | None:
        """One node and all below, None when it is not read; `key` is its full name."""
        where = self.where(node)
        if id(node) in self.seen:
            self.mistakes.append(f"{where}{key}: an alias (`*name`): YAML aliases are not read: write the value out")
            return None
        self.seen.add(id(node))
        if node.tag not in UNTAGGED:
            self.mistakes.append(f"{where}{key}: {node.tag}: YAML tags are not read: write the value without it")
            return None
        if isinstance(node, yaml.MappingNode):
            return Node(self.mapping(node, key), where)
        if isinstance(node, yaml.SequenceNode):
            items = [self.node(item, key) for item in node.value]
            return Node([item for item in items if item is not None], where)
        is_plain = isinstance(node, yaml.ScalarNode) and node.style is None
        return Node(plain(node.value) if is_plain else node.value, where, text=node.value)

    def mapping(self, node: yaml.MappingNode, prefix: str) -> dict[str, Node]:
        """The pairs of a mapping; a key that is given twice is a mistake."""
        pairs: dict[str, Node] = {}
        lines: dict[str, int] = {}
        for key_node, value_node in node.value:
            where = self.where(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistakes.append(f"{where}{prefix or 'recipe'}: a list or mapping as a key: keys are words")
                continue
            key = key_node.value
            name = f"{prefix}.{key}" if prefix else key
            if key in lines:
                self.mistakes.append(f"{where}{name}: given twice: line {lines[key]} has it already: remove one")
            value = self.node(value_node, name)
            lines[key] = key_node.start_mark.line + 1
            if value is not None:
                pairs[key] = Node(value.value, where, value.text)
        return pairs

    def where(self, node: yaml.Node) -> str:
        """`file:line: `."""
        return f"{self.name}:{node.start_mark.line + 1}: " if self.name else ""


UNTAGGED = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "seq", "map")}
"""What the base loader calls nodes without a tag."""


def plain(text: str) -> Any:
    """The value of a scalar that stands without quotes."""
    if text in WORDS:
        return WORDS[text]
    if INTEGER.fullmatch(text) and len(text) <= LONGEST_INTEGER:
        return int(text)
    return float(text) if NUMBER.fullmatch(text) else text


def show(node: Node) -> str:
    """A value as it stands in a message: one short line."""
    if node.text is not None:
        words = node.text if node.text.strip() else repr(node.text)
    elif node.is_group:
        words = "{" + ", ".join(f"{key}: {show(child)}" for key, child in node.value.items()) + "}"
    elif isinstance(node.value, list):
        words = "[" + ", ".join(show(item) for item in node.value) + "]"
    else:
        words = "null" if node.value is None else str(node.value)
    words = " ".join(words.split()) if words.strip("'") else words
    return words if len(words) <= 60 else words[:57] + "..."


def hub_folder() -> Path:
    """Where the recipes lie that ship with the program: inside the wheel, or at the top of a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "config_hub"
    return inside if inside.is_dir() else package.parent / "config_hub"


def path_of(name: str) -> Path:
    """The file or folder that a recipe names: `hub:experiments/addition` is what lies at that place among the recipes
    that ship with the program, wherever it is run; all else is on this disk."""
    if name.startswith(IN_HUB):
        return hub_folder() / name.removeprefix(IN_HUB)
    return Path(name).expanduser()


def hub_names() -> list[str]:
    """Names of all recipes of the hub, sorted: `finetune/smollm2-135m/lora`."""
    folder = hub_folder()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def find(name: str, beside: Path | None, mistakes: Mistakes, key: str = "--config: ", verb: str = "") -> Path | None:
    """The recipe file `name` stands for: a file (relative to `beside`), a hub name, or the unique end of one."""
    if not name:
        mistakes.without(f"{key}'': give a recipe file, or a name of `litrecipe recipes ls`")
        return None
    path = Path(name) if beside is None else beside / name
    if path.is_file():
        return path
    if path.is_dir() and name not in hub_names():
        mistakes.without(f"{key}{name}: is a folder: give a recipe file")
        return None
    return find_in_hub(name, mistakes, key, verb)


def find_in_hub(name: str, mistakes: Mistakes, key: str = "", verb: str = "") -> Path | None:
    """The file of a hub name, or of the unique end of one, unique perhaps among those of a verb only."""
    names = hub_names()
    wanted = name.removesuffix(".yaml")
    matches = [wanted] if wanted in names else [known for known in names if known.endswith(f"/{wanted}")]
    of_verb = [known for known in matches if verb and known.startswith(f"{verb.replace(' ', '/')}/")]
    matches = of_verb if len(of_verb) == 1 else matches
    if len(matches) == 1:
        return hub_folder() / f"{matches[0]}.yaml"
    if matches:
        mistakes.without(f"{key}{name}: could be {', '.join(matches)}: give more of the name")
    else:
        near = get_close_matches(wanted, names, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "`litrecipe recipes ls` lists the hub"
        mistakes.without(f"{key}{name}: no such file, and no recipe of the hub: {hint}")
    return None


def displayed(path: Path) -> str:
    """A path as messages name it; recipes of the hub without the way to it."""
    folder = hub_folder()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)

"""The house rules of docs/architecture.md, read off the imports: floors, no circles, light files, short files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent / "litrecipe"
FILES = sorted(HOUSE.rglob("*.py"))

ROOMS = [
    "config",
    "model",
    "objectives",
    "checkpoint",
    "data",
    "engine",
    "evaluation",
    "rollout",
    "recipes",
    "cluster",
    "front door",
]
"""From the ground up; rooms of one floor stand in this order too, so that they cannot need one another."""
FRONT_DOOR = ("cli", "hub", "line", "verbs", "__main__")
FLOOR_ONE = ("model", "objectives")
HEAVY = {"torch", "lightning_fabric", "pytorch_lightning", "peft", "transformers", "bitsandbytes", "lm_eval", "gguf"}
LIGHT_FILES = [
    "cli.py",
    "line.py",
    "verbs.py",
    "hub.py",
    "__init__.py",
    "__main__.py",
    "data/readers.py",
    "data/formats.py",
    "data/toy.py",
]


def name_of(file: Path) -> str:
    """`litrecipe.data.toy`; a package has the name of its folder."""
    parts = file.relative_to(HOUSE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file) for file in FILES}


def imports(file: Path, late: bool = True, for_types: bool = True) -> Iterator[str]:
    """Full names of what a file imports: at its head, inside functions (`late`), and for type checkers only."""
    tree = ast.parse(file.read_text())
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        is_late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        is_for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if (is_late and not late) or (is_for_types and not for_types):
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: import by the full name"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)


def room(module: str) -> str | None:
    """The room of one of our modules; None for the package itself and for what is not ours."""
    parts = module.split(".")
    if parts[0] != "litrecipe" or len(parts) == 1:
        return None
    return "front door" if parts[1] in FRONT_DOOR else parts[1]


def test_every_room_has_its_place() -> None:
    assert {room(module) for module in MODULES} - {None} == set(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_come_from_the_own_room_or_from_below(file: Path) -> None:
    here = room(name_of(file))
    for module in imports(file):
        there = room(module)
        if there is not None:
            assert here is not None, f"the package itself imports {module}"
            assert ROOMS.index(there) <= ROOMS.index(here), f"{name_of(file)} imports {module}"


def test_imports_make_no_circle() -> None:
    graph = {
        name_of(file): {module for module in imports(file, for_types=False) if module in MODULES} for file in FILES
    }
    done: set[str] = set()

    def visit(module: str, chain: tuple[str, ...]) -> None:
        assert module not in chain, " → ".join((*chain, module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*chain, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("file", sorted((HOUSE / "config").glob("*.py")), ids=name_of)
def test_config_knows_nothing_heavy_even_late(file: Path) -> None:
    assert not HEAVY & {module.split(".")[0] for module in imports(file)}


@pytest.mark.parametrize("file", [HOUSE / name for name in LIGHT_FILES], ids=name_of)
def test_light_files_import_nothing_heavy_at_their_head(file: Path) -> None:
    reached: set[str] = set()
    pending = [name_of(file)]
    while pending:
        module = pending.pop()
        if module in reached:
            continue
        reached.add(module)
        if module in MODULES:
            path = HOUSE.parent / Path(*module.split("."))
            pending += imports(
                path / "__init__.py" if path.is_dir() else path.with_suffix(".py"), late=False, for_types=False
            )
    assert not HEAVY & {module.split(".")[0] for module in reached}


@pytest.mark.parametrize("file", [file for file in FILES if room(name_of(file)) in FLOOR_ONE], ids=name_of)
def test_floor_one_knows_no_files_and_no_fabric(file: Path) -> None:
    known = {module.split(".")[0] for module in imports(file)}
    assert not known & {"pathlib", "os", "io", "json", "yaml", "lightning_fabric", "rich"}
    assert "open(" not in file.read_text()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_are_short(file: Path) -> None:
    longest = 200 if room(name_of(file)) == "recipes" else 520
    assert len(file.read_text().splitlines()) <= longest

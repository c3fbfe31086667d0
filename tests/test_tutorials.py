"""The tutorials say what the program knows: every command is read as it would be, every key exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from litrecipe import cli
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.merge import hub_names
from litrecipe.config.recipes import RECIPES

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted([*(REPO / "tutorials").glob("*.md"), REPO / "README.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KEYS = {key for kind in RECIPES.values() for key in schema.keys(kind)}
GROUPS = {key.partition(".")[0] for key in KEYS if "." in key}
NAMES = {key.rpartition(".")[2] for key in KEYS} | GROUPS
ENDINGS = {"json", "jsonl", "md", "png", "py", "safetensors", "txt", "yaml"}
"""Of file names, which look like a group and a key."""

pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text()) if language in languages]


def commands(page: Path) -> Iterator[list[str]]:
    """The words behind `litrecipe` of each command that is to succeed."""
    for body in blocks(page, "", "bash", "sh"):
        lines = re.sub(r"\\\n\s*", "", body).splitlines()
        for line, answer in zip(lines, [*lines[1:], ""], strict=True):
            command = line.removeprefix("$ ")
            if command.startswith("litrecipe ") and not answer.startswith("litrecipe: error"):
                yield shlex.split(command, comments=True)[1:]


def test_every_command_is_read(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that a reader has and we have not are left out, and what would be missing without them."""
    monkeypatch.setattr(cli, "call", lambda *_, **__: 0)
    for words in commands(page):
        found = next((name for name in (" ".join(words[:2]), words[0]) if name in cli.VERBS), None)
        if found is None or not isinstance(verb := cli.VERBS[found], cli.RecipeVerb):
            assert cli.run(words) == 0, words
            continue
        kind = cli.found(f"config.{verb.kind}")
        line = cli.Line(schema.keys(kind), verb.options)
        line.read(words[len(found.split()) :])
        assert line.mistakes == [], words
        configs = [name for name in line.configs if name in hub_names() or not name.endswith(".yaml")]
        try:
            schema.load(kind, configs, line.flags, whole=False)
        except InputError as error:
            pytest.fail(f"{words}: {error}")


def test_every_recipe_is_read(page: Path, tmp_path: Path) -> None:
    for number, body in enumerate(blocks(page, "yaml")):
        written = yaml.safe_load(body)
        if not isinstance(written, dict) or not written.keys() & (GROUPS | {"extends", "stages"}):
            continue  # of another program
        path = tmp_path / f"{number}.yaml"
        path.write_text(body)
        try:
            schema.load(schema.kind_of(path), [path], whole=False)
        except InputError as error:
            pytest.fail(f"{body}\n{error}")


def test_every_key_that_is_named_exists(page: Path) -> None:
    """In running text: `group.key`, and `key: value`."""
    text = FENCE.sub("", page.read_text())
    for code in re.findall(r"`([^`\n]+)`", text):
        for group, key in re.findall(r"(?<![\w./:-])([a-z_]+)\.([a-z_]+)", code):
            if group in GROUPS and key not in ENDINGS:
                assert f"{group}.{key}" in KEYS, code
        said = re.match(r"([a-z_.]+): \S", code)
        if said:
            assert said[1].rpartition(".")[2] in NAMES, code


def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", FENCE.sub("", page.read_text())):
        assert target.startswith("http") or (page.parent / target).exists(), target

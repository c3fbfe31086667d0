"""The tutorials say what the program knows: every command is read as it would be, every key exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from litrecipe import cli
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Fabric
from litrecipe.config.merge import hub_names
from litrecipe.config.recipes import RECIPES
from litrecipe.data.prompts import Prompt
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.families import FAMILIES
from litrecipe.rollout.rewards import make_judge
from litrecipe.rollout.sources import Completions, make_source
from litrecipe.verbs import VERBS, RecipeVerb, SubmitVerb

REPO = Path(__file__).resolve().parent.parent
PAGES = sorted([*(REPO / "tutorials").glob("*.md"), REPO / "README.md", REPO / "docs" / "scaling.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KEYS = {key for kind in RECIPES.values() for key in schema.keys(kind)}
GROUPS = {key.partition(".")[0] for key in KEYS if "." in key}
NAMES = {key.rpartition(".")[2] for key in KEYS} | GROUPS
ENDINGS = {"json", "jsonl", "md", "png", "py", "safetensors", "txt", "yaml"}
"""Of file names, which look like a group and a key."""
of_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


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


@of_every_page
def test_every_command_is_read(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that a reader has and we have not are left out, and what would be missing without them."""
    monkeypatch.setattr(cli, "call", lambda *_, **__: 0)
    for words in commands(page):
        verb: object = None
        if words[0] == "submit":
            submit = VERBS["submit"]
            assert isinstance(submit, SubmitVerb)
            found, verb = cli.submitted(submit, words := words[1:])
        else:
            found = next((name for name in (" ".join(words[:2]), words[0]) if name in VERBS), "")
            verb = VERBS.get(found)
        if not isinstance(verb, RecipeVerb):
            assert cli.run(words) == 0, words
            continue
        kind = cli.found(f"config.{verb.kind}")
        line = cli.Line(schema.keys(kind), verb.options, verb.words)
        line.read(words[len(found.split()) :])
        assert line.mistakes == [], words
        configs = [name for name in line.configs if name in hub_names() or not name.endswith(".yaml")]
        try:
            schema.load(kind, configs, line.flags, whole=False)
        except InputError as error:
            pytest.fail(f"{words}: {error}")


@of_every_page
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


@of_every_page
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


@of_every_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", FENCE.sub("", page.read_text())):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("text", "looks"),
    [
        ("```\n$ litrecipe align ppo --model M --ppo.clipp 3\n```\n", "commands"),
        ("```\nlitrecipe align dpo --model M \\\n    --dpo.loss simple\n```\n", "commands"),
        ("```yaml\nppo:\n  clipp: 3\n```\n", "recipes"),
        ("Set `ppo.clipp`.", "keys"),
        ("Set `clipp: 3`.", "keys"),
        ("See [there](nowhere.md#here).", "links"),
    ],
)
def test_what_is_wrong_is_found(text: str, looks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    looking = {
        "commands": lambda: test_every_command_is_read(page, monkeypatch),
        "recipes": lambda: test_every_recipe_is_read(page, tmp_path),
        "keys": lambda: test_every_key_that_is_named_exists(page),
        "links": lambda: test_every_link_leads_somewhere(page),
    }
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        looking[looks]()


def test_the_page_on_families_names_all() -> None:
    [page] = [page for page in PAGES if page.name.endswith("-model-families.md")]
    table = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert {name for line in table for name in re.findall(r"`(\w+)`", line)} >= set(FAMILIES)


def test_the_functions_are_called_as_they_are_written(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rewards and judges of the pages, in a file beside the recipe."""
    for name, page in (("rewards_of_10", "10-reward-functions.md"), ("judges_of_13", "13-iterative-dpo.md")):
        (tmp_path / f"{name}.py").write_text("".join(blocks(REPO / "tutorials" / page, "python")))
    monkeypatch.syspath_prepend(str(tmp_path))
    prompt = Prompt("f:1", [{"role": "user", "content": "How long?"}], None, {"unit": "km"}, None, np.array([1]))
    other = replace(prompt, row={})
    a = Completions([prompt, other], ["3 km", "three"], [[1], [1]], ["eos", "eos"])
    b = Completions([prompt, other], ["3 miles", "3"], [[1], [1]], ["eos", "eos"])
    tokenizer, fabric = Tokenizer.load(tiny_model), Fabric()
    scores = [
        make_source(f"function:rewards_of_10:{name}", tokenizer, fabric, "cpu")(a) for name in ("brief", "right_unit")
    ]
    assert scores == [[-2.0, -1.0], [1.0, None]]
    judge = make_judge("function:judges_of_13:shorter", tokenizer, fabric, "cpu")
    assert judge(a, b) == [1.0, 0.0] and judge(a, a) == [0.5, 0.5]

"""What outsiders count on: verbs, keys with their defaults, exit codes. A change here is a decision, not an accident.

To change it on purpose: `python tests/test_surface.py` writes surface.json anew; the change shows in the commit.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from litrecipe.config import schema, stop
from litrecipe.config.errors import WRONG_INPUT
from litrecipe.config.merge import SCHEMA_VERSION
from litrecipe.config.recipes import RECIPES
from litrecipe.verbs import VERBS, PlainVerb

FROZEN = Path(__file__).with_name("surface.json")


def surface() -> dict[str, Any]:
    """The surface as it is now."""
    keys: dict[str, Any] = {}
    for verb, kind in RECIPES.items():
        recipe = kind()
        defaults = dataclasses.asdict(recipe)
        for key, hint in schema.keys(kind).items():
            group, _, name = key.rpartition(".")
            default = defaults[group][name] if group else defaults[name]
            keys.setdefault(verb, {})[key] = f"{schema.describe(hint)}; {json.dumps(default)}"
    return {
        "verbs": {
            name: list(verb.arguments) if isinstance(verb, PlainVerb) else [f"--{option}" for option in verb.options]
            for name, verb in VERBS.items()
        },
        "exit_codes": {"wrong input": WRONG_INPUT, "pre-empted": stop.PREEMPTED, "interrupted": stop.INTERRUPTED},
        "schema_version": SCHEMA_VERSION,
        "keys": keys,
    }


def written() -> str:
    """The surface as it stands in the file."""
    return json.dumps(surface(), indent=1) + "\n"


def test_the_surface_is_as_frozen() -> None:
    assert json.loads(written()) == json.loads(FROZEN.read_text())


def test_every_recipe_is_of_the_present_version() -> None:
    assert {kind().schema_version for kind in RECIPES.values()} == {SCHEMA_VERSION}


if __name__ == "__main__":
    FROZEN.write_text(written())

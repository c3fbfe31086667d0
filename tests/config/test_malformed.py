"""Wrong recipes of every verb, drawn from the dataclasses: a line a mistake, at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from generated import DAMAGE, RIGHT, Wrong, written, wrong_recipes
from hypothesis import HealthCheck, given, settings

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.recipes import RECIPES

MODEL, OUT = Path("m"), Path("o")


def mistakes_of(wrong: Wrong, folder: Path) -> list[str]:
    path = folder / wrong.name
    wrong.write(path, MODEL, OUT)
    with pytest.raises(InputError) as caught:
        schema.load(RECIPES[wrong.verb], [path])
    return caught.value.mistakes


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(wrong=wrong_recipes())
def test_each_mistake_of_a_recipe_has_a_line(wrong: Wrong, tmp_path_factory: pytest.TempPathFactory) -> None:
    mistakes = mistakes_of(wrong, tmp_path_factory.getbasetemp())
    assert len(mistakes) == len(wrong.must_say)
    for said in wrong.must_say:
        assert any(said in line for line in mistakes), (said, mistakes)


@pytest.mark.parametrize("verb", sorted(RIGHT))
def test_recipes_are_right_before_anything_is_made_wrong(verb: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    Wrong(verb, written(RIGHT[verb]), []).write(path, MODEL, OUT)
    schema.load(RECIPES[verb], [path])


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_text_has_one_line(damage: str, tmp_path: Path) -> None:
    tree = {key: value for key, value in RIGHT["finetune"].items() if key != "out_dir"}
    [mistake] = mistakes_of(Wrong("finetune", DAMAGE[damage](written(tree)), []), tmp_path)
    assert "recipe.yaml" in mistake

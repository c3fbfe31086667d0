"""Recipes against their dataclasses: round trips, typos, all mistakes at once."""

from __future__ import annotations

import dataclasses
import random
import string
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import EvaluateRecipe, FinetuneRecipe, GenerateRecipe
from litrecipe.config.merge import Mistakes, merge
from litrecipe.config.online import PpoRecipe
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.recipes import RECIPES

GOOD = {"model.source": "m", "data.train": "d"}


def mistake_of(key: str, text: str) -> str:
    """The one mistake of a flag."""
    with pytest.raises(InputError) as wrong:
        from_flags((key, text))
    [mistake] = wrong.value.mistakes
    return mistake


def from_flags(*flags: tuple[str, str]) -> FinetuneRecipe:
    return schema.load(FinetuneRecipe, [], [*GOOD.items(), *flags])


# -- round trips ------------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(
    [
        "null",
        "~",
        "true",
        "no",
        "1",
        "1e-4",
        "1:30",
        "a: b",
        "[a]",
        "# x",
        " lead",
        "2024-01-01",
        "- a",
        "",
        "\x85",
        "é",
    ]
)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a type."""
    kind, arguments = get_origin(hint) or hint, get_args(hint)
    if kind is Literal:
        return st.sampled_from(arguments)
    if kind in (types.UnionType, Union):
        return st.one_of(*(values(member) for member in arguments))
    if kind is list:
        return st.lists(values(arguments[0]), max_size=3)
    if kind is tuple:
        return st.tuples(*(values(member) for member in arguments))
    if kind is dict:
        return st.dictionaries(values(arguments[0]), values(arguments[1]), max_size=3)
    return {
        int: st.integers(-(2**63) + 1, 2**63 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        bool: st.booleans(),
        str: TEXTS,
        types.NoneType: st.none(),
    }[kind]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


KINDS = sorted(set(RECIPES.values()) - {PipelineRecipe}, key=lambda kind: kind.__name__)
"""Of what has keys; a pipeline has recipes."""


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_dumped_recipe_reads_back_equal(kind: type, data: st.DataObject, folder: Path) -> None:
    recipe = kind()
    for key, value in data.draw(
        st.fixed_dictionaries({key: values(h) for key, h in schema.keys(kind).items() if key != "stages"})
    ).items():
        group, _, name = key.rpartition(".")
        setattr(getattr(recipe, group) if group else recipe, name, value)
    recipe.schema_version = 1
    path = folder / "dumped.yaml"
    path.write_text(schema.dump(recipe), encoding="utf-8")
    mistakes = Mistakes()
    walk = schema.Walk(kind)
    assert walk.group(kind, merge([path], [], mistakes), "") == recipe
    assert not mistakes and not walk.mistakes


def test_a_dump_is_for_people(tmp_path: Path) -> None:
    text = schema.dump(from_flags(("optim.lr", "1e-3")))
    assert "  betas: [0.9, 0.999]\n" in text
    assert "\ntrain:\n  max_steps: null\n" in text
    assert "  lr: 0.001\n" in text


# -- typos ------------------------------------------------------------------------------------------------------------

KEYS = sorted(schema.keys(FinetuneRecipe))


def misspell(word: str, draw: random.Random) -> str:
    """One letter added, lost, changed, or swapped with its neighbour."""
    at, letter = draw.randrange(len(word)), draw.choice(string.ascii_lowercase + "_")
    options = [word[:at] + letter + word[at:], word[:at] + letter + word[at + 1 :]]
    if len(word) > 1:
        options.append(word[:at] + word[at + 1 :])
    if at + 1 < len(word):
        options.append(word[:at] + word[at + 1] + word[at] + word[at + 2 :])
    return draw.choice(options)


@settings(deadline=None, max_examples=400)
@given(st.sampled_from(KEYS), st.randoms(use_true_random=False), st.booleans())
def test_a_typo_is_answered_with_the_right_name(key: str, draw: random.Random, in_group: bool) -> None:
    group, _, leaf = key.rpartition(".")
    wrong = f"{misspell(group, draw)}.{leaf}" if group and in_group else f"{group}.{misspell(leaf, draw)}".lstrip(".")
    if wrong in KEYS:
        return
    mistake = mistake_of(wrong, "1")
    assert mistake.startswith(f"{wrong}: 1: no such key: did you mean ")
    assert f"`{key}`" in mistake


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("lr", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("max_steps", "train.max_steps"),
        ("optim.max-steps", "train.max_steps"),
        ("learning_rate", None),
        ("Train.Max_Steps", "train.max_steps"),
        ("lora_alpha", "adapter.alpha"),
        ("num_train_epochs", "train.epochs"),
        ("batch_size", "train.global_batch_size"),
        ("zzzzzz", None),
    ],
)
def test_a_key_in_the_wrong_place(wrong: str, right: str | None) -> None:
    mistake = mistake_of(wrong, "1")
    assert (f"did you mean `{right}`" in mistake) if right else ("there are model, adapter" in mistake)


def test_all_mistakes_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = """\
train:
  max_stps: 3
  epochs: many
adapter:
  r: 0
  method: lorra
log: {loggers: [tensorbord]}
model: gpt
"""
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as wrong:
        schema.load(FinetuneRecipe, [path], [("data.train", "d"), ("data.max_time", "3"), ("optim.lr", "-1")])
    told = [mistake.removeprefix(f"{tmp_path}/") for mistake in wrong.value.mistakes]
    assert [line.split(": ")[:2] for line in told] == [
        ["r.yaml:2", "train.max_stps"],
        ["r.yaml:3", "train.epochs"],
        ["r.yaml:6", "adapter.method"],
        ["r.yaml:7", "log.loggers"],
        ["r.yaml:8", "model"],
        ["data.max_time", "3"],
        ["r.yaml:5", "adapter.r"],
        ["optim.lr", "-1.0"],
    ]


def test_what_is_missing_is_not_said_of_a_recipe_that_could_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError) as wrong:
        schema.load(FinetuneRecipe, [tmp_path / "none.yaml"])
    assert len(wrong.value.mistakes) == 1


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("optim.lr", "1e-4", 1e-4),
        ("optim.lr", "1", 1.0),
        ("train.max_tokens", "1e9", 10**9),
        ("train.max_steps", "null", None),
        ("train.max_time", "1:30:00", "1:30:00"),
        ("data.date", "2024-07-26", "2024-07-26"),
        ("data.val", "null", None),
        ("data.train", "null", "null"),
        ("out_dir", "007", "007"),
        ("out_dir", "a: b # c", "a: b # c"),
        ("fabric.devices", "auto", "auto"),
        ("fabric.devices", "2", 2),
        ("fabric.compile", "true", True),
        ("adapter.targets", "[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("adapter.targets", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("log.loggers", "[]", []),
        ("log.loggers", "", []),
        ("optim.betas", "0.9,0.95", (0.9, 0.95)),
        ("optim.betas", "[0.9, 0.95]", (0.9, 0.95)),
        ("data.columns", "{prompt: question}", {"prompt": "question"}),
        ("eval.tasks", "perplexity:a.txt,piqa", ["perplexity:a.txt", "piqa"]),
    ],
)
def test_flags_are_read_as_their_key_wants(key: str, text: str, value: object) -> None:
    recipe: Any = from_flags((key, text))
    for name in key.split("."):
        recipe = getattr(recipe, name)
    assert recipe == value
    assert type(recipe) is type(value)


def test_a_key_of_a_mapping_can_be_a_flag(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("data: {columns: {prompt: q}}")
    flags = [*GOOD.items(), ("data.columns.completion", "a")]
    recipe = schema.load(FinetuneRecipe, [tmp_path / "r.yaml"], flags)
    assert recipe.data.columns == {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("key", "text", "cure"),
    [
        ("train.seed", "1.5", "give a whole number"),
        ("train.seed", "9" * 400, "give a whole number"),
        ("train.seed", "true", "give a whole number"),
        ("train.seed", "[", "give a whole number"),
        ("train.seed", "null", "give a whole number"),
        ("train.seed", "{a: 1}", "give a whole number"),
        ("optim.lr", ".inf", "give a number"),
        ("optim.lr", "1e999", "give a number"),
        ("optim.lr", "nan", "give a number"),
        ("fabric.compile", "yes", "give true or false"),
        ("fabric.devices", "all", "give a whole number or auto"),
        ("optim.betas", "0.9", "give a list of 2 numbers"),
        ("optim.betas", "[a, b]", "give a list of 2 numbers (a is not one)"),
        ("log.loggers", "null", "give a list out of tensorboard, wandb, mlflow"),
        ("schedule.name", "cosinus", "give one of cosine, linear, constant, wsd"),
        ("train", "3", "is a group: set its keys: `train.max_steps`"),
    ],
)
def test_wrong_values_are_told_with_what_is_right(key: str, text: str, cure: str) -> None:
    mistake = mistake_of(key, text)
    assert mistake.startswith(f"{key}: ")
    assert cure in mistake


def test_a_mapping_says_what_it_leads_to() -> None:
    with pytest.raises(InputError) as caught:
        schema.load(PpoRecipe, [], [("rewards.sources", '{"length?max=12": fast}')], whole=False)
    assert "give a mapping of words to numbers: {a: 1.0} (fast is not one)" in str(caught.value)
    assert "give a mapping of words to words: {a: b}" in mistake_of("data.columns", "[a]")


def test_a_mistake_is_one_short_line() -> None:
    mistake = mistake_of("schedule.name", "a\nb" * 100)
    assert "\n" not in mistake
    assert len(mistake) < 150


def test_evaluate_and_generate_read_their_own_keys() -> None:
    flags = [("model.source", "m"), ("tasks", "a,b"), ("limit", "5"), ("out", "f")]
    recipe = schema.load(EvaluateRecipe, [], flags)
    assert (recipe.tasks, recipe.limit, recipe.out) == (["a", "b"], 5, "f")
    assert schema.load(GenerateRecipe, [], [("model.source", "m"), ("prompt", "1: [")]).prompt == "1: ["


def test_groups_are_dataclasses_and_every_key_is_documented() -> None:
    from litrecipe.config.describe import key_docs

    for kind in RECIPES.values():
        for name, hint in get_type_hints(kind).items():
            documented = key_docs(hint) if dataclasses.is_dataclass(hint) else {name: key_docs(kind)[name]}
            assert all(documented.values()), (kind, name)


@pytest.mark.parametrize("hint", sorted({str(hint): hint for hint in schema.keys(FinetuneRecipe).values()}.items()))
def test_every_type_has_words(hint: tuple[str, Any]) -> None:
    assert schema.describe(hint[1])


# -- free names -------------------------------------------------------------------------------------------------------


def test_null_takes_a_name_away_that_is_inherited(tmp_path: Path) -> None:
    """Quoted it is a word as others, and where a value was forgotten this is told."""
    (tmp_path / "base.yaml").write_text("model: {source: m}\ndata: {train: d, columns: {prompt: a, chosen: b}}\n")
    top = tmp_path / "top.yaml"
    top.write_text("extends: base.yaml\ndata: {columns: {prompt: null, rejected: 'null'}}\n")
    assert schema.load(FinetuneRecipe, [top]).data.columns == {"chosen": "b", "rejected": "null"}
    top.write_text("extends: base.yaml\ndata:\n  columns:\n    prompt:\n")
    with pytest.raises(InputError, match=r"data\.columns: .*prompt: .*give a mapping"):
        schema.load(FinetuneRecipe, [top])

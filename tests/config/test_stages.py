"""Stages of a pretraining: laid over what stands outside of them, all mistakes told at once, each once."""

from __future__ import annotations

from pathlib import Path

import pytest

from litrecipe import cli
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.pretrain import EACH_STAGE, PretrainRecipe

BASE = "model: {source: m}\ndata: {train: d}\n"
TAUGHT = f"{BASE}distil: {{teacher: T, method: top_1, alpha: 0.2}}\n"


@pytest.fixture
def load(tmp_path: Path):
    def read(text: str, *flags: tuple[str, str]) -> PretrainRecipe:
        (tmp_path / "r.yaml").write_text(text)
        return schema.load(PretrainRecipe, [tmp_path / "r.yaml"], flags)

    return read


@pytest.fixture
def mistakes(load, tmp_path: Path):
    def told(text: str, *flags: tuple[str, str]) -> list[str]:
        with pytest.raises(InputError) as error:
            load(text, *flags)
        return [line.removeprefix(f"{tmp_path}/r.yaml:") for line in error.value.mistakes]

    return told


@pytest.mark.parametrize("off", ["{teacher: null}", "null", "{teacher: }"])
def test_a_stage_does_without_the_teacher_and_all_that_belongs_to_it(load, off: str) -> None:
    recipe = load(f"{TAUGHT}stages:\n  a: {{}}\n  b: {{distil: {off}}}\n  c: {{distil: }}\n")
    assert [stage.distil.teacher for stage in recipe.stages.values()] == ["T", None, "T"]
    assert recipe.stages["b"].distil == PretrainRecipe().distil
    assert recipe == load(f"{TAUGHT}stages: {{a: {{}}, b: {{}}, c: {{}}}}\n", ("stages.b.distil.teacher", "null"))
    assert load(schema.dump(recipe)) == recipe


def test_teachers_that_stages_cannot_have(mistakes) -> None:
    cure = "write distil outside of the stages, and `distil: {teacher: null}` in those that do without"
    assert mistakes(
        f"{TAUGHT}stages:\n  a: {{distil: {{teacher: U}}}}\n  b: {{distil: {{teacher: null, alpha: 0.3}}}}\n"
    ) == [
        "6: stages.b.distil.alpha: 0.3: is the same in all stages: write it outside of them",
        "6: stages.b.distil.alpha: 0.3: there is no teacher: give distil.teacher, or remove it",
        f"5: stages.a.distil.teacher: U: {cure}",
    ]
    assert mistakes(f"{TAUGHT}stages: {{a: {{distil: null}}}}\n") == [
        "3: distil.teacher: T: no stage has it: remove it, or let one learn from it"
    ]


def test_a_wrong_key_hides_no_other_mistake_and_none_is_told_twice(mistakes) -> None:
    text = """\
data: {max_lenth: 3}
optim: {lr: -1}
schedule: {decay: exponential, half_life_steps: 9}
stages:
  a: {optim: {lr: -2, nme: sgd, name: sgd}, data: {max_length: 1}, train: {max_steps: none}}
  -b: {}
  c: {schedule: {decay: linear}, data: {train: d}}
"""
    assert [line.split(": ")[:2] for line in mistakes(text)] == [
        ["1", "data.max_lenth"],
        ["model.source", "missing"],
        ["2", "optim.lr"],
        ["3", "schedule.decay"],
        ["5", "stages.a.optim.name"],
        ["5", "stages.a.optim.nme"],
        ["5", "stages.a.train.max_steps"],
        ["5", "stages.a.data.train"],
        ["5", "stages.a.data.max_length"],
        ["5", "stages.a.optim.lr"],
        ["6", "stages.-b"],
        ["3", "stages.c.schedule.half_life_steps"],
    ]


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ("data: {mixx: {a: 1}}", "data.mixx: {a: 1}: no such key: did you mean `stages.s.data.mix`?"),
        (
            "train: {max_epochs: {a: 2}}",
            "train.max_epochs: {a: 2}: no such key: did you mean `stages.s.data.max_epochs`?",
        ),
        ("optm: {lr: 1}", "optm.lr: 1: no such key: did you mean `stages.s.optim.lr`?"),
    ],
)
def test_a_wrong_name_of_a_mapping_is_answered_with_the_likely_one(mistakes, wrong: str, line: str) -> None:
    assert mistakes(f"{BASE}stages:\n  s: {{{wrong}}}\n") == [f"4: stages.s.{line}"]


NAMING = "no name for a source: use a-z, A-Z, 0-9, and behind the first also - and _"


@pytest.mark.parametrize(
    ("text", "flags", "lines"),
    [
        (
            "data: {sources: {a.b: x, é: y, ok_1-2: z}}",
            [],
            [f"2: data.sources: a.b: {NAMING}", f"2: data.sources: é: {NAMING}"],
        ),
        (
            "data: {sources: {a: null}, mix: {a: 1}}",
            [],
            [
                "data.train: missing: give a data file or folder, a hub id, or `toy:units?n=512&seed=0`, or several by "
                "name in data.sources (2: data.sources: {a: null}: leaves none)",
                "2: data.mix: a: there are no data.sources to have shares: give some, or take them away: "
                "`data.mix: {a: null}`",
            ],
        ),
        (
            "data: {train: d, sources: {a: x}}",
            [],
            ["2: data.train: d: data.sources are taken instead: remove one of them (`data.sources: {a: null}`)"],
        ),
        (
            "data: {sources: {a: x}, max_epochs: {b: 1}}",
            [],
            ["2: data.max_epochs: b: no such source: there are a: put it right, or take it away (`b: null`)"],
        ),
        (
            "",
            [("data.train", "[a, b]")],
            [
                "data.train: [a, b]: is one source: give a folder that holds all, or for `litrecipe pretrain` name "
                "them: `data.sources: {a: …}`"
            ],
        ),
    ],
)
def test_sources_are_told_what_helps(
    mistakes, text: str, flags: list[tuple[str, str]], lines: list[str], tmp_path: Path
) -> None:
    told = mistakes(f"model: {{source: m}}\n{text}\n", *flags)
    assert [line.replace(f"{tmp_path}/r.yaml:", "") for line in told] == lines


@pytest.mark.parametrize(
    "cured", ["{sources: {a: null}, mix: {a: null}, train: d}", "{sources: {a: null, b: y}, mix: {a: null}}"]
)
def test_the_cures_work(tmp_path: Path, cured: str) -> None:
    (tmp_path / "base.yaml").write_text("model: {source: m}\ndata: {sources: {a: x}, mix: {a: 1}}\n")
    (tmp_path / "r.yaml").write_text(f"extends: base.yaml\ndata: {cured}\n")
    data = schema.load(PretrainRecipe, [tmp_path / "r.yaml"]).data
    assert (data.train or data.sources) in ("d", {"b": "y"}) and not data.mix


def test_a_list_in_a_file_is_answered_as_one_in_a_flag(mistakes) -> None:
    [line] = mistakes("model: {source: m}\ndata: {train: [a, b]}\n")
    assert line.startswith("2: data.train: [a, b]: is one source: give a folder that holds all")


@pytest.mark.parametrize("words", [[], ["texts.txt", "--out", "o", "--tokenizer", "t"]])
def test_a_recipe_of_another_verb_is_told_with_its_verb(words: list[str], capsys) -> None:
    assert cli.main(["data", "prepare", *words, "--config", "pretrain/books-14m"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("model: is of a recipe for `litrecipe pretrain`: run that, or give another")


def test_help_shows_what_a_stage_may_hold(capsys) -> None:
    assert cli.main(["pretrain", "--help", "stages"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {key}  " in shown for key in EACH_STAGE) and "optim.betas" not in shown
    assert cli.main(["align", "pipeline", "--help", "stages"]) == 0
    shown = capsys.readouterr().out
    assert "align rejection-sampling" in shown and "out_dir and checkpoint.resume" in " ".join(shown.split())
    assert cli.main(["pretrain", "--help", "out_dir"]) == 0
    assert "(default: runs/pretrain)" in capsys.readouterr().out

"""Pipelines as they are written: stages, references between them, and every mistake with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import DpoRecipe, FinetuneRecipe
from litrecipe.config.pipeline import PipelineRecipe, changed, flat, texts

WHOLE = """\
stages:
  sft:
    verb: finetune
    extends: finetune/smollm2-135m/full
    optim: {lr: 1e-4}
  reward:
    verb: align reward
    model: {source: "stage:sft"}
    data: {train: pairs.jsonl}
    train: {seed: 7}
  rounds:
    verb: align iterative-dpo
    model: {source: "stage:sft/best"}
    data: {train: prompts.jsonl}
    rewards: {sources: {"model:stage:reward": 1.0, "json?schema=stage:sft/s.json": 0.5}}
  dpo:
    verb: align dpo
    model: {source: "stage:rounds"}
    data: {train: "stage:rounds/pairs/000001.jsonl"}
  tested:
    verb: evaluate
    model: {source: "stage:dpo"}
    tasks: ["preference:stage:rounds/pairs/000001.jsonl?x=1"]
seed: 3
out_dir: runs/p
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "p.yaml"
    path.write_text(WHOLE)
    return path


def load(*configs: Path, flags: tuple[tuple[str, str], ...] = ()) -> PipelineRecipe:
    return schema.load(PipelineRecipe, configs, flags)


def mistakes(path: Path, *flags: tuple[str, str]) -> list[str]:
    """What is wrong with a file, without its name."""
    with pytest.raises(InputError) as wrong:
        load(path, flags=flags)
    return [line.removeprefix(f"{path}:") for line in wrong.value.mistakes]


def test_stages_are_recipes_of_their_verbs_in_the_order_of_the_file(written: Path) -> None:
    pipeline = load(written, flags=(("stages.dpo.dpo.beta", "0.3"), ("only", "dpo,sft")))
    assert list(pipeline.stages) == ["sft", "reward", "rounds", "dpo", "tested"]
    assert pipeline.wanted == ["sft", "dpo"]
    sft, dpo = pipeline.stages["sft"].recipe, pipeline.stages["dpo"].recipe
    of_hub = schema.load(FinetuneRecipe, ["finetune/smollm2-135m/full"], [("optim.lr", "1e-4"), ("train.seed", "3")])
    of_hub.out_dir = FinetuneRecipe.out_dir
    assert sft == of_hub
    assert isinstance(dpo, DpoRecipe) and dpo.dpo.beta == 0.3


def test_the_seed_is_that_of_stages_that_set_none(written: Path) -> None:
    seeds = {name: flat(stage.recipe).get("train.seed") for name, stage in load(written).stages.items()}
    assert seeds == {"sft": 3, "reward": 7, "rounds": 3, "dpo": 3, "tested": None}


def test_a_wrong_seed_is_told_once(written: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(written, flags=(("seed", "-1"),))
    assert caught.value.mistakes == ["seed: -1: give 0 or more"]


def test_references_become_paths_wherever_they_stand(written: Path) -> None:
    pipeline = load(written, flags=(("out_dir", "elsewhere/p"),))
    assert pipeline.resolved("reward").model.source == "elsewhere/p/sft/final"
    rounds = pipeline.resolved("rounds")
    assert rounds.model.source == "elsewhere/p/sft/best"
    assert rounds.rewards.sources == {
        "model:elsewhere/p/reward/final": 1.0,
        "json?schema=elsewhere/p/sft/s.json": 0.5,
    }
    assert (rounds.out_dir, rounds.checkpoint.resume) == ("elsewhere/p/rounds", "auto")
    assert pipeline.resolved("dpo").data.train == "elsewhere/p/rounds/pairs/000001.jsonl"
    tested = pipeline.resolved("tested")
    assert tested.tasks == ["preference:elsewhere/p/rounds/pairs/000001.jsonl?x=1"]
    assert tested.out == "elsewhere/p/tested/results.json"
    assert pipeline.stages["rounds"].needs == ["sft", "reward"]
    assert pipeline.stages["dpo"].recipe.data.train.startswith("stage:"), "as written"


def test_what_is_to_come_is_known_by_its_file(written: Path, tmp_path: Path) -> None:
    pipeline = load(written, flags=(("out_dir", str(tmp_path / "p")),))
    assert pipeline.is_to_come("model:stage:reward") and not pipeline.is_to_come("toy:units")
    (tmp_path / "p" / "reward" / "final").mkdir(parents=True)
    assert not pipeline.is_to_come("model:stage:reward")
    assert pipeline.is_to_come("stage:reward/held_out.json")


def test_words_that_only_look_like_references_are_left_alone(written: Path) -> None:
    pipeline = load(written)
    assert pipeline.located("backstage:sft, a stage, stage: x") == "backstage:sft, a stage, stage: x"


def test_a_dump_reads_back_equal_and_runs_elsewhere(written: Path, tmp_path: Path) -> None:
    pipeline = load(written)
    copy = tmp_path / "copy.yaml"
    copy.write_text(schema.dump(pipeline))
    assert load(copy) == pipeline
    assert "stage:rounds/pairs/000001.jsonl" in copy.read_text()
    assert load(copy, flags=(("out_dir", "b"),)).resolved("reward").model.source == "b/sft/final"


def test_pipelines_extend_and_overlay_stage_by_stage(written: Path, tmp_path: Path) -> None:
    """A stage of an overlay is laid over the stage of that name, its `extends` first; new stages come last."""
    (tmp_path / "dpo.yaml").write_text("dpo: {beta: 0.7}\nout_dir: nowhere\ncheckpoint: {every: 9, resume: auto}\n")
    top = tmp_path / "top.yaml"
    top.write_text(
        "extends: p.yaml\nstages:\n  dpo: {verb: align dpo, extends: dpo.yaml, optim: {lr: 2e-6}}\n"
        "  again: {verb: finetune, model: {source: 'stage:dpo'}, data: {train: x}}\n"
    )
    for pipeline in (load(top), load(written, top)):
        assert list(pipeline.stages) == ["sft", "reward", "rounds", "dpo", "tested", "again"]
        dpo = pipeline.stages["dpo"].recipe
        assert (dpo.dpo.beta, dpo.optim.lr, dpo.model.source, dpo.checkpoint.every) == (0.7, 2e-6, "stage:rounds", 9)
        assert pipeline.resolved("dpo").out_dir == "runs/p/dpo"


BAD = """\
stages:
  final: {verb: finetune}
  sft:
    verb: fintune
  reward:
    verb: reward
  a:
    verb: align dpo
    model: {source: "stage:sfft"}
    data: {trian: x}
    optim: {lr: -1}
    out_dir: x
  b:
    verb: align ppo
    model: {source: "stage:c"}
    optm: {lr: 1}
    ppo: {top_k: 4}
  c:
    verb: evaluate
    model: {source: m}
    tasks: [a]
  d:
    verb: align dpo
    model: {source: "stage:c"}
    data: {train: "stage:d/x.jsonl"}
    optim: 3
  e: finetune
  f: {}
only: [nobody]
seeds: 4
"""


def test_all_mistakes_of_all_stages_are_told_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(BAD)
    told = mistakes(path, ("stages.dd.optim.lr", "1"), ("stages.d.checkpoint.resume", "auto"))
    begins = [
        "30: seeds: 4: no such key: did you mean `seed`?",
        "2: stages.final: no name for a stage",
        "4: stages.sft.verb: fintune: did you mean finetune?",
        "6: stages.reward.verb: reward: did you mean align reward?",
        "12: stages.a.out_dir: x: is out_dir/a of the pipeline",
        "10: stages.a.data.trian: x: no such key: did you mean `stages.a.data.train`?",
        "11: stages.a.optim.lr: -1.0: give a number above 0",
        "16: stages.b.optm.lr: 1: no such key: did you mean `stages.b.optim.lr`?",
        "13: stages.b.data.train: missing",
        "13: stages.b.rewards.sources: missing",
        "17: stages.b.ppo.top_k: 4: ",
        "stages.d.checkpoint.resume: auto: is checkpoint.resume of all",
        "26: stages.d.optim: 3: is a group: set its keys: `stages.d.optim.name`",
        "27: stages.e: finetune: is a group",
        "28: stages.f.verb: missing: give one of finetune, align reward, align dpo, align ppo, align grpo, "
        "align rloo, align iterative-dpo, align rejection-sampling, pretrain, evaluate",
        "stages.dd: no such stage: did you mean d?",
        "29: only: nobody: no such stage: there are final, sft",
        "9: stages.a.model.source: stage:sfft: no such stage: did you mean sft?",
        "15: stages.b.model.source: stage:c: runs later",
        "24: stages.d.model.source: stage:c: makes no model: name a file of it",
        "25: stages.d.data.train: stage:d: runs just then",
    ]
    assert len(told) == len(begins), told
    for line, begin in zip(told, begins, strict=True):
        assert line.startswith(begin), (line, begin)


@pytest.mark.parametrize("text", ["stages: [a]\n", "stages: 3\n", "stages:\n", "out_dir: x\n", "", "seed: 1\n"])
def test_without_stages_there_is_nothing_to_do(tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(text)
    [told] = mistakes(path)
    assert "stages: " in told and "{sft: {verb: finetune, …}, …}" in told


def test_an_extends_that_cannot_be_read_is_the_only_mistake_of_its_stage(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("stages:\n  a: {verb: finetune, extends: no/such}\n  b: {verb: finetune, extends: p.yaml}\n")
    one, other = mistakes(path)
    assert one.startswith("2: stages.a.extends: no/such: no such file")
    assert other.startswith("3: stages.b.extends: p.yaml: a recipe cannot extend itself")


def test_a_recipe_of_another_verb_is_told_as_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is of a recipe for `litrecipe align pipeline`"):
        path = tmp_path / "p.yaml"
        path.write_text(WHOLE)
        schema.load(FinetuneRecipe, [path])


def test_only_sampling_makes_no_model(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "stages:\n  best:\n    verb: align rejection-sampling\n    model: {source: m}\n    data: {train: d}\n"
        "    rewards: {sources: {numeric: 1}}\n    rejection_sampling: {only_sample: true}\n"
        "  sft: {verb: finetune, model: {source: 'stage:best'}, data: {train: 'stage:best/sft.jsonl'}}\n"
    )
    [told] = mistakes(path)
    assert told.startswith("8: stages.sft.model.source: stage:best: makes no model")


def test_texts_are_changed_in_lists_and_keys_and_nothing_else_is() -> None:
    value = {"a": [1, "b", ("c", None)], "d": True}
    assert changed(value, str.upper) == {"A": [1, "B", ("C", None)], "D": True}
    assert texts(value) == ["a", "b", "c", "d"]

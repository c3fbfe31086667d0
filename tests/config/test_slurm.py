"""The `slurm` group: what it takes, and one's own defaults below it."""

from __future__ import annotations

from pathlib import Path

import pytest

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.slurm_defaults import with_defaults

NEEDED = [("model.source", "m"), ("data.train", "t.jsonl")]


def load(*flags: tuple[str, str], configs: list[Path] | None = None) -> FinetuneRecipe:
    return schema.load(FinetuneRecipe, configs or [], [*NEEDED, *flags], over=with_defaults)


@pytest.fixture(autouse=True)
def no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LITRECIPE_SLURM", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))


@pytest.fixture
def defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """At its usual place."""
    path = tmp_path / "config" / "litrecipe" / "slurm.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(
        "account: us\npartition: cpu\nenv: {A: file, B: file}\n"
        "clusters:\n  big:\n    partition: h100\n    env: {B: big}\n  small: {mem: 8G}\n"
    )
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return path


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("nodes", "0", "give 1 or more"),
        ("time", "soon", "give a time such as"),
        ("mem", "64 gigabytes", "give a number with K, M, G or T"),
        ("signal", "70000", "give seconds from 1 to 65535"),
        ("partition", "$QUEUE", "sbatch knows no variables: write out what is meant"),
        ("account", "a\nb", "it is one line of sbatch's"),
        ("gpu_type", "a100", "give slurm.gpus_per_node, or remove it"),
        ("env", "{a-b: c}", "is no name for a variable"),
        ("sbatch_flags", "[--time=3]", "slurm.time says it: use that"),
        ("sbatch_flags", "[-N2]", "slurm.nodes says it: use that"),
        ("sbatch_flags", "[--array=1-2]", "litrecipe says it itself: remove it"),
        ("sbatch_flags", "[--comment=$USER]", "sbatch knows no variables"),
        ("srun_flags", "[exclusive]", "give flags with their values"),
        ("pre", "['']", "remove it"),
    ],
)
def test_what_is_wrong_is_told_with_its_key(key: str, value: str, said: str) -> None:
    with pytest.raises(InputError) as wrong:
        load((f"slurm.{key}", value))
    [line] = wrong.value.mistakes
    assert line.startswith(f"slurm.{key}: ") and said in line


def test_a_signal_comes_before_the_end() -> None:
    with pytest.raises(InputError, match=r"slurm\.signal: 120: slurm\.time is 1m: give fewer seconds, or more time"):
        load(("slurm.time", "1m"))
    assert load(("slurm.time", "1m"), ("slurm.signal", "20")).slurm.signal == 20


def test_tasks_are_those_of_the_gpus() -> None:
    with pytest.raises(InputError, match=r"slurm\.tasks_per_node: 2: slurm\.gpus_per_node is 8"):
        load(("slurm.gpus_per_node", "8"), ("slurm.tasks_per_node", "2"))


def test_flags_beat_the_recipe_beats_the_cluster_beats_the_file(defaults: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("slurm: {qos: recipe, account: recipe}\n")
    slurm = load(("slurm.cluster", "big"), ("slurm.account", "flag"), configs=[recipe]).slurm
    assert (slurm.account, slurm.qos, slurm.partition, slurm.env) == (
        "flag",
        "recipe",
        "h100",
        {"A": "file", "B": "big"},
    )
    plain = load(configs=[recipe]).slurm
    assert (plain.account, plain.partition, plain.mem) == ("recipe", "cpu", None)
    assert schema.load(FinetuneRecipe, [recipe], NEEDED).slurm.partition is None, "only submit reads the file"


def test_mistakes_of_the_file_name_its_lines(defaults: Path) -> None:
    defaults.write_text("acount: us\nclusters: {big: {nodes: none}}\n")
    with pytest.raises(InputError) as wrong:
        load(("slurm.cluster", "big"))
    assert wrong.value.mistakes == [
        f"{defaults}:1: slurm.acount: us: no such key: did you mean `slurm.account`?",
        f"{defaults}:2: slurm.nodes: none: give a whole number or null",
    ]
    with pytest.raises(
        InputError, match=rf"slurm\.cluster: bigg: no such name under `clusters` in {defaults}: did you"
    ):
        load(("slurm.cluster", "bigg"), ("slurm.account", "x"))
    defaults.write_text("clusters: 3\n")
    with pytest.raises(InputError, match=rf"^{defaults}:1: clusters: 3: give keys by name"):
        load()
    defaults.write_text("clusters: {big: 3}\n")
    with pytest.raises(InputError, match=rf"^{defaults}:1: clusters\.big: 3: is a group"):
        load(("slurm.cluster", "big"))


def test_a_named_file_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LITRECIPE_SLURM", str(tmp_path / "gone.yaml"))
    with pytest.raises(InputError, match=r"gone\.yaml: No such file"):
        load()


def test_stages_take_what_the_pipeline_says(tmp_path: Path) -> None:
    """And have the last word; what is wrong with it is told once; read back it is the same."""
    recipe = tmp_path / "p.yaml"
    stage = "{verb: finetune, model: {source: m}, data: {train: t.jsonl}, slurm: {nodes: 2}}"
    recipe.write_text(f"slurm: {{time: 1h, nodes: 4}}\nstages:\n  a: {stage}\n  b: {stage.replace('nodes', 'qos')}\n")
    pipeline = schema.load(PipelineRecipe, [recipe])
    told = [(stage.recipe.slurm.time, stage.recipe.slurm.nodes) for stage in pipeline.stages.values()]
    assert told == [("1h", 2), ("1h", 4)]
    again = tmp_path / "again.yaml"
    again.write_text(schema.dump(pipeline))
    assert schema.load(PipelineRecipe, [again]) == pipeline
    recipe.write_text(recipe.read_text().replace("1h", "never"))
    with pytest.raises(InputError) as wrong:
        schema.load(PipelineRecipe, [recipe])
    assert [line.partition(": give")[0] for line in wrong.value.mistakes] == [f"{recipe}:1: slurm.time: never"]

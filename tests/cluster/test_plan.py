"""What a recipe becomes as a job, and what no job can be made of; without a Slurm."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from litrecipe import cli
from litrecipe.cluster.script import own_program
from litrecipe.config import schema
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.engine.rundir import RunDir


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder in which neither Slurm nor defaults are found."""
    (tmp_path / "slurm.yaml").write_text("")
    monkeypatch.setenv("LITRECIPE_SLURM", str(tmp_path / "slurm.yaml"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def words(tiny_model: Path) -> list[str]:
    return [
        "--model",
        str(tiny_model),
        "--data.train",
        "toy:units?n=8",
        "--out_dir",
        "run",
        "--data.cache_dir",
        "cache",
    ]


def submit(*words: object) -> int:
    return cli.main(["submit", *map(str, words), "--dry_run"])


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    capsys.readouterr()
    assert submit(*words) == 2
    said = capsys.readouterr().err.splitlines()
    return [line.removeprefix("litrecipe: error: ") for line in said if line.startswith("litrecipe: error: ")]


def test_what_does_not_go_together_names_both_keys(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    both = [*words, "--slurm.gpus_per_node", 8, "--fabric.devices", 4, "--slurm.nodes", 2, "--fabric.num_nodes", 3]
    assert refused(capsys, "finetune", *both, "--fabric.accelerator", "cpu") == [
        "fabric.devices: 4: slurm.gpus_per_node is 8: make them the same, or auto",
        "fabric.num_nodes: 3: slurm.nodes is 2: make them the same",
        "fabric.accelerator: cpu: slurm.gpus_per_node is 8: use cuda, or remove one of them",
    ]
    assert not Path("run").exists()


def test_devices_and_nodes_say_what_is_asked_for_where_slurm_does_not(words: list[str]) -> None:
    Path("slurm.yaml").write_text("clusters: {c: {qos: q}}\n")
    asked = ["--slurm.cluster", "c", "--slurm.dependency", "afterok:7"]
    assert submit("finetune", *words, "--fabric.devices", 2, "--fabric.num_nodes", 3, *asked) == 0
    written = schema.load(FinetuneRecipe, ["run/job.yaml"])
    assert (written.slurm.nodes, written.slurm.tasks_per_node) == (3, 2)
    assert (written.fabric.num_nodes, written.fabric.devices, written.checkpoint.resume) == (3, 2, "auto")
    assert (written.slurm.cluster, written.slurm.dependency, written.slurm.qos) == (None, None, "q")
    Path("slurm.yaml").write_text("qos: r\n")
    assert submit("finetune", "--config", "run/job.yaml") == 0, "what was written is a recipe to submit"
    assert schema.load(FinetuneRecipe, ["run/job.yaml"]) == written


def test_what_the_verb_would_refuse_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of keys, data, model and place, as the verb itself does."""
    [line] = refused(capsys, "finetune", *words, "--data.train", "toy:unitz")
    assert line.startswith("data.train: toy:unitz")
    assert refused(capsys, "finetune", *words, "--model", "no/such/folder")[0].startswith(
        "model.source: no/such/folder"
    )
    assert "Slurm reads a backslash" in refused(capsys, "finetune", *words, "--out_dir", "a\\b")[0]
    assert refused(capsys, "finetune", *words, "--out_dir", "$SCRATCH/a") == [
        "out_dir: $SCRATCH/a: sbatch knows no variables: write out what is meant"
    ]
    [line] = refused(capsys, "finetune", *words, "--distil.teacher", "no/such/teacher")
    assert line.startswith("distil.teacher: no/such/teacher")
    Path("file").write_text("")
    assert (
        "file: Not a directory: name another --out_dir" in refused(capsys, "finetune", *words, "--out_dir", "file/a")[0]
    )
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text("a: b\n")
    assert "holds a recipe.yaml that no run wrote" in refused(capsys, "finetune", *words)[0]


def test_a_checkpoint_of_another_run_is_where_the_first_start_begins(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Every later one goes on from the newest of its own."""
    for run in ("other", "run"):
        folder = Path(run) / "checkpoints" / "step-00000003"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    own = "run/checkpoints/step-00000003"
    assert refused(capsys, "finetune", *words, "--checkpoint.resume", own) == [
        f"checkpoint.resume: {own}: a job that is queued again goes on from the newest: use auto"
    ]
    other = Path("other/checkpoints/step-00000003")
    assert submit("finetune", *words, "--out_dir", "new", "--checkpoint.resume", other) == 0
    text = Path("new/job.sh").read_text()
    assert f"resume={shlex.quote(str(other.absolute()))}\n" in text
    assert text.count('--checkpoint.resume "$resume"') == 1
    again = ("finetune", "--config", "new/job.yaml")
    assert submit(*again) == 0 and Path("new/job.sh").read_text() == text, "it has not begun"
    (Path("new") / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert submit(*again) == 0 and Path("new/job.sh").read_text() == text, "it has, and the script sees that"
    Path("new/job.yaml").unlink()
    [line] = refused(capsys, "finetune", *words, "--out_dir", "new", "--checkpoint.resume", other)
    assert line.startswith("out_dir: new: holds another run")


def test_verbs_without_a_run_directory(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their job lies beside what they write; one that is a single process is not asked for several."""
    measured = ["--model", tiny_model, "--tasks", "perplexity:rows.txt"]
    Path("rows.txt").write_text("Some text.\n")
    assert refused(capsys, "evaluate", *measured) == ["out: missing: say where the results go"]
    assert submit("evaluate", *measured, "--out", "results/a.json") == 0
    text = Path("results/a.job/job.sh").read_text()
    assert "litrecipe evaluate --config" in text and "--checkpoint.resume" not in text
    assert "kept() { :; }" in text, "it begins anew: nothing is queued again"
    several = ["--slurm.gpus_per_node", 2, "--fabric.devices", 2, "--out", "results/b.json"]
    assert refused(capsys, "evaluate", *measured, *several) == [
        "slurm.gpus_per_node: 2: this verb is one process: use cpus_per_task",
        "fabric.devices: 2: evaluation and sampling run in one process: leave it out",
    ]
    [line] = refused(capsys, "evaluate", *measured, "--out", "b.json", "--reference", "no/such/model")
    assert line.startswith("reference: no/such/model")
    prepared = ["rows.txt", "--tokenizer", tiny_model, "--out", "shards"]
    assert refused(capsys, "data", "prepare", *prepared, "--slurm.nodes", 2) == [
        "slurm.nodes: 2: this verb is one process: use cpus_per_task"
    ]
    assert submit("data", "prepare", *prepared) == 0
    assert "litrecipe data prepare --config" in Path("shards.job/job.sh").read_text()
    assert "sweep a verb that trains" in refused(capsys, "evaluate", *measured, "--out", "r", "--sweep", "limit=1,2")[0]


def test_nothing_is_submitted_where_something_trains(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with RunDir("run").held():
        [line] = refused(capsys, "finetune", *words)
    assert line.startswith(f"out_dir: {Path('run').absolute()}: another process trains here")
    assert not Path("run/job.sh").exists()


def test_stages_share_what_is_asked_for_but_where_they_are_one_process(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The pipeline's own process is this program, and its stages are the container's."""
    Path("rows.txt").write_text("Some text.\n")
    stages = (
        f"stages:\n  sft: {{verb: finetune, model: {{source: {tiny_model}}}, data: {{train: 'toy:units?n=8'}}, more}}\n"
        "  look: {verb: evaluate, model: {source: 'stage:sft'}, tasks: ['perplexity:rows.txt'], own}\n"
    )
    group = "slurm: {container: apptainer exec x, tasks_per_node: 4}\n"
    asked = ["align", "pipeline", "--config", "p.yaml", "--out_dir", "pipe"]
    Path("p.yaml").write_text(
        group + stages.replace("more", "fabric: {devices: 2}").replace("own", "slurm: {tasks_per_node: 2}")
    )
    assert refused(capsys, *asked) == [
        "p.yaml:3: stages.sft.fabric.devices: 2: slurm.tasks_per_node is 4: make them the same, or auto",
        "p.yaml:4: stages.look.slurm.tasks_per_node: 2: this verb is one process: use cpus_per_task",
    ]
    Path("p.yaml").write_text(group + stages.replace(", more", "").replace(", own", ""))
    assert submit(*asked) == 0
    for stage, tasks in (("sft", 4), ("look", 1)):
        text = Path(f"pipe/{stage}/job.sh").read_text()
        launcher = re.search(rf"LAUNCHER='srun --ntasks-per-node={tasks} .* apptainer exec x litrecipe'\n(.*)", text)
        assert launcher and launcher[1].startswith(shlex.join(own_program()))


def test_what_is_missing_is_fetched_where_the_job_looks(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "LITRECIPE_CACHE"):
        monkeypatch.setenv(name, "before")
    env = "{HF_HOME: /there, HF_HUB_OFFLINE: '1', LITRECIPE_CACHE: cache, OTHER: x}"
    assert submit("finetune", *words, "--slurm.env", env) == 0
    assert (os.environ["HF_HOME"], os.environ["LITRECIPE_CACHE"]) == ("/there", "cache")
    assert os.environ["HF_HUB_OFFLINE"] == "before" and "OTHER" not in os.environ

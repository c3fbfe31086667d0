"""`litrecipe align pipeline`: stages in order, each fed by those before, stopped and continued anywhere.

Where no process has to be killed, stages run within the test's process: the same program with the same words, started
in no time.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import start, steps_done, wait_until
from rich.console import Console

from litrecipe import cli
from litrecipe.checkpoint.source import open_model
from litrecipe.config import progress, schema, stop
from litrecipe.config.errors import InputError
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.stages import VERBS as STAGE_VERBS
from litrecipe.engine.rundir import RunDir
from litrecipe.recipes import pipeline, stage_runs
from litrecipe.recipes.dry_run_pipeline import main_of
from litrecipe.verbs import VERBS, RecipeVerb

PIPELINE = """\
stages:
  sft:
    verb: finetune
    model: {{source: {model}}}
    data: {{train: "toy:units?n=32&seed=0", val: "toy:units?n=4&seed=0&split=test", cache_dir: {cache}}}
    optim: {{lr: 1e-3}}
  reward:
    verb: align reward
    model: {{source: "stage:sft"}}
    data: {{train: "toy:units-pairs?n=24&seed=0", cache_dir: {cache}}}
  rejection:
    verb: align rejection-sampling
    model: {{source: "stage:sft"}}
    adapter: {{method: none}}
    data: {{train: "toy:units?n=32&seed=1", cache_dir: {cache}}}
    rewards: {{sources: {{"model:stage:reward": 1.0, "length?max=9": 0.1}}}}
    rejection_sampling: {{completions_per_prompt: 3, max_new_tokens: 6, truncated: learn}}
  ppo:
    verb: align ppo
    model: {{source: "stage:rejection"}}
    adapter: {{method: none}}
    data: {{train: "toy:units?n=16&seed=2", cache_dir: {cache}}}
    rewards: {{sources: {{"model:stage:reward": 1.0}}}}
    ppo: {{layout: separate, rollout_batch_size: 8, minibatches: 2, epochs: 1, max_new_tokens: 6}}
  again:
    verb: finetune
    model: {{source: "stage:ppo"}}
    data: {{train: "stage:rejection/sft.jsonl", cache_dir: {cache}}}
  tested:
    verb: evaluate
    model: {{source: "stage:again"}}
    tasks: ["exact_match:toy:units?n=4&seed=0&split=test"]
    generate: {{max_new_tokens: 4}}
"""
STAGES = ["sft", "reward", "rejection", "ppo", "again", "tested"]
MODELS = STAGES[:-1]
OF_TRAINING = "    log: {loggers: []}\n    fabric: {accelerator: cpu}\n    checkpoint: {every: 1}\n"


@pytest.fixture
def recipe(tiny_model: Path, tmp_path: Path) -> Path:
    """All verbs of the Llama 3 pipeline but DPO, a stage that reads what another wrote, and one that measures."""
    text = PIPELINE.format(model=tiny_model, cache=tmp_path / "cache")
    for verb in ("finetune", "align reward", "align rejection-sampling", "align ppo"):
        text = text.replace(f"    verb: {verb}\n", f"    verb: {verb}\n{OF_TRAINING}")
    (tmp_path / "p.yaml").write_text(text)
    return tmp_path / "p.yaml"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """Stages run within this process; their command lines land here."""
    lines: list[list[str]] = []
    handlers = {number: signal.getsignal(number) for number in stop.SIGNALS}

    def run(command: list[str], *, is_ours: bool) -> int:
        assert is_ours
        assert command[1:3] == ["-m", "litrecipe.cli"]
        lines.append(command[3:])
        try:
            return cli.main(command[3:])
        except SystemExit as stopped:
            return int(stopped.code or 0)

    monkeypatch.setattr(stage_runs, "run_child", run)
    yield lines
    for number, handler in handlers.items():
        signal.signal(number, handler)


def load(recipe: Path, out: Path, *flags: tuple[str, object]) -> PipelineRecipe:
    return schema.load(PipelineRecipe, [recipe], [("out_dir", str(out)), *((key, str(value)) for key, value in flags)])


AUTO = ("checkpoint.resume", "auto")


def bytes_of(out: Path, names: list[str] = MODELS) -> dict[str, bytes]:
    """What lies in the stages' finals, critics too; adapters and configs name the folders they came from."""
    files = [file for name in names for file in sorted((out / name / "final").rglob("*.safetensors"))]
    assert {file.relative_to(out).parts[0] for file in files} == set(names)
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def test_verbs_are_found_where_the_front_door_finds_them() -> None:
    for verb in STAGE_VERBS:
        of_door = VERBS[verb]
        assert isinstance(of_door, RecipeVerb)
        assert main_of(verb) is cli.found(of_door.code)


def test_a_whole_pipeline(
    recipe: Path, tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages in order, each told; results in a table and in pipeline.json; `final` leads to the last policy, and the
    folder is a model like any run's."""
    out = tmp_path / "run"
    assert pipeline.main(load(recipe, out)) == 0
    assert [line[-1] for line in here] == [str(out / name / "stage.yaml") for name in STAGES]
    shown, said = capsys.readouterr()
    heads = [line for line in said.splitlines() if line.startswith("stage ")]
    assert heads[:2] == ["stage 1 of 6, sft: finetune", "stage 2 of 6, reward: align reward"]
    assert len(heads) == 6
    assert all(f"\n {name} " in f"\n{shown}" for name in STAGES)
    summary = json.loads((out / "pipeline.json").read_text())
    told = summary["stages"]
    assert summary["final"] == "again/final"
    assert [told[name]["steps"] for name in STAGES] == [4, 3, 4, 4, 4, None]
    assert told["ppo"]["result"] == "ppo/final" and told["tested"]["result"] == "tested/results.json"
    assert told["sft"]["metrics"]["eval_loss"] > 0 and told["tested"]["metrics"].keys() >= {
        "eval_exact_match:toy:units?n=4&seed=0&split=test/exact_match"
    }
    assert all(one["done"] and one["seconds"] > 0 for one in told.values())
    assert str((out / "final").readlink()) == "again/final"
    moved = out.rename(tmp_path / "moved")
    assert open_model(str(moved)).weights_hash() == open_model(str(moved / "again")).weights_hash()
    assert schema.load_run(moved) == schema.load_run(moved / "again")


def test_a_stage_starts_from_what_the_one_before_it_made(recipe: Path, tmp_path: Path, here: list[list[str]]) -> None:
    """By the hashes that runs keep of what they were made from."""
    out = tmp_path / "run"
    pipeline.main(load(recipe, out, ("only", "sft,reward")))
    newest = max((out / "reward" / "checkpoints").iterdir())
    started_from = json.loads((newest / "state.json").read_text())["identity"]["base weights"]
    assert started_from == open_model(str(out / "sft")).weights_hash()
    assert not (out / "final").exists(), "not all stages are finished"


def test_what_is_finished_is_not_done_again(
    recipe: Path, tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert pipeline.main(load(recipe, out, ("only", "sft"))) == 0
    with pytest.raises(InputError, match="holds a pipeline already: continue it"):
        pipeline.main(load(recipe, out))
    assert pipeline.main(load(recipe, out, AUTO, ("only", "sft,reward"))) == 0
    assert [line[:2] for line in here] == [["finetune", "--config"], ["align", "reward"]]
    assert "stage 1 of 6, sft: finetune: finished before" in capsys.readouterr().err
    (out / "sft" / "final" / "model.safetensors").write_bytes(b"torn")
    assert pipeline.main(load(recipe, out, AUTO, ("only", "sft"))) == 0
    assert here[2][0] == "finetune", "what is torn is made again"
    assert pipeline.main(load(recipe, out, AUTO, ("only", "reward"))) == 0, "of the same bytes"
    assert len(here) == 3


def test_data_of_a_finished_stage_may_be_gone(
    recipe: Path, tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "run", tmp_path / "d.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    words = ["align", "pipeline", "--config", str(recipe), "--out_dir", str(out), "--only", "sft"]
    words += ["--stages.sft.data.train", str(data), "--checkpoint.resume", "auto"]
    assert cli.main(words) == 0
    data.unlink()
    assert cli.main(words) == 0
    (out / "sft" / "stage.json").unlink()
    assert cli.main(words) == 2
    assert f"stages.sft.data.train: {data}: no such file" in capsys.readouterr().err


def test_a_changed_recipe_is_refused_and_the_cure_works(recipe: Path, tmp_path: Path, here: list[list[str]]) -> None:
    """What may change: how fast and where it is made, not what. Names of keys, what they were, and what follows."""
    out = tmp_path / "run"
    wanted = ("only", "sft,reward,rejection")
    pipeline.main(load(recipe, out, wanted))
    free = (("stages.sft.log.every", 2), ("stages.sft.checkpoint.keep", 1), ("stages.sft.train.micro_batch_tokens", 99))
    assert pipeline.main(load(recipe, out, wanted, AUTO, *free)) == 0
    other = (("stages.reward.optim.lr", 3e-5), ("stages.reward.train.seed", 5))
    with pytest.raises(InputError) as wrong:
        pipeline.main(load(recipe, out, wanted, AUTO, *other))
    reward, rejection = out / "reward", out / "rejection"
    cure = f"put that back, name another --out_dir, or start anew from there: rm -r {reward} {rejection}"
    assert wrong.value.mistakes == [
        f"stages.reward.optim.lr: 3e-05: {reward} was made with 1e-05: {cure}",
        f"stages.reward.train.seed: 5: {reward} was made with 0: {cure}",
    ]
    shutil.rmtree(reward)
    with pytest.raises(InputError, match=rf"stages\.rejection: .*reward, is gone: .*rm -r {rejection}$"):
        pipeline.main(load(recipe, out, wanted, AUTO, *other))
    shutil.rmtree(rejection)
    assert len(here) == 3
    assert pipeline.main(load(recipe, out, wanted, AUTO, *other)) == 0
    assert [line[1] for line in here[3:]] == ["reward", "rejection-sampling"]
    (out / "reward" / "final" / "manifest.json").write_text('{"format": "litrecipe/1", "files": {}}')
    with pytest.raises(InputError, match=r"stages\.rejection: .*reward, is another now: name another --out_dir"):
        pipeline.main(load(recipe, out, wanted, AUTO, *other))


def test_a_mistake_of_a_changed_key_names_its_line(recipe: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out = tmp_path / "run"
    pipeline.main(load(recipe, out, ("only", "sft")))
    recipe.write_text(recipe.read_text().replace("lr: 1e-3", "lr: 2e-3"))
    with pytest.raises(InputError, match=rf"^{recipe}:9: stages\.sft\.optim\.lr: 0\.002: .* made with 0\.001"):
        pipeline.main(load(recipe, out, AUTO, ("only", "sft")))


def test_only_needs_what_it_leaves_out(
    recipe: Path, tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(InputError) as wrong:
        pipeline.main(load(recipe, out, ("only", "rejection")))
    assert wrong.value.mistakes == [
        f"only: rejection: needs {name}, which is not finished: run that too, or first" for name in ("sft", "reward")
    ]
    assert not out.exists()
    pipeline.main(load(recipe, out, ("only", "sft")))
    assert pipeline.main(load(recipe, out, AUTO, ("only", "reward"), ("stages.sft.optim.lr", 1e-4))) == 0
    said = capsys.readouterr().err
    assert f"stages.sft.optim.lr: 0.0001: {out}/sft was made with 0.001: taken as it is" in said
    assert "not run: rejection, ppo, again, tested" in said


def test_all_mistakes_are_told_before_anything_runs(
    recipe: Path, tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of data, models, reward sources and tasks of any stage, with lines; what stages write is no mistake."""
    out = tmp_path / "run"
    text = recipe.read_text().replace("toy:units?n=16", "toy:unitz?n=16").replace("length?max=9", "lenght?max=9")
    recipe.write_text(text.replace("exact_match:", "exact_mach:"))
    line = next(number for number, one in enumerate(text.splitlines(), start=1) if "unitz" in one)
    words = ["align", "pipeline", "--config", str(recipe), "--out_dir", str(out)]
    assert cli.main(words) == 2
    [told] = capsys.readouterr().err.splitlines()
    assert told.startswith(f"litrecipe: error: {recipe}:{line}: stages.ppo.data.train: toy:unitz")
    recipe.write_text(recipe.read_text().replace("unitz", "units"))
    assert cli.main([*words, "--stages.reward.model.source", "no/where/at/all"]) == 2
    told = [one for one in capsys.readouterr().err.splitlines() if one.startswith("litrecipe: error: ")]
    keys = [one.partition("stages.")[2].partition(": ")[0] for one in told]
    assert keys == ["reward.model.source", "rejection.rewards.sources", "tested.tasks"]
    assert here == [] and not out.exists()


def test_a_stage_that_fails_ends_the_pipeline_with_its_code(
    recipe: Path, tmp_path: Path, here: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """Wrong input that shows only when a stage runs: no candidate is good enough. Mended, it goes on from there."""
    out = tmp_path / "run"
    bad = ("stages.rejection.rejection_sampling.min_score", 1e9)
    assert pipeline.main(load(recipe, out, bad)) == 2
    said = capsys.readouterr().err
    assert "litrecipe: error: rejection_sampling: 0 of 96 completions are learnt" in said
    assert "stage 3 of 6, rejection: align rejection-sampling: ended with exit code 2; " in said
    assert not json.loads((out / "pipeline.json").read_text())["stages"]["rejection"]["done"]
    shutil.rmtree(out / "rejection")
    assert pipeline.main(load(recipe, out, AUTO)) == 0
    assert len(here) == 3 + 4


def test_a_column_that_no_row_has_is_told_before_the_first_stage(
    recipe: Path, tmp_path: Path, here: list[list[str]]
) -> None:
    bad = ("stages.rejection.rewards.sources", '{"model:stage:reward": 1.0, "exact?column=anser": 1.0}')
    for dry_run in (True, False):
        with pytest.raises(InputError) as wrong:
            pipeline.main(load(recipe, tmp_path / "run", bad), dry_run=dry_run)
        [line] = wrong.value.mistakes
        assert line.endswith("exact?column=anser: anser: no row has this column (did you mean answer?)")
        assert "stages.rejection.rewards.sources: " in line
    assert not here


def test_a_stage_that_refused_its_input_may_be_put_right(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It made nothing, so nothing was made with the other value."""
    out = tmp_path / "run"
    monkeypatch.setattr(stage_runs, "run_child", lambda *_, **__: 2)
    assert pipeline.main(load(recipe, out, ("stages.sft.optim.lr", 5.0))) == 2
    assert "ended with exit code 2; put right what is wrong, then the same command" in capsys.readouterr().err
    assert not (out / "sft" / "stage.json").exists()
    monkeypatch.setattr(stage_runs, "run_child", lambda *_, **__: 1)
    assert pipeline.main(load(recipe, out, AUTO)) == 1
    with pytest.raises(InputError, match=r"stages\.sft\.optim\.lr: 5\.0: .* was made with 0\.001"):
        pipeline.main(load(recipe, out, AUTO, ("stages.sft.optim.lr", 5.0)))


def test_a_signal_between_stages_stops_there(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that comes when a stage has just ended well: the stage counts, and the next is not begun."""
    out = tmp_path / "run"

    def ends_well(*_: object, **__: object) -> int:
        monkeypatch.setattr(stop, "_received", signal.SIGTERM)
        return 0

    monkeypatch.setattr(stage_runs, "run_child", ends_well)
    with pytest.raises(stop.Stopped) as stopped:
        pipeline.main(load(recipe, out))
    assert stopped.value.code == 85
    assert "stopped by SIGTERM before stage 2 of 6, reward: align reward; the same command" in capsys.readouterr().err
    assert json.loads((out / "sft" / "stage.json").read_text())["done"]
    assert not (out / "reward").exists()


def test_one_pipeline_at_a_time(recipe: Path, tmp_path: Path, here: list[list[str]]) -> None:
    with (
        RunDir(tmp_path / "run").held(),
        pytest.raises(InputError, match="another process trains here"),
    ):
        pipeline.main(load(recipe, tmp_path / "run"))


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_it_is_one_process(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "4")
    with pytest.raises(InputError, match=f"{name}: 4: a pipeline is one process: start it as one"):
        pipeline.main(load(recipe, tmp_path / "run"))


def test_another_verbs_run_is_left_alone(recipe: Path, tmp_path: Path, here: list[list[str]]) -> None:
    out = tmp_path / "run"
    pipeline.main(load(recipe, out, ("only", "sft")))
    with pytest.raises(InputError, match="holds a run that is no pipeline"):
        pipeline.main(load(recipe, out / "sft", AUTO))


def test_a_dry_run_shows_every_stage_and_writes_nothing(
    recipe: Path,
    tmp_path: Path,
    here: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The recipe as it will run; numbers with the first model where a stage's is to come; steps where known."""
    monkeypatch.setattr(progress, "console", lambda: Console(width=200))
    out = tmp_path / "run"
    assert pipeline.main(load(recipe, out, ("stages.again.train.max_steps", 7)), dry_run=True) == 0
    shown = capsys.readouterr().out
    assert here == [] and not out.exists()
    order, *stages = shown.split("\nstage ")
    assert "4  ppo        align ppo                 model.source from rejection, rewards.sources from reward" in order
    assert "5  again      finetune                  model.source from ppo, data.train from rejection/sft.jsonl" in order
    sft, reward, rejection, ppo, again, tested = stages
    assert "57,072 parameters" in sft and "to come" not in sft and "[bold]steps" not in sft and "steps 4 of 8" in sft
    assert "to come model.source: " in reward and f"source: {out}/sft/final" in reward and "57,120 param" in reward
    assert "sampling 32 prompts, 3 completions each" in rejection
    assert "judges" in ppo and f"model:{out}/reward/final: 1.0" in ppo and "steps 4: 2 on each rollout" in ppo
    assert "as many as data.train gives, once it is there, at most 7" in again
    assert f"out: {out}/tested/results.json" in tested
    assert all(f"\nout_dir: {out}/{name}\n" in one for name, one in zip(MODELS, stages, strict=False))


# -- as processes -----------------------------------------------------------------------------------------------------


def working_on(out: Path) -> list[int]:
    """The processes that run a stage of the pipeline there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            continue
        if not dead and any(word.startswith(f"{out}/".encode()) for word in words):
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_stopped_killed_and_continued_it_equals_the_unbroken_run(
    litrecipe: Callable[..., Any], recipe: Path, tmp_path: Path
) -> None:
    """SIGTERM in the midst of the first stage, kill -9 of the pipeline at a random moment of the second, or after it,
    which leaves no stage behind; all finals, and what was sampled, equal those of the unbroken run to the byte."""
    text = recipe.read_text()
    first, _, others = text.partition("  reward:\n")
    first = first.replace("n=32", "n=320")  # 40 steps: four were over before the signal came, now and then
    sampling = others[others.index("  rejection:\n") : others.index("  ppo:\n")]
    last = others[others.index("  again:\n") : others.index("  tested:\n")].replace("stage:ppo", "stage:rejection")
    recipe.write_text(first + sampling.replace('"model:stage:reward": 1.0, ', "") + last)
    names = ["sft", "rejection", "again"]
    unbroken, broken, log = tmp_path / "unbroken", tmp_path / "broken", tmp_path / "log"

    def command(out: Path) -> list[Any]:
        return ["align", "pipeline", "--config", recipe, "--out_dir", out, "--checkpoint.resume", "auto"]

    litrecipe(*command(unbroken), timeout=600)
    process = start(command(broken), broken, log)
    assert wait_until(lambda: steps_done(broken / "sft") >= 1, process, 300), log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 85, log.read_text()
    assert "stage 1 of 3, sft: finetune: was stopped" in log.read_text()
    assert steps_done(broken / "sft") < 40
    assert not (broken / "sft" / "final").exists() and not working_on(broken)

    process = start(command(broken), broken, log)
    assert wait_until((broken / "rejection" / "candidates.json").exists, process, 300), log.read_text()
    time.sleep(random.Random(0).uniform(0, 3))
    process.kill()
    process.wait(30)
    end = time.monotonic() + 5
    while working_on(broken) and time.monotonic() < end:
        time.sleep(0.05)
    assert not working_on(broken)
    assert not (broken / "final").exists()

    litrecipe(*command(broken), timeout=600)
    assert bytes_of(broken, names) == bytes_of(unbroken, names)
    for name in ("candidates.jsonl", "sft.jsonl", "best_of.json"):
        assert (broken / "rejection" / name).read_bytes() == (unbroken / "rejection" / name).read_bytes()
    assert str((broken / "final").readlink()) == "again/final"

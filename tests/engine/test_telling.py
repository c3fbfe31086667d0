"""Loggers that people name in recipes write what they should, offline; speed is told without evaluations."""

import time

import pytest

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import FinetuneRecipe, Log
from litrecipe.config.stop import Stopped
from litrecipe.engine import telling
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import StepResult
from litrecipe.engine.rundir import RunDir, read_records
from litrecipe.engine.telling import Teller, check_loggers, check_login, make_loggers
from litrecipe.recipes import finetune


def write(loggers):
    for step in (1, 2, 3):
        for logger in loggers:
            logger.log_metrics({"loss": 1.0 / step}, step)
    for logger in loggers:
        logger.finalize("success")


def test_tensorboard_events_and_their_resumption(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(make_loggers(Log(), str(tmp_path)))
    again = make_loggers(Log(), str(tmp_path), purge_step=3)
    again[0].log_metrics({"loss": 9.0}, 3)
    again[0].finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 0.5), (3, 9.0)]


@pytest.mark.slow
def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(make_loggers(Log(loggers=["wandb"]), str(tmp_path)))
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1
    assert any(path.stat().st_size > 0 for path in runs[0].glob("*.wandb"))


@pytest.mark.slow
def test_mlflow_in_a_local_store(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    loggers = make_loggers(Log(loggers=["mlflow"], project="ours"), str(tmp_path))
    write(loggers)
    history = mlflow.tracking.MlflowClient(loggers[0]._tracking_uri).get_metric_history(loggers[0].run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1.0 / 3)]


@pytest.fixture
def recipe(tiny_model, tmp_path):
    flags = {
        "model.source": str(tiny_model),
        "data.train": "toy:units?n=24&seed=0",
        "data.cache_dir": str(tmp_path / "cache"),
        "fabric.accelerator": "cpu",
        "checkpoint.every": "2",
        "out_dir": str(tmp_path / "run"),
    }
    return schema.load(FinetuneRecipe, [], flags.items())


def test_a_resumed_run_has_every_step_once_in_tensorboard(recipe, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe.train.max_steps, recipe.checkpoint.resume = 4, "auto"
    finetune.main(recipe)
    for folder in (tmp_path / "run" / "checkpoints" / "step-00000004", tmp_path / "run" / "final"):
        folder.rename(tmp_path / folder.name)  # as if the run had been killed after step 3
    recipe.train.max_steps = 5
    finetune.main(recipe)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
    told = [record["loss"] for record in read_records(tmp_path / "run" / "metrics.jsonl") if "loss" in record]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(told, rel=1e-6)


class Ending:
    """A logger that remembers how the run ended."""

    def __init__(self):
        self.status = None

    def log_metrics(self, metrics, step):
        pass

    def finalize(self, status):
        self.status = status


def test_loggers_are_told_how_the_run_ended(recipe, tmp_path, monkeypatch):
    logger = Ending()
    monkeypatch.setattr(telling, "make_loggers", lambda *_, **__: [logger])
    recipe.train.max_steps = 2
    finetune.main(recipe)
    assert logger.status == "success"
    recipe.out_dir, recipe.optim.lr = str(tmp_path / "burst"), 1e30
    recipe.train.grad_clip, recipe.train.max_steps = None, 20
    with pytest.raises(InputError, match="before the optimizer step"):
        finetune.main(recipe)
    assert logger.status == "failed"
    assert telling.ending(Stopped(15)) == "KILLED"


def test_speed_is_told_without_the_time_of_evaluations(recipe, tmp_path):
    recipe.log.every, recipe.log.loggers = 4, []
    folder = RunDir(tmp_path / "speed")
    folder.path.mkdir()
    teller = Teller(make_fabric(recipe.fabric), recipe, folder, total_steps=8, first_step=0)
    for step in range(1, 9):
        time.sleep(0.05)
        teller.tell(step, 100 * step, 0.1, StepResult(1.0, 1.0, {}), {"step": step})
        if step in (2, 6):
            time.sleep(1)
            teller.tell_evaluation(step, {"eval_loss": 1.0})
    rates = [r["tokens_per_second"] for r in read_records(folder.path / "metrics.jsonl") if "loss" in r]
    assert len(rates) == 2
    assert all(1000 < rate <= 2000 for rate in rates), rates


@pytest.mark.slow
def test_the_line_names_the_stage_and_what_the_tokens_of_a_distillation_cost(recipe, tmp_path):
    teller = Teller(make_fabric(recipe.fabric), recipe, RunDir(tmp_path), 9, 0)
    shown: list[str] = []
    teller.line.show = lambda text, last=False: shown.append(text)  # type: ignore[method-assign]
    for stage in ("core", ""):
        teller.tell(1, 100, 0.1, StepResult(1.0, 1.0, {"kl": 0.25, "nll": 0.5}), {"step": 1}, stage)
    assert shown[0].startswith("core: step 1/9 · loss 1.0000 · nll 0.500 · kl 0.250 · ")
    assert shown[1].startswith("step 1/9 · ")


def test_wandb_without_a_login_is_told_before_anything_slow(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(InputError, match=r"log\.loggers: wandb: it knows no API key: `wandb login`"):
        check_login(Log(loggers=["wandb"]))
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_login(Log(loggers=["wandb"]))
    check_login(Log(loggers=["tensorboard"]))


def test_a_logger_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(telling, "find_spec", lambda name: None if name == "wandb" else object())
    with pytest.raises(InputError, match=r"log\.loggers: wandb: wandb is not installed: .*litrecipe\[loggers\]"):
        check_loggers(Log(loggers=["tensorboard", "wandb"]))

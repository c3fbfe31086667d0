"""Loggers that people name in recipes write what they should, offline."""

import json

import pytest

from litrecipe.config.groups import Log
from litrecipe.engine.telling import make_loggers


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
    assert json.dumps([point.value for point in history])

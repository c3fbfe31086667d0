"""What a run tells while it goes: the progress line, metrics.jsonl, the flight recorder, the loggers."""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from litrecipe.config import progress
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Log
from litrecipe.engine.rundir import RunDir

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from litrecipe.engine.fit import StepResult

TIMING = ("tokens_per_second", "memory", "seconds")
"""Fields of metrics.jsonl that differ between two runs that do the same."""


def make_loggers(log: Log, out_dir: str, purge_step: int | None = None) -> list[Any]:
    """The loggers a recipe names; TensorBoard writes into the run directory."""
    loggers: list[Any] = []
    for name in log.loggers:
        if name == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(out_dir, name="", version="tensorboard", purge_step=purge_step))
            continue
        try:
            from pytorch_lightning.loggers import MLFlowLogger, WandbLogger
        except ImportError as error:
            raise InputError(f"log.loggers: {name}: needs `pip install 'litrecipe[loggers]'`") from error
        if name == "wandb":
            loggers.append(WandbLogger(project=log.project, save_dir=out_dir))
        else:
            # $MLFLOW_TRACKING_URI names a server; without one runs are kept in files, if MLflow is asked to.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            loggers.append(MLFlowLogger(experiment_name=log.project, save_dir=f"{out_dir}/mlruns"))
    return loggers


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: on the GPU if it uses one, else resident in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Teller:
    """Speaks for the run; silent on every rank but the first."""

    def __init__(self, fabric: Fabric, recipe: Any, run_dir: RunDir, total_steps: int, first_step: int) -> None:
        self.fabric, self.dir, self.total = fabric, run_dir, total_steps
        self.every = recipe.log.every
        self.speaks = fabric.global_rank == 0
        self.line = progress.Line()
        self.started = self.last_time = time.monotonic()
        self.first_step = first_step
        self.last_tokens: int | None = None
        self.loggers = make_loggers(recipe.log, recipe.out_dir, purge_step=first_step or None) if self.speaks else []

    def tell(self, step: int, tokens: int, lr: float, result: StepResult, flight: dict[str, Any]) -> None:
        """One optimizer step."""
        if not self.speaks:
            return
        self.dir.append("flight.jsonl", flight)
        if step % self.every and step != self.total:
            return
        now = time.monotonic()
        rate = (tokens - (self.last_tokens or 0)) / max(now - self.last_time, 1e-9)
        if self.last_tokens is None:
            rate = sum_of_tokens(tokens, step, self.first_step) / max(now - self.started, 1e-9)
        self.last_time, self.last_tokens = now, tokens
        memory = peak_memory_bytes(self.fabric.device)
        record = {
            "step": step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": tokens,
            **result.metrics,
            "tokens_per_second": round(rate, 1),
            "memory": memory,
        }
        self.dir.append("metrics.jsonl", record)
        self.log({name: value for name, value in record.items() if name != "step"}, step)
        done = step - self.first_step
        left = (now - self.started) / done * (self.total - step)
        self.line.show(
            f"step {step}/{self.total} · loss {result.loss:.4f} · lr {lr:.2e} · grad norm {result.grad_norm:.3f} · "
            f"{rate:.0f} tokens/s · {memory / 1e9:.2f} GB · {progress.duration(left)} left",
            last=step == self.total,
        )

    def tell_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """One evaluation."""
        if not self.speaks:
            return
        self.dir.append("metrics.jsonl", {"step": step, **metrics})
        self.log(metrics, step)
        self.last_time = time.monotonic()
        self.say("evaluation at step {}: {}".format(step, " · ".join(f"{k} {v:.4f}" for k, v in metrics.items())))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Hand numbers to the loggers."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def say(self, message: str) -> None:
        """One line of text."""
        self.line.clear()
        progress.say(message)

    def warn(self, message: str) -> None:
        """One line of warning."""
        self.line.clear()
        progress.warn(message)

    def close(self) -> None:
        """Flush the loggers."""
        self.line.clear()
        for logger in self.loggers:
            logger.finalize("success")


def sum_of_tokens(tokens: int, step: int, first_step: int) -> float:
    """Tokens of the first step told after a start, from the run's mean when it was resumed."""
    return tokens / step * (step - first_step)

"""What a run tells while it goes: the progress line, metrics.jsonl, the flight recorder, the loggers."""

from __future__ import annotations

import os
import resource
import sys
import time
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from litrecipe.config import progress, stop
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Log
from litrecipe.engine.peak import peak_flops
from litrecipe.engine.rundir import RunDir

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from litrecipe.engine.fit import StepResult

TIMING = ("tokens_per_second", "mfu", "memory", "time/rollout", "total_steps")
"""Fields of metrics.jsonl that differ between two runs that do the same."""
ON_THE_LINE = {
    "nll": "nll",
    "rewards/accuracies": "accuracy",
    "accuracy": "accuracy",
    "rewards/margins": "margin",
    "kl": "kl",
    "reward": "reward",
}
"""Metrics that the progress line shows, and what it calls them."""
LOGGER_PACKAGES = {
    "tensorboard": ("tensorboard",),
    "wandb": ("pytorch_lightning", "wandb"),
    "mlflow": ("pytorch_lightning", "mlflow"),
}


def check_loggers(log: Log) -> None:
    """Say what is not installed while nothing has been read or computed yet; imports none of it."""
    mistakes = [
        f"log.loggers: {name}: {package} is not installed: `pip install 'litrecipe[loggers]'`, or leave it out"
        for name in log.loggers
        for package in LOGGER_PACKAGES[name]
        if find_spec(package) is None
    ]
    if mistakes:
        raise InputError(*mistakes)


def check_login(log: Log) -> None:
    """Ask W&B whether it knows this user, before a model is loaded for a run that it would refuse."""
    if "wandb" not in log.loggers or os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    why = "it knows no API key"
    try:
        if wandb.login(prompt=False):
            return
    except wandb.Error as error:
        why = str(error)
    raise InputError(f"log.loggers: wandb: {why}: `wandb login`, or set WANDB_MODE=offline and sync later")


def make_loggers(log: Log, out_dir: str, purge_step: int | None = None) -> list[Any]:
    """The loggers a recipe names; TensorBoard writes into the run directory."""
    check_loggers(log)
    loggers: list[Any] = []
    for name in log.loggers:
        if name == "tensorboard":
            from lightning_fabric.loggers import TensorBoardLogger

            loggers.append(TensorBoardLogger(out_dir, name="", version="tensorboard", purge_step=purge_step))
            continue
        from pytorch_lightning.loggers import MLFlowLogger, WandbLogger

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
        self.every, self.precision = recipe.log.every, recipe.fabric.precision
        self.speaks = fabric.global_rank == 0
        self.line = progress.Line()
        self.started = self.last_step = time.monotonic()
        self.rate_since = self.started
        """Where the clock of tokens per second was last set to 0, moved on by the time evaluations took."""
        self.first_step = first_step
        self.last_tokens: int | None = None
        self.flops = 0.0
        """What the steps since the last telling asked of the model, over all ranks."""
        self.loggers = make_loggers(recipe.log, recipe.out_dir, purge_step=first_step + 1) if self.speaks else []

    def tell(
        self, step: int, tokens: int, lr: float, result: StepResult, flight: dict[str, Any], stage: str = ""
    ) -> None:
        """One optimizer step, of a `stage` where there are several."""
        progress.whisper(f"step {step}/{self.total}: loss {result.loss:.4f}")
        if not self.speaks:
            return
        self.dir.append("flight.jsonl", flight)
        self.last_step = now = time.monotonic()
        if step % self.every and step != self.total:
            return
        told = self.last_tokens
        new = sum_of_tokens(tokens, step, self.first_step) if told is None else tokens - told
        seconds = max(now - self.rate_since, 1e-9)
        rate = new / seconds
        utilization = self.utilization(seconds)
        self.rate_since, self.last_tokens, self.flops = now, tokens, 0.0
        memory = peak_memory_bytes(self.fabric.device)
        record = {
            "step": step,
            "total_steps": self.total,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens": tokens,
            **result.metrics,
            "tokens_per_second": round(rate, 1),
            **({} if utilization is None else {"mfu": round(utilization, 4)}),
            "memory": memory,
        }
        self.dir.append("metrics.jsonl", record)
        self.log({name: value for name, value in record.items() if name not in ("step", "total_steps")}, step)
        done = step - self.first_step
        left = (now - self.started) / done * (self.total - step)
        of_method = [
            f"{word} {result.metrics[name]:.3f}" for name, word in ON_THE_LINE.items() if name in result.metrics
        ]
        parts = [
            # What matters most stands first: a narrow terminal cuts the end off.
            f"{stage + ': ' if stage else ''}step {step}/{self.total}",
            f"loss {result.loss:.4f}",
            *of_method,
            f"{progress.duration(left)} left",
            f"{rate:.0f} tokens/s",
            *([] if utilization is None else [f"MFU {utilization:.0%}"]),
            f"{memory / 1e9:.2f} GB",
            f"lr {lr:.2e}",
            f"grad norm {result.grad_norm:.3f}",
        ]
        self.line.show(" · ".join(parts), last=step == self.total)

    def utilization(self, seconds: float) -> float | None:
        """Model FLOPs utilisation (PaLM, 2204.02311): what was asked of the model as a share of what the devices can do
        in that time; None where nobody counts, or the device is not known."""
        if not self.flops:
            return None
        peak = self.peak_flops
        return None if peak is None else self.flops / (seconds * peak * self.fabric.world_size)

    @cached_property
    def peak_flops(self) -> float | None:
        """Of one device, at the run's precision."""
        return peak_flops(self.fabric.device, half=self.precision != "32-true")

    def tell_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """One evaluation."""
        if not self.speaks:
            return
        self.dir.append("metrics.jsonl", {"step": step, **metrics})
        self.log(metrics, step)
        self.rate_since += time.monotonic() - self.last_step
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
        """Flush the loggers and tell them how the run ended; for a `finally`, where an exception is still known."""
        self.line.clear()
        for logger in self.loggers:
            logger.finalize(ending(sys.exception()))


def ending(error: BaseException | None) -> str:
    """How a run ended, in the words that Lightning's loggers hand on."""
    if error is None:
        return "success"
    return "KILLED" if isinstance(error, stop.Stopped) else "failed"


def sum_of_tokens(tokens: int, step: int, first_step: int) -> float:
    """Tokens of the first step told after a start, from the run's mean when it was resumed."""
    return tokens / step * (step - first_step)

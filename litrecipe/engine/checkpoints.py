"""A run's checkpoints: what is kept of it, and how it goes on from there, bit for bit."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from litrecipe.checkpoint import state as training_state
from litrecipe.config.errors import InputError
from litrecipe.config.progress import warn
from litrecipe.data.source import StepSource
from litrecipe.engine.grid import grid_of
from litrecipe.engine.optim import load_optimizer_state, optimizer_state
from litrecipe.engine.rng import capture_rng, restore_rng
from litrecipe.engine.rundir import RunDir
from litrecipe.engine.spikes import SpikeGuard
from litrecipe.model.tensor_plan import alike, held_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

SAME = "resume with the same, or start a new out_dir"
"""The cure for a checkpoint of another run."""


@dataclass
class Counters:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done."""
    total_steps: int = 0
    """Steps after which it ends."""
    tokens: int = 0
    """Tokens of all samples trained on."""
    skipped: int = 0
    """Samples that fit into no row."""


@dataclass
class Checkpoints:
    """Saves a run into its directory, and sets it back to where a checkpoint stood."""

    fabric: Fabric
    run_dir: RunDir
    parameters: dict[str, nn.Parameter]
    """What is trained."""
    carried: dict[str, nn.Parameter]
    """What else the run changes."""
    optimizer: torch.optim.Optimizer
    optimizer_name: str
    """`optim.name` of the recipe."""
    source: StepSource
    identity: dict[str, str]
    """Settings and hashes that must be the same when the run goes on."""
    keep: int
    """How many checkpoints are left when a new one is complete."""
    writer: training_state.Writer
    guard: SpikeGuard | None = None
    saved_at: int | None = None
    """The step of the newest checkpoint of this run."""

    def save(self, at: Counters) -> None:
        """Write a complete checkpoint unless this step has one, then delete the oldest beyond `keep`."""
        if self.saved_at == at.step:
            return
        state = {
            **asdict(at),
            "source": self.source.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
            "optimizer": self.optimizer_kind,
            "identity": self.identity,
            "world_size": self.fabric.world_size,
            "data_ranks": grid_of(self.fabric).rows,
            "rank": {"rng": capture_rng()},
        }
        weights = {name: alike(parameter.data, parameter) for name, parameter in self.changed.items()}
        tensors = optimizer_state(self.optimizer, self.parameters)
        target = training_state.step_folder(self.run_dir.checkpoints, at.step)
        training_state.save(target, weights, tensors, state, self.writer)
        if self.fabric.global_rank == 0:
            training_state.prune(target, self.keep)
        self.saved_at = at.step

    def load(self, folder: Path) -> Counters:
        """Set weights, optimizer, data and random numbers to a checkpoint's, and return how far it was.

        Raises InputError naming every setting and weight in which the run differs from the checkpoint's.
        """
        saved = training_state.Saved(folder, verified=True)
        state, weights = saved.state, saved.tensors("weights")
        mistakes = self.mismatches(folder, state["identity"], weights.shapes)
        try:
            self.source.load_state_dict(state["source"])
        except InputError as error:
            mistakes += error.mistakes
        if mistakes:
            raise InputError(*mistakes)
        if self.guard is not None and state.get("guard"):
            self.guard.load_state_dict(state["guard"])
        with torch.no_grad():
            for name, parameter in self.changed.items():
                piece, _ = training_state.local_piece(parameter.data)
                piece.copy_(weights.like(name, parameter))
        kinds = (self.optimizer_kind, state["optimizer"])
        load_optimizer_state(self.optimizer, self.parameters, saved.tensors("optimizer"), *kinds)
        grid, world = grid_of(self.fabric), state["world_size"]
        rows = state.get("data_ranks", world)
        if rows == grid.rows:  # ranks that share a model draw alike
            restore_rng(state["ranks"][grid.rank * (world // rows)]["rng"])
        else:
            warn(f"resuming on {self.fabric.world_size} ranks what {state['world_size']} wrote")
        at = Counters(**{field.name: state[field.name] for field in fields(Counters)})
        if self.run_dir.owns(folder):
            self.saved_at = at.step
        return at

    @property
    def changed(self) -> dict[str, nn.Parameter]:
        """All weights that a run changes."""
        return self.parameters | self.carried

    def mismatches(self, folder: Path, was: dict[str, str], shapes: dict[str, torch.Size]) -> list[str]:
        """What differs between this run and the checkpoint's: settings by name, then the trained weights' shapes."""
        mistakes = other_settings(folder, was, self.identity)
        ours = {name: list(held_of(one).whole_shape(one.shape)) for name, one in self.changed.items()}
        theirs = {name: list(shape) for name, shape in shapes.items()}
        if odd := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            first = f"{odd[0]}: {theirs.get(odd[0], 'absent')}, now {ours.get(odd[0], 'absent')}"
            mistakes.append(f"checkpoint.resume: {folder}: trains other weights ({first}; {len(odd)} in all): {SAME}")
        return mistakes

    @property
    def optimizer_kind(self) -> str:
        """Fused and plain kernels differ in the last bit, so the kind is part of the state."""
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        return self.optimizer_name + (" (fused)" if fused else "")


def other_settings(folder: Path, was: dict[str, str], now: dict[str, str]) -> list[str]:
    """What is not as it was, by name."""
    return [
        f"checkpoint.resume: {folder}: made with other {name} ({brief(was.get(name))}, now {brief(value)}): {SAME}"
        for name, value in now.items()
        if was.get(name) != value
    ]


def refuse_other_run(run_dir: RunDir, resume: str | None, identity: dict[str, str]) -> None:
    """Raise InputError where the checkpoint to go on from was made by another run, before anything slow is done.

    A first look only, at the newest: `Checkpoints.load` reads all of it and decides.
    """
    named = [Path(resume)] if resume else []
    for folder in training_state.all_checkpoints(run_dir.checkpoints)[:1] if resume == "auto" else named:
        try:
            was = json.loads((folder / "state.json").read_text())["identity"]
        except (OSError, ValueError, KeyError):  # damaged perhaps: told, or passed over, when it is loaded
            continue
        if mistakes := other_settings(folder, was, identity):
            raise InputError(*mistakes)


def brief(value: str | None) -> str:
    """A setting as it is, the beginning of a hash."""
    return "absent" if value is None else value[:12] + "…" if re.fullmatch("[0-9a-f]{32,}", value) else value

"""A run's checkpoints: what is kept of it, and how it goes on from there, bit for bit."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from litrecipe.checkpoint import state as training_state
from litrecipe.config.errors import InputError
from litrecipe.config.progress import counted, say, warn
from litrecipe.data.source import StepSource
from litrecipe.engine.background import Background
from litrecipe.engine.grid import grid_of
from litrecipe.engine.optim import load_optimizer_state, optimizer_bytes, optimizer_state
from litrecipe.engine.rng import capture_rng, restore_rng, seed_rng
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
    lr: float | None = None
    """Peak learning rate, of the first role and of the stage that it is in; None where an older litrecipe saved it."""


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
    seed: int
    """`train.seed`; ranks that the checkpoint does not know draw their random numbers by it."""
    keep: int
    """How many checkpoints are left when a new one is complete."""
    writer: training_state.Writer
    guard: SpikeGuard | None = None
    behind: training_state.Writer | None = None
    """How the ranks write together beside the training, which goes on meanwhile; None: it waits for each save."""
    saved_at: int | None = None
    """The step of the newest checkpoint of this run, which may still be on its way to the disk."""
    background: Background = field(default_factory=Background)

    def save(self, at: Counters) -> None:
        """Write a complete checkpoint unless this step has one, then delete the oldest beyond `keep`.

        Where this is done in the background, what can go wrong is told by the next `save` or `wait`. That one failed
        says nothing of the next: this one is then waited for. Raises InputError, on every rank, when it fails, too.
        """
        behind = self.behind
        try:
            self.wait()
        except InputError as error:
            warn(str(error))
            self.saved_at = behind = None
        if self.saved_at == at.step:
            return
        state = {
            **asdict(at),
            "source": self.source.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
            "optimizer": self.optimizer_kind,
            "identity": self.identity,
            "world_size": self.fabric.world_size,
            "data_size": grid_of(self.fabric).data_size,
            "rank": {"rng": capture_rng()},
        }
        tensors = {
            "weights": {name: alike(parameter.data, parameter) for name, parameter in self.changed.items()},
            "optimizer": optimizer_state(self.optimizer, self.parameters),
        }
        is_copied = behind is not None
        pieces = {kind: training_state.pieces_of(some, self.writer, copied=is_copied) for kind, some in tensors.items()}
        target = training_state.step_folder(self.run_dir.checkpoints, at.step)
        training_state.begin(target, pieces, state, self.writer)
        if behind is None:
            self.finish(target, pieces, self.writer)
        else:
            self.background.start(partial(self.finish, target, pieces, behind))
        self.saved_at = at.step

    def finish(
        self, target: Path, pieces: dict[str, dict[str, training_state.Piece]], writer: training_state.Writer
    ) -> None:
        """Write the tensors of a checkpoint that was begun, then delete the oldest beyond `keep`."""
        training_state.finish(target, pieces, writer)
        if writer.rank == 0:
            training_state.prune(target, self.keep)

    def wait(self) -> None:
        """Until all that was saved is on the disk. Raises InputError, on every rank, when it could not be."""
        self.background.wait()

    def close(self) -> None:
        """Wait once more; for a `finally`, which another error may have led to."""
        try:
            self.wait()
        except InputError as error:
            warn(str(error))

    def warn_of_little_room(self) -> None:
        """Say when the disk cannot hold the checkpoints that are kept and the one that is being written."""
        size = sum(parameter.nbytes for parameter in self.changed.values())
        size += optimizer_bytes(self.optimizer_name, self.parameters.values())
        size *= grid_of(self.fabric).tensor_size  # each of which has a part
        free = training_state.free_bytes(self.run_dir.checkpoints)
        if free is None or not size:
            return
        held = len(training_state.all_checkpoints(self.run_dir.checkpoints))
        wanted = max(1, self.keep + 1 - held)
        if free < wanted * size:
            warn(
                f"out_dir: {self.run_dir.path}: {free / 1e9:.3g} GB are free and {wanted} checkpoints more of about "
                f"{size / 1e9:.3g} GB are to come (checkpoint.keep {self.keep}, and the one that is being written): "
                "make room, or lower checkpoint.keep"
            )

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
        mine, of_ranks = grid_of(self.fabric).data_rank, state["ranks"]
        of_data = of_ranks[:: len(of_ranks) // state.get("data_size", len(of_ranks))]
        if mine < len(of_data):  # ranks that share a model draw alike
            restore_rng(of_data[mine]["rng"])
        else:
            seed_rng(self.seed, mine, state["step"])
        if len(of_ranks) != self.fabric.world_size:
            wrote = counted(len(of_ranks), "rank")
            say(f"{folder}: written by {wrote}, {self.fabric.world_size} go on: equal up to rounding")
        elif len(of_data) != grid_of(self.fabric).data_size:
            say(f"{folder}: written by ranks that shared layers otherwise: equal up to rounding")
        at = Counters(**{field.name: state[field.name] for field in fields(Counters) if field.name in state})
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

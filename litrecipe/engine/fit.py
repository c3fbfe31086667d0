"""The one training loop.

A step, in the order of the maths: take the step's samples, pack them into rows, count what the loss is divided by, run
each row forward and backward, clip, step. Everything else here surrounds that: telling, evaluating, saving, stopping.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from litrecipe.checkpoint.manifest import is_disk_full
from litrecipe.config import schema, stop
from litrecipe.config.checks import parse_duration
from litrecipe.config.errors import InputError
from litrecipe.config.progress import counted, track
from litrecipe.data.packing import Packing, pack
from litrecipe.data.source import SampleList, StepSource
from litrecipe.engine import fabric as ranks
from litrecipe.engine.checkpoints import Checkpoints, Counters
from litrecipe.engine.gradients import add_up_copies, add_up_shares, norm_of
from litrecipe.engine.grid import grid_of
from litrecipe.engine.legs import Leg, leg_of
from litrecipe.engine.optim import Role, Treatment, make_optimizer, plain_treatment, set_rates, trained_parameters
from litrecipe.engine.recorder import flight_record, hash_rng
from litrecipe.engine.rng import capture_rng, restore_rng, seed_rng
from litrecipe.engine.rundir import RunDir
from litrecipe.engine.schedule import lr_factor
from litrecipe.engine.spikes import SpikeGuard
from litrecipe.engine.statistics import completed, with_statistics
from litrecipe.engine.telling import Teller
from litrecipe.model.row import Row, Sample, make_row
from litrecipe.objectives.loss import (
    Loss,
    Objective,
    OfOwnRows,
    StepGlobal,
    Tallying,
    add_up,
    detached,
    metric_maxima,
    metric_sums,
    quotients,
    step_loss,
    tally,
)

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass
class Job:
    """What a recipe hands to `fit`."""

    fabric: Fabric
    recipe: Any
    """The verb's dataclass; read here: train, optim, schedule, eval, checkpoint, log, fabric and out_dir."""
    module: nn.Module
    """Everything that is trained: maps a Row to what the objective takes."""
    objective: Objective
    source: StepSource
    save_final: Callable[[Path], None]
    """Writes the finished model into a folder; called on every rank."""
    val: SampleList | None = None
    measured: Callable[[dict[str, float]], dict[str, float]] = lambda _: {}
    """What else is told of the held-out data, from its metrics, `loss` among them."""
    evaluate_tasks: Callable[[], dict[str, float]] | None = None
    """Runs `eval.tasks` on the module as it stands; called on every rank."""
    carried: Callable[[], dict[str, nn.Parameter]] = dict
    """Weights that no gradient moves and that the run changes nevertheless (a moving reference), asked for once the
    module is set up; saved and restored with the trained ones."""
    roles: Sequence[Role] = ()
    """Parts of the module with learning rates and clipping of their own, which together are all that is trained.
    Empty: `optim.lr` and `train.grad_clip` for everything."""
    rests: Callable[[int], Collection[str]] = lambda _: ()
    """Names of the roles that learn nothing in the step after so many."""
    refuses: Callable[[dict[str, float]], str | None] = lambda _: None
    """Why the optimizer must not take a step of which this is told, with `loss` and `grad_norm`, in words; the samples
    are passed over then."""
    guard: SpikeGuard | None = None
    """Refuses steps as well, those among them that are not finite, which are an error otherwise."""
    treatment: Callable[[str, nn.Parameter], Treatment] = plain_treatment
    """How a weight is dealt with by the optimizer, by its name."""
    legs: Sequence[Leg] = ()
    """Stages of the run; none: `optim.lr`, `schedule` and `train.micro_batch_tokens` throughout."""
    flops: Callable[[Sequence[Sample]], float] | None = None
    """Floating-point operations that a step on some samples asks of the model: the progress line tells the share of
    what the devices can do."""
    looking: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around the pass that looks at a step for its objective: spares what its statistics do not need."""
    told: Callable[[], dict[str, float]] = dict
    """What else the record of a step says, asked for after it: of the samples' making, for example."""
    after_step: Callable[[int, StepResult], None] | None = None
    """Called after each optimizer step with the number of steps done and what the last one told."""
    online: bool = False
    """Whether samples are made from the module as it stands: an evaluation comes before the first step too, and the
    progress line makes room for what is said meanwhile."""
    evaluated: Callable[[int, dict[str, float]], None] | None = None
    """Called on every rank with step and numbers of each evaluation, before they are told: again if that never was."""
    check_first: Callable[[StepResult], None] | None = None
    """Looks at what the first step of a run told, which is of the weights as they were before it."""
    identity: dict[str, str] = field(default_factory=dict)
    """Hashes of what must not change between a checkpoint and its resumption (base weights, data, tokenizer)."""


@dataclass
class StepResult:
    """What one optimizer step tells."""

    loss: float
    grad_norm: float
    metrics: dict[str, float]
    refused: str | None = None
    """Why the optimizer did not take it."""


def fit(job: Job) -> int:
    """Train, and return the exit code: 0 when done. Raises `Stopped` (85 or 130) after saving when told to stop."""
    folder = RunDir(job.recipe.out_dir)
    try:
        with ExitStack() as lock:
            ranks.on_first_rank(job.fabric, lambda: lock.enter_context(folder.held()))
            run = Run(job)
            with closing(run.teller), closing(run.checkpoints), stop.deferred():
                return run.train()
    except OSError as error:
        ours = isinstance(error.filename, str | Path) and Path(error.filename).is_relative_to(folder.path)
        if not is_disk_full(error) and not ours:
            raise
        what, cure = ("disk full", "make room") if is_disk_full(error) else ("cannot be written", "see to the folder")
        raise InputError(
            f"out_dir: {folder.path}: {what} ({error}): {cure} and run again with --checkpoint.resume auto"
        ) from error


class Run:
    """The state of one training run."""

    def __init__(self, job: Job) -> None:
        self.job, self.fabric, self.recipe = job, job.fabric, job.recipe
        self.train_config = job.recipe.train
        self.dir = RunDir(job.recipe.out_dir)
        resume = ranks.on_first_rank(self.fabric, lambda: self.dir.find_resume(job.recipe.checkpoint.resume))
        self.raw = job.module
        self.module = self.fabric.setup_module(job.module, move_to_device=not job.recipe.fabric.is_sharded)
        self.parameters = trained_parameters(self.raw)
        # Built before any forward: under FSDP2 the optimizer must see the sharded parameters and nothing else.
        self.roles = job.roles or [Role("", job.recipe.optim.lr, self.train_config.grad_clip)]
        self.raw_optimizer = make_optimizer(self.parameters, job.recipe.optim, self.roles, job.treatment)
        self.optimizer: Any = self.fabric.setup_optimizers(self.raw_optimizer)
        self.lr = 0.0
        self.grid = grid_of(self.fabric)
        self.writer = ranks.checkpoint_writer(self.fabric, sharded=job.recipe.fabric.is_sharded)
        self.checkpoints = Checkpoints(
            fabric=self.fabric,
            run_dir=self.dir,
            parameters=self.parameters,
            carried=job.carried(),
            optimizer=self.raw_optimizer,
            optimizer_name=job.recipe.optim.name,
            source=job.source,
            identity=job.identity,
            seed=self.train_config.seed,
            keep=job.recipe.checkpoint.keep,
            writer=self.writer,
            behind=ranks.background_writer(self.fabric, self.writer) if job.recipe.checkpoint.asynchronous else None,
            guard=job.guard,
        )
        seed_rng(self.train_config.seed, self.grid.data_rank)
        self.at = Counters() if resume is None else self.checkpoints.load(resume)
        started_for, rate_was = self.at.total_steps, self.at.lr
        self.at.total_steps = job.source.total_steps(self.train_config)
        whole = Leg(
            "", self.at.total_steps, self.roles[0].lr, job.recipe.schedule, self.train_config.micro_batch_tokens
        )
        self.legs = job.legs or [whole]
        self.leg, _ = leg_of(self.legs, max(0, self.at.step - 1))
        self.leg.begin()
        self.at.lr = self.leg.lr
        if self.fabric.global_rank == 0:
            self.dir.start(schema.dump(job.recipe), self.at.step)
            self.checkpoints.warn_of_little_room()
            if self.at.step < self.at.total_steps:
                self.dir.put_final_aside()
        self.fabric.barrier()
        self.evaluated_at = ranks.on_first_rank(self.fabric, self.dir.last_evaluation)
        self.teller = Teller(self.fabric, self.recipe, self.dir, self.at.total_steps, self.at.step)
        if resume is not None:
            self.teller.say(f"resumed {resume} at step {self.at.step} of {self.at.total_steps}")
            if started_for != self.at.total_steps:
                was = f"the run was to have {counted(started_for, 'step')}"
                self.teller.warn(f"{was}, now {self.at.total_steps}: look at train.*")
            if rate_was not in (None, self.at.lr):
                self.teller.warn(f"{self.leg.where}optim.lr: was {rate_was:g}, is {self.at.lr:g} from here on")
        else:
            self.teller.say(f"{counted(self.at.total_steps, 'step')}; the run is in {self.dir.path}")
        for leg in self.legs:
            for what in leg.without_room():
                self.teller.warn(what)
        if self.at.step > self.at.total_steps:
            self.teller.warn(
                f"step {self.at.step} is beyond {self.at.total_steps}, where train ends: nothing is left to do"
            )

    def train(self) -> int:
        """All steps that are left; then the final model."""
        started = time.monotonic()
        while True:
            signal_number = ranks.stop_requested(self.fabric)
            if signal_number is None and self.evaluation_due():
                signal_number = self.evaluate()
            if signal_number is not None:
                self.save_and_stop(signal_number)
            if self.at.step >= self.at.total_steps or self.out_of_time(started):
                break
            self.enter(*leg_of(self.legs, self.at.step))
            if self.job.online:
                self.teller.line.clear()
            try:
                # Samples that are made, not read, take their time; what has begun of them is dropped. Several ranks
                # are not in lockstep there: they must agree on their own.
                with stop.interruptible(stop.requested if self.fabric.world_size == 1 else lambda: None):
                    samples = self.job.source.next_step()
            except stop.Stopped as stopped:
                self.save_and_stop(stopped.signal_number)
            if not samples:
                break
            rng = hash_rng()
            result = self.train_step(samples)
            if self.at.step == 0 and self.job.check_first is not None:
                self.job.check_first(result)
            self.at.step += 1
            if self.job.after_step is not None:
                self.job.after_step(self.at.step, result)
            self.at.tokens += sum(s.length for s in samples if s.length <= self.leg.micro_batch_tokens)
            if self.job.flops is not None:
                self.teller.flops += self.job.flops(samples)
            result.metrics.update(self.job.told())
            flight = flight_record(self.at.step, samples, rng, result.loss, result.grad_norm)
            self.teller.tell(self.at.step, self.at.tokens, self.lr, result, flight, self.leg.name)
            if self.recipe.checkpoint.every and self.at.step % self.recipe.checkpoint.every == 0:
                self.checkpoints.save(self.at)
        self.checkpoints.save(self.at)
        if self.evaluated_at != self.at.step:
            signal_number = self.evaluate()
            if signal_number is not None:
                self.save_and_stop(signal_number)
        self.checkpoints.wait()
        self.job.save_final(self.dir.final)
        self.fabric.barrier()
        steps = counted(self.at.step, "step")
        self.teller.say(f"done: {steps}, {self.at.tokens} tokens; the model is in {self.dir.final}")
        return 0

    def train_step(self, samples: list[Sample]) -> StepResult:
        """One optimizer step on the whole of `samples`, whose cut into rows and ranks changes nothing."""
        rows = self.rows_of_this_rank(samples)
        at_once = len(rows) == 1 and isinstance(self.job.objective, OfOwnRows)
        rows = rows if at_once else list(self.with_statistics(rows, samples))
        counts = ranks.sums(self.fabric, add_up([self.job.objective.counts(row) for row in rows]))
        # Sharded gradients are added up after each row: kept back until the last, they would be whole on every rank.
        losses = [self.learn(row, counts, at_once=at_once) for row in rows]
        shares = torch.stack([step_loss(loss, counts) for loss in losses]).tolist()
        total = ranks.sums(self.fabric, {"loss": sum(shares)})["loss"]
        bad = [row for row, share in zip(rows, shares, strict=True) if not math.isfinite(share)]
        self.stop_if_not_finite("loss", total, samples, bad)
        if self.grid.data_size > 1 and not self.recipe.fabric.is_sharded:
            add_up_copies(self.parameters.values())
        add_up_shares(self.parameters.values(), self.grid.tensor)
        norms = {role.name: self.clip(role, samples) for role in self.roles}
        metrics = quotients(ranks.sums(self.fabric, metric_sums(losses)))
        metrics |= ranks.maxima(self.fabric, metric_maxima(losses))
        metrics |= self.tallied(losses)
        rates = self.set_rates()
        norm = math.hypot(*norms.values())
        refused = self.refused(metrics | {"loss": total, "grad_norm": norm})
        if refused is None:
            self.optimizer.step()
        else:
            self.teller.warn(f"step {self.at.step + 1}: {refused}")
        self.optimizer.zero_grad()
        if self.job.guard is not None:
            metrics["passed_over"] = float(self.job.guard.refused)
        if len(norms) > 1:
            metrics |= {f"grad_norm/{name}": norm for name, norm in norms.items()}
            metrics |= {f"lr/{name}": rate for name, rate in rates.items()}
        return StepResult(total, norm, metrics, refused)

    def refused(self, numbers: dict[str, float]) -> str | None:
        """Why the optimizer does not take a step, if it does not."""
        by_guard = None if self.job.guard is None else self.job.guard(numbers)
        return by_guard or self.job.refuses(numbers)

    def enter(self, leg: Leg, begin: int) -> None:
        """Go over to a leg, unless the run is in it already."""
        if leg.name and (leg is not self.leg or self.at.step == 0):
            self.teller.say(f"stage {leg.name}: steps {begin + 1} to {begin + leg.steps}")
        if leg is self.leg:
            return
        self.leg, self.at.lr = leg, leg.lr
        leg.begin()
        if self.job.guard is not None:
            self.job.guard.start_anew()

    def set_rates(self) -> dict[str, float]:
        """Set the learning rates of the step that comes, and return them by role; the first role's is the run's."""
        step = self.at.step - leg_of(self.legs, self.at.step)[1]
        share = self.leg.lr / self.roles[0].lr
        factors = {
            role.name: share * lr_factor(role.schedule or self.leg.schedule, step, self.leg.steps)
            for role in self.roles
        }
        set_rates(self.raw_optimizer, self.recipe.optim, factors)
        rates = {role.name: role.lr * factors[role.name] for role in self.roles}
        self.lr = rates[self.roles[0].name]
        return rates

    def clip(self, role: Role, samples: list[Sample]) -> float:
        """Clip a role's gradient by its norm, and return what that was."""
        parameters = role.parameters(self.parameters)
        if role.name in self.job.rests(self.at.step):
            for parameter in parameters:
                parameter.grad = None  # of zeros the optimizer would still move by its momentum
        norm = norm_of(parameters, self.grid.tensor)
        self.stop_if_not_finite("gradient norm", float(norm), samples)
        # Within the bound torch would multiply all gradients by 1: a pass over all of them that changes nothing.
        if role.grad_clip is not None and not role.grad_clip / (norm + 1e-6) >= 1:
            torch.nn.utils.clip_grads_with_norm_(parameters, role.grad_clip, norm)
        return float(norm)

    def tallied(self, losses: list[Loss]) -> dict[str, float]:
        """What the objective makes of what adds up over the step's rows."""
        if not isinstance(self.job.objective, Tallying):
            return {}
        return self.job.objective.tell(ranks.tensor_sums(self.fabric, tally(losses)))

    def learn(self, row: Row, counts: dict[str, float], at_once: bool = False) -> Loss:
        """Forward and backward of one row.

        `at_once`: it is the only one of this rank, and tells itself what the objective must know of the step.

        The loss comes back without its graph: the next row's activations would have to go around what is left of it.
        """
        output = self.module(row)
        if at_once and isinstance(self.job.objective, StepGlobal):
            mine = self.job.objective.statistics(output, row)
            (row,) = completed([row], [mine], self.job.objective, self.grid.data_rank, self.gather)
        loss = self.job.objective(output, row)
        # The loss is a sum over the ranks; FSDP averages gradients.
        averaged = self.grid.data_size if self.recipe.fabric.is_sharded else 1
        self.fabric.backward(step_loss(loss, counts) * averaged)
        return detached(loss)

    def with_statistics(
        self,
        rows: Iterable[Row],
        samples: Sequence[Sample] | SampleList,
        watched: Callable[[Iterable[Row]], Iterable[Row]] = iter,
    ) -> Iterable[Row]:
        """The rows of a step, or of an evaluation, with what the objective must know of all its samples.

        It looks at rows that are `watched` on their way. Samples that fit into no row do not count; of the others
        nothing is left out, however long what is looked at (a prompt with another's answers), or the numbers would
        depend on the cut.
        """
        objective = self.job.objective
        if not isinstance(objective, StepGlobal):
            return rows
        budget = self.leg.micro_batch_tokens
        fitting = (sample for sample in map(samples.__getitem__, range(len(samples))) if sample.length <= budget)
        wanted = objective.statistics_samples(list(fitting))
        looked_at = watched(self.packed(wanted, max([budget, *(sample.length for sample in wanted)])))
        with self.job.looking():
            return with_statistics(rows, looked_at, self.module, objective, self.grid.data_rank, self.gather)

    def gather(self, value: Any) -> list[Any]:
        """What each rank with data of its own brings, on all of them."""
        return ranks.gather_data(self.fabric, value)

    def rows_of_this_rank(self, samples: list[Sample]) -> list[Row]:
        """Pack the step's samples; every rank gets the same number of rows, empty ones where they ran out."""
        for sample in samples:
            if sample.length > self.leg.micro_batch_tokens:
                self.at.skipped += 1
                self.teller.warn(
                    f"{sample.id}: {sample.length} tokens do not fit train.micro_batch_tokens "
                    f"{self.leg.micro_batch_tokens}: skipped ({self.at.skipped} so far)"
                )
        return self.packed(samples, self.leg.micro_batch_tokens)

    def packed(self, samples: Sequence[Sample], budget: int) -> list[Row]:
        """This rank's rows of some samples, at least one; those too long for any row are left out."""
        packing = pack([s.length for s in samples], budget, multiple_of=self.grid.data_size)
        mine = packing.rows[self.grid.data_rank :: self.grid.data_size] or [[]]
        return [make_row([samples[i] for i in row]).to(self.fabric.device) for row in mine]

    def stop_if_not_finite(self, what: str, value: float, samples: list[Sample], bad: list[Row] | None = None) -> None:
        """Before the optimizer step, where a NaN would spoil every weight. `value` is the same on all ranks.

        The samples of all ranks' `bad` rows are named, or the whole step where no row is known to be bad.
        """
        if math.isfinite(value) or self.job.guard is not None:
            return
        of_ranks = self.gather([name for row in bad or [] for name in row.sample_ids])
        names = ", ".join([name for of_rank in of_ranks for name in of_rank] or [sample.id for sample in samples])
        raise InputError(
            f"data.train: {what} is {value} at step {self.at.step + 1}, before the optimizer step, on the samples "
            f"{names}: look at them, lower optim.lr, or use fabric.precision 32-true; the last checkpoint is good"
        )

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been done (a resumed run may owe one)."""
        every = self.recipe.eval.every
        begun = self.at.step > 0 or self.job.online
        due = bool(every) and begun and self.at.step < self.at.total_steps and self.at.step % every == 0
        return due and self.evaluated_at != self.at.step

    @torch.no_grad()
    def evaluate(self) -> int | None:
        """Loss on the held-out data, then the tasks; returns the signal that cut it short, if one did.

        Random numbers go on as if there had been no evaluation (lm-eval seeds the generators), so that a resumed run
        which need not repeat it draws the same.
        """
        metrics: dict[str, float] = {}
        rng = capture_rng()
        self.raw.eval()
        try:
            if self.job.val is not None:
                losses, counts = [], []
                for row in self.stoppable(self.with_statistics(self.validation_rows(), self.job.val, self.stoppable)):
                    losses.append(detached(self.job.objective(self.module(row), row)))
                    counts.append(self.job.objective.counts(row))
                total_counts = ranks.sums(self.fabric, add_up(counts))
                share = sum(float(step_loss(loss, total_counts)) for loss in losses)
                means = ranks.sums(self.fabric, {"loss": share})
                means |= quotients(ranks.sums(self.fabric, metric_sums(losses))) | self.tallied(losses)
                means |= self.job.measured(means)
                metrics |= {f"eval_{name}": value for name, value in means.items()}
            if self.job.evaluate_tasks is not None:
                # All ranks score the same requests, in lockstep, so none may leave on its own.
                with stop.interruptible(lambda: ranks.stop_requested(self.fabric)):
                    metrics |= {f"eval_{name}": value for name, value in self.job.evaluate_tasks().items()}
        except stop.Stopped as stopped:
            return stopped.signal_number
        finally:
            self.raw.train()
            restore_rng(rng)
        if metrics and self.job.evaluated is not None:
            self.job.evaluated(self.at.step, metrics)
        if metrics:
            self.teller.tell_evaluation(self.at.step, metrics)
        self.evaluated_at = self.at.step
        return None

    def stoppable(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows, until any rank is asked to stop; raises `Stopped` on all of them then."""
        for row in rows:
            signal_number = ranks.stop_requested(self.fabric)
            if signal_number is not None:
                raise stop.Stopped(signal_number)
            yield row

    def validation_rows(self) -> Iterator[Row]:
        """The held-out samples of this rank, packed."""
        assert self.job.val is not None
        mine = self.validation_packing.rows[self.grid.data_rank :: self.grid.data_size] or [[]]
        self.teller.line.clear()
        for row in track(mine, "evaluating: row"):
            yield make_row([self.job.val[i] for i in row]).to(self.fabric.device)

    @cached_property
    def validation_packing(self) -> Packing:
        """Which held-out samples share a row. Says once how many fit into none."""
        assert self.job.val is not None
        budget = self.train_config.micro_batch_tokens
        packing = pack(list(self.job.val.lengths), budget, multiple_of=self.grid.data_size)
        if packing.oversized:
            self.teller.warn(
                f"data.val: {len(packing.oversized)} of {counted(len(self.job.val), 'sample')} do not fit "
                f"train.micro_batch_tokens {budget}: eval_loss is without them"
            )
        return packing

    def save_and_stop(self, signal_number: int) -> None:
        """Save, say so and leave with the exit code that the signal stands for."""
        self.checkpoints.save(self.at)
        self.checkpoints.wait()
        self.teller.say(
            f"stopped by {signal.Signals(signal_number).name}: step {self.at.step} of {self.at.total_steps} is saved "
            f"in {self.dir.path}; the same command with --checkpoint.resume auto goes on"
        )
        raise stop.Stopped(signal_number)

    def out_of_time(self, started: float) -> bool:
        """Whether `train.max_time` has passed, as rank 0's clock says."""
        if self.train_config.max_time is None:
            return False
        late = time.monotonic() - started > parse_duration(self.train_config.max_time)
        return bool(self.fabric.broadcast(late))

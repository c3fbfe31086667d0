"""What the recipes that can learn from a teacher do alike: open it, put it beside the student, or ask it beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from litrecipe.checkpoint.load import load_teacher
from litrecipe.checkpoint.source import ModelFiles, open_model_as
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Distil, Quantize, TrainingRecipe
from litrecipe.config.progress import say
from litrecipe.data.cache import cache_folder, key_of
from litrecipe.data.remembered import KnownSamples, WithExtras, Witness, remembered
from litrecipe.data.source import SampleList
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.checkpoints import refuse_other_run
from litrecipe.engine.rundir import RunDir
from litrecipe.model.architecture import Architecture
from litrecipe.model.decoder import Decoder
from litrecipe.model.flops import forward_flops, training_flops
from litrecipe.model.row import Row, Sample
from litrecipe.model.teacher import TEACHER_IDS, TEACHER_LOGPS, StudentAndTeacher, Teacher
from litrecipe.model.tensor_plan import check_divides
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.objectives.distillation import Distillation
from litrecipe.recipes.known import start
from litrecipe.recipes.training import longest_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Teaching:
    """A teacher's files, and how is learnt from it."""

    distil: Distil
    files: ModelFiles
    tokens: int
    """Of the tokenizer that both have."""

    @property
    def known_by(self) -> dict[str, str]:
        """What must be the same when a run goes on."""
        settings = {f"distil.{key}": str(value) for key, value in asdict(self.distil).items() if key != "teacher"}
        return settings | {"teacher": self.weights}

    @property
    def weights(self) -> str:
        """Hash of all that the teacher computes with."""
        return key_of(self.files.weights_hash(), start(self.files))

    @property
    def k(self) -> int | None:
        """How many of its tokens the teacher names; None: it tells its whole distribution."""
        return {"full": None, "top_k": self.distil.top_k, "top_1": 1}[self.distil.method]

    @property
    def alpha(self) -> float:
        """Weight of the data's tokens."""
        given, is_top_1 = self.distil.alpha, self.distil.method == "top_1"
        return given if given is not None else 0.1 if is_top_1 else 0.0

    def check_reach(self, longest: int, where: str = "") -> None:
        """Raises InputError for samples, of a stage (`stages.core.`), that are longer than the teacher's context."""
        if longest > (context := self.files.architecture.max_positions):
            raise InputError(
                f"{where}data.max_length: {longest}: the context of distil.teacher {self.distil.teacher} is {context} "
                "tokens: give that or less"
            )

    def load(self, recipe: TrainingRecipe) -> Teacher:
        """The teacher, frozen; in bf16 where anything is: its weights do not move, so that no rounding adds up."""
        quantize, files = Quantize(method=self.distil.quantize), self.files.for_length(longest_of(recipe))
        shared = recipe.fabric.is_sharded and not self.distil.cache
        teacher = load_teacher(files, dtype=teacher_dtype(recipe), quantize=quantize, shared=shared)
        teacher.k = self.k
        teacher.temperature, teacher.tokens = self.distil.temperature, self.tokens
        if recipe.fabric.compile:
            teacher.compile_blocks()
        say(f"teacher: {self.files.describe()}")
        return teacher


@dataclass
class Lesson:
    """What a language model is trained on."""

    module: nn.Module
    """The model, with its teacher beside it where it has one."""
    objective: CausalLM
    train: SampleList
    val: SampleList | None

    def looking(self) -> AbstractContextManager[None]:
        """What routers choose does not depend on the teacher, which is not asked inside."""
        return self.module.alone() if isinstance(self.module, StudentAndTeacher) else nullcontext()

    def flops(self, student: Architecture, samples: Sequence[Sample]) -> float:
        """Operations that a step asks of the model, all of whose weights learn, and of a teacher that answers live."""
        total = training_flops(student, samples)
        if isinstance(self.module, StudentAndTeacher) and self.module.asks and self.module.teacher is not None:
            total += forward_flops(self.module.teacher.architecture, samples)
        return total

    def go_on(self, taught: bool, again: bool) -> None:
        """Learn from the teacher from here on, or without it; it is kept where it will be asked `again`."""
        if not isinstance(self.module, StudentAndTeacher) or not isinstance(self.objective, Distillation):
            return
        self.module.asks = self.objective.taught = taught
        if not taught and not again:
            self.module.let_go()


def open_teaching(distil: Distil, tokenizer: Tokenizer) -> Teaching | None:
    """The teacher, once it is sure that it can read what the student reads; None where there is none.

    Raises InputError for a reward model, and for another tokenizer: what the two say of a token could not be compared.
    """
    if distil.teacher is None:
        return None
    files, said = open_model_as(distil.teacher, "distil.teacher: "), f"distil.teacher: {distil.teacher}"
    if files.is_reward_model or files.weights is None:
        what = "a reward model" if files.is_reward_model else "a config.json without weights"
        raise InputError(f"{said}: is {what}: give a language model")
    if Tokenizer.load(files.tokenizer_dir).text_fingerprint != tokenizer.text_fingerprint:
        raise InputError(f"{said}: has another tokenizer than the model that is trained: give one of the same family")
    known = min(tokenizer.size, files.architecture.vocab_size)
    if distil.method == "top_k" and Distil.top_k != distil.top_k > known:  # the default is nobody's wish
        raise InputError(f"distil.top_k: {distil.top_k}: the teacher knows {known} tokens: give at most that")
    return Teaching(distil, files, tokenizer.size)


def lesson(
    student: Decoder,
    train: KnownSamples,
    val: KnownSamples | None,
    recipe: TrainingRecipe,
    teaching: Teaching | None,
    fabric: Fabric,
    known: dict[str, str],
    z_loss: float = 0.0,
) -> Lesson:
    """Module, objective and samples of a student that is ready to be trained; a teacher whose answers are kept is asked
    now, unless the checkpoint to go on from is of a run that is not `known` by the same.

    Several processes must call it together.
    """
    student.with_log_z = z_loss > 0
    if teaching is None:
        return Lesson(student, CausalLM(z_loss), train, val)
    distil = teaching.distil
    objective = Distillation(teaching.alpha, distil.temperature, z_loss)
    shape: dict[str, Any] = {"temperature": distil.temperature, "hard": distil.method == "top_1"}
    if not distil.cache:
        check_divides(teaching.files.architecture, recipe.fabric.tensor_parallel, "the teacher")
        return Lesson(StudentAndTeacher(student, teaching.load(recipe), **shape), objective, train, val)
    refuse_other_run(RunDir(recipe.out_dir), recipe.checkpoint.resume, known)
    remember = remembering(teaching, recipe, fabric)
    return Lesson(StudentAndTeacher(student, **shape), objective, remember(train), val and remember(val))


def remembering(teaching: Teaching, recipe: TrainingRecipe, fabric: Fabric) -> Callable[[KnownSamples], WithExtras]:
    """What gives samples the teacher's answers, from disk where it was asked before.

    Each of several processes must call it: they share the work.
    """
    teacher = teaching.load(recipe).to(fabric.device)
    known_by = [teaching.weights, teaching.distil.quantize, teaching.distil.temperature, teaching.k, teaching.tokens]
    known_by += [recipe.fabric.precision, fabric.device.type, key_of(asdict(teacher.architecture))]
    witness = Witness(
        "teacher", lambda row: answers(teacher, row.to(fabric.device)), known_by, recipe.train.micro_batch_tokens
    )

    def remember(samples: KnownSamples) -> WithExtras:
        with fabric.autocast():
            return remembered(samples, witness, cache_folder(recipe.data), fabric.global_rank, fabric.world_size)

    return remember


def answers(teacher: Teacher, row: Row) -> dict[str, Tensor]:
    """What it says of a row, as extras; ids in the fewest bytes that hold them."""
    said = teacher(row)
    ids = torch.uint16 if teacher.architecture.vocab_size <= 2**16 else torch.int32
    return {TEACHER_IDS: said.ids.to(ids), TEACHER_LOGPS: said.logps.float()}


def teacher_dtype(recipe: TrainingRecipe) -> torch.dtype:
    """What a teacher's weights are loaded in."""
    return torch.float32 if recipe.fabric.precision == "32-true" else torch.bfloat16

"""A student beside the frozen teacher that it learns from.

Shapes: P predictions of a row, k tokens that are kept of each place.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from litrecipe.model.architecture import Architecture
from litrecipe.model.decoder import Decoder
from litrecipe.model.head import Predictions, SoftTargets
from litrecipe.model.row import Row
from litrecipe.model.soft_targets import Likeliest, WholeVocabulary, likeliest

TEACHER_IDS, TEACHER_LOGPS = "teacher_ids", "teacher_logps"
"""Names of the extras that hold what a teacher said of a sample: k ids and k log-probabilities a prediction."""


class Teacher(Decoder):
    """A decoder that says of a row's places what it expects there, without gradient."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        self.k: int | None = None
        """How many of its likeliest tokens it names; None: it tells all of its distribution."""
        self.temperature = 1.0
        self.tokens = architecture.vocab_size
        """How many tokens there are; what its table holds behind them is padding, which a student may lack."""

    @torch.no_grad()
    def forward(self, row: Row) -> WholeVocabulary | Likeliest:  # type: ignore[override]
        """Of each place that predicts."""
        own = None if self.own_tokens is None else self.own_tokens.first(self.tokens)
        start = 0 if own is None else own.start
        hidden, weight = self.hidden(row, row.predict_from), self.lm_head.weight[: self.tokens - start]
        cap = self.architecture.final_softcap
        if self.k is not None:
            return likeliest(hidden, weight, self.k, self.temperature, cap, own)
        from torch.distributed.fsdp import FSDPModule  # there is nothing to import where it is not used

        if isinstance(self, FSDPModule):  # what was gathered is gone when this is left
            weight = weight.clone()
        return WholeVocabulary.read(hidden, weight, cap, self.temperature, start)


class StudentAndTeacher(nn.Module):
    """The student's predictions, with how far they are from what the teacher says of the same places.

    Without a `teacher` the rows' extras say what it said.
    """

    def __init__(
        self, student: Decoder, teacher: Teacher | None = None, *, temperature: float = 1.0, hard: bool = False
    ) -> None:
        """`hard`: the first token that the teacher names is taken for certain."""
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.temperature, self.hard = temperature, hard
        self.asks = True
        """Whether the teacher is asked; else the predictions are the student's own, and hold nothing of it."""
        self.train()

    def forward(self, row: Row) -> Predictions:
        """Of the row's targets."""
        if not self.asks:
            return self.student(row)
        said: SoftTargets = kept_in(row, self.temperature) if self.teacher is None else self.teacher(row)
        if self.hard:
            assert isinstance(said, Likeliest)
            said = Likeliest(said.ids[:, :1], torch.zeros_like(said.logps[:, :1]))
        return self.student(row, soft=said)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, the teacher is not asked."""
        asked, self.asks = self.asks, False
        try:
            yield
        finally:
            self.asks = asked

    def let_go(self) -> None:
        """Free the memory of the teacher, which will not be asked again. One that is sharded stays where it is: FSDP2
        holds its pieces."""
        from torch.distributed.fsdp import FSDPModule

        if self.teacher is None or isinstance(self.teacher, FSDPModule):
            return
        for parameter in self.teacher.parameters():  # others hold them, too
            parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        self.teacher = None

    def train(self, mode: bool = True) -> StudentAndTeacher:
        """The teacher never has dropout."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self


def kept_in(row: Row, temperature: float = 1.0) -> Likeliest:
    """What a teacher said of a row at a temperature. Raises ValueError where the row does not know."""
    places = len(row.target)
    if not places:  # an empty row has no extras
        return Likeliest(row.target[:, None], row.weight[:, None], temperature)
    if TEACHER_IDS not in row.extra:
        raise ValueError("there is no teacher: neither the module nor the row holds one")
    ids, logps = (row.extra[name].view(places, -1) for name in (TEACHER_IDS, TEACHER_LOGPS))
    return Likeliest(ids, logps, temperature)

"""The built-in task `preference:FILE`: how well a model tells better answers from worse ones.

Shapes: A answers of a row.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.config.progress import counted, say
from litrecipe.data.comparisons import COMPARISONS, ComparisonCounts
from litrecipe.data.preferences import holds_preferences, read_preferences
from litrecipe.data.readers import check_sources
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.evaluation.comparing import Pair, compare, summary
from litrecipe.evaluation.pictures import draw_comparison
from litrecipe.evaluation.tasks import SPLIT, Outcome, Settings
from litrecipe.model.adapters import has_adapter
from litrecipe.model.decoder import Decoder
from litrecipe.model.reference import PolicyAndReference
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Row, Sample
from litrecipe.objectives.answers import LABEL, sum_by_segment


@dataclass(frozen=True)
class Preference:
    """`preference:FILE`: rewards of better and worse answers.

    FILE is anything that `litrecipe align` trains on: pairs or ranked lists. A reward model gives its score at an
    answer's last token; a policy its implicit reward β (log π(y | x) - log π_ref(y | x)) (2305.18290), where π_ref is
    `reference`, or the base under an adapter.

    Metrics: see `comparing.summary`. Standard errors take all pairs of a prompt for one observation.
    """

    spec: str
    source: str

    higher_is_better: ClassVar[dict[str, bool]] = {
        "accuracy": True,
        "length_accuracy": True,
        "shorter_accuracy": True,
        "margin": True,
        "log_loss": False,
        "calibration_error": False,
    }

    @classmethod
    def parse(cls, spec: str) -> Preference:
        """Read the part after the name; raises InputError when there is no such data."""
        source = spec.partition(":")[2]
        try:
            check_sources({f"tasks: {spec}": source}, SPLIT)
        except InputError as error:
            raise InputError(*error.mistakes) from None
        if not holds_preferences(source, Data(), SPLIT):
            raise InputError(f"tasks: {spec}: its first row compares no answers: give chosen and rejected, or a list")
        return cls(spec, source)

    def config(self) -> dict[str, Any]:
        return {"task": self.spec, "output_type": "multiple_choice"}

    def run(self, model: Decoder | RewardModel, tokenizer: Tokenizer, settings: Settings) -> Outcome:
        samples = self._samples(tokenizer, model.architecture.max_positions)
        used = samples[: settings.limit]
        pairs = compare(
            self._reward(model, settings),
            used,
            budget=settings.batch_tokens,
            device=model.device,
            progress="preference: row" if settings.chatty else None,
        )
        found = summary(pairs)
        if settings.pictures is not None:
            name = re.sub(r"[^\w.-]+", "_", self.spec)
            picture = settings.pictures.with_name(f"{settings.pictures.stem}.{name}.png")
            draw_comparison(pairs, picture, f"{self.spec}: {counted(len(pairs), 'pair')}")
            say(f"wrote {picture}")
        return Outcome(
            metrics={name: value for name, (value, _) in found.items()},
            stderrs={name: error for name, (_, error) in found.items()},
            available=len(samples),
            samples=[_record(place, pair, model) for place, pair in enumerate(pairs)],
        )

    def _samples(self, tokenizer: Tokenizer, max_positions: int) -> list[Sample]:
        """Whole answers, cut where the model cannot read on; says what became of the rows."""
        data, counts = Data(max_length=max_positions), ComparisonCounts(self.source)
        samples = list(COMPARISONS.make(read_preferences(self.source, data, split=SPLIT), data, tokenizer, counts))
        say(str(counts))
        if not samples:
            raise InputError(f"tasks: {self.spec}: nothing to compare ({counts}): look with `litrecipe data preview`")
        if LABEL in samples[0].extra:
            raise InputError(f"tasks: {self.spec}: single answers with a label: give pairs or ranked lists")
        return samples

    def _reward(self, model: Decoder | RewardModel, settings: Settings) -> Callable[[Row], Tensor]:
        if isinstance(model, RewardModel):
            return model
        if settings.reference is None and not has_adapter(model):
            raise InputError(
                f"tasks: {self.spec}: the implicit reward of a policy needs what it was before: give `reference`, e.g. "
                "--reference M"
            )
        beside = PolicyAndReference(model, settings.reference)

        def implicit(row: Row) -> Tensor:
            predictions = beside(row)
            assert predictions.ref_logps is not None
            return settings.beta * sum_by_segment(predictions.logps - predictions.ref_logps, row)[row.answers]

        return torch.no_grad()(implicit)


def _record(place: int, pair: Pair, model: Decoder | RewardModel) -> dict[str, Any]:
    rewards = torch.tensor([pair.chosen, pair.rejected])
    normalised = {"normalised": model.normalised(rewards).tolist()} if isinstance(model, RewardModel) else {}
    return {
        "doc_id": place,
        "doc": {"where": pair.where, "prompt": pair.prompt},
        "resps": [[pair.chosen], [pair.rejected]],
        "filtered_resps": [pair.chosen, pair.rejected],
        "tokens": [pair.chosen_tokens, pair.rejected_tokens],
        "accuracy": pair.right,
        "margin": pair.margin,
        "weight": pair.weight,
        **normalised,
    }

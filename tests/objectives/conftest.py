"""Tiny weights with the numbers that another implementation made of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.row import make_row
from litrecipe.objectives.answers import pairs_of, sum_by_segment, tokens_by_segment
from litrecipe.objectives.dpo import REF_LOGPS

sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import made.py
from made import ranked


@pytest.fixture(scope="module")
def reference(shared):
    """Numbers that TRL 0.11.4 and 1.16.0 made from tiny weights, and what our decoder makes of the same weights."""
    folder = shared / "checks" / "trl_reference"
    numbers = json.loads((folder / "reference.json").read_text())
    modern = json.loads((folder / "modern.json").read_text())
    numbers["dpo"] |= {f"{name} 1.16": v for name, v in modern["dpo"].items()}
    return Reference(folder, numbers, modern)


class Reference:
    """Policy and reference on the four pairs, in float64, prompts computed once."""

    def __init__(self, folder, numbers, modern):
        self.numbers, self.modern = numbers, modern
        self.architecture = read_architecture(json.loads((folder / "config.json").read_text()))
        self.policy, self.frozen = (self.load(folder / f"{name}.safetensors") for name in ("policy", "ref"))
        self.plain_samples = [
            ranked(str(n), [pair["chosen"], pair["rejected"]], pair["prompt"])
            for n, pair in enumerate(numbers["inputs"]["pairs"])
        ]
        self.policy.with_collisions = True
        self.row = make_row(self.plain_samples)
        with torch.no_grad():
            self.ref = self.answers(self.frozen)
            known = [self.frozen(make_row([sample])).logps.numpy() for sample in self.plain_samples]
        self.samples = [
            replace(s, extra={REF_LOGPS: logps}) for s, logps in zip(self.plain_samples, known, strict=True)
        ]
        """The pairs with what the reference makes of them."""

    def load(self, path):
        model = Decoder(self.architecture).double()
        model.load_state_dict(load_file(path))
        return model

    def answers(self, model):
        """Sums of log-probabilities of the chosen and the rejected answers (4,), and their tokens."""
        pairs = pairs_of(self.row)
        sums = sum_by_segment(model(self.row).logps, self.row)[pairs]
        tokens = tokens_by_segment(self.row)[pairs]
        return sums[:, 0], sums[:, 1], tokens[:, 0], tokens[:, 1]

    def gradient_norm(self, loss):
        self.policy.zero_grad()
        loss.backward()
        return float(torch.nn.utils.get_total_norm([p.grad for p in self.policy.parameters()]))

"""litrecipe with its passes through transformers counted and its steps timed, for `hydra.py`.

    python passes.py OUT.json align ppo --config …

Writes {"backbones": how many transformers lie in memory, "tokens": {what for: how many of them were read}, "cpu": [the
process's CPU seconds after each step]}. Two adapters on one base are one transformer. Passes that sample, that look
(scores, log-probabilities and values of a rollout), and that learn, each with a backward pass, are told apart.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from litrecipe.cli import main
from litrecipe.engine.telling import Teller
from litrecipe.model.attention import Forest
from litrecipe.model.decoder import Trunk


def count(out: Path, argv: list[str]) -> int:
    """Run `litrecipe` with `argv`, and write what was counted."""
    tokens_read: dict[str, int] = defaultdict(int)
    backbones: set[int] = set()
    cpu: list[float] = []
    read, tell = Trunk._hidden, Teller.tell

    def counted(self: Trunk, tokens: torch.Tensor, positions: torch.Tensor, attention: Any, *rest: Any) -> torch.Tensor:
        sampling = not isinstance(attention[0], Forest)
        tokens_read["sample" if sampling else "learn" if torch.is_grad_enabled() else "look"] += len(tokens)
        backbones.add(backbone(self))
        return read(self, tokens, positions, attention, *rest)

    def timed(self: Teller, *told: Any) -> None:
        cpu.append(time.process_time())
        tell(self, *told)

    with patch.object(Trunk, "_hidden", counted), patch.object(Teller, "tell", timed):
        code = main(argv)
    out.write_text(json.dumps({"backbones": len(backbones), "tokens": tokens_read, "cpu": cpu}))
    return code


def backbone(model: Trunk) -> int:
    """Of the weights of a transformer, the adapters on it left out."""
    projection = model.model.layers[0].self_attn.q_proj
    return id(getattr(projection, "base_layer", projection).weight)


if __name__ == "__main__":
    sys.exit(count(Path(sys.argv[1]), sys.argv[2:]))

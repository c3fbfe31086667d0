"""litrecipe with its passes through transformers counted, for `hydra.py`.

    python passes.py OUT.json align ppo --config …

Writes {"backbones": how many transformers lie in memory, "passes": {what for: {"tokens": how many were read, "by": how
many of the transformers took part}}}. Two adapters on one base are one transformer. Passes that sample, that look
(scores, log-probabilities and values of a rollout), and that learn, each with a backward pass, are told apart.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from litrecipe.cli import main
from litrecipe.model.attention import Forest
from litrecipe.model.decoder import Trunk


def count(out: Path, argv: list[str]) -> int:
    """Run `litrecipe` with `argv`, and write what was counted."""
    tokens_read: dict[str, int] = defaultdict(int)
    ran: dict[str, set[int]] = defaultdict(set)
    whole = Trunk._hidden

    def counted(self: Trunk, tokens: torch.Tensor, positions: torch.Tensor, attention: Any, *rest: Any) -> torch.Tensor:
        sampling = not isinstance(attention[0], Forest)
        kind = "sample" if sampling else "learn" if torch.is_grad_enabled() else "look"
        tokens_read[kind] += len(tokens)
        ran[kind].add(backbone(self))
        return whole(self, tokens, positions, attention, *rest)

    Trunk._hidden = counted  # type: ignore[method-assign]
    try:
        code = main(argv)
    finally:
        Trunk._hidden = whole  # type: ignore[method-assign]
    passes = {kind: {"tokens": read, "by": len(ran[kind])} for kind, read in tokens_read.items()}
    out.write_text(json.dumps({"backbones": len(set().union(*ran.values())), "passes": passes}))
    return code


def backbone(model: Trunk) -> int:
    """Where the weights of a transformer lie, the adapters on it left out."""
    projection = model.model.layers[0].self_attn.q_proj
    return int(getattr(projection, "base_layer", projection).weight.data_ptr())


if __name__ == "__main__":
    sys.exit(count(Path(sys.argv[1]), sys.argv[2:]))

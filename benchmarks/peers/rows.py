"""Writes the tokenised samples of a recipe as JSON lines in the order in which it trains on them.

    python rows.py RECIPE.yaml OUT.jsonl

One object a sample: `input_ids`, and `labels` with -100 where nothing is learnt. So a peer that cannot mask as we do
still learns the same tokens in the same order.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from litrecipe.checkpoint.source import open_model
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.config.schema import load
from litrecipe.data.source import RecordedSource
from litrecipe.data.supervised import load_supervised
from litrecipe.data.tokenizer import Tokenizer


def main(recipe_file: Path, out: Path) -> None:
    recipe = load(FinetuneRecipe, [recipe_file])
    files = open_model(recipe.model.source, tokenizer=recipe.model.tokenizer)
    tokenizer = Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template)
    data = load_supervised(recipe.data, tokenizer, seed=recipe.train.seed)
    source = RecordedSource(data.train, recipe.train)
    with out.open("w") as file:
        while samples := source.next_step():
            for sample in samples:
                (segment,) = sample.segments
                tokens = segment.tokens.tolist()
                labels = [t if w else -100 for t, w in zip(tokens, segment.weights.tolist(), strict=True)]
                file.write(json.dumps({"input_ids": tokens, "labels": labels}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

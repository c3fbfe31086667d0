"""Writes the tokenised samples of a recipe as JSON lines in the order in which it trains on them.

    python rows.py finetune RECIPE.yaml OUT.jsonl
    python rows.py pretrain RECIPE.yaml OUT.jsonl
    python rows.py "align dpo" RECIPE.yaml OUT.jsonl ADAPTER.safetensors

One object a sample: `input_ids`, and `labels` with -100 where nothing is learnt; of a pair `prompt_ids`, `chosen_ids`
and `rejected_ids`. So a peer that cannot mask as we do still learns the same tokens in the same order. With a fourth
name also the adapter that the recipe starts from, under peft's names.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.recipes import RECIPES
from litrecipe.config.schema import load
from litrecipe.data.comparisons import load_comparisons
from litrecipe.data.pretraining import open_stream
from litrecipe.data.source import RecordedSource, StepSource
from litrecipe.data.supervised import load_supervised
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.row import Sample


def main(verb: str, recipe_file: str, out: str, adapter: str | None = None) -> None:
    recipe = load(RECIPES[verb], [recipe_file])
    files = open_model(recipe.model.source, tokenizer=recipe.model.tokenizer)
    tokenizer = Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template)
    row = pair if verb == "align dpo" else labelled
    source: StepSource
    if verb == "pretrain":
        source = open_stream(recipe, tokenizer).source
    else:
        load_data = load_supervised if verb == "finetune" else load_comparisons
        source = RecordedSource(load_data(recipe.data, tokenizer, seed=recipe.train.seed).train, recipe.train)
    with Path(out).open("w") as file:
        while samples := source.next_step():
            file.writelines(json.dumps(row(sample)) + "\n" for sample in samples)
    if adapter:
        from safetensors.torch import save_file

        from litrecipe.model.adapters import adapter_state

        save_file(adapter_state(load_model(files, adapter=recipe.adapter, seed=recipe.train.seed)), adapter)


def labelled(sample: Sample) -> dict[str, list[int]]:
    (segment,) = sample.segments
    tokens = segment.tokens.tolist()
    labels = [t if w else -100 for t, w in zip(tokens, segment.weights.tolist(), strict=True)]
    return {"input_ids": tokens, "labels": labels}


def pair(sample: Sample) -> dict[str, list[int]]:
    prompt, chosen, rejected = sample.segments
    assert chosen.weights.all() and rejected.weights.all()  # the peer learns all tokens of an answer
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {name: segment.tokens.tolist() for name, segment in zip(names, (prompt, chosen, rejected), strict=True)}


if __name__ == "__main__":
    main(*sys.argv[1:])

"""`litrecipe data check` and `litrecipe data preview`: look at training data the way a training run will see it."""

from __future__ import annotations

from itertools import islice

from litrecipe.checkpoint.source import open_model
from litrecipe.config import progress
from litrecipe.config.errors import InputError
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.data.formats import check_rows, read_conversations
from litrecipe.data.readers import Mistakes, check_source
from litrecipe.data.report import check_tables, render_sample
from litrecipe.data.supervised import SupervisedCounts, encode_all, make_sample
from litrecipe.data.tokenizer import Tokenizer


def check(recipe: FinetuneRecipe) -> int:
    """Print duplicates, leakage, template trouble, lengths and what is cut or dropped. 0 unless rows cannot be read."""
    if not check_rows(recipe.data):
        raise _no_rows(recipe)
    console = progress.console()
    for table in check_tables(recipe.data, _tokenizer(recipe), recipe.train.seed):
        console.print(table)
    return 0


def preview(recipe: FinetuneRecipe, n: int) -> int:
    """Print the first `n` rows as they will be learnt: learnt tokens are green and between ⟦ ⟧."""
    check_source("data.train", recipe.data.train)
    console = progress.console()
    tokenizer = _tokenizer(recipe)
    counts = SupervisedCounts(recipe.data.train)
    mistakes = Mistakes()
    conversations = islice(read_conversations(recipe.data.train, recipe.data, mistakes), n)
    for conversation, encoded in encode_all(conversations, recipe.data, tokenizer, counts):
        if sample := make_sample(conversation.where, encoded, recipe.data, counts):
            console.print(render_sample(sample, tokenizer), soft_wrap=True)
    mistakes.raise_if_any()
    if not counts.rows:
        raise _no_rows(recipe)
    console.print(f"shown: {counts}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _no_rows(recipe: FinetuneRecipe) -> InputError:
    return InputError(f"data.train: {recipe.data.train}: has no rows: give data to learn from")


def _tokenizer(recipe: FinetuneRecipe) -> Tokenizer:
    files = open_model(recipe.model.source, tokenizer=recipe.model.tokenizer)
    return Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template, date=recipe.data.date)

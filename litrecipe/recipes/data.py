"""`litrecipe data`: look at training data the way a training run will see it, learn a tokenizer from texts, and turn
texts into token shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from litrecipe.checkpoint.manifest import new_folder, refuse_foreign
from litrecipe.checkpoint.source import open_asked, open_model
from litrecipe.config import progress
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data, DataRecipe
from litrecipe.config.merge import path_of
from litrecipe.config.prepare import PrepareRecipe
from litrecipe.config.progress import counted, say
from litrecipe.data.comparison_report import check_comparisons
from litrecipe.data.comparisons import COMPARISONS
from litrecipe.data.formats import check_rows, read_conversations
from litrecipe.data.new_tokenizer import CHAT, learn_tokenizer, write_tokenizer
from litrecipe.data.preferences import holds_preferences
from litrecipe.data.prepare import prepare as prepare_shards
from litrecipe.data.prepared import Kind
from litrecipe.data.readers import Mistakes, check_source, check_sources
from litrecipe.data.report import check_conversations, render
from litrecipe.data.supervised import SUPERVISED
from litrecipe.data.tokenizer import Tokenizer


def check(recipe: DataRecipe) -> int:
    """Print duplicates, leakage, template trouble, lengths and what is cut or dropped. 0 unless rows cannot be read."""
    check_source("data.train", recipe.data.train)
    kind = kind_of_rows(recipe.data)
    if not check_rows(recipe.data, kind.read):
        raise _no_rows(recipe)
    tables = check_comparisons if kind is COMPARISONS else check_conversations
    console = progress.console()
    for table in tables(recipe.data, _tokenizer(recipe), recipe.train.seed):
        console.print(table)
    return 0


def preview(recipe: DataRecipe, n: int) -> int:
    """Print the first `n` rows as they will be learnt: learnt tokens are green and between ⟦ ⟧."""
    check_source("data.train", recipe.data.train)
    console = progress.console()
    kind = kind_of_rows(recipe.data)
    counts = kind.counts(recipe.data.train)
    mistakes = Mistakes()
    rows = islice(kind.read(recipe.data.train, recipe.data, mistakes), n)
    tokenizer = _tokenizer(recipe)
    for sample in kind.make(rows, recipe.data, tokenizer, counts):
        console.print(render(sample, tokenizer), soft_wrap=len(sample.segments) == 1)
    mistakes.raise_if_any()
    if not counts.rows:
        raise _no_rows(recipe)
    console.print(f"shown: {counts}", highlight=False, markup=False, soft_wrap=True)
    return 0


def prepare(recipe: PrepareRecipe) -> int:
    """Write token shards of texts, or go on where this was interrupted."""
    prepare_shards(recipe, _tokenizer_of(recipe.tokenizer))
    return 0


def _tokenizer_of(source: str) -> Tokenizer:
    """That of a folder with nothing but a tokenizer, or of a model."""
    folder = path_of(source)
    if (folder / "tokenizer.json").is_file():
        return Tokenizer.load(folder)
    try:
        return Tokenizer.load(open_model(source).tokenizer_dir)
    except InputError as error:
        raise InputError(*(mistake.replace("model.source:", "tokenizer:", 1) for mistake in error.mistakes)) from error


def train_tokenizer(
    texts: Sequence[str],
    out: str,
    vocab_size: int,
    special: Sequence[str],
    split_digits: bool = False,
    chat: bool = False,
    min_frequency: int = 0,
    column: str = "text",
) -> int:
    """Write a folder with a byte-level BPE of all that is said in `texts`, each of them anything `data.train` takes."""
    check_sources({"texts": list(texts)})
    refuse_foreign(Path(out))
    columns = {} if column == "text" else {"text": column}
    count = size = 0

    def contents() -> Iterator[str]:
        nonlocal count, size
        for text in texts:
            rows = read_conversations(text, Data(train=text, columns=columns))
            for conversation in progress.track(rows, f"reading {text}"):
                for content in (message.get("content") for message in conversation.messages):
                    if content:  # a turn may only call tools
                        count += 1
                        size += len(content)
                        yield content
        if count:
            say(
                f"read {counted(count, 'text', ',')} of {size / 1e6:,.1f} million characters; learning "
                f"{counted(vocab_size, 'token', ',')}"
            )

    tokens = [*(CHAT if chat else ()), *special]
    backend = learn_tokenizer(contents(), vocab_size, tokens, split_digits=split_digits, min_frequency=min_frequency)
    if not count:
        raise InputError(f"texts: {', '.join(texts)}: has no rows: give texts to learn from")
    replaces = "replaced" if Path(out).exists() else "wrote"
    with new_folder(Path(out)) as draft:
        write_tokenizer(draft, backend, chat=chat)
    found = backend.get_vocab_size()
    fewer = f" of the {vocab_size} asked for: the texts hold no more pairs" if found < vocab_size else ""
    said = f"{counted(found, 'token')}{fewer}, from {counted(count, 'text')}"
    say(f"{replaces} {out}: {said}: name it as model.tokenizer, its size as vocab_size")
    return 0


def kind_of_rows(data: Data) -> Kind[Any]:
    """Whether the first row of `data.train` compares or rates answers, or is a conversation to learn."""
    return COMPARISONS if holds_preferences(data.train, data) else SUPERVISED


def _no_rows(recipe: DataRecipe) -> InputError:
    return InputError(f"data.train: {recipe.data.train}: has no rows: give data to learn from")


def _tokenizer(recipe: DataRecipe) -> Tokenizer:
    files = open_asked(recipe.model)
    return Tokenizer.load(files.tokenizer_dir, recipe.model.chat_template, date=recipe.data.date)

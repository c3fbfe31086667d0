from __future__ import annotations

import pytest

from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.prepare import PrepareRecipe, parse_size

NEEDED = [("sources", "a.jsonl"), ("tokenizer", "t"), ("out", "o")]


@pytest.mark.parametrize(
    ("text", "size"),
    [("64MB", 64_000_000), ("1GiB", 2**30), ("500000", 500_000), ("1.5 kb", 1500), ("2GiB", 2**31), ("7B", 7)],
)
def test_sizes_are_read_with_their_unit(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "0", "-1MB", "3GiB", "64 bytes", "nan", "inf"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_size(text)


def test_the_defaults_lack_what_nobody_can_guess() -> None:
    with pytest.raises(InputError) as error:
        schema.load(PrepareRecipe)
    assert [mistake.split(":")[0] for mistake in error.value.mistakes] == ["sources", "tokenizer", "out"]
    assert schema.load(PrepareRecipe, flags=NEEDED).sources == ["a.jsonl"]


@pytest.mark.parametrize(
    ("key", "wrong", "cure"),
    [
        ("min_tokens", "0", "give 1 or more"),
        ("max_tokens", "0", "give 1 or more"),
        ("workers", "0", "give 1 or more, or null"),
        ("shard_size", "9TB", "give a size such as 64MB"),
        ("columns", "{body: text}", "a document has one column"),
        ("dedup.threshold", "1.5", "give a number above 0, and at most 1"),
        ("dedup.ngram", "0", "give 1 or more"),
        ("decontaminate.ngram", "7", "give 8 or more"),
        ("on_error", "ignore", "give one of error, skip"),
        ("txt", "page", "give one of file, line"),
    ],
)
def test_a_wrong_value_is_told_with_its_cure(key: str, wrong: str, cure: str) -> None:
    with pytest.raises(InputError) as error:
        schema.load(PrepareRecipe, flags=[*NEEDED, (key, wrong)])
    [mistake] = error.value.mistakes
    assert mistake.startswith(f"{key}: ") and cure in mistake


def test_keys_that_do_not_go_together_are_told() -> None:
    flags = [("min_tokens", "9"), ("max_tokens", "8"), ("dedup.near", "true"), ("dedup.bands", "7")]
    with pytest.raises(InputError) as error:
        schema.load(PrepareRecipe, flags=[*NEEDED, *flags])
    assert error.value.mistakes == [
        "max_tokens: 8: is below min_tokens 9: raise it",
        "dedup.bands: 7: must divide dedup.permutations 128: give 16 for 128",
    ]
    schema.load(PrepareRecipe, flags=[*NEEDED, ("dedup.bands", "7")])  # nobody hears it

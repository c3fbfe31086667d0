from __future__ import annotations

import numpy as np
import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.prepare import Dedup
from litrecipe.data import duplicates
from litrecipe.data.duplicates import Duplicates, Marks, marks_from_json, marks_to_json

WORDS = [f"word{number}" for number in range(5000)]


def alike(seed: int, share: float, count: int = 400) -> tuple[str, str, float]:
    """Two texts, the second with a part of its words replaced, and the Jaccard similarity of their 5-grams."""
    random = np.random.default_rng(seed)
    first = random.choice(WORDS, count).tolist()
    second = list(first)
    changed = int(count * (1 - share))
    second[:changed] = random.choice(WORDS, changed).tolist()
    grams = [{tuple(words[place : place + 5]) for place in range(count - 4)} for words in (first, second)]
    return " ".join(first), " ".join(second), len(grams[0] & grams[1]) / len(grams[0] | grams[1])


def test_exact_duplicates_differ_in_case_and_white_space_only() -> None:
    dedup = Dedup(exact=True)
    found = Duplicates(dedup)
    first, same, other = Marks(dedup)(["The  End.\n", " the end. ", "the end!"])
    assert found.original(first) is None
    found.keep(7, first)
    assert found.original(same) == ("exact_duplicate", 7)
    assert found.original(other) is None


def test_near_duplicates_are_those_of_a_similarity_above_the_threshold() -> None:
    """MinHash estimates: 128 numbers have a standard error of 0.04 at most, and the pairs keep 0.1 away from 0.8. The
    chance that 16 bands of 8 miss a pair of 0.9 is 1e-4."""
    dedup = Dedup(near=True)
    marks = Marks(dedup)
    counted = {True: 0, False: 0}
    for seed in range(60):
        first, second, similarity = alike(seed, 0.98 if seed % 2 else 0.75)
        if 0.7 < similarity < 0.9:
            continue
        found = Duplicates(dedup)
        a, b = marks([first, second])
        found.keep(3, a)
        is_duplicate = similarity >= 0.9
        assert found.original(b) == (("near_duplicate", 3) if is_duplicate else None), (seed, similarity)
        counted[is_duplicate] += 1
    assert min(counted.values()) >= 20


def test_the_first_of_several_originals_is_named_after_a_restart_too() -> None:
    dedup = Dedup(exact=True, near=True)
    first, second, similarity = alike(1, 0.99)
    assert similarity > 0.9
    a, b = Marks(dedup)([first, second])
    for kept in ([a, b], marks_from_json(marks_to_json([a, b]))):
        found = Duplicates(dedup)
        for number, mark in enumerate(kept):
            found.keep(number + 10, mark)
        assert found.original(b) == ("exact_duplicate", 11)
        assert found.original(Marks(dedup)([f"{second} end"])[0]) == ("near_duplicate", 10)


def test_short_texts_are_compared_whole() -> None:
    dedup = Dedup(near=True)
    found = Duplicates(dedup)
    hi, same, other = Marks(dedup)(["Hi, there", "hi there!", "hi you"])
    found.keep(0, hi)
    assert found.original(same) == ("near_duplicate", 0) and found.original(other) is None


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"dedup\.near: true: rensa is not installed: `pip install"):
        Marks(Dedup(near=True))

"""Prompts and completions made by hand, on the tiny model's tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litrecipe.config.groups import Data
from litrecipe.data.openings import parse_prompt
from litrecipe.data.prompts import Prompt, encode_prompt
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.rollout.sources import Completions

MakePrompt = Callable[..., Prompt]
Complete = Callable[..., Completions]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests never touch the user's cache."""
    monkeypatch.setenv("LITRECIPE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.load(tiny_model)


@pytest.fixture(scope="session")
def ask(tokenizer: Tokenizer) -> MakePrompt:
    """A prompt of a row's columns."""

    def ask(where: str = "f:1", **row: Any) -> Prompt:
        one = parse_prompt(row, where, Data())
        tokens = np.array(encode_prompt(one, tokenizer), dtype=np.int32)
        return Prompt(one.where, one.messages, one.text, one.row, one.tools, tokens)

    return ask


@pytest.fixture(scope="session")
def complete(tokenizer: Tokenizer) -> Complete:
    """Texts as completions of prompts, in tokens; those that ended with `eos` have the end token."""

    def complete(prompts: Sequence[Prompt], texts: Sequence[str], ended: str | Sequence[str] = "eos") -> Completions:
        ends = [ended] * len(texts) if isinstance(ended, str) else list(ended)
        tokens = [
            tokenizer.encode(text) + [tokenizer.eos_ids[0]] * (end == "eos")
            for text, end in zip(texts, ends, strict=True)
        ]
        return Completions(list(prompts), list(texts), tokens, ends)

    return complete

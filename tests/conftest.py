"""What every test may use: the real model and the shared data, when they are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

REPO = Path(__file__).resolve().parent.parent
REAL_MODEL = REPO / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SHARED = Path(os.environ.get("LITRECIPE_SHARED", REPO.parent / "shared"))


@pytest.fixture(scope="session")
def real_model() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct (`make model` fetches it)."""
    if not REAL_MODEL.exists():
        pytest.skip("the real model is not here: run `make model`")
    return REAL_MODEL


@pytest.fixture(scope="session")
def shared() -> Path:
    """A folder of public data and reference numbers that the project can do without."""
    if not SHARED.exists():
        pytest.skip("no shared data beside the checkout")
    return SHARED

"""The tiny model that gives varied answers, opened by us and by lm-eval's own backend."""

from __future__ import annotations

from pathlib import Path

import pytest

from litrecipe.config import groups
from litrecipe.evaluation.session import Session, open_session


@pytest.fixture(scope="session")
def tiny(varied_model: Path) -> Session:
    """The tiny model, opened by us."""
    return open_session(groups.Model(source=str(varied_model)), groups.Quantize(), groups.Fabric(accelerator="cpu"))


@pytest.fixture(scope="session")
def tiny_hf(varied_model: Path):
    """The tiny model in lm-eval's own Hugging Face backend."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(varied_model), device="cpu", dtype="float32", batch_size=4)

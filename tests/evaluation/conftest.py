"""The tiny model with weights so large that its answers vary, opened by us and by lm-eval's own backend."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from litrecipe.config import groups
from litrecipe.evaluation.session import Session, open_session


@pytest.fixture(scope="session")
def tiny_folder(tiny_model: Path, tmp_path_factory) -> Path:
    """256 positions, and initial weights of 0.3: the likeliest tokens differ clearly, and from place to place."""
    from safetensors.torch import save_file

    from litrecipe.model.architecture import read_architecture
    from litrecipe.model.decoder import Decoder

    folder = tmp_path_factory.mktemp("evaluated") / "model"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"initializer_range": 0.3, "max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(config))
    model = Decoder(read_architecture(config))
    model.init_weights(seed=1)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def tiny(tiny_folder) -> Session:
    """The tiny model, opened by us."""
    return open_session(groups.Model(source=str(tiny_folder)), groups.Quantize(), groups.Fabric(accelerator="cpu"))


@pytest.fixture(scope="session")
def tiny_hf(tiny_folder):
    """The tiny model in lm-eval's own Hugging Face backend."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny_folder), device="cpu", dtype="float32", batch_size=4)

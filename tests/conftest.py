"""What every test may use: the real model and the shared data, when they are there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import what lies here

from cluster import Cluster, running, why_not
from tiny import TINY_CONFIG, write_random_model, write_tiny_tokenizer

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


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder of a random two-layer Llama with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_tokenizer(folder)
    write_random_model(folder, TINY_CONFIG, seed=0)
    return folder


@pytest.fixture(scope="session")
def varied_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 256 positions and weights so large that its likeliest tokens vary and differ clearly."""
    folder = tmp_path_factory.mktemp("varied") / "model"
    write_tiny_tokenizer(folder)
    write_random_model(folder, TINY_CONFIG | {"initializer_range": 0.3, "max_position_embeddings": 256}, seed=1)
    return folder


@pytest.fixture(scope="session")
def teacher_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A larger model than the tiny one with its tokenizer, a larger table and clear preferences."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    write_tiny_tokenizer(folder)
    larger = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": 328, "initializer_range": 0.2}
    write_random_model(folder, TINY_CONFIG | larger, seed=2)
    return folder


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A real Slurm of two nodes with two CPUs each, all of them this machine; one for all tests of a worker."""
    if reason := why_not():
        pytest.skip(reason)
    with running() as cluster:
        yield cluster


@pytest.fixture
def litrecipe():
    """Run the program as a user would; returns the finished process with its output as text."""
    import preloaded

    def run(*args: object, check: bool = True, timeout: float = 240, **keys):
        words = list(map(str, args))
        if keys.keys() <= {"cwd"}:
            ranks = preloaded.run(words, timeout, keys.get("cwd", Path.cwd()), preloaded.ranks_of(words))
            done = next((rank for rank in ranks if rank.returncode), ranks[0])
        else:
            command = [sys.executable, "-m", "litrecipe", *words]
            done = subprocess.run(command, text=True, capture_output=True, timeout=timeout, **keys)
        if check and done.returncode:
            raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run

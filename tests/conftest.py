"""What every test may use: the real model and the shared data, when they are there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))  # so that tests can import small.py

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


CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "torch_dtype": "float32",
}


def write_tiny_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 320 ids with ChatML's control tokens, in the files a Hugging Face folder has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog and asks what the answer is"] * 9, trainer
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": CHATML,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def write_random_model(folder: Path, config: dict, seed: int) -> None:
    """Config and weights of a random Llama."""
    from safetensors.torch import save_file

    from litrecipe.model.decoder import Decoder
    from litrecipe.model.families import read_architecture

    (folder / "config.json").write_text(json.dumps(config))
    model = Decoder(read_architecture(config))
    model.init_weights(seed=seed)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


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


@pytest.fixture
def litrecipe():
    """Run the program as a user would; returns the finished process with its output as text."""
    import preloaded

    def run(*args: object, check: bool = True, timeout: float = 240, **keys):
        words = list(map(str, args))
        if preloaded.can_fork(words) and keys.keys() <= {"cwd"}:
            done = preloaded.run(words, timeout, keys.get("cwd", Path.cwd()))
        else:
            command = [sys.executable, "-m", "litrecipe", *words]
            done = subprocess.run(command, text=True, capture_output=True, timeout=timeout, **keys)
        if check and done.returncode:
            raise AssertionError(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run

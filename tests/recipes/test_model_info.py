"""What `litrecipe model info` says of a model, of which it reads no weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from litrecipe.checkpoint.hf import save_model, save_reward_model
from litrecipe.checkpoint.safetensors_files import SafetensorsFile
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.reward import RewardModel
from litrecipe.recipes.model import info

LAYERS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_attention_heads": 32, "num_hidden_layers": 32}
MIXTRAL_8X7B: dict[str, Any] = LAYERS | {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}
MIXTRAL_8X22B = MIXTRAL_8X7B | {
    "vocab_size": 32768,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
}
QWEN3_30B_A3B: dict[str, Any] = LAYERS | {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}


def told(source: object, capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """First word or two of each line → its columns."""
    assert info(str(source)) == 0
    lines = capsys.readouterr().out.splitlines()
    return {columns[0]: columns[1:] for line in lines if (columns := [word for word in line.split("  ") if word])}


@pytest.mark.parametrize(
    ("config", "whole", "active"),
    [
        (MIXTRAL_8X7B, "46,702,792,704", "12,879,925,248"),  # 47B and 13B (2401.04088, section 3)
        (MIXTRAL_8X22B, "140,630,071,296", "39,161,468,928"),  # 141B and 39B
        (QWEN3_30B_A3B, "30,532,122,624", "3,353,032,704"),  # 30.5B and 3.3B
    ],
)
def test_published_models(config: dict[str, Any], whole: str, active: str, tmp_path: Path, capsys) -> None:
    """From a config.json alone, as their authors count; a line for each part."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = told(tmp_path / "config.json", capsys)
    columns = {name.strip(): [column.strip() for column in rest] for name, rest in said.items()}
    assert columns["all"][0] == whole and columns["active"][0] == active
    parts = ("norm", "router", "embedding", "head", "attention", "experts")
    assert sum(int(columns[part][0].replace(",", "")) for part in parts) == int(whole.replace(",", ""))
    size = int(whole.replace(",", "")) / 1e9
    assert [float(n) for n in columns["fp32"][:2]] == pytest.approx([4 * size, 16 * size], rel=1e-3)
    assert [float(n) for n in columns["bf16"][:2]] == pytest.approx([2 * size, 8 * size], rel=1e-3)
    assert float(columns["nf4"][0]) == pytest.approx(size / 2, rel=0.1)


def test_layers_with_a_window(tmp_path: Path, capsys) -> None:
    """Gemma 3's every sixth sees all: of twelve layers two. 12 layers x 2 x 1 head of 16 x 2 bytes."""
    config = LAYERS | {"model_type": "gemma3_text", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32}
    config |= {"num_hidden_layers": 12, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 99, "sliding_window": 512}))
    assert info(str(tmp_path / "config.json")) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "10 of 12 layers see the last 512 tokens" in said
    assert "768 bytes a token, also in layers with a window" in said


def test_shards_are_not_read(tmp_path: Path, tiny_model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model and a reward model, whose last line of weights is its score."""
    config = json.loads((tiny_model / "config.json").read_text()) | {"model_type": "mixtral", "num_local_experts": 3}
    for kind, save, more in (
        (Decoder, save_model, {}),
        (RewardModel, save_reward_model, {"pad_token": "<|im_end|>", "statistics": None}),
    ):
        model = kind(read_architecture(config))
        model.init_weights(0)
        save(tmp_path / kind.__name__, model, tiny_model, max_shard_bytes=50_000, **more)
        assert len(list((tmp_path / kind.__name__).glob("*.safetensors"))) > 2
    monkeypatch.setattr(SafetensorsFile, "tensors", lambda _: pytest.fail("read"))
    for name, head in (("Decoder", "head tied"), ("RewardModel", "reward model")):
        assert info(str(tmp_path / name)) == 0
        said = capsys.readouterr().out
        assert head in said and "2 of 3 for each token, of size 96" in said
    assert "48" in next(line for line in said.splitlines() if line.strip().startswith("head "))


def test_names_of_the_hub(capsys) -> None:
    assert info("hub:pretrain/mixtral-tiny") == 0
    said = capsys.readouterr().out
    assert "15,088,896 parameters in 6 layers of 256, 6,241,536 of them at work on a token" in said

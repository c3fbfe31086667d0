"""What is saved here loads in transformers and here, and is whole or absent."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model, load_reward_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.model.row import Sample, Segment, make_row


def load_in_transformers(folder: Path):
    """The model, which must take every tensor and miss none."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, "eos_token_id": [2, 5]},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_transformers_loads_what_we_save(tmp_path: Path, make_llama, their_logits, our_logits, changes) -> None:
    make_llama(tmp_path / "theirs", **changes)
    files = open_model(str(tmp_path / "theirs"))
    model = load_model(files)
    save_model(tmp_path / "ours", model, files.tokenizer_dir)
    again = load_in_transformers(tmp_path / "ours")
    torch.testing.assert_close(their_logits(again), our_logits(model), atol=1e-4, rtol=1e-5)
    assert again.config.eos_token_id == changes.get("eos_token_id", 2)
    assert again.generation_config.eos_token_id == changes.get("eos_token_id", 2)


def test_shards_and_dtype(tmp_path: Path, tiny_model: Path, our_logits) -> None:
    model = load_model(open_model(str(tiny_model)), dtype=torch.bfloat16)
    save_model(tmp_path / "out", model, tiny_model, max_shard_bytes=40e3)
    shards = sorted(tmp_path.glob("out/model-*-of-*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 45e3 for shard in shards)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    again = load_model(open_model(str(tmp_path / "out")), dtype=torch.bfloat16)
    assert torch.equal(our_logits(again), our_logits(model))
    wide = load_model(open_model(str(tiny_model)))
    save_model(tmp_path / "half", wide, tiny_model, dtype=torch.bfloat16)
    assert torch.equal(
        our_logits(load_model(open_model(str(tmp_path / "half")), dtype=torch.bfloat16)), our_logits(model)
    )


def test_the_tokenizer_goes_along(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!")
    model = load_model(open_model(str(tiny_model)))
    save_model(tmp_path / "out", model, tiny_model)
    save_model(tmp_path / "other", model, tiny_model, chat_template=str(template))
    messages = [{"role": "user", "content": "the fox 😀"}]
    first, again, other = (
        AutoTokenizer.from_pretrained(path) for path in (tiny_model, tmp_path / "out", tmp_path / "other")
    )
    ids = first.apply_chat_template(messages)["input_ids"]
    assert again.apply_chat_template(messages)["input_ids"] == ids
    assert other.apply_chat_template(messages, tokenize=False) == "the fox 😀!"


def save_tiny(tiny_model: Path, folder: Path) -> None:
    save_model(folder, load_model(open_model(str(tiny_model))), tiny_model)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja"])
@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
def test_every_damage_is_found_by_the_manifest(tmp_path: Path, tiny_model: Path, name: str, how: str) -> None:
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}")
    model = load_model(open_model(str(tiny_model)))
    save_model(tmp_path / "out", model, tiny_model, chat_template=str(template))
    file = tmp_path / "out" / name
    whole = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(whole[:-1])
    else:
        whole[-9] ^= 4
        file.write_bytes(whole)
    with pytest.raises(InputError) as caught:
        load_model(open_model(str(tmp_path / "out")))
    assert all(line.startswith(str(file)) for line in caught.value.mistakes)


def test_a_damaged_manifest(tmp_path: Path, tiny_model: Path) -> None:
    save_tiny(tiny_model, tmp_path / "out")
    for text in ("{", '{"format": "litrecipe/1"}', '{"format": "litrecipe/1", "files": {"config.json": 3}}'):
        (tmp_path / "out" / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=str(tmp_path / "out" / "manifest.json")):
            open_model(str(tmp_path / "out"))


def test_a_manifest_of_others_says_nothing_and_protects_its_folder(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "out"
    save_tiny(tiny_model, out)
    (out / "manifest.json").write_text('{"files": ["a"], "version": 3}')
    load_model(open_model(str(out)))
    with pytest.raises(InputError, match="was not written by litrecipe"):
        save_tiny(tiny_model, out)


def test_our_own_folder_is_replaced_and_no_other(tmp_path: Path, tiny_model: Path) -> None:
    save_tiny(tiny_model, tmp_path / "out")
    (tmp_path / "out" / "old").write_text("")
    save_tiny(tiny_model, tmp_path / "out")
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").write_text("dear")
    with pytest.raises(InputError, match="was not written by litrecipe"):
        save_tiny(tiny_model, tmp_path / "home")
    assert (tmp_path / "home" / "letter").read_text() == "dear"


def test_a_full_disk_leaves_the_older_model(tmp_path: Path, tiny_model: Path) -> None:
    save_tiny(tiny_model, tmp_path / "out")
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    code = f"""
import resource, sys
from pathlib import Path
from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError

model = load_model(open_model({str(tiny_model)!r}))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # as if the disk were full within the weights
try:
    save_model(Path({str(tmp_path / "out")!r}), model, Path({str(tiny_model)!r}))
except InputError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith(f"{tmp_path / 'out'}: "), done.stderr
    assert "Traceback" not in done.stderr and "make room" in done.stderr
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_adapters_and_quantised_weights_are_not_written_as_a_model(tmp_path: Path, tiny_model: Path) -> None:
    from litrecipe.config.groups import Adapter, Quantize

    files = open_model(str(tiny_model))
    for keys in ({"adapter": Adapter(method="lora", r=2)}, {"quantize": Quantize(method="nf4")}):
        with pytest.raises(ValueError, match="merge adapters and dequantise"):
            save_model(tmp_path / "out", load_model(files, **keys), tiny_model)
    assert not (tmp_path / "out").exists()


TWO_RANKS = """
import os, sys, resource
from pathlib import Path
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from litrecipe.checkpoint.hf import save_model, save_reward_model
from litrecipe.checkpoint.load import load_model, load_reward_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter

out, rank, tiny = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo")
adapter = Adapter(method="dora", r=2)

def sharded(adapter=None, load=load_model):
    model = load(open_model(str(tiny)), adapter=adapter)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return model

def full():
    save_model(out / "full", sharded(), tiny, max_shard_bytes=40e3)

def adapted():
    save_adapter(out / "adapter", sharded(adapter), adapter, str(tiny), tiny)

def rewarded():
    known = {"pad_token": "<|endoftext|>", "statistics": (1.0, 2.0)}
    save_reward_model(out / "full", sharded(load=load_reward_model), tiny, **known)
    model = sharded(adapter, load_reward_model)
    save_adapter(out / "adapter", model, adapter, str(tiny), tiny, **known)
"""


def on_two_ranks(tmp_path: Path, tiny_model: Path, code: str) -> list[str]:
    """What each of two processes printed."""
    return processes.on_two_ranks(TWO_RANKS + code + "\ndist.destroy_process_group()\n", tmp_path, tiny_model)


@pytest.mark.slow
def test_a_full_disk_of_the_first_rank_ends_all_ranks(tmp_path: Path, tiny_model: Path) -> None:
    said = on_two_ranks(
        tmp_path,
        tiny_model,
        """
if rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # as if the disk were full in the first shard
for save in (full, adapted):
    try:
        save()
    except InputError as error:
        print(error)
""",
    )
    assert said[0] == said[1] and said[0].count("make room") == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_sharded_model_is_written_whole(tmp_path: Path, tiny_model: Path, our_logits) -> None:
    on_two_ranks(tmp_path, tiny_model, "full()\nadapted()\n")
    whole = our_logits(load_model(open_model(str(tiny_model))))
    assert torch.equal(our_logits(load_model(open_model(str(tmp_path / "full")))), whole)
    torch.testing.assert_close(our_logits(load_model(open_model(str(tmp_path / "adapter")))), whole)


@pytest.mark.slow
def test_a_sharded_reward_model_is_written_whole(tmp_path: Path, tiny_model: Path) -> None:
    code = """
rewarded()
import numpy as np
from litrecipe.model.row import Sample, Segment, make_row

text = Sample("text", (Segment(np.array([1, 9, 7, 2]), np.array([0, 1, 1, 1], np.float32)),))
model = sharded(load=load_reward_model)
model(make_row([text] if rank == 0 else [])).sum().backward()
print(model.score.weight.grad.full_tensor().tolist())
"""
    said = on_two_ranks(tmp_path, tiny_model, code)
    model = load_reward_model(open_model(str(tiny_model)))
    for name in ("full", "adapter"):
        files = open_model(str(tmp_path / name))
        assert files.is_reward_model and files.reward_statistics == (1.0, 2.0)
        again = load_reward_model(files, seed=7)
        assert torch.equal(again.score.weight, model.score.weight)
        assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)
    text = Sample("text", (Segment(np.array([1, 9, 7, 2]), np.array([0, 1, 1, 1], np.float32)),))
    (model(make_row([text])).sum() / 2).backward()  # sharding takes the mean over the ranks
    assert said[0] == said[1] and model.score.weight.grad is not None
    torch.testing.assert_close(torch.tensor(json.loads(said[0])), model.score.weight.grad)

"""Memory of each rank of a model that ranks share: while it is loaded, trained and written, on 1, 2 and 4 of them.

    python benchmarks/sharding.py [--ranks 1 2 4] [--layers 12]

The model is a random Llama of about 98 million parameters in fp32 (0.39 GB), in several files. Every rank is a process
of its own on this machine, over gloo; what is told is its largest resident memory in each stage, above that before the
model was there (torch and the program itself), which the kernel counts anew for each stage. With `full` all weights are
trained by AdamW, with `qlora` an adapter on a base in NF4. One process without sharding stands beside them (`alone`).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import MIB, REPO, environment, print_table, write_result

STAGES = ("load", "train", "export")
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
METHODS = {
    "full": {},
    "qlora": {"adapter.method": "lora", "quantize.method": "nf4"},
}
WRITE = """
import json, sys
from pathlib import Path
from litrecipe.checkpoint.hf import save_model
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
folder = Path(sys.argv[1])
model = Decoder(read_architecture(json.loads((folder / "config.json").read_text())))
model.init_weights(seed=0)
save_model(folder / "model", model, folder, max_shard_bytes=60e6)
print(sum(p.numel() for p in model.parameters()))
"""
RANK = """
import json, re, sys
from pathlib import Path
import numpy as np
from litrecipe.checkpoint.hf import save_model
from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.peft_adapter import save_adapter
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.data.source import RecordedSource
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, Run
from litrecipe.model import adapters, lora_linear, quantize
from litrecipe.model.row import Sample, Segment
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.recipes.training import load_to_train, make_ready

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def begin():
    Path("/proc/self/clear_refs").write_text("5")

class Samples(list):
    lengths = np.full(4, 32)

folder, flags = Path(sys.argv[1]), json.loads(sys.argv[2])
recipe = schema.load(FinetuneRecipe, [], [(key, str(value)) for key, value in flags.items()])
chance = np.random.default_rng(0)
samples = Samples(
    Sample(f"row:{n}", (Segment(chance.integers(3, 16384, 32).astype(np.int32), np.float32([0] + 31 * [1])),))
    for n in range(4)
)
fabric = make_fabric(recipe.fabric)
files = open_model(str(folder / "model"))
empty, peaks = resident("VmRSS"), {}
begin()
model = load_to_train(load_model, files, recipe)
make_ready(model, recipe)
run = Run(Job(fabric, recipe, model, CausalLM(), RecordedSource(samples, recipe.train), save_final=lambda _: None))
peaks["load"] = resident("VmHWM") - empty
begin()
for _ in range(2):
    run.train_step(list(samples))
peaks["train"] = resident("VmHWM") - empty
held = resident("VmRSS") - empty
begin()
out = folder / "out"
if recipe.adapter.method == "none":
    save_model(out, model, files.tokenizer_dir, max_shard_bytes=60e6)
else:
    save_adapter(out, model, recipe.adapter, str(folder / "model"), files.tokenizer_dir)
peaks["export"] = resident("VmHWM") - empty - held
print("MEASURED", json.dumps(peaks))
run.teller.close()
"""


def measure(folder: Path, ranks: int, method: str, strategy: str) -> dict[str, Any]:
    """The largest of the ranks' peaks in each stage, MiB; `export` is above what the model holds."""
    flags = {
        "model.source": str(folder / "model"),
        "out_dir": str(folder / f"run-{method}-{strategy}-{ranks}"),
        "data.train": "none",
        "train.max_steps": 2,
        "train.global_batch_size": 4,
        "train.micro_batch_tokens": 32,
        "log.loggers": "[]",
        "fabric.accelerator": "cpu",
        "fabric.devices": ranks,
        "fabric.strategy": strategy,
        **METHODS[method],
    }
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = str(one.getsockname()[1])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}
    meet |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), json.dumps(flags)],
            cwd=REPO,
            env=environment(1, {**meet, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    texts = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit(f"benchmark: a rank failed:\n{texts[0][-4000:]}")
    of_ranks = [json.loads(text.partition("MEASURED ")[2].partition("\n")[0]) for text in texts]
    return {stage: round(max(peaks[stage] for peaks in of_ranks) / MIB) for stage in STAGES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=12)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": asked.layers}))
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        command = [sys.executable, "-c", WRITE, str(folder)]
        parameters = int(subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout)
        rows = []
        for method in METHODS:
            for ranks in asked.ranks:
                for strategy in ["auto", "fsdp"] if ranks == 1 else ["fsdp"]:
                    peaks = measure(folder, ranks, method, strategy)
                    named = "alone" if strategy == "auto" else "fsdp"
                    rows.append({"method": method, "strategy": named, "ranks": ranks, **peaks})
                    print(rows[-1], flush=True)
    print_table(["method", "strategy", "ranks", *STAGES], [list(row.values()) for row in rows])
    weights = parameters * 4 / MIB
    write_result(
        "sharding",
        {
            "parameters": parameters,
            "weights_mib": round(weights),
            "unit": "MiB above a process without a model, largest rank; export: above the model",
            "ranks": rows,
        },
    )


if __name__ == "__main__":
    os.environ.setdefault("LITRECIPE_CACHE", tempfile.mkdtemp())
    main()

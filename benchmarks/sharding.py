"""Memory of each rank of a model that ranks share: while it is loaded, trained and written, on 1, 2 and 4 of them.

    python benchmarks/sharding.py [--ranks 1 2 4] [--layers 12]

The model is a random Llama of about 98 million parameters in fp32 (0.39 GB), in several files. Every rank is a process
of its own on this machine, over gloo, forked from one that has imported the program. What is told is its largest
resident memory in each stage, which the kernel counts anew, above what it had before there was a model. With `full` all
weights are trained by AdamW, with `qlora` an adapter on a base in NF4. One process without sharding stands beside them
(`alone`).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import MIB, print_table, run_child, write_result

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
HOST = """
import json, os, re, socket, sys, traceback
from pathlib import Path
import numpy as np
import torch.distributed.fsdp
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
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.row import Sample, Segment
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.recipes.training import load_to_train, make_ready

folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])

class Samples(list):
    lengths = np.full(4, 32)

def write(result):
    model = Decoder(read_architecture(json.loads((folder / "config.json").read_text())))
    model.init_weights(seed=0)
    save_model(folder / "model", model, folder, max_shard_bytes=60e6)
    result.write_text(str(sum(p.numel() for p in model.parameters())))

def resident(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def begin():
    Path("/proc/self/clear_refs").write_text("5")

def rank(result, flags):
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
    source = RecordedSource(samples, recipe.train)
    run = Run(Job(fabric, recipe, model, CausalLM(), source, save_final=lambda _: None))
    peaks["load"] = resident("VmHWM") - empty
    begin()
    for _ in range(2):
        run.train_step(list(samples))
    peaks["train"] = resident("VmHWM") - empty
    held = resident("VmRSS") - empty
    begin()
    if recipe.adapter.method == "none":
        save_model(folder / "out", model, files.tokenizer_dir, max_shard_bytes=60e6)
    else:
        save_adapter(folder / "out", model, recipe.adapter, str(folder / "model"), files.tokenizer_dir)
    peaks["export"] = resident("VmHWM") - empty - held
    run.teller.close()
    result.write_text(json.dumps(peaks))

def forked(act, *given):
    # a process that has imported and computed nothing yet can be copied; what it holds is taken off
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        act(*given)
        code = 0
    except BaseException:
        traceback.print_exc()
    os._exit(code)

def waited(children):
    if any([os.waitpid(child, 0)[1] for child in children]):
        sys.exit("a process failed")

waited([forked(write, folder / "parameters")])
for number, (ranks, flags) in enumerate(jobs):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}
    os.environ |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    children = []
    for place in range(ranks):
        os.environ |= {"RANK": str(place), "LOCAL_RANK": str(place)}
        children.append(forked(rank, folder / f"{number}.{place}", flags))
    waited(children)
    print("DONE", number, flush=True)
"""


def flags_of(folder: Path, ranks: int, method: str, strategy: str) -> dict[str, Any]:
    """A recipe as flags."""
    return {
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=12)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": asked.layers}))
        (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
        kinds = [
            (method, strategy, ranks)
            for method in METHODS
            for ranks in asked.ranks
            for strategy in (["auto", "fsdp"] if ranks == 1 else ["fsdp"])
        ]
        jobs = [(ranks, flags_of(folder, ranks, method, strategy)) for method, strategy, ranks in kinds]
        run_child([sys.executable, "-c", HOST, folder, json.dumps(jobs)], threads=1).check()
        parameters = int((folder / "parameters").read_text())
        rows = []
        for number, (method, strategy, ranks) in enumerate(kinds):
            of_ranks = [json.loads((folder / f"{number}.{place}").read_text()) for place in range(ranks)]
            peaks = {stage: round(max(one[stage] for one in of_ranks) / MIB) for stage in STAGES}
            named = "alone" if strategy == "auto" else "fsdp"
            rows.append({"method": method, "strategy": named, "ranks": ranks, **peaks})
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

"""What only a GPU shows, in under ten minutes: the GPU's attention and arithmetic against the CPU's, and speed.

    python benchmarks/gpu_check.py

Needs no download: the models are random, the tokenizer is made here, the data is `toy:fields` and generated text.
Writes benchmarks/results/gpu_check.json. `--accelerator cpu` tries the checks themselves on a machine without a GPU,
with a shrunken model, and writes nothing.

Shapes: T tokens of a row, H heads, G key-value heads, D head size.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import LITRECIPE, MIB, REPO, environment, read_lines, write_result

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
BILLION = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
"""The shape of Llama-3.2-1B (its vocabulary apart)."""
PEAK_BF16 = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "T4": 65e12}
"""Dense bf16 (T4: fp16) FLOP/s as the maker states them, by a word of the device's name."""


class Bench:
    """A working folder with a tokenizer, data and the means to train."""

    def __init__(self, folder: Path, accelerator: str) -> None:
        self.folder, self.accelerator = folder, accelerator
        make_tokenizer(folder / "tokenizer")
        self.text = folder / "text.jsonl"
        chance = random.Random(0)
        words = ["".join(chance.choices("abcdefghij", k=chance.randint(2, 9))) for _ in range(500)]
        lines = (json.dumps({"text": " ".join(chance.choices(words, k=600))}) for _ in range(64))
        self.text.write_text("\n".join(lines) + "\n")

    def config(self, name: str, shape: dict[str, int]) -> Path:
        """A `config.json` of the Llama family."""
        path = self.folder / name / "config.json"
        path.parent.mkdir(exist_ok=True)
        fixed = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 512,
            "num_key_value_heads": shape["num_attention_heads"] // 4,
            "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
        }
        path.write_text(json.dumps({**fixed, **shape}))
        return path

    def train(
        self, name: str, model: Path, *flags: str, accelerator: str | None = None, verb: str = "finetune"
    ) -> list[dict[str, Any]]:
        """The metrics of a short run on a model folder, or on random weights for a `config.json`."""
        out = self.folder / "runs" / name
        fixed = {
            "model.source": model,
            "model.init": "random" if model.suffix == ".json" else "pretrained",
            "model.tokenizer": self.folder / "tokenizer",
            "data.train": "toy:fields?n=256&seed=0",
            "data.cache_dir": self.folder / "cache",
            "fabric.accelerator": accelerator or self.accelerator,
            "fabric.devices": 1,
            "schedule.name": "constant",
            "train.max_steps": 20,
            "checkpoint.every": "null",
            "out_dir": out,
        }
        words = [str(word) for key, value in fixed.items() for word in (f"--{key}", value)]
        done = subprocess.run(
            [*LITRECIPE, *verb.split(), *words, *flags], cwd=REPO, env=environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
        return [line for line in read_lines(out / "metrics.jsonl") if "loss" in line]


def make_tokenizer(folder: Path) -> None:
    """Bytes as tokens, and the ChatML template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    specials = ["<|im_start|>", "<|im_end|>", "<|padding|>"]  # the last for reward models
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": CHATML}))


def spans_of_a_forest() -> list[Any]:
    """Four roots, one of them with two branches: packed conversations and a preference pair."""
    from litrecipe.model.row import Span

    lengths, parents = [200, 3, 150, 400, 60, 90], [-1, -1, -1, -1, 3, 3]
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [Span(stop - n, stop, parent) for stop, n, parent in zip(stops, lengths, parents, strict=True)]


def check_attention(bench: Bench) -> dict[str, Any]:
    """Attention and its gradients on the device against the CPU, fp32 and bf16, on a forest of segments."""
    import torch

    from litrecipe.model.attention import Forest

    spans = spans_of_a_forest()
    total = spans[-1].stop
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(total, heads, 64, generator=generator) for heads in (32, 8, 8)]

    def outputs(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [x.to(device, dtype, copy=True).requires_grad_() for x in inputs]
        out = Forest(spans, device).attend(*tensors)
        gradients = torch.autograd.grad(out.float().square().sum(), tensors)
        return [x.detach().float().cpu() for x in (out, *gradients)]

    reference = outputs("cpu", torch.float32)
    found: dict[str, Any] = {}
    for dtype, allowed in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        pairs = zip(outputs(torch_device(bench), dtype), reference, strict=True)
        worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        found[str(dtype)] = {"largest_relative_difference": worst, "allowed": allowed, "ok": worst <= allowed}
    return {**found, "ok": all(entry["ok"] for entry in found.values())}


def torch_device(bench: Bench) -> str:
    return "cuda" if bench.accelerator == "cuda" else "cpu"


def apart(a: list[dict[str, Any]], b: list[dict[str, Any]], steps: int) -> float:
    """Largest relative difference of the losses of the first steps."""
    return max(abs(x["loss"] - y["loss"]) / abs(y["loss"]) for x, y in zip(a[:steps], b[:steps], strict=True))


def check_precision(bench: Bench) -> dict[str, Any]:
    """The same 20 steps on the CPU in fp32 and on the device in each precision, compiled and not."""
    config = bench.config("small", SMALL)
    reference = bench.train("cpu", config, accelerator="cpu")
    cases: dict[str, tuple[list[str], float]] = {
        "32-true": ([], 1e-3),
        "bf16-mixed": (["--fabric.precision", "bf16-mixed"], 2e-2),
        "bf16-true": (["--fabric.precision", "bf16-true"], 5e-2),
        "compile": (["--fabric.compile", "true"], 1e-3),
        "activation_checkpointing": (["--fabric.activation_checkpointing", "true"], 1e-3),
    }
    found: dict[str, Any] = {}
    for name, (flags, allowed) in cases.items():
        worst = apart(bench.train(name, config, *flags), reference, 20)
        found[name] = {"largest_relative_loss_difference": worst, "allowed": allowed, "ok": worst <= allowed}
    return {**found, "ok": all(entry["ok"] for entry in found.values())}


def check_quantised(bench: Bench) -> dict[str, Any]:
    """LoRA on NF4 and int8 bases, and the 8-bit optimizers: it runs, and the loss falls."""
    bench.train("base", bench.config("small", SMALL))
    base = bench.folder / "runs" / "base" / "final"
    lora = ["--adapter.method", "lora", "--optim.lr", "2e-3"]
    cases = {
        "nf4": [*lora, "--quantize.method", "nf4"],
        "int8": [*lora, "--quantize.method", "int8"],
        "dora nf4": ["--adapter.method", "dora", "--optim.lr", "2e-3", "--quantize.method", "nf4"],
        "adamw8bit": ["--optim.name", "adamw8bit", "--optim.lr", "1e-3"],
        "paged_adamw8bit": ["--optim.name", "paged_adamw8bit", "--optim.lr", "1e-3"],
    }
    found: dict[str, Any] = {}
    for name, flags in cases.items():
        losses = [line["loss"] for line in bench.train(name.replace(" ", "-"), base, *flags)]
        found[name] = {"first_loss": losses[0], "last_loss": losses[-1], "ok": losses[-1] < losses[0]}
    return {**found, "ok": all(entry["ok"] for entry in found.values())}


def check_speed(bench: Bench) -> dict[str, Any]:
    """Tokens a second, model FLOPs utilisation and memory of full fine-tuning at one billion parameters in bf16.

    FLOPs of a token: 6 for each parameter of a matrix, and 6 times layers, width and sequence length for attention,
    which sees half of the sequence on average (2104.04473, causal and without recomputation).
    """
    shape = BILLION if bench.accelerator == "cuda" else SMALL
    config = bench.config("billion", shape)
    text = ["--data.train", str(bench.text), "--data.format", "text", "--data.mask", "all", "--data.max_length", "2048"]
    size = ["--train.micro_batch_tokens", "16384", "--train.global_batch_size", "8", "--train.max_steps", "12"]
    found: dict[str, Any] = {"ok": True}
    for name, flags in {"bf16-true": [], "bf16-true, compile": ["--fabric.compile", "true"]}.items():
        precision = ["--fabric.precision", "bf16-true"]
        lines = bench.train("speed" + "-compile" * bool(flags), config, *text, *size, *precision, *flags)
        rate = sorted(line["tokens_per_second"] for line in lines[4:])[len(lines[4:]) // 2]
        tokens = lines[-1]["tokens"] / (8 * len(lines))
        matrices = matrix_parameters(json.loads(config.read_text()))
        attention = 6 * shape["num_hidden_layers"] * shape["hidden_size"] * tokens
        flops = rate * (6 * matrices + attention)
        peak = peak_flops(bench)
        found[name] = {
            "tokens_per_second": rate,
            "tokens_a_sample": round(tokens),
            "mfu": round(flops / peak, 4) if peak else None,
            "tflops": round(flops / 1e12, 1),
            "peak_memory_mib": round(lines[-1]["memory"] / MIB),
        }
    return found


def check_layouts(bench: Bench) -> dict[str, Any]:
    """PPO in bf16 with adapters beside a reward model, joined, and as a hydra: memory, and seconds a completion.

    What a hydra saves makes room for a larger batch; so it is measured once more with the batch that fills what `lora`
    took (2309.00754 reports up to 65 % less time a sample for that).
    """
    shape, batch, new_tokens = (BILLION, 64, 128) if bench.accelerator == "cuda" else (SMALL, 4, 16)
    half = ["--fabric.precision", "bf16-true"]
    pairs = ["--data.train", "toy:units-pairs?n=16&seed=0", "--reward.sft_coef", "1", "--train.max_steps", "1"]
    bench.train("joint", bench.config("layouts", shape), *half, *pairs, verb="align reward")
    hydra = bench.folder / "runs" / "joint" / "final"

    def practise(layout: str, batch: int) -> dict[str, Any]:
        longest = batch * (new_tokens + 128)
        given = {
            "data.train": "toy:units?n=512&seed=0",
            "rewards.sources": json.dumps({"hydra" if layout == "hydra" else f"model:{hydra}": 1.0}),
            "ppo.layout": layout,
            "ppo.rollout_batch_size": batch,
            "ppo.max_new_tokens": new_tokens,
            "ppo.epochs": 1,
            "ppo.cache_tokens": longest,
            "train.micro_batch_tokens": longest,
            "train.max_steps": 3,
        }
        flags = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
        lines = bench.train(f"{layout}-{batch}", hydra, *half, *flags, verb="align ppo")
        seconds = (lines[-1]["tokens"] - lines[-2]["tokens"]) / lines[-1]["tokens_per_second"]
        memory = round(lines[-1]["memory"] / MIB)
        return {"batch": batch, "seconds_a_completion": round(seconds / batch, 5), "peak_memory_mib": memory}

    found: dict[str, Any] = {layout: practise(layout, batch) for layout in ("lora", "joined", "hydra")}
    saved = found["lora"]["peak_memory_mib"] - found["hydra"]["peak_memory_mib"]
    a_completion = (practise("hydra", 2 * batch)["peak_memory_mib"] - found["hydra"]["peak_memory_mib"]) / batch
    found["hydra, larger"] = practise("hydra", batch + min(3 * batch, max(0, int(saved / max(a_completion, 0.1)))))
    # On a CPU memory is that of the whole process, most of which is not the model.
    return {**found, "ok": bench.accelerator == "cpu" or saved > 0}


def matrix_parameters(config: dict[str, Any]) -> int:
    """Parameters that take part in matrix products, the tied head included."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    key_value = config["head_dim"] * config["num_key_value_heads"]
    layer = 2 * hidden * config["head_dim"] * heads + 2 * hidden * key_value + 3 * hidden * inner
    return int(config["num_hidden_layers"] * layer + config["vocab_size"] * hidden)


def peak_flops(bench: Bench) -> float | None:
    if bench.accelerator != "cuda":
        return None
    import torch

    words = torch.cuda.get_device_name().replace("-", " ").split()
    return next((flops for part, flops in PEAK_BF16.items() if part in words), None)


CHECKS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "attention": check_attention,
    "precision": check_precision,
    "quantised": check_quantised,
    "speed": check_speed,
    "layouts": check_layouts,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    args = parser.parse_args()
    import torch

    if args.accelerator == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu-check: this machine has no CUDA GPU (or torch is a CPU build): nothing was checked")
    results: dict[str, Any] = {}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.accelerator)
        for name in args.only:
            start = time.monotonic()
            try:
                results[name] = CHECKS[name](bench)
            except Exception as error:  # noqa: BLE001 - one broken check must not hide what the others find
                results[name] = {"ok": False, "error": f"{type(error).__name__}: {error}"}
            results[name]["seconds"] = round(time.monotonic() - start, 1)
            print(
                f"{name}: {'ok' if results[name]['ok'] else 'FAILED'}\n{json.dumps(results[name], indent=1)}",
                flush=True,
            )
    if args.accelerator == "cuda":
        device = {
            "name": torch.cuda.get_device_name(),
            "capability": ".".join(map(str, torch.cuda.get_device_capability())),
            "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
        write_result("gpu_check", {"device": device, "seconds": round(time.monotonic() - began), "checks": results})
    if not all(result["ok"] for result in results.values()):
        sys.exit("gpu-check: failed: " + ", ".join(name for name, result in results.items() if not result["ok"]))


if __name__ == "__main__":
    main()

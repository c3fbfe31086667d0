"""litrecipe's sampling and transformers' on the same weights, in turns within one process.

    python transformers_sample.py MODEL_FOLDER PROMPTS.jsonl OUT.json [--repeats 3] [--new_tokens 64]

A line of the prompts is a list of token ids. Both sample from the whole distribution at temperature 1. Jobs:

`one each`: every prompt once, as one batch. `four each`: a quarter of the prompts, four times each. `other lengths`:
every prompt twice, with completions of 8 to `new_tokens` tokens, in batches of as many as there are prompts, where
transformers goes on until the longest of a batch has ended.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.model.decoding import generate

SHORTEST = 8
"""Tokens."""
Prompts = Sequence[Sequence[int]]


class Ours:
    def __init__(self, folder: Path) -> None:
        self.model = load_model(open_model(str(folder))).requires_grad_(False).eval()

    def greedy(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        return [found.tokens for found in generate(self.model, prompts, max_new_tokens=tokens)]

    def sample(self, prompts: Prompts, times: int, tokens: int, seed: int) -> int:
        settings = {"completions": times, "max_new_tokens": tokens, "temperature": 1.0, "seed": seed}
        return sum(len(found.tokens) for found in generate(self.model, prompts, **settings))

    def sample_lengths(self, prompts: Prompts, lengths: Sequence[int], seed: int) -> int:
        """Completions of given lengths, as many at a time as half of them."""
        left = list(lengths)

        def count_down(index: int, _: int) -> bool:
            left[index] -= 1
            return left[index] == 0

        places = len(lengths) // 2 * (max(map(len, prompts)) + max(lengths))
        settings = {"max_new_tokens": max(lengths), "temperature": 1.0, "seed": seed, "cache_tokens": places}
        found = generate(self.model, prompts, on_token=count_down, **settings)
        return sum(len(completion.tokens) for completion in found)


class Theirs:
    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def _generate(self, prompts: Prompts, tokens: int, **settings: Any) -> torch.Tensor:
        """The new tokens (completions, tokens); an end token is a token as others."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        fixed = {"max_new_tokens": tokens, "min_new_tokens": None, "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(ids, attention_mask=mask, **fixed, **settings)
        assert out.shape[1] == longest + tokens
        return out[:, longest:]

    def greedy(self, prompts: Prompts, tokens: int) -> list[list[int]]:
        return self._generate(prompts, tokens, do_sample=False).tolist()

    def sample(self, prompts: Prompts, times: int, tokens: int, seed: int) -> int:
        torch.manual_seed(seed)
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "num_return_sequences": times}
        return self._generate(prompts, tokens, **settings).numel()

    def sample_lengths(self, prompts: Prompts, lengths: Sequence[int], seed: int) -> int:
        """Batches in order, each as long as its longest; what comes after an end is thrown away."""
        size = len(lengths) // 2
        for start in range(0, len(lengths), size):
            self.sample(prompts[start : start + size], 1, max(lengths[start : start + size]), seed)
        return sum(lengths)


def agreement(first: list[list[int]], second: list[list[int]]) -> float:
    """Share of the completions that are the same to the last token."""
    return sum(a == b for a, b in zip(first, second, strict=True)) / len(first)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--new_tokens", type=int, default=64)
    args = parser.parse_args()
    prompts = [json.loads(line) for line in args.prompts.read_text().splitlines()]
    lengths = random.Random(0).choices(range(SHORTEST, args.new_tokens + 1), k=2 * len(prompts))
    sides = {"litrecipe": Ours(args.model_folder), "transformers": Theirs(args.model_folder)}
    jobs = {
        "one each": lambda side, seed: side.sample(prompts, 1, args.new_tokens, seed),
        "four each": lambda side, seed: side.sample(prompts[: len(prompts) // 4], 4, args.new_tokens, seed),
        "other lengths": lambda side, seed: side.sample_lengths(prompts * 2, lengths, seed),
    }
    few = prompts[: len(prompts) // 2]  # as many as have our weights laid out; warms both up, too
    greedy = agreement(*(side.greedy(few, args.new_tokens) for side in sides.values()))
    told: dict[str, dict[str, list[dict[str, float]]]] = {job: {name: [] for name in sides} for job in jobs}
    for seed in range(args.repeats):
        for job, run in jobs.items():
            for name, side in sides.items():
                wall, cpu = time.perf_counter(), time.process_time()
                tokens = run(side, seed)
                seconds = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
                told[job][name].append({"tokens": tokens, **seconds})
                print(job, name, told[job][name][-1], flush=True)
    args.out.write_text(json.dumps({"threads": torch.get_num_threads(), "same_greedily": greedy, "jobs": told}))


if __name__ == "__main__":
    main()

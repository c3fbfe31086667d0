"""TRL's DPOTrainer on tokenised pairs; runs in an environment that holds trl.

    python trl_dpo.py MODEL_FOLDER PAIRS.jsonl ADAPTER.safetensors OUT.json [--batch 8] [--checkpointing] [--precompute]

The pairs are taken in the order of the file, `--batch` a step in one padded batch, and the adapter starts from the file
it is given. The reference is the model without its adapter, asked at every step, or with `--precompute` once before the
first. With `--checkpointing` it recomputes activations, as it does by default.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, set_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class OnPairs(DPOTrainer):
    """Takes pairs that are tokenised, and tells how long the reference took when it is asked beforehand."""

    reference_seconds = 0.0

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, *args: Any) -> Dataset:
        began = time.monotonic()
        dataset = super()._precompute_ref_logps(*args)
        self.reference_seconds += time.monotonic() - began
        return dataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("pairs", type=Path)
    parser.add_argument("adapter")
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--precompute", action="store_true")
    args = parser.parse_args()
    pairs = [json.loads(line) for line in args.pairs.read_text().splitlines()]
    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        num_train_epochs=1,
        learning_rate=5e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=512,
        beta=0.1,
        precompute_ref_log_probs=args.precompute,
        train_sampling_strategy="sequential",
        gradient_checkpointing=args.checkpointing,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = OnPairs(
        model=AutoModelForCausalLM.from_pretrained(args.model_folder, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(pairs),
        processing_class=AutoTokenizer.from_pretrained(args.model_folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    state = load_file(args.adapter)
    assert len(state) == sum(parameter.requires_grad for parameter in trainer.model.parameters())
    assert not set_peft_model_state_dict(trainer.model, state).unexpected_keys
    setup = time.monotonic() - BEGAN - trainer.reference_seconds
    began = time.monotonic()
    trainer.train()
    train = time.monotonic() - began + trainer.reference_seconds
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "setup_seconds": setup,
        "train_seconds": train,
        "reference_seconds": trainer.reference_seconds if args.precompute else None,
        "tokens": int(steps[-1]["num_tokens"]),
        "losses": [step["loss"] for step in steps],
        "margins": [step["rewards/margins"] for step in steps],
        "threads": torch.get_num_threads(),
    }
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()

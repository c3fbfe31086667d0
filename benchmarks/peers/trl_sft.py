"""TRL's SFTTrainer on tokenised rows; runs in an environment that holds trl.

    python trl_sft.py MODEL_FOLDER ROWS.jsonl OUT.json [--micro 8] [--checkpointing]

The rows are taken in the order of the file, 8 a step, with the labels as they stand, `--micro` of them in one padded
batch, and with `--checkpointing` it recomputes activations, as it does by default.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

BEGAN = time.monotonic()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.rows.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(args.model_folder, dtype=torch.float32)
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=8 // args.micro,
        num_train_epochs=1,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=1.0,
        max_length=2048,
        shuffle_dataset=False,
        train_sampling_strategy="sequential",
        gradient_checkpointing=args.checkpointing,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=0,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(args.model_folder),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, task_type="CAUSAL_LM"),
    )
    setup = time.monotonic() - BEGAN
    began = time.monotonic()
    trainer.train()
    train = time.monotonic() - began
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"setup_seconds": setup, "train_seconds": train, "losses": losses, "threads": torch.get_num_threads()}
    args.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()

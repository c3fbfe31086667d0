"""transformers' Trainer on sequences of tokens, all weights trained; runs where transformers and accelerate are.

    python transformers_pretrain.py MODEL_FOLDER ROWS.jsonl OUT.json [--batch 2] [--micro 2] [--rates FILE] [--save DIR]

The sequences are taken in the order of the file, `--batch` a step, `--micro` of them at once. Each is one document.
`--rates` is a list of learning rates, one a step, `--save` where the trained model is written.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

BEGAN = time.monotonic()

import torch  # noqa: E402
from torch.utils.data import Dataset, SequentialSampler  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments  # noqa: E402


class Sequences(Dataset):
    """Input and labels are the same: the model shifts them."""

    def __init__(self, file: Path) -> None:
        self.rows = [json.loads(line)["input_ids"] for line in file.read_text().splitlines()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        tokens = torch.tensor(self.rows[place])
        return {"input_ids": tokens, "labels": tokens}


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *_: object, **__: object) -> None:
        self.ends.append(time.monotonic())

    def on_step_end(self, *_: object, **__: object) -> None:
        self.ends.append(time.monotonic())


class InOrder(Trainer):
    """The Trainer with the sequences as they come."""

    def _get_train_sampler(self, *_: object) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--micro", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--rates", type=Path)
    parser.add_argument("--save", type=Path)
    args = parser.parse_args()
    rows = Sequences(args.rows)
    model = AutoModelForCausalLM.from_pretrained(args.model_folder, dtype=torch.float32)
    model.model.embed_tokens.padding_idx = None  # what ends a text pads too, and would not be learnt as an input
    settings = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        per_device_train_batch_size=args.micro,
        gradient_accumulation_steps=args.batch // args.micro,
        max_steps=len(rows) // args.batch,
        learning_rate=args.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    clock = Clock()
    optimizers: tuple = (None, None)
    if args.rates:
        rates = json.loads(args.rates.read_text())
        plain = InOrder(model=model, args=settings, train_dataset=rows)
        plain.create_optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(
            plain.optimizer, lambda step: rates[min(step, len(rates) - 1)] / args.lr
        )
        optimizers = plain.optimizer, schedule
    trainer = InOrder(model=model, args=settings, train_dataset=rows, callbacks=[clock], optimizers=optimizers)
    setup = time.monotonic() - BEGAN
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "setup_seconds": setup,
        "train_seconds": clock.ends[-1] - clock.ends[0],
        "losses": losses,
        "threads": torch.get_num_threads(),
        "steps_seconds": [round(after - before, 3) for before, after in zip(clock.ends, clock.ends[1:], strict=False)],
    }
    args.out.write_text(json.dumps(result))
    if args.save:
        model.save_pretrained(args.save)


if __name__ == "__main__":
    main()

"""litgpt's pretraining on sequences of tokens, all weights trained; runs in an environment that holds litgpt.

    python litgpt_pretrain.py MODEL_FOLDER ROWS.jsonl OUT.json [--batch 2]

The sequences are taken in the order of the file, `--batch` a step and at once. It reads a sequence but for its last
token and predicts all but the first, so as many as the others. Put aside so that the job is the same: its schedule (a
constant rate instead), and the checkpoint at the end.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()

import torch  # noqa: E402
from litgpt import pretrain  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.data import DataModule  # noqa: E402
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402


class Sequences(DataModule):
    """Tokens in their order."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.rows = [torch.tensor(json.loads(line)["input_ids"]) for line in file.read_text().splitlines()]

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=False)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[:1], batch_size=1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model_folder")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=3e-4)
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    checkpoint = work / "SmolLM2-135M-Instruct"
    shutil.copytree(args.model_folder, checkpoint)
    convert_hf_checkpoint(checkpoint, dtype="float32")
    data = Sequences(args.rows)
    length = len(data.rows[0])
    pretrain.get_lr = lambda rate, *_: rate
    pretrain.save_checkpoint = lambda *_, **__: None
    adam = {"lr": args.lr, "weight_decay": 0.1, "betas": [0.9, 0.95], "fused": True}
    setup = time.monotonic() - BEGAN
    pretrain.setup(
        "SmolLM2-135M-Instruct",
        out_dir=work / "out",
        precision="32-true",
        initial_checkpoint_dir=checkpoint,
        data=data,
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=args.batch,
            micro_batch_size=args.batch,
            max_tokens=len(data.rows) * (length - 1),
            max_seq_length=length - 1,
            max_norm=1.0,
            min_lr=args.lr,
            lr_warmup_steps=1,
            tie_embeddings=True,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": adam},
        devices=1,
        logger_name="csv",
        seed=0,
    )
    (log,) = work.rglob("metrics.csv")
    lines = [line for line in csv.DictReader(log.open()) if line.get("loss")]
    assert len(lines) == len(data.rows) // args.batch
    seconds = [float(line["iter_time"]) for line in lines]
    result = {
        "setup_seconds": setup,
        "train_seconds": sum(seconds),
        "losses": [float(line["loss"]) for line in lines],
        "threads": torch.get_num_threads(),
        "steps_seconds": [round(one, 3) for one in seconds],
    }
    args.out.write_text(json.dumps(result))
    shutil.rmtree(work)


if __name__ == "__main__":
    main()

"""litgpt's LoRA fine-tuning on tokenised rows; runs in an environment that holds litgpt.

    python litgpt_lora.py MODEL_FOLDER ROWS.jsonl OUT.json

The rows are taken in the order of the file, 8 a step, with the labels as they stand. Two of litgpt's parts are put
aside so that the job is the same: its schedule (warm-up and cosine only) gives way to a constant rate, and the merge at
the end is left out. It does not clip gradients.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.monotonic()

import torch  # noqa: E402
from litgpt.args import EvalArgs, TrainArgs  # noqa: E402
from litgpt.data import DataModule  # noqa: E402
from litgpt.data.base import get_sft_collate_fn  # noqa: E402
from litgpt.finetune import lora  # noqa: E402
from litgpt.prompts import Default  # noqa: E402
from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint  # noqa: E402
from torch.optim.lr_scheduler import LambdaLR  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402


class Rows(DataModule):
    """Tokenised rows in their order."""

    prompt_style = Default()

    def __init__(self, file: str) -> None:
        super().__init__()
        self.rows = [sample(json.loads(line)) for line in Path(file).read_text().splitlines()]

    def connect(self, tokenizer: Any = None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size, shuffle=False, collate_fn=get_sft_collate_fn())

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[:1], batch_size=1, collate_fn=get_sft_collate_fn())


def sample(row: dict[str, list[int]]) -> dict[str, Any]:
    counts = {"raw": len(row["input_ids"]), "raw_plus_prompt_template": len(row["input_ids"])}
    return {**{key: torch.tensor(row[key]) for key in ("input_ids", "labels")}, "token_counts": counts}


def main(model_folder: str, rows_file: str, out: str) -> None:
    work = Path(tempfile.mkdtemp())
    checkpoint = work / "SmolLM2-135M-Instruct"
    shutil.copytree(model_folder, checkpoint)
    convert_hf_checkpoint(checkpoint, dtype="float32")
    lora.get_lr_scheduler = lambda optimizer, **_: LambdaLR(optimizer, lambda step: 1.0)
    lora.merge_lora = lora.save_hyperparameters = lambda *_, **__: None
    data = Rows(rows_file)
    steps = len(data.rows) // 8
    setup = time.monotonic() - BEGAN
    adam = {"lr": 2e-4, "weight_decay": 0.0, "betas": [0.9, 0.999], "fused": True}
    lora.setup(
        checkpoint,
        out_dir=work / "out",
        precision="32-true",
        devices=1,
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.0,
        lora_query=True,
        lora_key=True,
        lora_value=True,
        lora_projection=True,
        lora_mlp=True,
        data=data,
        train=TrainArgs(
            save_interval=None, global_batch_size=8, micro_batch_size=8, lr_warmup_steps=1, epochs=1, max_steps=steps
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, initial_validation=False, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": adam},
        seed=0,
    )
    (log,) = work.rglob("metrics.csv")
    lines = [line for line in csv.DictReader(log.open()) if line["loss"]]  # throughput has lines of its own
    assert len(lines) == steps
    result = {
        "setup_seconds": setup,
        "train_seconds": sum(float(line["iter_time"]) for line in lines),
        "losses": [float(line["loss"]) for line in lines],
        "threads": torch.get_num_threads(),
    }
    Path(out).write_text(json.dumps(result))
    shutil.rmtree(work)


if __name__ == "__main__":
    main(*sys.argv[1:4])

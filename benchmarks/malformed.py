"""Malformed input in hundreds of ways: each must end with exit code 2, `litrecipe: error:` lines and no traceback.

    python benchmarks/malformed.py [--only recipes data models commands]

Recipes are made wrong field by field from the dataclasses; data, model files and command lines by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import shutil
import struct
import sys
import tempfile
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import LITRECIPE, REPO, as_hf_folder, not_refused, print_table, run_child, write_result

sys.path.append(str(REPO / "tests"))
from generated import wrong_values

from litrecipe.config.groups import FinetuneRecipe


@dataclasses.dataclass
class Case:
    """One wrong input."""

    name: str
    command: list[str | Path]
    must_say: str = ""
    """What the message has to hold: the key, the file, or file:line."""


def run(case: Case) -> str | None:
    """What is wrong with the answer, or None."""
    done = run_child([*LITRECIPE, *case.command])
    return not_refused(done.returncode, done.output, [case.must_say])


def recipe_cases(folder: Path) -> Iterator[Case]:
    """Every key misspelt, every typed key with a value of another type, and files that are no recipes."""

    def recipe(name: str, text: str | bytes) -> list[str | Path]:
        path = folder / f"{name}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["finetune", "--config", path]

    for group in dataclasses.fields(FinetuneRecipe):
        group_type = typing.get_type_hints(FinetuneRecipe)[group.name]
        if not dataclasses.is_dataclass(group_type):
            continue
        yield Case(f"group {group.name} misspelt", recipe(f"group-{group.name}", f"{group.name}x: {{}}\n"), group.name)
        yield Case(f"group {group.name} a list", recipe(f"list-{group.name}", f"{group.name}: [1, 2]\n"), group.name)
        for key, hint in typing.get_type_hints(group_type).items():
            dotted = f"{group.name}.{key}"
            misspelt = recipe(f"misspelt-{dotted}", f"{group.name}:\n  {key}x: 1\n")
            yield Case(f"{dotted} misspelt", misspelt, f"{dotted}")
            for number, wrong in enumerate(wrong_values(hint)):
                text = f"{group.name}:\n  {key}: {json.dumps(wrong)}\n"
                yield Case(f"{dotted} = {wrong!r}", recipe(f"wrong-{dotted}-{number}", text), dotted)

    texts: dict[str, str | bytes] = {
        "unclosed bracket": "train: {max_steps: 1\n",
        "tab": "train:\n\tmax_steps: 1\n",
        "a list": "- train\n- data\n",
        "a word": "train\n",
        "duplicate key": "out_dir: a\nout_dir: b\n",
        "python object": "out_dir: !!python/object/apply:os.getcwd []\n",
        "binary": bytes(range(256)),
        "latin-1": "out_dir: é\n".encode("latin-1"),
        "extends nothing": "extends: no/such/recipe\n",
        "extends itself": "extends: extends itself.yaml\n",
        "newer schema": "schema_version: 999\n",
    }
    for name, text in texts.items():
        yield Case(f"recipe: {name}", recipe(name, text))


def data_cases(folder: Path, model: Path) -> Iterator[Case]:
    """Files that cannot be read and rows that make no sense; the good first row shows that the line is counted."""
    good = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    user = {"role": "user", "content": "a"}
    rows: dict[str, Any] = {
        "no JSON": "{",
        "a number": "3",
        "a list": "[]",
        "an empty object": "{}",
        "unknown columns": json.dumps({"question": "a", "reply": "b"}),
        "messages empty": json.dumps({"messages": []}),
        "messages a string": json.dumps({"messages": "hello"}),
        "message a string": json.dumps({"messages": ["hello"]}),
        "no role": json.dumps({"messages": [{"content": "a"}]}),
        "no content": json.dumps({"messages": [user, {"role": "assistant"}]}),
        "unknown role": json.dumps({"messages": [user, {"role": "robot", "content": "b"}]}),
        "content a number": json.dumps({"messages": [user, {"role": "assistant", "content": 7}]}),
        "content null": json.dumps({"messages": [user, {"role": "assistant", "content": None}]}),
        "two users in a row": json.dumps({"messages": [user, user, {"role": "assistant", "content": "b"}]}),
        "assistant first": json.dumps({"messages": [{"role": "assistant", "content": "b"}]}),
        "completion a list": json.dumps({"prompt": "a", "completion": ["b"]}),
        "alpaca without output": json.dumps({"instruction": "a", "input": ""}),
        "sharegpt from unknown": json.dumps({"conversations": [{"from": "cat", "value": "a"}]}),
        "NaN": '{"prompt": NaN, "completion": "b"}',
    }
    command: list[str | Path] = ["finetune", "--model", model, "--data.cache_dir", folder / "cache", "--out_dir"]
    for number, (name, row) in enumerate(rows.items()):
        path = folder / f"row{number}.jsonl"
        path.write_text(f"{good}\n{row}\n")
        yield Case(f"row: {name}", [*command, folder / "out", "--data.train", path], f"{path.name}:2")

    whole = gzip.compress((good + "\n").encode() * 500)
    files: dict[str, bytes] = {
        "empty.jsonl": b"",
        "blank.jsonl": b"\n\n",
        "latin.jsonl": good.replace("b", "é").encode("latin-1") + b"\n",
        "torn.jsonl.gz": whole[: len(whole) // 2],
        "not.jsonl.gz": b"hello",
        "not.jsonl.zst": b"hello",
        "not.parquet": b"hello",
        "not.json": b"hello",
        "number.json": b"3",
        "data.docx": b"PK",
    }
    for name, content in files.items():
        path = folder / name
        path.write_bytes(content)
        yield Case(f"file: {name}", [*command, folder / "out", "--data.train", path], name)
    (folder / "nothing").mkdir()
    for source in (folder / "missing.jsonl", folder / "nothing", "toy:unit", "toy:units?n=0", "toy:units?m=3", ""):
        yield Case(f"data.train = {source}", [*command, folder / "out", "--data.train", source], "data.train")


def model_cases(folder: Path, model: Path) -> Iterator[Case]:
    """Model folders and GGUF files that are damaged in one place."""

    def damaged(name: str) -> Path:
        copy = folder / name
        shutil.copytree(model, copy)
        return copy

    def generate(source: str | Path) -> list[str | Path]:
        return ["generate", "--model", source, "--prompt", "hello"]

    (weights,) = model.glob("*.safetensors")
    for name in ("config.json", "tokenizer.json", weights.name):
        copy = damaged(f"without {name}")
        (copy / name).unlink()
        yield Case(f"model without {name}", generate(copy), name)
        copy = damaged(f"empty {name}")
        (copy / name).write_bytes(b"")
        yield Case(f"model with empty {name}", generate(copy), name)
    copy = damaged("torn")
    with (copy / weights.name).open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    yield Case("torn safetensors", generate(copy), weights.name)
    copy = damaged("flipped")
    with (copy / weights.name).open("r+b") as file:
        file.seek(weights.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    yield Case("one bit flipped in safetensors", generate(copy), weights.name)
    copy = damaged("header")
    with (copy / weights.name).open("r+b") as file:
        file.write(struct.pack("<Q", 2**62))
    yield Case("safetensors header too long", generate(copy), weights.name)
    index = damaged("sharded")
    (index / "manifest.json").unlink()
    (index / weights.name).rename(index / "model-00001-of-00002.safetensors")
    names = {
        "model.norm.weight": "model-00001-of-00002.safetensors",
        "lm_head.weight": "model-00002-of-00002.safetensors",
    }
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    yield Case("a missing shard", generate(index), "model-00002-of-00002.safetensors")

    changes: dict[str, dict[str, Any]] = {
        "unknown family": {"model_type": "nonesuch"},
        "no family": {"model_type": None},
        "hidden size of another model": {"hidden_size": 640},
        "more layers than weights": {"num_hidden_layers": 31},
        "vocabulary smaller than the tokenizer": {"vocab_size": 1000},
        "hidden size a word": {"hidden_size": "big"},
        "unknown rope": {"rope_scaling": {"rope_type": "nonesuch", "factor": 2.0}},
        "unknown activation": {"hidden_act": "nonesuch"},
    }
    for name, change in changes.items():
        copy = damaged(name)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **change}))
        yield Case(f"config.json: {name}", generate(copy), str(copy))

    gguf = folder / "not.gguf"
    gguf.write_bytes(b"hello")
    torn = folder / "torn.gguf"
    torn.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 5, 5))
    for source in (gguf, torn, folder / "missing.gguf", folder / "missing", "nobody/nothing"):
        yield Case(f"model.source = {source}", generate(source), str(source))


def command_cases() -> Iterator[Case]:
    """Command lines."""
    for words in (
        "finetun",
        "--nonsense",
        "finetune",
        "finetune --config no/such/recipe",
        "finetune --config",
        "finetune --train.max_stepz 3",
        "finetune --train.max_steps three",
        "finetune --train 3",
        "finetune --model a b",
        "evaluate",
        "evaluate --model nothing.gguf --tasks piqa",
        "evaluate --config no/such/recipe",
        "generate",
        "recipes",
        "recipes show",
        "recipes show no/such/recipe",
        "recipes validate no/such/recipe",
        "recipes cp no/such/recipe out.yaml",
        "data check",
        "model info",
        "model info missing.gguf",
        "model merge missing out",
        "runs ls no-such-folder",
        "runs diff no-such-folder no-such-folder",
    ):
        yield Case(f"litrecipe {words}", list(words.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = ("recipes", "data", "models", "commands")
    parser.add_argument("--only", nargs="+", choices=kinds, default=kinds)
    args = parser.parse_args()
    counts: dict[str, int] = {}
    wrong: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = as_hf_folder(folder / "model") if {"data", "models"} & set(args.only) else folder
        makers = {
            "recipes": lambda place: recipe_cases(place),
            "data": lambda place: data_cases(place, model),
            "models": lambda place: model_cases(place, model),
            "commands": lambda place: command_cases(),
        }
        for kind in args.only:
            place = folder / kind
            place.mkdir()
            counts[kind] = 0
            for case in makers[kind](place):
                counts[kind] += 1
                answer = run(case)
                if answer is not None:
                    wrong[case.name] = answer.replace(str(folder), "TMP")
                    print(f"{case.name}: {wrong[case.name]}", flush=True)
    print_table(["kind", "cases"], list(counts.items()))
    write_result("malformed", {"cases": counts, "wrong": wrong})
    if wrong:
        sys.exit(
            f"malformed: {len(wrong)} of {sum(counts.values())} inputs did not end with exit code 2 and a clear line"
        )


if __name__ == "__main__":
    main()

"""Small files of large content are refused before they are in memory; what is merely repetitive is not."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

from litrecipe.config.errors import InputError
from litrecipe.data import unpacking
from litrecipe.data.readers import read_rows

MB = 1_000_000


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of up to a megabyte."""
    for module in ("unpacking", "readers"):
        monkeypatch.setattr(f"litrecipe.data.{module}.LONGEST_ROW", MB)


def mistake_of(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(str(path)))
    [mistake] = caught.value.mistakes
    return mistake


def pack(path: Path, content: bytes) -> Path:
    packed = gzip.compress(content) if path.suffix == ".gz" else zstandard.ZstdCompressor().compress(content)
    path.write_bytes(packed)
    return path


@pytest.mark.parametrize("name", ["whole.json.gz", "whole.json.zst", "rows.jsonl.zst"])
def test_a_file_that_holds_hundreds_of_times_its_size_is_a_bomb(tmp_path: Path, name: str) -> None:
    """Rows one by one may repeat each other more, as only zstandard can say in so few bytes."""
    row = b'{"text": "' + b" " * 90_000 + b'"}'
    most, count = (unpacking.MOST_REPEATED, 400) if "rows" in name else (unpacking.MOST_UNPACKED, 40)
    path = pack(tmp_path / name, b"[" + b",".join([row] * count) + b"]" if most == 100 else (row + b"\n") * count)
    assert path.stat().st_size * most < count * len(row)
    assert f"holds more than {most} times its size, which no data does: " in mistake_of(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_line_without_end_is_too_long(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    content = b'{"text": "1"}\n' + np.random.default_rng(0).bytes(MB // 2 + 1).hex().encode()
    path.write_bytes(content) if path.suffix in (".jsonl", ".txt") else pack(path, content)
    assert mistake_of(path) == f"{path}:2: {unpacking.TOO_LONG}"


def test_repetitive_data_is_no_bomb(tmp_path: Path) -> None:
    rows = [{"text": "the same words " * 20, "n": n} for n in range(5000)]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for name in ("a.jsonl.gz", "a.jsonl.zst"):
        path = pack(tmp_path / name, content)
        assert path.stat().st_size * 20 < len(content)
        assert [row for row, _ in read_rows(str(path))] == rows


def write_repeated(path: Path, texts: list[str], rows: int) -> None:
    """A Parquet file that holds each text once."""
    indices = np.arange(rows, dtype=np.int32) % len(texts)
    column = pa.DictionaryArray.from_arrays(pa.array(indices), pa.array(texts))
    parquet.write_table(pa.table({"text": column}), path, compression="zstd", dictionary_pagesize_limit=2**30)


def test_parquet_that_repeats_a_long_text_is_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_repeated(path, ["x" * (MB // 2)], 2000)
    assert path.stat().st_size * unpacking.MOST_REPEATED < 2000 * (MB // 2)
    assert f"holds more than {unpacking.MOST_REPEATED} times its size" in mistake_of(path)


def test_parquet_of_pages_that_blow_up_is_a_bomb(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * 20_000] * 1000})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert f"holds more than {unpacking.MOST_UNPACKED} times its size" in mistake_of(path)


def test_a_parquet_row_too_long_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    noise = np.random.default_rng(0).bytes(MB).hex()
    parquet.write_table(pa.table({"text": ["a", "b", noise]}), path)
    assert mistake_of(path).startswith(f"{path}:3: ") and unpacking.TOO_LONG in mistake_of(path)


def test_parquet_rows_are_the_same_wherever_their_texts_are_kept(tmp_path: Path) -> None:
    """Nested, missing, repeated and unique texts, in one batch and, where they are long together, one by one."""
    long = np.random.default_rng(0).bytes(200_000).hex()
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": "é"}], "n": 1, "said": ["a", None, "b"], "of": {"x": "y"}},
        {"messages": [], "n": None, "said": None, "of": {"x": None}},
        {"messages": [{"role": "user", "content": long}] * 2, "n": 3, "said": [], "of": None},
        {"messages": [{"role": "user", "content": long}], "n": 4, "said": ["a"], "of": {"x": "y"}},
    ]
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.Table.from_pylist(rows), path)
    assert [row for row, _ in read_rows(str(path))] == rows

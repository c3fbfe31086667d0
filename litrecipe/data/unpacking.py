"""Files as they are inside: unpacked where they are compressed, Parquet in batches, and nothing that a small file blows
up to what no memory or disk holds."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

Watch = Callable[[BinaryIO], object]
"""Is told the file that is read, as it lies on the disk, so that `tell()` says how far reading is."""
COMPRESSIONS = (".gz", ".zst")
PARQUET_ROWS = 1024
"""Rows of a Parquet file that are in memory at once."""
LONGEST_ROW = 256_000_000
"""Bytes of a row."""
TOO_LONG = f"more than {LONGEST_ROW // 10**6} MB: too long for a row: cut it in two"
MOST_UNPACKED = 100
"""What a compressed file that is read whole may hold, as a multiple of its size, once that is more than `LONGEST_ROW`:
text has 3 to 20, a bomb thousands."""
MOST_REPEATED = 10_000
"""The same of a file that is read row by row: rows may repeat each other."""
ZST_CHUNK = 1 << 12
"""Bytes that are unpacked at once: of a bomb they are tens of MB."""


def open_unpacked(path: Path, watch: Watch | None = None, most: int = MOST_REPEATED) -> BinaryIO:
    """A file, unpacked while it is read. Raises one of `read_errors` where it is damaged, and where it holds more than
    `most` times its size."""
    suffix = path.suffix.lower()
    file: Any
    if suffix == ".gz":
        file = gzip.GzipFile(path, "rb")
        raw = file.fileobj
    elif suffix == ".zst":
        file = _ZstFile(path)
        raw = file.compressed
    else:
        file = raw = path.open("rb")
    if watch is not None:
        watch(raw)
    return file if file is raw else io.BufferedReader(_Unpacked(file, path.stat().st_size, most))


class Bomb(EOFError):
    """A compressed file holds more than `times` its size, which no data does."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times


class _Unpacked(io.RawIOBase):
    """What a compressed file holds, up to where it is no data any more."""

    def __init__(self, file: Any, size: int, most: int) -> None:
        self.file, self.most, self.left = file, most, max(LONGEST_ROW, most * size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self.file.readinto(buffer)
        self.left -= count
        if self.left < 0:
            raise Bomb(self.most)
        return count

    def close(self) -> None:
        self.file.close()
        super().close()


class _ZstFile(io.RawIOBase):
    """Reads a zstandard file and, unlike the library's own reader, raises EOFError when its last frame is cut."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self.compressed = path.open("rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._inside_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = (self._frame.unused_data if self._frame.eof else b"") or self.compressed.read(ZST_CHUNK)
            if not chunk:
                if self._inside_frame:
                    raise EOFError
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            self._ready = memoryview(self._frame.decompress(chunk))
            self._inside_frame = not self._frame.eof
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self.compressed.close()
        super().close()


def read_errors() -> tuple[type[Exception], ...]:
    """What reading a broken or cut compressed file raises."""
    from zstandard import ZstdError

    return (EOFError, gzip.BadGzipFile, zlib.error, ZstdError)


def broken(error: Exception) -> str:
    """One of `read_errors` in words, with a cure."""
    if isinstance(error, Bomb):
        return f"holds more than {error.times} times its size, which no data does: fetch it again, or unpack it"
    if isinstance(error, EOFError):
        return "the compressed file ends too early: fetch or write it again"
    return f"not a readable compressed file ({reason(error)}): fetch or write it again"


def reason(error: Exception) -> str:
    """The first line of what an error says, or its name."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return next(iter(str(error).splitlines()), type(error).__name__)


def parquet_rows(source: Any, size: int) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet file that takes so many bytes on disk; raises Bomb, and ValueError for a row too long."""
    from pyarrow import parquet

    texts = [one.path for one in parquet.ParquetFile(source).schema if one.physical_type == "BYTE_ARRAY"]
    # A text that is stored once stays so in memory until it is known how much the rows make of it.
    file = parquet.ParquetFile(source, read_dictionary=texts)
    if _unpacked_pages(file.metadata) > max(LONGEST_ROW, MOST_UNPACKED * size):
        raise Bomb(MOST_UNPACKED)
    left = max(LONGEST_ROW, MOST_REPEATED * size)
    for batch in file.iter_batches(batch_size=PARQUET_ROWS):
        length = _length(batch)
        left -= length
        if left < 0:
            raise Bomb(MOST_REPEATED)
        together = len(batch) if length <= LONGEST_ROW else 1
        for start in range(0, len(batch), together):
            part = batch.slice(start, together)
            if together == 1 and _length(part) > LONGEST_ROW:
                raise ValueError(TOO_LONG)
            yield from part.to_pylist()


def _unpacked_pages(metadata: Any) -> int:
    """Bytes of all pages of a Parquet file, as its metadata tells."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    return sum(group.column(column).total_uncompressed_size for group in groups for column in range(group.num_columns))


def _length(batch: Any) -> int:
    """Bytes of all columns in its rows."""
    return sum(map(_text_bytes, batch.columns))


def _text_bytes(array: Any) -> int:
    """Bytes that the texts of a column have in its rows, where in memory each is there once."""
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        lengths = compute.binary_length(array.dictionary).take(array.indices)
        return compute.sum(lengths).as_py() or 0
    if types.is_struct(array.type):
        return sum(map(_text_bytes, array.flatten()))
    if types.is_list(array.type) or types.is_large_list(array.type):
        return _text_bytes(array.flatten())
    return int(array.nbytes)

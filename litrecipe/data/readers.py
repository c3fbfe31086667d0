"""Rows of files, folders, hub data sets and generated sources, each with the place it comes from. Imports no torch."""

from __future__ import annotations

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import parse_qsl

from litrecipe.config.errors import InputError
from litrecipe.data.toy import ToySource, toy_rows

Located = tuple[dict[str, Any], str]
"""A row and where it stands: `file:line`, or `file:row` for JSON and Parquet (both count from 1)."""

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
COMPRESSIONS = (".gz", ".zst")
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(\?.*)?")
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing"),
}


class Mistakes:
    """Gathers what is wrong with rows; remembers the first 20 and counts the rest."""

    SHOWN = 20

    def __init__(self) -> None:
        self.shown: list[str] = []
        self.count = 0

    def add(self, mistake: str) -> None:
        """Note one mistake, `<file:line>: <what>: <cure>`."""
        self.count += 1
        if len(self.shown) < self.SHOWN:
            self.shown.append(mistake)

    def raise_if_any(self) -> None:
        """Raise InputError with the first 20 mistakes and the number of the others."""
        if self.count > self.SHOWN:
            raise InputError(*self.shown, f"… and {self.count - self.SHOWN} more mistakes")
        if self.count:
            raise InputError(*self.shown)


def read_rows(source: str, mistakes: Mistakes | None = None) -> Iterator[Located]:
    """The rows of a file, a folder, a hub data set id or a `toy:` source, in a fixed order.

    Rows that cannot be read are noted in `mistakes`; without it they are raised together at the end, as InputError.
    A source that does not exist raises InputError at once.
    """
    gathered = Mistakes() if mistakes is None else mistakes
    if source.startswith("toy:"):
        yield from toy_rows(source)
    else:
        for path in find_files(source):
            yield from _read_file(path, gathered)
    if mistakes is None:
        gathered.raise_if_any()


def source_hash(source: str) -> str:
    """Hash of what a source holds: changes when the rows may have changed."""
    digest = sha256()
    if source.startswith("toy:"):
        digest.update(repr(list(toy_rows(source))).encode())
        return digest.hexdigest()
    for path in find_files(source):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def find_files(source: str) -> list[Path]:
    """The data files of a path or hub id, sorted; raises InputError when there are none."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _files_under(path, source)
    if path.exists():
        if _kind(path) is None:
            raise InputError(f"{source}: {path.suffix or 'no suffix'}: data files end in {_suffixes()}")
        return [path]
    looks_like_a_file = _kind(Path(source.partition("?")[0])) is not None
    if HUB_ID.fullmatch(source) and not looks_like_a_file:
        return _hub_files(source)
    raise InputError(f"{source}: no such file or folder{_nearest(path)}")


def check_sources(sources: dict[str, str]) -> None:
    """Raise InputError naming the recipe's keys whose sources cannot be found; their rows are not read."""
    mistakes = []
    for key, source in sources.items():
        try:
            if source.startswith("toy:"):
                ToySource.parse(source)
            else:
                find_files(source)
        except InputError as error:
            mistakes += [f"{key}: {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise InputError(*mistakes)


def check_source(key: str, source: str) -> None:
    """`check_sources` of one."""
    check_sources({key: source})


def _suffixes() -> str:
    return ", ".join(SUFFIXES) + f" (and {' or '.join(COMPRESSIONS)} after it)"


def _kind(path: Path) -> str | None:
    """`.json`, `.jsonl`, `.parquet` or `.txt`; None for other files."""
    name = path.name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = Path(name).suffix
    return suffix if suffix in SUFFIXES else None


def _files_under(folder: Path, source: str) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and _kind(path) and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not found:
        raise InputError(f"{source}: no data files in this folder: they end in {_suffixes()}")
    return found


def _nearest(path: Path) -> str:
    """A hint at the path the user may have meant: the deepest folder that exists, and the likeliest name in it."""
    folder, wanted = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, wanted = folder.parent, folder.name
    near = get_close_matches(wanted, [entry.name for entry in folder.iterdir()], n=1) if folder.is_dir() else []
    return f" (did you mean {folder / near[0]}?)" if near else f" ({folder} has nothing of a similar name)"


@cache
def _hub_files(source: str) -> list[Path]:
    """Download a data set's files; `org/name?split=test&files=*.jsonl` chooses among them (split is train if unsaid).

    A data set whose file names name no split is read whole.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, query = source.partition("?")
    options = dict(parse_qsl(query))
    split = options.pop("split", "train")
    pattern = options.pop("files", "*")
    if options or split not in SPLIT_NAMES:
        raise InputError(f"{source}: {query}: options are split=train|validation|test and files=<pattern>")
    patterns = [f"*{suffix}{compression}" for suffix in SUFFIXES for compression in ("", *COMPRESSIONS)]
    try:
        folder = Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, ConnectionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{source}: no such file or folder{_nearest(Path(name))}, and not to be had from the hub: {reason}; "
            "give a local file, or check the id, the network and HF_HUB_OFFLINE"
        ) from error
    found = [path for path in _files_under(folder, source) if fnmatch(path.relative_to(folder).as_posix(), pattern)]
    if any(_names_split(path.relative_to(folder), names) for path in found for names in SPLIT_NAMES.values()):
        found = [path for path in found if _names_split(path.relative_to(folder), SPLIT_NAMES[split])]
    if not found:
        raise InputError(f"{source}: no files of the split {split!r} that match {pattern!r} in this data set")
    return found


def _names_split(path: Path, names: tuple[str, ...]) -> bool:
    return any(word in names for word in re.split(r"[^a-z]+", path.as_posix().lower()))


def _read_file(path: Path, mistakes: Mistakes) -> Iterator[Located]:
    kind = _kind(path)
    if kind == ".parquet":
        yield from _read_parquet(path, mistakes)
    elif kind == ".json":
        yield from _read_json(path, mistakes)
    else:
        yield from _read_lines(path, mistakes, plain_text=kind == ".txt")


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(_ZstFile(path))
    return path.open("rb")


class _ZstFile(io.RawIOBase):
    """Reads a zstandard file and, unlike the library's own reader, raises EOFError when its last frame is cut."""

    def __init__(self, path: Path) -> None:
        import zstandard

        self._file = path.open("rb")
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._inside_frame = False
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            chunk = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(1 << 18)
            if not chunk:
                if self._inside_frame:
                    raise EOFError
                return 0
            if self._frame.eof:
                self._frame = self._new_frame()
            self._ready = self._frame.decompress(chunk)
            self._inside_frame = not self._frame.eof
        taken = self._ready[: len(buffer)]
        buffer[: len(taken)] = taken
        self._ready = self._ready[len(taken) :]
        return len(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_errors() -> tuple[type[Exception], ...]:
    """What reading a broken or cut compressed file raises."""
    from zstandard import ZstdError

    return (EOFError, gzip.BadGzipFile, zlib.error, ZstdError)


def _read_lines(path: Path, mistakes: Mistakes, plain_text: bool) -> Iterator[Located]:
    """JSONL, or text with a row a line; empty lines count but give no row."""
    number = 0
    try:
        with _open(path) as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path}:{number}"
                text = _decode(raw, number == 1, where, mistakes)
                if text is None or not text.strip():
                    continue
                if plain_text:
                    yield {"text": text.rstrip("\r\n")}, where
                elif (row := _parse(text, where, mistakes)) is not None:
                    yield row, where
    except _read_errors() as error:
        mistakes.add(f"{path}:{number + 1}: {_broken(error)}")


def _broken(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "the compressed file ends too early: fetch or write it again"
    return f"not a readable compressed file ({error}): fetch or write it again"


def _decode(raw: bytes, is_start: bool, where: str, mistakes: Mistakes) -> str | None:
    try:
        return raw.decode("utf-8-sig" if is_start else "utf-8")
    except UnicodeDecodeError as error:
        mistakes.add(f"{where}: byte {error.start + 1} is 0x{raw[error.start]:02x}, not UTF-8: save the file as UTF-8")
        return None


def _parse(text: str, where: str, mistakes: Mistakes) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        mistakes.add(f"{where}: not valid JSON ({error.msg} at column {error.colno}): one JSON object a line")
    except (ValueError, RecursionError) as error:
        mistakes.add(f"{where}: {_unreadable(error)}")
    else:
        if isinstance(row, dict):
            return row
        mistakes.add(f'{where}: {_excerpt(row)}: a row must be a JSON object like {{"messages": […]}}')
    return None


def _unreadable(error: Exception) -> str:
    """What Python's reader refuses although it is JSON."""
    if isinstance(error, RecursionError):
        return "JSON nested too deeply: flatten it"
    return f"a number Python does not read ({error}): write it as text"


def _excerpt(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:39] + "…"


def _read_json(path: Path, mistakes: Mistakes) -> Iterator[Located]:
    """A list of objects, or an object that holds one such list (as `{"data": […]}`)."""
    try:
        with _open(path) as file:
            raw = file.read()
    except _read_errors() as error:
        mistakes.add(f"{path}:1: {_broken(error)}")
        return
    try:
        document = json.loads(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        mistakes.add(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8")
        return
    except json.JSONDecodeError as error:
        cure = "one object a line belongs into a .jsonl file" if error.msg == "Extra data" else "mend the JSON"
        mistakes.add(f"{path}:{error.lineno}: not valid JSON ({error.msg} at column {error.colno}): {cure}")
        return
    except (ValueError, RecursionError) as error:
        mistakes.add(f"{path}:1: {_unreadable(error)}")
        return
    if isinstance(document, dict):
        lists = [value for value in document.values() if isinstance(value, list)]
        document = lists[0] if len(lists) == 1 else document
    if not isinstance(document, list):
        mistakes.add(f"{path}:1: neither a list of rows nor an object that holds one: give [{{…}}, …]")
        return
    for number, row in enumerate(document, start=1):
        if isinstance(row, dict):
            yield row, f"{path}:{number}"
        else:
            mistakes.add(f"{path}:{number}: {_excerpt(row)}: a row must be a JSON object")


def _read_parquet(path: Path, mistakes: Mistakes) -> Iterator[Located]:
    import pyarrow
    from pyarrow import parquet

    try:
        source = io.BytesIO(_open(path).read()) if path.suffix.lower() in COMPRESSIONS else path
        number = 0
        for batch in parquet.ParquetFile(source).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield row, f"{path}:{number}"
    except (pyarrow.ArrowException, OSError, ValueError, *_read_errors()) as error:
        mistakes.add(f"{path}:1: not a readable Parquet file ({str(error).splitlines()[0]}): fetch or write it again")

"""Rows of files, folders, hub data sets and generated sources, each with the place it comes from. Imports no torch."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from functools import cache, partial
from glob import escape
from hashlib import file_digest, sha256
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qsl

from litrecipe.checkpoint.hub import HUB_ID, fetch
from litrecipe.config.errors import InputError
from litrecipe.config.files import nearest, refuse_links_out
from litrecipe.config.progress import say
from litrecipe.data.toy import ToySource, toy_rows
from litrecipe.data.unpacking import (
    COMPRESSIONS,
    LONGEST_ROW,
    MOST_UNPACKED,
    TOO_LONG,
    Watch,
    broken,
    open_unpacked,
    parquet_rows,
    read_errors,
    reason,
)

Located = tuple[dict[str, Any], str]
"""A row and where it stands: `file:line`, or `file:row` for JSON and Parquet (both count from 1)."""

SUFFIXES = (".json", ".jsonl", ".parquet", ".txt")
NOT_DATA = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|requirements)(?![a-z]).*\.txt.*|dataset_(dict|infos?)\.json", re.I
)
"""Files that lie beside data and whose names end like data."""
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


def read_rows(source: str, mistakes: Mistakes | None = None, split: str = "train") -> Iterator[Located]:
    """The rows of a file, a folder, a hub data set id or a `toy:` source, in a fixed order (`split`: see `find_files`).

    Rows that cannot be read are noted in `mistakes`; without it they are raised together at the end, as InputError.
    A source that does not exist raises InputError at once.
    """
    gathered = Mistakes() if mistakes is None else mistakes
    if source.startswith("toy:"):
        yield from toy_rows(source)
    else:
        for path in find_files(source, split):
            yield from read_file(path, gathered)
    if mistakes is None:
        gathered.raise_if_any()


def source_hash(source: str) -> str:
    """Hash of what a source holds: changes when the rows, or the names of the files in a folder, may have changed."""
    digest = sha256()
    if source.startswith("toy:"):
        digest.update(repr(list(toy_rows(source))).encode())
        return digest.hexdigest()
    folder, names = _locate(source)
    for name in names:
        path = folder / name
        digest.update(f"{name}\0{path.stat().st_size}\0{file_hash(path)}\0".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Digest of a file's content, read once a process as long as size and time stay what they are."""
    stat = path.stat()
    return _file_hash(path, stat.st_size, stat.st_mtime_ns)


@cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> str:
    """Digest of a file's content; `size` and `mtime_ns` are those it has now, so that it is read again when changed."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def find_files(source: str, split: str = "train") -> list[Path]:
    """The data files of a path or hub id, sorted.

    Of a folder or a hub data set they are those of one split, and of one kind; `folder?split=test&files=*.jsonl`
    chooses among them (`split` if unsaid, and everything when no file name names a split). InputError when there are
    none, or of several kinds.
    """
    folder, names = _locate(source, split)
    return [folder / name for name in names]


def _locate(source: str, split: str = "train") -> tuple[Path, list[str]]:
    """A folder and the names of the data files below it."""
    try:
        path = Path(source).expanduser()
        if path.is_symlink() and not path.exists():
            raise InputError(f"{source}: a link to {path.readlink()}, which is not there: mend it")
        if path.exists() and not path.is_dir():
            if not path.is_file():
                raise InputError(f"{source}: neither a file nor a folder: write its rows to a file")
            if _kind(path.name) is None:
                raise InputError(f"{source}: {path.suffix or 'no suffix'}: data files end in {_suffixes()}")
            return path.parent, [path.name]
        name, _, query = source.partition("?")
        folder = Path(name).expanduser()
        if folder.is_dir():
            if (folder / "index.json").is_file() and any(folder.glob("chunk-*.bin")):
                raise InputError(f"{source}: is token shards: `litrecipe pretrain` reads them; give text here")
            chosen = _choose(source, _files_below(folder), query, split)
            refuse_links_out(folder, chosen)
            return folder, chosen
        if _kind(folder.name) is None and (match := HUB_ID.fullmatch(name)):
            return _from_hub(source, match["repo"], match["revision"], query, split)
        close = nearest(folder)
    except (OSError, RuntimeError) as error:  # a name too long; a home that is nobody's
        raise InputError(f"{source}: {reason(error)}: give a file or folder that can be read") from error
    hint = f"did you mean {close}?" if close else "nothing there has a similar name"
    raise InputError(f"{source}: no such file or folder ({hint})")


def check_source(key: str, source: str) -> None:
    """`check_sources` of one."""
    check_sources({key: source})


def check_sources(sources: Mapping[str, str | list[str]], split: str = "train") -> None:
    """Raise InputError naming the recipe's keys whose sources cannot be found; their rows are not read."""
    mistakes = []
    several = {key: [given] if isinstance(given, str) else given for key, given in sources.items()}
    for key, source in ((key, source) for key, given in several.items() for source in given):
        try:
            if source.startswith("toy:"):
                ToySource.parse(source)
            else:
                find_files(source, split)
        except InputError as error:
            mistakes += [f"{key}: {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise InputError(*mistakes)


def _suffixes() -> str:
    return ", ".join(SUFFIXES) + f" (and {' or '.join(COMPRESSIONS)} after it)"


def _kind(name: str) -> str | None:
    """`.json`, `.jsonl`, `.parquet` or `.txt`; None for other files."""
    name = name.lower()
    for compression in COMPRESSIONS:
        name = name.removesuffix(compression)
    suffix = Path(name).suffix
    return suffix if suffix in SUFFIXES else None


def _files_below(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _choose(source: str, names: list[str], query: str, split: str) -> list[str]:
    """The data files among all files of a folder or data set: of one split where names tell splits, and of one kind."""
    options = dict(parse_qsl(query))
    split = options.pop("split", split)
    pattern = options.pop("files", "*")
    if options or split not in SPLIT_NAMES:
        raise InputError(f"{source}: {query}: options are split=train|validation|test and files=<pattern>")
    data = sorted(name for name in names if _is_data(name))
    if not data:
        raise InputError(f"{source}: no data files in it: they end in {_suffixes()}")
    chosen = [name for name in data if fnmatch(name, pattern)]
    if any(_names_split(name, words) for name in chosen for words in SPLIT_NAMES.values()):
        chosen = [name for name in chosen if _names_split(name, SPLIT_NAMES[split])]
    if not chosen:
        raise InputError(
            f"{source}: no files of the split {split!r} that match {pattern!r}, but {_list(data)}: choose with "
            "?split=train|validation|test, ?files=<pattern>, or both"
        )
    if len({_kind(name) for name in chosen}) > 1:
        endings = Counter("*" + name[name.lower().rindex(str(_kind(name))) :] for name in chosen)
        told = ", ".join(f"{count} {ending}" for ending, count in endings.items())
        cure = f"choose one with ?files=<pattern> behind it, such as ?files={next(iter(endings))}, or name one file"
        raise InputError(f"{source}: files of several kinds ({told}): {cure}")
    if chosen != data:
        _say_once(f"{source}: takes {_list(chosen)} of its {len(data)} data files")
    return chosen


def _is_data(name: str) -> bool:
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") for part in parts)
    return not hidden and _kind(name) is not None and not NOT_DATA.fullmatch(parts[-1])


def _names_split(name: str, words: tuple[str, ...]) -> bool:
    return any(word in words for word in re.split(r"[^a-z]+", name.lower()))


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


_say_once = cache(say)


@cache
def _from_hub(source: str, repo: str, revision: str | None, query: str, split: str) -> tuple[Path, list[str]]:
    """Download what was chosen of a data set; without the network, choose among what was downloaded before."""
    listed = _hub_listing(repo, revision)
    if listed is not None:
        chosen = _choose(source, listed, query, split)
        wanted = [escape(name) for name in chosen]
    else:
        kept = _files_below(fetch(source, repo, revision, kind="dataset", allow=[]))
        chosen = _choose(source, kept, query, split)
        wanted = [re.sub(r"\d+", "*", escape(name)) for name in chosen]  # no shard of them may be missing
    return fetch(source, repo, revision, kind="dataset", allow=wanted), chosen


def _hub_listing(repo: str, revision: str | None) -> list[str] | None:
    """The names of a data set's files; None when the hub does not tell (`fetch` then says why)."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        # One request, where list_repo_files tries again for half a minute when there is no network.
        return [file.rfilename for file in HfApi().dataset_info(repo, revision=revision).siblings or []]
    except (OfflineModeIsEnabled, HTTPError, HFValidationError):
        return None


def read_file(
    path: Path, mistakes: Mistakes, *, whole_text: bool = False, watch: Watch | None = None
) -> Iterator[Located]:
    """The rows of one file; `whole_text` makes one row of a .txt file, its text as it stands."""
    kind = _kind(path.name)
    if kind == ".parquet":
        yield from _read_parquet(path, mistakes, watch)
    elif kind == ".json":
        yield from _read_json(path, mistakes, watch)
    elif kind == ".txt" and whole_text:
        if (text := read_text(path, mistakes, watch)) is not None:
            yield {"text": text}, f"{path}:1"
    else:
        yield from _read_lines(path, mistakes, plain_text=kind == ".txt", watch=watch)


def _read_lines(path: Path, mistakes: Mistakes, plain_text: bool, watch: Watch | None) -> Iterator[Located]:
    """JSONL, or text with a row a line; empty lines count but give no row."""
    number = 0
    try:
        with open_unpacked(path, watch) as file:
            for number, raw in enumerate(iter(partial(file.readline, LONGEST_ROW + 1), b""), start=1):
                where = f"{path}:{number}"
                if len(raw) > LONGEST_ROW:
                    mistakes.add(f"{where}: {TOO_LONG}")
                    return
                text = _decode(raw, number == 1, where, mistakes)
                if text is None or not text.strip():
                    continue
                if plain_text:
                    yield {"text": text.rstrip("\r\n")}, where
                elif (row := _parse(text, where, mistakes)) is not None:
                    yield row, where
    except read_errors() as error:
        mistakes.add(f"{path}:{number + 1}: {broken(error)}")


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


def read_text(path: Path, mistakes: Mistakes, watch: Watch | None = None) -> str | None:
    """The whole of a file as text, with its line ends as they are; None where it cannot be read."""
    try:
        with open_unpacked(path, watch, MOST_UNPACKED) as file:
            raw = file.read()
    except read_errors() as error:
        mistakes.add(f"{path}:1: {broken(error)}")
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        mistakes.add(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8: save the file as UTF-8")
        return None


def _read_json(path: Path, mistakes: Mistakes, watch: Watch | None) -> Iterator[Located]:
    """A list of objects, or an object that holds one such list (as `{"data": […]}`)."""
    text = read_text(path, mistakes, watch)
    if text is None:
        return
    try:
        document = json.loads(text)
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


def _read_parquet(path: Path, mistakes: Mistakes, watch: Watch | None) -> Iterator[Located]:
    import pyarrow

    number = 0
    try:
        with open_unpacked(path, watch, MOST_UNPACKED) as file:
            source = io.BytesIO(file.read()) if path.suffix.lower() in COMPRESSIONS else file
            for row in parquet_rows(source, path.stat().st_size):
                number += 1
                yield row, f"{path}:{number}"
    except read_errors() as error:
        mistakes.add(f"{path}:1: {broken(error)}")
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        mistakes.add(f"{path}:{number + 1}: not a readable Parquet file ({reason(error)}): fetch or write it again")

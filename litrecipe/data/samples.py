"""Tokenised samples on disk, read through memory maps.

Shapes: N samples, S segments, T tokens of all of them, E values of an extra of all of them.

A folder holds flat arrays (`tokens`, `weights`, `segment_starts`, `segment_parents`, `sample_starts`, and two for each
extra), the samples' names and, written last, `complete.json` with the sha256 of every other file and of itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from litrecipe.checkpoint.manifest import replace_folder, sync, write_text
from litrecipe.config.errors import InputError
from litrecipe.model.row import Sample, Segment

MARKER = "complete.json"
IDS = "ids.json"
CURE = "delete this folder and run again"
ARRAYS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype(np.int32),  # (T,)
    "weights": np.dtype(np.uint8),  # (T,), float32 when they are not all 0 or 1
    "segment_starts": np.dtype(np.int64),  # (S + 1,), places in `tokens`
    "segment_parents": np.dtype(np.int32),  # (S,), within the sample, -1 for none
    "sample_starts": np.dtype(np.int64),  # (N + 1,), places among the segments
}


FLOAT, PLACE = np.dtype(np.float32), np.dtype(np.int64)


class SampleSet:
    """Samples of a folder, or some of them. Reading one touches only its own part of the files."""

    def __init__(
        self, folder: str | Path, indices: np.ndarray | None = None, *, verify: bool = True, cure: str = CURE
    ) -> None:
        """Open what `SampleSet.write` wrote. Raises InputError naming a file that is missing, cut or altered."""
        self.folder = Path(folder)
        marker = _read_marker(self.folder, cure)
        if verify:
            _verify(self.folder, marker, cure)
        self._arrays = {name: _map(self.folder / f"{name}.bin", np.dtype(marker["dtypes"][name])) for name in ARRAYS}
        self._extras = {
            name: (
                _map(self.folder / f"extra-{name}.bin", np.dtype(marker["dtypes"].get(f"extra-{name}", FLOAT))),
                _map(self.folder / f"extra-{name}-starts.bin", PLACE),
            )
            for name in marker.get("extras", [])
        }
        """name → (E,) values and (N + 1,) where each sample's begin."""
        self.about: dict[str, Any] = marker["about"]
        """What its writer kept with it."""
        self._whole_fingerprint: str = marker["fingerprint"]
        count = len(self._arrays["sample_starts"]) - 1
        self._indices = np.arange(count) if indices is None else np.asarray(indices)
        self._is_subset = indices is not None

    @classmethod
    def write(
        cls, folder: str | Path, samples: Iterable[Sample], about: Callable[[], dict[str, Any]] = dict
    ) -> SampleSet:
        """Write samples into a new folder, all or nothing: it has its name when it is complete and on the disk.

        Of several processes only one may do so at a time; what a killed one left behind is removed.
        `about` is called when all samples are written and gives what else shall be kept (JSON).
        """
        folder = Path(folder)
        parts = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir(parents=True)
        try:
            _write_files(parts, samples, about)
            replace_folder(parts, folder)
        finally:
            shutil.rmtree(parts, ignore_errors=True)
        return cls(folder, verify=False)

    def subset(self, indices: Iterable[int]) -> SampleSet:
        """The samples at `indices`, in that order, on the same files."""
        return SampleSet(self.folder, self._indices[np.asarray(list(indices), dtype=np.int64)], verify=False)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        place = int(self._indices[index])
        first, last = self._arrays["sample_starts"][place : place + 2]
        segments = []
        for segment in range(first, last):
            start, stop = self._arrays["segment_starts"][segment : segment + 2]
            segments.append(
                Segment(
                    self._arrays["tokens"][start:stop],
                    self._arrays["weights"][start:stop].astype(np.float32),
                    int(self._arrays["segment_parents"][segment]),
                )
            )
        extra = {name: values[starts[place] : starts[place + 1]] for name, (values, starts) in self._extras.items()}
        return Sample(self._ids[place], tuple(segments), extra)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each sample."""
        starts = self._arrays["segment_starts"][self._arrays["sample_starts"]]
        return np.diff(starts)[self._indices]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the samples and their order, wherever they came from: their names do not count."""
        if not self._is_subset:
            return self._whole_fingerprint
        return sha256(self._whole_fingerprint.encode() + self._indices.astype(np.int64).tobytes()).hexdigest()

    @cached_property
    def _ids(self) -> list[str]:
        return json.loads((self.folder / IDS).read_text(encoding="utf-8"))


def _write_files(folder: Path, samples: Iterable[Sample], about: Callable[[], dict[str, Any]]) -> None:
    ids: list[str] = []
    segment_starts, segment_parents, sample_starts = [0], [], [0]
    extras: dict[str, _Extra] = {}
    weight_dtype = ARRAYS["weights"]
    with ExitStack() as files:
        tokens, weights = (files.enter_context((folder / f"{name}.bin").open("wb")) for name in ("tokens", "weights"))
        for sample in samples:
            for segment in sample.segments:
                if weight_dtype == np.uint8 and not np.isin(segment.weights, (0, 1)).all():
                    weight_dtype = _widen(folder, weights)
                tokens.write(np.asarray(segment.tokens, dtype=ARRAYS["tokens"]).tobytes())
                weights.write(np.asarray(segment.weights, dtype=weight_dtype).tobytes())
                segment_starts.append(segment_starts[-1] + len(segment.tokens))
                segment_parents.append(segment.parent)
            sample_starts.append(len(segment_parents))
            ids.append(sample.id)
            for name, values in sample.extra.items():
                if name not in extras:
                    extras[name] = _Extra(files.enter_context((folder / f"extra-{name}.bin").open("wb")), values)
                extras[name].add(values)
    small = {"segment_starts": segment_starts, "segment_parents": segment_parents, "sample_starts": sample_starts}
    for name, numbers in small.items():
        np.array(numbers, dtype=ARRAYS[name]).tofile(folder / f"{name}.bin")
    for name, extra in extras.items():
        np.array(extra.starts, dtype=PLACE).tofile(folder / f"extra-{name}-starts.bin")
    (folder / IDS).write_text(json.dumps(ids), encoding="utf-8")
    hashes = _hash_files(folder)
    for name in hashes:
        sync(folder / name)
    dtypes = {name: str(dtype) for name, dtype in ARRAYS.items()} | {"weights": str(weight_dtype)}
    dtypes |= {f"extra-{name}": str(extra.dtype) for name, extra in extras.items()}
    content = {name: digest for name, digest in hashes.items() if name != IDS}
    fingerprint = sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    marker = {"about": about(), "fingerprint": fingerprint, "dtypes": dtypes, "files": hashes, "extras": list(extras)}
    write_text(folder / MARKER, json.dumps({**marker, "seal": _seal(marker)}, indent=1))


class _Extra:
    """A file that an extra of all samples is written into."""

    def __init__(self, file: BinaryIO, first: np.ndarray) -> None:
        """The `first` sample's values say what kind of numbers they are: integers of a size, or float32."""
        self.file = file
        self.dtype = first.dtype if np.issubdtype(first.dtype, np.integer) else FLOAT
        self.starts = [0]

    def add(self, values: np.ndarray) -> None:
        """Those of the next sample."""
        self.file.write(np.asarray(values, dtype=self.dtype).tobytes())
        self.starts.append(self.starts[-1] + len(values))


def _widen(folder: Path, weights: Any) -> np.dtype[Any]:
    """Rewrite the weights so far as float32."""
    weights.flush()
    wide = np.fromfile(folder / "weights.bin", dtype=np.uint8).astype(np.float32)
    weights.seek(0)
    weights.write(wide.tobytes())
    return np.dtype(np.float32)


def _hash_files(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.iterdir()):
        if path.name != MARKER:
            with path.open("rb") as file:
                hashes[path.name] = file_digest(file, "sha256").hexdigest()
    return hashes


def is_complete(folder: str | Path) -> bool:
    """Whether a set of samples was written here to its end."""
    return (Path(folder) / MARKER).is_file()


def _read_marker(folder: Path, cure: str) -> dict[str, Any]:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no complete set of samples: {cure}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{folder / MARKER}: {error}: damaged: {cure}") from error
    if not isinstance(marker, dict) or marker.pop("seal", None) not in (None, _seal(marker)):
        raise InputError(f"{folder / MARKER}: altered: {cure}")
    return marker


def _seal(marker: dict[str, Any]) -> str:
    """Hash of what the marker says, as it is read again."""
    return sha256(json.dumps(json.loads(json.dumps(marker)), sort_keys=True).encode()).hexdigest()


def _verify(folder: Path, marker: dict[str, Any], cure: str) -> None:
    found = _hash_files(folder)
    mistakes = [
        f"{folder / name}: {'altered' if name in found else 'missing'}: {cure}"
        for name, wanted in marker["files"].items()
        if found.get(name) != wanted
    ]
    if mistakes:
        raise InputError(*mistakes)


def _map(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")

"""Text → a folder of token shards, in several processes. Killed and started again, it goes on where it was.

What is written does not depend on the number of processes, nor on how often it was interrupted: documents come back
from the processes in their order, a shard ends with the document that fills it, and after each shard the state is
written down from which the rest follows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from litrecipe.checkpoint.manifest import (
    MANIFEST,
    describe_file,
    entries_of,
    replace_folder,
    write_manifest,
    write_text,
)
from litrecipe.config.errors import InputError
from litrecipe.config.files import locked, read_json
from litrecipe.config.prepare import PrepareRecipe, parse_size
from litrecipe.config.progress import Line, counted, duration, say
from litrecipe.config.stop import Stopped
from litrecipe.data.cache import key_of
from litrecipe.data.contamination import check_against, evaluation_inputs, read_evaluation_texts
from litrecipe.data.documents import Cursor, Document, Documents, Read
from litrecipe.data.duplicates import Duplicates, Mark, Marks, marks_from_json, marks_to_json
from litrecipe.data.encoding import Encoded, Encoder, encode_all
from litrecipe.data.readers import Mistakes, check_sources
from litrecipe.data.shard_files import Chunk, ChunkWriter, write_index
from litrecipe.data.tokenizer import Tokenizer

VERSION = 1
"""Raise it when the same texts give other files."""
KIND = "token shards"
"""Tells our manifests of shards from those of models."""
BEGUN, STATE, SKIPPED = "begun.json", "state.json", "skipped.jsonl"
LOCK = ".lock"
PART = ".part"
"""Ends the name of the folder in which the shards are made."""
BATCH = 1 << 20
"""Characters that a process is given at once, about."""
EXAMPLES = 3
"""Skipped documents of each kind that the manifest shows; `skipped.jsonl` lists all."""
EXCERPT = 200
"""Characters of a skipped document that are shown."""
SMALL = 1 << 20
"""Bytes of files for which another process is not worth its start."""


@dataclass
class Counts:
    """What became of what was read."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    """Bytes of the documents that were kept, as UTF-8."""
    skipped: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """All that was read."""
        return self.documents + sum(self.skipped.values())

    def __str__(self) -> str:
        said = f"{counted(self.documents, 'document', ',')}, {counted(self.tokens, 'token', ',')}"
        named = (f"{count:,} {reason.replace('_', ' ')}" for reason, count in self.skipped.items())
        return said + (f" of {self.rows:,} read; left out: {', '.join(named)}" if self.skipped else "")


@dataclass
class State:
    """Where the preparation stands after a shard."""

    cursor: Cursor = field(default_factory=Cursor)
    counts: Counts = field(default_factory=Counts)
    inputs: list[dict[str, int]] = field(default_factory=list)
    """Documents, tokens and bytes of text of each input."""
    chunks: list[Chunk] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    skipped_bytes: int = 0
    """Length of `skipped.jsonl`."""

    @classmethod
    def read(cls, path: Path) -> State:
        """What was written last."""
        kept = read_json(path)
        kept["cursor"] = Cursor(**kept["cursor"])
        kept["counts"] = Counts(**kept["counts"])
        kept["chunks"] = [Chunk(**chunk) for chunk in kept["chunks"]]
        return cls(**kept)

    def write(self, path: Path) -> None:
        """All or nothing."""
        draft = path.with_suffix(".new")
        write_text(draft, json.dumps(asdict(self)))
        draft.replace(path)


def prepare(recipe: PrepareRecipe, tokenizer: Tokenizer, split: str = "train") -> dict[str, Any]:
    """Write the folder `recipe.out` and return its manifest; does nothing where it is there already.

    Raises InputError with all mistakes of the texts that it met, or where `out` holds something else.
    """
    out = Path(recipe.out).expanduser()
    check_sources({"sources": recipe.sources}, split)
    check_against(recipe.decontaminate)
    documents = Documents.of(recipe, split)
    about = settings_of(recipe, tokenizer, documents)
    draft = out.with_name(f"{out.name}{PART}")
    if not _may_be_used(draft):
        raise InputError(f"out: {draft}: is where this would be made, and holds something else: move that away")
    try:
        with locked(draft / LOCK, f"prepares {out}"):
            draft.mkdir(exist_ok=True)  # another process may have had the lock, and finished
            if (found := _finished(out, about["key"])) is None:
                if not _is_whole(draft, about["key"]):
                    _Preparation(recipe, tokenizer, documents, about, draft).run()
                for path in (*draft.glob("marks-*.json"), draft / LOCK, draft / BEGUN):
                    path.unlink(missing_ok=True)
                replace_folder(draft, out)
                found = read_json(out / MANIFEST)
            else:
                shutil.rmtree(draft)
            return found
    except OSError as error:
        if error.filename in [str(one.path) for one in documents.inputs]:
            raise InputError(f"{error.filename}: {error.strerror}: give files that can be read") from error
        cure = "make room, or name a folder that can be written"
        raise InputError(f"out: {out}: {error.strerror or error}: {cure}") from error


def _may_be_used(draft: Path) -> bool:
    """Whether nothing but an interrupted preparation is there."""
    if not draft.exists() or (draft / BEGUN).is_file():
        return True
    return draft.is_dir() and (bool(_key_of(draft)) or all(path.name == LOCK for path in draft.iterdir()))


def _is_whole(draft: Path, key: str) -> bool:
    """Whether all is written of what the key stands for, and only its name is still to be given."""
    return not (draft / STATE).exists() and _key_of(draft) == key


def _key_of(folder: Path) -> str:
    """The key in the manifest of a folder; "" where it is none of ours."""
    return str(read_json(folder / MANIFEST).get("key", "")) if entries_of(folder) is not None else ""


def _finished(out: Path, key: str) -> dict[str, Any] | None:
    """The manifest of what was prepared here before from the same; InputError where something else is here."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if (found := _key_of(out)) != key:
        what = "was prepared from other texts or settings" if found else "holds something else"
        raise InputError(f"out: {out}: exists, and {what}: name another folder, or remove it")
    say(f"{out}: prepared before, from the same texts and settings")
    return read_json(out / MANIFEST)


def bos_and_eos(recipe: PrepareRecipe, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What begins and what ends each document. Raises InputError where the tokenizer has none of what is asked for."""
    wants_bos = tokenizer.adds_bos if recipe.bos == "auto" else recipe.bos == "always"
    mistakes = []
    if wants_bos and tokenizer.bos_id is None:
        mistakes.append(
            "bos: always: this tokenizer has no bos_token: give never, or name one in tokenizer_config.json"
        )
    if recipe.eos and not tokenizer.eos_ids:
        mistakes.append("eos: true: this tokenizer has no eos_token: give false, or name one in tokenizer_config.json")
    if mistakes:
        raise InputError(*mistakes)
    bos = [tokenizer.bos_id] if wants_bos and tokenizer.bos_id is not None else []
    return bos, list(tokenizer.eos_ids[:1]) if recipe.eos else []


def settings_of(recipe: PrepareRecipe, tokenizer: Tokenizer, documents: Documents) -> dict[str, Any]:
    """All that the result depends on, for the manifest; `key` stands for it."""
    bos, eos = bos_and_eos(recipe, tokenizer)
    without = ("sources", "tokenizer", "out", "workers", "schema_version")
    keys = {name: value for name, value in asdict(recipe).items() if name not in without}
    decisive = {name: value for name, value in keys.items() if name != "on_error"}  # so that `skip` goes on after one
    made_by = {
        "fingerprint": tokenizer.text_fingerprint,
        "vocab_size": tokenizer.backend.get_vocab_size(with_added_tokens=True),
        "bos": bos,
        "eos": eos,
    }
    sources = [one.describe() for one in documents.inputs]
    against = [one.describe() for one in evaluation_inputs(recipe.decontaminate)]
    texts = [(one["source"], Path(one["file"]).name, one["sha256"]) for one in [*sources, *against]]
    return {
        "kind": KIND,
        "version": VERSION,
        "key": key_of(VERSION, made_by, decisive, texts),
        "tokenizer": {"source": recipe.tokenizer} | made_by,
        "settings": keys,
        "sources": sources,
        "decontaminated": {"against": against},
    }


class _Preparation:
    """One folder on its way."""

    def __init__(
        self, recipe: PrepareRecipe, tokenizer: Tokenizer, documents: Documents, about: dict[str, Any], draft: Path
    ) -> None:
        self.recipe, self.documents, self.about, self.draft = recipe, documents, about, draft
        bos, eos = bos_and_eos(recipe, tokenizer)
        features: dict[str, Any] = {}
        if recipe.decontaminate.against:
            texts = features["contamination"] = read_evaluation_texts(recipe.decontaminate)
            about["decontaminated"] |= {"texts": texts.texts, "too_short": texts.too_short}
        if recipe.dedup.exact or recipe.dedup.near:
            features["marks"] = Marks(recipe.dedup)
        self.features = list(features)
        self.encoder = Encoder(tokenizer, bos, eos, list(features.values()))
        self.duplicates = Duplicates(recipe.dedup)
        self.marks: list[Mark] = []
        """Of the documents since the last shard."""
        self.around = len(bos) + len(eos)
        self.state = self._resumed()
        self.writer = ChunkWriter(draft, parse_size(recipe.shard_size), len(self.state.chunks))
        self.line = Line()
        self.seen_bytes = 0
        """Of text, in this process."""
        self.first_byte = documents.bytes
        """Of the files, after the first batch of this process."""

    def _resumed(self) -> State:
        """What an interrupted preparation of the same left behind; all else in the draft is removed."""
        path = self.draft / STATE
        begun = self.draft / BEGUN
        if path.is_file() and begun.is_file() and read_json(begun)["key"] == self.about["key"]:
            state = State.read(path)
            number = 0
            for shard in range(len(state.chunks) if "marks" in self.features else 0):
                for mark in marks_from_json(read_json(self._marks_file(shard))["marks"]):
                    self.duplicates.keep(number, mark)
                    number += 1
            with (self.draft / SKIPPED).open("ab") as file:
                file.truncate(state.skipped_bytes)
            say(
                f"goes on after {counted(state.counts.documents, 'document', ',')}, "
                f"{counted(state.counts.tokens, 'token', ',')}"
            )
            return state
        for left in self.draft.iterdir():
            if left.name not in (LOCK, BEGUN):
                left.unlink()
        write_text(begun, json.dumps({"key": self.about["key"]}))
        (self.draft / SKIPPED).touch()
        return State(inputs=[{"documents": 0, "tokens": 0, "text_bytes": 0} for _ in self.documents.inputs])

    def _marks_file(self, shard: int) -> Path:
        return self.draft / f"marks-{shard}.json"

    def run(self) -> None:
        """Read, tokenise and write what is still to do."""
        state, start = self.state, self.state.cursor
        workers = min(self.recipe.workers or cores(), max(1, self.documents.bytes // SMALL))
        try:
            with (self.draft / SKIPPED).open("a", encoding="utf-8") as self.skipped:
                for batch, encoded in encode_all(self.encoder, self._batches(start), workers):
                    self._take(batch, encoded)
                    self._show(batch[-1])
                self._close_shard()
        except (KeyboardInterrupt, Stopped):
            self.line.clear()
            say(f"stopped after {counted(len(state.chunks), 'shard')}; the same command goes on behind them")
            raise
        if not state.counts.documents:
            shutil.rmtree(self.draft)
            raise InputError(
                f"sources: {', '.join(self.recipe.sources)}: no document in them ({state.counts}): give texts"
            )
        self._finish()

    def _batches(self, start: Cursor) -> Iterator[tuple[list[Read], list[str]]]:
        """What is read, some at a time, beside the texts in it."""
        batch: list[Read] = []
        size = 0
        for read in self.documents.read(start):
            if isinstance(read.event, Document):
                size += len(read.event.text)
            elif read.event.why and self.recipe.on_error == "error":
                self._refuse(read)
            batch.append(read)
            if size >= BATCH or len(batch) >= BATCH >> 8:
                yield batch, _texts(batch)
                batch, size = [], 0
        if batch:
            yield batch, _texts(batch)

    def _refuse(self, first: Read) -> None:
        """Raise InputError with the mistake and those that follow it in the same input."""
        mistakes = Mistakes()
        for read in self.documents.read(Cursor(first.input, first.after.events - 1)):
            if read.input != first.input or mistakes.count > Mistakes.SHOWN:
                break
            if not isinstance(read.event, Document) and read.event.why:
                mistakes.add(f"{read.event.where}: {read.event.why}")
        if self.state.chunks:
            say(f"{counted(len(self.state.chunks), 'shard')} were whole before: `--on_error skip` goes on behind them")
        else:
            shutil.rmtree(self.draft)
        mistakes.raise_if_any()

    def _take(self, batch: Sequence[Read], encoded: Encoded) -> None:
        """Documents of a batch into shards, in order, and notes of what is left out."""
        stops = np.cumsum(encoded.lengths)
        place = 0
        for read in batch:
            event = read.event
            if not isinstance(event, Document):
                self._skip("unreadable" if event.why else "empty", event.where, event.why)
            else:
                tokens = encoded.tokens[stops[place] - encoded.lengths[place] : stops[place]]
                found = {name: of_all[place] for name, of_all in zip(self.features, encoded.features, strict=True)}
                self._keep_or_skip(read, event, tokens, **found)
                place += 1
            self.state.cursor = read.after
            if self.writer.is_full:
                self._close_shard()

    def _keep_or_skip(
        self, read: Read, document: Document, tokens: np.ndarray, contamination: str = "", marks: Mark | None = None
    ) -> None:
        length, size = len(tokens) - self.around, len(document.text.encode())
        self.seen_bytes += size
        shortest, longest = self.recipe.min_tokens, self.recipe.max_tokens
        reason, why = "", f"{counted(length, 'token')}"
        if length < shortest:
            reason = "too_short"
        elif longest is not None and length > longest:
            reason = "too_long"
        elif contamination:
            reason, why = "contaminated", contamination
        elif marks is not None and (duplicate := self.duplicates.original(marks)):
            reason, original = duplicate
            why = f"of document {original} in the shards"
        if reason:
            self._skip(reason, document.where, why, document.text)
            return
        if marks is not None:
            self.duplicates.keep(self.state.counts.documents, marks)
            self.marks.append(marks)
        self.writer.add(tokens, document.where)
        for counts in (self.state.counts.__dict__, self.state.inputs[read.input]):
            counts["documents"] += 1
            counts["tokens"] += len(tokens)
            counts["text_bytes"] += size

    def _skip(self, reason: str, where: str, why: str, text: str = "") -> None:
        """Count it, and write it down."""
        counts = self.state.counts
        counts.skipped[reason] = counts.skipped.get(reason, 0) + 1
        note = {"reason": reason, "where": where, "why": why, "text": text[:EXCERPT]}
        self.skipped.write(json.dumps(note, ensure_ascii=False) + "\n")
        examples = counts.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(note)

    def _close_shard(self) -> None:
        """Write what fills a shard, and then that it is written."""
        if not self.writer.is_empty:
            if "marks" in self.features:
                kept = json.dumps({"marks": marks_to_json(self.marks)})
                write_text(self._marks_file(self.writer.chunks), kept)
                self.marks.clear()
            self.state.chunks.append(self.writer.write())
            self.state.config = self.writer.config
        self.skipped.flush()
        os.fsync(self.skipped.fileno())
        self.state.skipped_bytes = (self.draft / SKIPPED).stat().st_size
        self.state.write(self.draft / STATE)

    def _show(self, read: Read) -> None:
        """How far it is, how fast, and how long it will take."""
        seconds, total = self.line.seconds, max(1, self.documents.bytes)
        self.first_byte = min(self.first_byte, read.bytes)
        share, now = min(1.0, read.bytes / total), (read.bytes - self.first_byte) / total
        speed = self.seen_bytes / seconds / 1e6
        left = f" · {duration(seconds * (1 - share) / now)} left" if now else ""
        counts = self.state.counts
        done = f"{counted(counts.documents, 'document', ',')}, {counted(counts.tokens, 'token', ',')}"
        self.line.show(f"preparing · {100 * share:.0f} % · {done} · {speed:.1f} MB/s{left}")

    def _finish(self) -> None:
        """The index and the manifest; then there is nothing to go on with."""
        state, draft = self.state, self.draft
        self.line.clear()
        write_index(draft, state.chunks, state.config)
        entries = {chunk.info["filename"]: _entry(chunk) for chunk in state.chunks}
        entries |= {name: describe_file(draft / name) for name in ("index.json", SKIPPED)}
        sources = [one | counts for one, counts in zip(self.about["sources"], state.inputs, strict=True)]
        fingerprint = key_of([chunk.sha256 for chunk in state.chunks])
        about = {**self.about, "fingerprint": fingerprint, "dtype": str(self.encoder.dtype)}
        about |= {"rows": state.counts.rows, **asdict(state.counts), "sources": sources}
        write_manifest(draft, entries, about)
        (draft / STATE).unlink()
        seconds, size = self.line.seconds, self.seen_bytes / 1e6
        say(f"prepared {state.counts}; {size:.1f} MB of text in {seconds:.1f} s, {size / seconds:.1f} MB/s")


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _entry(chunk: Chunk) -> dict[str, Any]:
    return {"bytes": chunk.info["chunk_bytes"], "sha256": chunk.sha256}


def _texts(batch: Iterable[Read]) -> list[str]:
    return [read.event.text for read in batch if isinstance(read.event, Document)]

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from litrecipe import cli
from litrecipe.checkpoint.manifest import MANIFEST, mistakes_of
from litrecipe.config.errors import InputError
from litrecipe.config.prepare import Decontaminate, Dedup, PrepareRecipe
from litrecipe.data import prepare as preparing
from litrecipe.data.prepare import SKIPPED, STATE, prepare
from litrecipe.data.shard_files import write_index
from litrecipe.data.shards import Shards
from litrecipe.data.tokenizer import Tokenizer

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "over",
    "a",
    "lazy",
    "dog",
    "what",
    "France",
    "naïve",
    "café",
    "你好",
    "🤗",
    "42",
]


def text_of(seed: int, words: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


def write(path: Path, rows: list[Any]) -> Path:
    lines = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    content = lines.encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def skipped(folder: Path) -> list[tuple[str, str]]:
    """Reason and line of all that was left out."""
    notes = [json.loads(line) for line in (folder / SKIPPED).read_text().splitlines()]
    return [(note["reason"], note["where"].rpartition(":")[2]) for note in notes]


@pytest.fixture
def recipe(tmp_path: Path) -> PrepareRecipe:
    """Two sources of 60 texts, in shards of about seven."""
    a = write(tmp_path / "a.jsonl.gz", [{"text": text_of(seed, 20 + seed)} for seed in range(40)])
    b = write(tmp_path / "b.jsonl", [{"text": text_of(seed, 5), "title": "t"} for seed in range(40, 60)])
    return PrepareRecipe(sources=[str(a), str(b)], out=str(tmp_path / "out"), shard_size="1KB", workers=1)


def test_documents_are_their_tokens_and_an_end_in_order(recipe: PrepareRecipe, tokenizer: Tokenizer) -> None:
    manifest = prepare(recipe, tokenizer)
    texts = [text_of(seed, 20 + seed if seed < 40 else 5) for seed in range(60)]
    shards = Shards(recipe.out)
    assert len(shards) == manifest["documents"] == manifest["rows"] == 60
    for number, text in enumerate(texts):
        assert shards.read(number).tolist() == [*tokenizer.encode(text), tokenizer.eos_ids[0]]
    assert manifest["text_bytes"] == shards.text_bytes == sum(len(text.encode()) for text in texts)
    assert manifest["tokens"] == shards.tokens == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    assert [source["documents"] for source in manifest["sources"]] == [40, 20]
    assert sum(source["tokens"] for source in manifest["sources"]) == manifest["tokens"]
    assert len(json.loads((Path(recipe.out) / "index.json").read_text())["chunks"]) > 5
    assert mistakes_of(Path(recipe.out), "…") == []
    assert {path.name for path in Path(recipe.out).iterdir()} == {*manifest["files"], MANIFEST}


def test_litdata_reads_the_same_tokens(recipe: PrepareRecipe, tokenizer: Tokenizer) -> None:
    """Its loader cuts a chunk's tokens into blocks and leaves out what is no whole block at its end."""
    from litdata import StreamingDataset, TokensLoader

    prepare(replace(recipe, shard_size="1GB"), tokenizer)
    shards = Shards(recipe.out)
    all_tokens = np.concatenate([shards.read(number) for number in range(len(shards))])
    theirs = StreamingDataset(recipe.out, item_loader=TokensLoader(block_size=33), shuffle=False)
    found = np.concatenate([np.asarray(theirs[place]) for place in range(len(theirs))])
    assert found.dtype == np.uint16 and len(found) == len(all_tokens) // 33 * 33 > 1000
    assert (found == all_tokens[: len(found)]).all()


def test_many_ids_take_wider_tokens(
    recipe: PrepareRecipe, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(recipe, tokenizer)
    monkeypatch.setattr("litrecipe.data.encoding.token_dtype", lambda _: np.dtype(np.int32))
    assert prepare(replace(recipe, out=str(tmp_path / "wide")), tokenizer)["dtype"] == "int32"
    wide, narrow = Shards(tmp_path / "wide"), Shards(recipe.out)
    assert (wide.lengths == narrow.lengths).all()
    assert all((wide.read(number) == narrow.read(number)).all() for number in range(60))


@pytest.mark.parametrize(("eos", "bos", "around"), [(True, "auto", 1), (True, "always", 2), (False, "never", 0)])
def test_what_stands_around_a_document(
    recipe: PrepareRecipe, tokenizer: Tokenizer, eos: bool, bos: Any, around: int
) -> None:
    prepare(replace(recipe, eos=eos, bos=bos), tokenizer)
    tokens = Shards(recipe.out).read(3).tolist()
    plain = tokenizer.encode(text_of(3, 23))
    assert len(tokens) == len(plain) + around
    assert tokens == [tokenizer.bos_id] * (bos == "always") + plain + [tokenizer.eos_ids[0]] * eos


def test_a_tokenizer_that_begins_texts_begins_documents(
    recipe: PrepareRecipe, tokenizer: Tokenizer, chatml_folder: Path, tmp_path: Path
) -> None:
    import tokenizers
    from tokenizers import processors

    backend = tokenizers.Tokenizer.from_file(str(chatml_folder / "tokenizer.json"))
    begin = ("<|im_start|>", tokenizer.bos_id)
    backend.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    beginning = Tokenizer(backend, special_tokens=tokenizer.special_tokens)
    prepare(recipe, beginning)
    assert all(Shards(recipe.out).read(number)[0] == tokenizer.bos_id for number in range(60))


def test_any_number_of_processes_gives_the_same_bytes(
    recipe: PrepareRecipe, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(recipe, tokenizer)
    monkeypatch.setattr(preparing, "SMALL", 1)
    monkeypatch.setattr(preparing, "BATCH", 500)
    prepare(replace(recipe, out=str(tmp_path / "three"), workers=3), tokenizer)
    assert contents(tmp_path / "three") == contents(tmp_path / "out")


KILLED = """
import sys
from litrecipe.config.prepare import Dedup, PrepareRecipe
from litrecipe.data import prepare as preparing
from litrecipe.data.tokenizer import Tokenizer

preparing.SMALL, preparing.BATCH = 1, 4000
if __name__ == "__main__":
    source, out, folder = sys.argv[1:]
    dedup = Dedup(exact=True, near=True)
    recipe = PrepareRecipe(sources=[source], out=out, shard_size="20KB", workers=2, on_error="skip", dedup=dedup)
    preparing.prepare(recipe, Tokenizer.load(folder))
"""


@pytest.mark.slow
def test_killed_it_goes_on_and_the_result_is_that_of_an_unbroken_run(
    tmp_path: Path, chatml_folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed by SIGKILL after its second shard; some documents repeat earlier ones, some rows cannot be read."""
    rows: list[Any] = [{"text": text_of(number % 600, 200)} for number in range(1000)]
    rows[5::100] = ["{"] * len(rows[5::100])
    source = write(tmp_path / "a.jsonl.gz", rows)
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, source, tmp_path / "out", chatml_folder])
    state = tmp_path / "out.part" / STATE
    try:
        end = time.monotonic() + 120
        while not state.exists() or len(json.loads(state.read_text())["chunks"]) < 2:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.005)
        workers = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()
        process.wait()
    assert len(workers) >= 2
    assert not psutil.wait_procs(workers, timeout=20)[1]
    done = json.loads(state.read_text())["counts"]["documents"]
    dedup = Dedup(exact=True, near=True)
    recipe = PrepareRecipe([str(source)], shard_size="20KB", workers=1, on_error="skip", dedup=dedup)
    manifest = prepare(replace(recipe, out=str(tmp_path / "out")), tokenizer)
    assert f"goes on after {done:,} documents" in capsys.readouterr().err and 0 < done < manifest["documents"]
    prepare(replace(recipe, out=str(tmp_path / "unbroken")), tokenizer)
    assert contents(tmp_path / "out") == contents(tmp_path / "unbroken")
    assert manifest["rows"] == 1000 and manifest["skipped"]["unreadable"] == 10
    assert manifest["skipped"]["exact_duplicate"] > 300
    assert not (tmp_path / "out.part").exists()


def test_a_stop_between_shards_loses_and_repeats_nothing(
    recipe: PrepareRecipe,
    tokenizer: Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At every shard in turn, in the midst of writing the next one."""
    prepare(replace(recipe, out=str(tmp_path / "unbroken")), tokenizer)
    write_shard = preparing.ChunkWriter.write
    for stop in range(1, 20):
        left = stop

        def write_some(writer: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                (writer.folder / f"chunk-0-{writer.chunks}.bin").write_bytes(b"half a sha")
                raise KeyboardInterrupt
            return write_shard(writer)

        monkeypatch.setattr(preparing.ChunkWriter, "write", write_some)
        try:
            prepare(recipe, tokenizer)
        except KeyboardInterrupt:
            assert not Path(recipe.out).exists()
        else:
            break
    assert 2 < stop < 19
    assert contents(Path(recipe.out)) == contents(tmp_path / "unbroken")
    assert "stopped after 3 shards; the same command goes on behind them" in capsys.readouterr().err


def test_other_texts_or_settings_begin_anew(
    recipe: PrepareRecipe, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "write_index", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe, tokenizer)
    monkeypatch.setattr(preparing, "write_index", write_index)
    prepare(replace(recipe, min_tokens=2), tokenizer)
    assert "goes on" not in capsys.readouterr().err
    assert mistakes_of(Path(recipe.out), "…") == []


def test_a_stop_at_the_end_loses_nothing(
    recipe: PrepareRecipe, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the index, in the midst of the manifest, after it, and before the folder has its name."""

    def stop(folder: Path, *_: Any) -> None:
        (folder / MANIFEST).write_text('{"format": "litre')
        raise KeyboardInterrupt

    one = replace(recipe, dedup=Dedup(exact=True))
    prepare(replace(one, out=str(tmp_path / "unbroken")), tokenizer)
    for name in ("write_index", "write_manifest", "replace_folder"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(preparing, name, (lambda *_: stop(tmp_path)) if name == "replace_folder" else stop)
            prepare(one, tokenizer)
    prepare(one, tokenizer)
    assert contents(Path(recipe.out)) == contents(tmp_path / "unbroken")


def test_a_finished_folder_is_left_as_it_is(
    recipe: PrepareRecipe, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = prepare(recipe, tokenizer)
    before = {path: path.stat().st_mtime_ns for path in Path(recipe.out).iterdir()}
    assert prepare(replace(recipe, workers=2), tokenizer) == first
    assert "prepared before" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"out: .*exists, and was prepared from other texts or settings: name another"):
        prepare(replace(recipe, eos=False), tokenizer)
    assert {path: path.stat().st_mtime_ns for path in Path(recipe.out).iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="exists, and holds something else"):
        prepare(replace(recipe, out=str(tmp_path / "mine")), tokenizer)


def test_nobody_elses_folder_is_touched(recipe: PrepareRecipe, tokenizer: Tokenizer) -> None:
    """Neither where it is made, nor when there is nothing to make."""
    thesis = Path(f"{recipe.out}.part") / "thesis.txt"
    for made in (False, True):
        if made:
            prepare(recipe, tokenizer)
        thesis.parent.mkdir()
        thesis.write_text("mine")
        with pytest.raises(
            InputError, match=r"out: .*out\.part: is where this would be made, and holds something else"
        ):
            prepare(recipe, tokenizer)
        assert thesis.read_text() == "mine"
        thesis.unlink()
        thesis.parent.rmdir()


BAD: list[Any] = [
    {"text": "good one"},
    "{not json",
    '{"text": "\udcff bad bytes"}',
    {"content": "other column"},
    {"text": 7},
    {"text": " \n"},
    '{"text": "\\ud800"}',
    {"text": "<|im_end|> in a text"},
    {"text": "the last one"},
]
"""Of which lines 2, 3, 4, 5 and 7 cannot be read, and line 6 is empty."""


def test_mistakes_are_told_by_line_and_nothing_is_written(recipe: PrepareRecipe, tokenizer: Tokenizer) -> None:
    bad = write(Path(recipe.out).with_name("bad.jsonl"), BAD)
    with pytest.raises(InputError) as error:
        prepare(replace(recipe, sources=[*recipe.sources, str(bad)]), tokenizer)
    assert [mistake.split(": ")[0] for mistake in error.value.mistakes] == [f"{bad}:{line}" for line in (2, 3, 4, 5, 7)]
    assert all(len(mistake.splitlines()) == 1 for mistake in error.value.mistakes)
    wanted = ("not valid JSON", "not UTF-8", "'text' is missing or null (it has content)", "is int", "lone surrogate")
    for mistake, words in zip(error.value.mistakes, wanted, strict=True):
        assert words in mistake
    assert not Path(recipe.out).exists() and not Path(f"{recipe.out}.part").exists()


def test_after_a_mistake_skipping_goes_on_behind_what_was_whole(
    recipe: PrepareRecipe, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = write(tmp_path / "bad.jsonl", BAD)
    one = replace(recipe, sources=[*recipe.sources, str(bad)])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(InputError):
        patch.setattr(preparing, "BATCH", 300)
        prepare(one, tokenizer)
    assert "shards were whole before: `--on_error skip` goes on behind them" in capsys.readouterr().err
    prepare(replace(one, on_error="skip"), tokenizer)
    assert "goes on after" in capsys.readouterr().err
    prepare(replace(one, on_error="skip", out=str(tmp_path / "unbroken")), tokenizer)
    assert contents(Path(recipe.out)) == contents(tmp_path / "unbroken")


def test_skipping_counts_and_lists_what_it_leaves_out(recipe: PrepareRecipe, tokenizer: Tokenizer) -> None:
    bad = write(Path(recipe.out).with_name("bad.jsonl"), BAD)
    cut = bad.with_name("cut.jsonl.gz")
    cut.write_bytes(gzip.compress(b'{"text": "whole"}\n' * 9 + os.urandom(9999))[:-500])
    one = replace(recipe, sources=[str(bad), str(cut)], on_error="skip")
    manifest = prepare(one, tokenizer)
    lines = skipped(Path(recipe.out))
    first = [("unreadable", "2"), ("unreadable", "3"), ("unreadable", "4"), ("unreadable", "5"), ("empty", "6")]
    assert lines[:6] == [*first, ("unreadable", "7")]
    assert lines[-1][0] == "unreadable" and "ends too early" in (Path(recipe.out) / SKIPPED).read_text()
    assert manifest["rows"] == manifest["documents"] + len(lines)
    assert manifest["skipped"] == {"unreadable": len(lines) - 1, "empty": 1}
    assert [note["where"] for note in manifest["examples"]["empty"]] == [f"{bad}:6"]
    shards = Shards(recipe.out)
    assert [tokenizer.decode(shards.read(number)) for number in range(3)] == [
        "good one",
        "<|im_end|> in a text",
        "the last one",
    ]
    assert tokenizer.eos_ids[0] not in shards.read(1)[:-1]  # a control token that somebody wrote stays text


def test_documents_that_are_too_short_or_too_long(recipe: PrepareRecipe, tokenizer: Tokenizer) -> None:
    lengths = [len(tokenizer.encode(text_of(seed, 20 + seed if seed < 40 else 5))) for seed in range(60)]
    low, high = int(np.quantile(lengths, 0.2)), int(np.quantile(lengths, 0.8))
    manifest = prepare(replace(recipe, min_tokens=low, max_tokens=high), tokenizer)
    kept = [length for length in lengths if low <= length <= high]
    assert (Shards(recipe.out).lengths - 1).tolist() == kept
    assert manifest["skipped"] == {
        "too_short": sum(length < low for length in lengths),
        "too_long": sum(length > high for length in lengths),
    }


def test_duplicates_and_contamination_are_left_out_with_the_reason(recipe: PrepareRecipe, tokenizer: Tokenizer) -> None:
    words = text_of(1, 60).split()
    quoted = [f"w{number}" for number in range(20)]
    rows = [
        {"text": " ".join(words)},
        {"text": "  ".join(words).upper()},
        {"text": " ".join(words[:-1])},
        {"text": " ".join([*words[:20], *quoted[3:17], *words[20:]])},
        {"text": " ".join([*words[::-1], *quoted[3:15]])},
    ]
    here = Path(recipe.out).parent
    asked = write(here / "questions.jsonl", [{"prompt": " ".join(quoted), "completion": "w1"}])
    against = Decontaminate([f"exact_match:{asked}"])
    one = replace(recipe, sources=[str(write(here / "rows.jsonl", rows))], decontaminate=against)
    manifest = prepare(replace(one, dedup=Dedup(exact=True, near=True, threshold=0.7)), tokenizer)
    assert skipped(Path(recipe.out)) == [("exact_duplicate", "2"), ("near_duplicate", "3"), ("contaminated", "4")]
    assert manifest["examples"]["near_duplicate"][0]["why"] == "of document 0 in the shards"
    assert f"in common with {asked}:1" in manifest["examples"]["contaminated"][0]["why"]
    assert manifest["documents"] == 2 and manifest["decontaminated"]["texts"] == 2
    assert manifest["decontaminated"]["too_short"] == 1


def test_a_text_file_is_one_document_or_a_document_a_line(recipe: PrepareRecipe, tokenizer: Tokenizer) -> None:
    poem = Path(recipe.out).with_name("poem.txt")
    poem.write_text("one\n\n two\r\n", newline="")
    prepare(replace(recipe, sources=[str(poem)]), tokenizer)
    assert tokenizer.decode(Shards(recipe.out).read(0)) == "one\n\n two\r\n"
    lines = replace(recipe, sources=[str(poem)], txt="line", out=f"{recipe.out}-lines")
    prepare(lines, tokenizer)
    shards = Shards(lines.out)
    assert [tokenizer.decode(shards.read(number)) for number in range(len(shards))] == ["one", " two"]


@pytest.mark.parametrize("text", ["", "\n\n", '{"text": ""}\n'])
def test_sources_without_a_document_are_refused(recipe: PrepareRecipe, tokenizer: Tokenizer, text: str) -> None:
    empty = Path(recipe.out).with_name("empty.jsonl")
    empty.write_text(text)
    with pytest.raises(InputError, match=r"sources: .*empty\.jsonl: no document in them"):
        prepare(replace(recipe, sources=[str(empty)]), tokenizer)
    assert not Path(recipe.out).exists() and not Path(f"{recipe.out}.part").exists()


def test_a_killed_process_is_told(recipe: PrepareRecipe, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_workers(*_: Any, **__: Any) -> None:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):  # it is gone already
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()

    monkeypatch.setattr(preparing, "SMALL", 1)
    monkeypatch.setattr(preparing, "BATCH", 500)
    monkeypatch.setattr(preparing._Preparation, "_take", no_workers)
    with pytest.raises(InputError, match="workers: 2: one of the processes was killed: give fewer"):
        prepare(replace(recipe, workers=2), tokenizer)


def test_the_command_says_what_is_wrong(
    recipe: PrepareRecipe, chatml_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "prepare", *recipe.sources, "--tokenizer", str(chatml_folder), "--out", str(tmp_path / "a")]
    assert cli.main([*command, "--workers", "1"]) == 0
    assert len(Shards(tmp_path / "a")) == 60
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["tokenizer"]["source"] == str(chatml_folder)
    assert cli.main(["data", "prepare", "--shard_size", "9TB", "--columns", "{body: text}"]) == cli.WRONG_INPUT
    assert cli.main([*command[:2], "nowhere.txt", *command[4:]]) == cli.WRONG_INPUT
    assert cli.main([*command[:4], "--tokenizer", "nowhere", "--out", "x"]) == cli.WRONG_INPUT
    told = capsys.readouterr().err
    for wrong in (
        "sources: missing: give files",
        "tokenizer: missing: give a folder",
        "out: missing: give the folder",
        "columns: body: a document has one column",
        "shard_size: 9TB: give a size such as 64MB",
        "sources: nowhere.txt: no such file or folder",
        "tokenizer: nowhere: no such file or folder",
    ):
        assert f"litrecipe: error: {wrong}" in told

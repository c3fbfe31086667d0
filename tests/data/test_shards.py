from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.config.prepare import PrepareRecipe
from litrecipe.data.prepare import prepare
from litrecipe.data.shards import Shards, is_prepared, open_shards
from litrecipe.data.tokenizer import Tokenizer

TEXTS = [f"text number {number}: " + "the quick brown fox " * (number % 7) for number in range(40)]


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


@pytest.fixture
def folder(source: str, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    prepare(PrepareRecipe([source], out=str(tmp_path / "out"), shard_size="500B", workers=1), tokenizer)
    return tmp_path / "out"


def mistakes_of(folder: Path, tokenizer: Tokenizer) -> list[str]:
    with pytest.raises(InputError) as error:
        open_shards(str(folder), tokenizer)
    assert all(len(mistake.splitlines()) == 1 for mistake in error.value.mistakes)
    return error.value.mistakes


def test_any_part_of_any_document_is_read(folder: Path, tokenizer: Tokenizer) -> None:
    shards = open_shards(str(folder), tokenizer)
    documents = [np.array([*tokenizer.encode(text), tokenizer.eos_ids[0]]) for text in TEXTS]
    assert len(list(folder.glob("chunk-*.bin"))) > 3
    assert shards.lengths.tolist() == [len(document) for document in documents]
    random = np.random.default_rng(0)
    for number in random.permutation(len(documents)):
        start, stop = sorted(random.integers(0, len(documents[number]) + 3, size=2))
        for given in [(), (start,), (start, stop), (-3,)]:
            read = shards.read(int(number), *map(int, given))
            assert read.dtype == np.int64
            assert read.tolist() == documents[number][slice(*([*given, None] if len(given) < 2 else given))].tolist()


def test_the_same_tokens_have_the_same_fingerprint(
    folder: Path, source: str, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    recipe = PrepareRecipe([source], out=str(tmp_path / "again"), shard_size="500B", workers=1)
    prepare(recipe, tokenizer)
    assert Shards(tmp_path / "again").fingerprint == Shards(folder).fingerprint
    prepare(replace(recipe, out=str(tmp_path / "other"), eos=False), tokenizer)
    assert Shards(tmp_path / "other").fingerprint != Shards(folder).fingerprint


def test_text_is_prepared_into_the_cache_once(source: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    data = Data(cache_dir=str(tmp_path / "kept"))
    shards = open_shards(source, tokenizer, data)
    assert (
        not is_prepared(source) and is_prepared(str(shards.folder)) and shards.folder.is_relative_to(tmp_path / "kept")
    )
    assert [tokenizer.decode(shards.read(number)) for number in range(len(shards))] == TEXTS
    before = (shards.folder / "chunk-0-0.bin").stat().st_mtime_ns
    again = open_shards(source, tokenizer, data)
    assert again.folder == shards.folder and (again.folder / "chunk-0-0.bin").stat().st_mtime_ns == before
    Path(source).write_text('{"body": "other"}\n')
    other = open_shards(source, tokenizer, replace(data, columns={"text": "body"}))
    assert other.folder != shards.folder and len(other) == 1


def test_what_is_damaged_in_the_cache_is_made_anew(
    source: str, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    chunk = open_shards(source, tokenizer).folder / "chunk-0-0.bin"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1])
    assert len(open_shards(source, tokenizer)) == len(TEXTS) and chunk.read_bytes() == content
    assert "damaged and made anew" in capsys.readouterr().err


def test_of_a_folder_that_one_split_is_read_which_is_asked_for(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": f"words to {name}"}))
    held_out = open_shards(str(tmp_path), tokenizer, key="data.val", split="validation")
    assert tokenizer.decode(held_out.read(0)) == "words to validation"
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": "other words"}))
    changed = open_shards(str(tmp_path), tokenizer, key="data.val", split="validation")
    assert tokenizer.decode(changed.read(0)) == "other words"


def test_mistakes_name_the_keys_of_the_recipe_that_trains(tmp_path: Path, chatml_folder: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "a.txt").write_text("a")
    tokenizer = Tokenizer.load(chatml_folder)
    for given, words in (("empty.jsonl", "no document in them"), ("nowhere.jsonl", "no such file or folder")):
        with pytest.raises(InputError, match=rf"^data\.sources\.books: .*{given}: {words}"):
            open_shards(str(tmp_path / given), tokenizer, key="data.sources.books")
    endless = Tokenizer(tokenizer.backend, special_tokens={})
    with pytest.raises(InputError, match=r"^data\.val: this tokenizer has no eos_token"):
        open_shards(str(tmp_path / "a.txt"), endless, key="data.val")


def test_shards_of_another_tokenizer_are_refused(folder: Path, llama2_folder: Path, tokenizer: Tokenizer) -> None:
    [mistake] = mistakes_of(folder, Tokenizer.load(llama2_folder))
    assert mistake.startswith(f"data.train: {folder}: was tokenised by another, which is not the model's tokenizer")
    assert open_shards(str(folder), tokenizer).tokenizer_fingerprint == tokenizer.text_fingerprint


def test_a_chat_template_makes_no_other_tokenizer(folder: Path, chatml_folder: Path, tagged_folder: Path) -> None:
    with_tags = Tokenizer.load(tagged_folder)
    assert with_tags.fingerprint != Tokenizer.load(chatml_folder).fingerprint
    assert len(open_shards(str(folder), with_tags)) == len(TEXTS)


def test_an_index_without_shards_is_refused(folder: Path, tokenizer: Tokenizer) -> None:
    """litdata's `optimize` writes one when it is called without a `__main__` guard."""
    (folder / "index.json").write_text(json.dumps({"chunks": [], "config": None}))
    assert mistakes_of(folder, tokenizer)[0].startswith(f"{folder / 'index.json'}: has no shards in it")
    (folder / "index.json").write_text("{")
    assert "not valid JSON" in mistakes_of(folder, tokenizer)[0]
    (folder / "index.json").write_text('{"chunks": [{}], "config": {}}')
    assert "not an index of litdata's" in mistakes_of(folder, tokenizer)[0]


def test_all_that_is_damaged_is_told_at_once(folder: Path, tokenizer: Tokenizer) -> None:
    chunks = sorted(folder.glob("chunk-*.bin"))
    content = [chunk.read_bytes() for chunk in chunks]
    chunks[0].unlink()
    chunks[1].write_bytes(content[1][:-2])
    chunks[2].write_bytes(content[2][:5])
    chunks[3].write_bytes(b"\xff" + content[3][1:])
    said = [mistake.removeprefix(f"{folder}/") for mistake in mistakes_of(folder, tokenizer)]
    starts = ("0.bin: missing", "1.bin: cut or damaged: ", "2.bin: cut: 5 bytes", "3.bin: damaged: its head")
    assert len(said) == 4
    assert all(one.startswith(f"chunk-0-{start}") for one, start in zip(said, starts, strict=True))


def test_a_changed_token_is_found_by_its_hash(folder: Path, tokenizer: Tokenizer) -> None:
    """Once files were hashed they are not again, until they are written again."""
    chunk = folder / "chunk-0-1.bin"
    content = bytearray(chunk.read_bytes())
    open_shards(str(folder), tokenizer)
    content[-1] ^= 1
    chunk.write_bytes(content)
    assert mistakes_of(folder, tokenizer)[0].startswith(f"{chunk}: altered: its sha256 is not the one in manifest.json")
    assert len(open_shards(str(folder), tokenizer, verify=False)) == len(TEXTS)


def test_shards_that_litdata_wrote_are_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Who made them, and of how much text, is not known; documents are its items."""
    from litdata.streaming.cache import Cache
    from litdata.streaming.item_loader import TokensLoader

    cache = Cache(str(tmp_path / "theirs"), chunk_bytes=400, item_loader=TokensLoader(4))
    for number in range(20):
        cache[number] = torch.arange(number, 2 * number + 3)
    cache.done()
    cache.merge()
    shards = open_shards(str(tmp_path / "theirs"), tokenizer)
    assert (len(shards), shards.text_bytes, shards.tokenizer_fingerprint, shards.manifest) == (20, 0, "", {})
    assert [shards.read(number).tolist() for number in range(20)] == [
        list(range(number, 2 * number + 3)) for number in range(20)
    ]
    assert len(shards.fingerprint) == 32


def test_a_folder_of_something_else_is_refused(tokenizer: Tokenizer, tmp_path: Path, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "kind": "model"}))
    assert "holds no token shards" in mistakes_of(folder, tokenizer)[0]
    with pytest.raises(InputError, match="no such file or folder"):
        open_shards(str(tmp_path / "nowhere"), tokenizer)

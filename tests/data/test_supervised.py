from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.cache import cache_folder
from litrecipe.data.formats import Conversation, RowError, read_conversations
from litrecipe.data.samples import SampleSet
from litrecipe.data.supervised import SupervisedCounts, encode_all, load_supervised
from litrecipe.data.tokenizer import Tokenizer


def row(asked: str, said: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


@pytest.fixture
def source(tmp_path: Path) -> str:
    return write(tmp_path / "train.jsonl", [row(f"What is {n}?", f"{n} is {n} 🤗") for n in range(20)])


def learnt(samples: SampleSet) -> list[int]:
    """Tokens of each sample that are learnt."""
    return [int(samples[i].segments[0].weights.sum()) for i in range(len(samples))]


def written(samples: SampleSet) -> int:
    """When the files of a set were written."""
    return (samples.folder / "complete.json").stat().st_mtime_ns


def test_samples_are_the_conversations(tokenizer: Tokenizer, source: str) -> None:
    loaded = load_supervised(Data(train=source), tokenizer, seed=0)
    assert loaded.val is None and len(loaded.train) == 20
    for n in (0, 19):
        messages = row(f"What is {n}?", f"{n} is {n} 🤗")["messages"]
        [encoded] = tokenizer.encode_batch([Conversation(messages, "file:1")])
        assert not isinstance(encoded, RowError)
        ids, mask = encoded
        sample = loaded.train[n]
        assert sample.id == f"{source}:{n + 1}"
        np.testing.assert_array_equal(sample.segments[0].tokens, ids)
        np.testing.assert_array_equal(sample.segments[0].weights, mask.astype(np.float32))
    counts = loaded.report.train
    assert (counts.rows, counts.samples) == (20, 20)
    assert counts.tokens == loaded.train.lengths.sum()
    assert counts.learnt == sum(learnt(loaded.train)) > 0


def test_mask_all_learns_everything_that_has_a_predecessor(tokenizer: Tokenizer, source: str) -> None:
    train = load_supervised(Data(train=source, mask="all"), tokenizer, seed=0).train
    assert learnt(train) == (train.lengths - 1).tolist()


def test_the_second_time_nothing_is_tokenised(tokenizer: Tokenizer, source: str) -> None:
    first = load_supervised(Data(train=source), tokenizer, seed=0)
    before = written(first.train)
    again = load_supervised(Data(train=source), tokenizer, seed=1)
    assert written(again.train) == before
    assert first.train.fingerprint == again.train.fingerprint
    assert str(first.report) == str(again.report)


@pytest.mark.parametrize("change", [{"max_length": 60}, {"mask": "all"}, {"format": "messages"}])
def test_other_options_are_tokenised_anew(tokenizer: Tokenizer, source: str, change: dict[str, Any]) -> None:
    load_supervised(Data(train=source), tokenizer, seed=0)
    load_supervised(Data(train=source, **change), tokenizer, seed=0)
    folder = cache_folder(Data()) / "supervised"
    assert sum(path.is_dir() for path in folder.iterdir()) == 2


def test_another_template_or_content_is_tokenised_anew(
    tokenizer: Tokenizer, chatml_folder: Path, tmp_path: Path, source: str
) -> None:
    before = load_supervised(Data(train=source), tokenizer, seed=0).train.fingerprint
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    mine = Tokenizer.load(chatml_folder, str(template))
    assert load_supervised(Data(train=source), mine, seed=0).train.fingerprint != before
    write(Path(source), [row("a", "b")])
    assert len(load_supervised(Data(train=source), tokenizer, seed=0).train) == 1


def test_a_damaged_cache_is_made_anew(tokenizer: Tokenizer, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = load_supervised(Data(train=source), tokenizer, seed=0).train
    (first.folder / "tokens.bin").write_bytes(b"")
    again = load_supervised(Data(train=source), tokenizer, seed=0).train
    assert again.fingerprint == first.fingerprint and len(again[3].segments[0].tokens) > 0
    assert "damaged" in capsys.readouterr().err


def test_cut_empty_and_masked_samples_are_counted_and_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [row("a", "b"), row("a", "b " * 300), row("a " * 300, "b"), row("a", " "), row("", "b")]
    loaded = load_supervised(Data(train=write(tmp_path / "x.jsonl", rows), max_length=100), tokenizer, seed=0)
    counts = loaded.report.train
    assert [sample.id.rpartition(":")[2] for sample in map(loaded.train.__getitem__, range(2))] == ["1", "2"]
    assert loaded.train.lengths.max() == 100
    found = {
        name: (trouble.count, [w.rpartition(":")[2] for w in trouble.first])
        for name, trouble in (("truncated", counts.truncated), ("empty", counts.empty), ("masked", counts.masked))
    }
    assert found == {"truncated": (2, ["2", "3"]), "empty": (2, ["4", "5"]), "masked": (1, ["3"])}
    assert "truncated to data.max_length: 2 (x.jsonl:2, x.jsonl:3)" in str(loaded.report)
    assert "dropped as empty: 2" in str(loaded.report) and "nothing to learn: 1" in str(loaded.report)


def test_a_set_without_anything_to_learn_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [row("a " * 300, "b")] * 3)
    for _ in range(2):  # also from the cache
        with pytest.raises(InputError, match=r"data\.train: nothing in it can be learnt"):
            load_supervised(Data(train=source, max_length=50), tokenizer, seed=0)


def test_wrong_rows_are_named_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [row("a", "b"), {"messages": []}, {"rows": 1}])
    with pytest.raises(InputError) as caught:
        load_supervised(Data(train=source), tokenizer, seed=0)
    assert [mistake.split(": ")[0] for mistake in caught.value.mistakes] == [f"{source}:2", f"{source}:3"]


def test_rows_that_the_template_refuses_are_named(chatml_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('I said no') }}{% endif %}{{ m.content }}"
        "<|im_end|>{% endfor %}"
    )
    source = write(tmp_path / "x.jsonl", [row("a", "b"), row("a", "no"), row("no", "b")])
    with pytest.raises(InputError) as caught:
        load_supervised(Data(train=source), Tokenizer.load(chatml_folder, str(template)), seed=0)
    assert [mistake.split(": ")[0] for mistake in caught.value.mistakes] == [f"{source}:2", f"{source}:3"]
    assert "I said no" in caught.value.mistakes[0]


def test_a_template_that_refuses_all_rows_is_not_tried_on_all(chatml_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "d.jsonl", [row("a", "b")] * 5000)
    template = tmp_path / "t.jinja"
    template.write_text("{{ raise_exception('no') }}")
    counts = SupervisedCounts(source)
    with pytest.raises(InputError) as wrong:
        tokenizer = Tokenizer.load(chatml_folder, str(template))
        list(encode_all(read_conversations(source, Data(train=source)), Data(train=source), tokenizer, counts))
    assert len(wrong.value.mistakes) == 21
    assert counts.rows == 20


def test_held_out_samples_are_chosen_by_the_seed(tokenizer: Tokenizer, source: str) -> None:
    data = Data(train=source, val_fraction=0.25)
    one, same, other = (load_supervised(data, tokenizer, seed=seed) for seed in (0, 0, 1))
    assert one.val is not None and same.val is not None and other.val is not None
    assert (len(one.train), len(one.val)) == (15, 5)
    ids = {sample_set[i].id for sample_set in (one.train, one.val) for i in range(len(sample_set))}
    assert len(ids) == 20
    assert one.val.fingerprint == same.val.fingerprint != other.val.fingerprint
    assert "5 samples of it held out" in str(one.report)


def test_val_is_read_like_train(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    val = write(tmp_path / "val.jsonl", [row("a", "b")])
    loaded = load_supervised(Data(train=source, val=val), tokenizer, seed=0)
    assert loaded.val is not None and len(loaded.val) == 1
    assert loaded.report.val is not None and loaded.report.val.rows == 1
    with pytest.raises(InputError, match=r"^data\.val: "):
        long = write(tmp_path / "long.jsonl", [row("a " * 3000, "b")])
        load_supervised(Data(train=source, val=long), tokenizer, seed=0)


def test_a_template_that_tells_the_date_needs_one(chatml_folder: Path, tmp_path: Path, source: str) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%d %b %Y %H') }}{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    with pytest.raises(InputError, match=r"^data\.date: missing: .*--data\.date 2024-07-26$"):
        load_supervised(Data(train=source), Tokenizer.load(chatml_folder, str(template)), seed=0)
    tokenizer = Tokenizer.load(chatml_folder, str(template), date="2024-07-26")
    train = load_supervised(Data(train=source, date="2024-07-26"), tokenizer, seed=0).train
    assert tokenizer.decode(train[0].segments[0].tokens).startswith("26 Jul 2024 00")


def test_a_cache_that_cannot_be_written_is_said(tokenizer: Tokenizer, chatml_folder: Path, source: str) -> None:
    code = (
        "import resource, sys\nfrom litrecipe.config.errors import InputError\n"
        "from litrecipe.config.groups import Data\nfrom litrecipe.data.supervised import load_supervised\n"
        "from litrecipe.data.tokenizer import Tokenizer\ntokenizer = Tokenizer.load(sys.argv[2])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        "try:\n    load_supervised(Data(train=sys.argv[1]), tokenizer, seed=0)\n"
        "except InputError as error:\n    print(error)"
    )
    # A limit on the size of files stands for a full disk: Python ignores the signal, so writing fails.
    command = [sys.executable, "-c", code, source, str(chatml_folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"data.cache_dir: {cache_folder(Data())}: File too large: make room")
    with pytest.raises(InputError, match=rf"^data\.cache_dir: {source}/x: Not a directory"):
        load_supervised(Data(train=source, cache_dir=f"{source}/x"), tokenizer, seed=0)


def test_samples_longer_than_the_models_context_are_refused(tokenizer: Tokenizer, source: str, tmp_path: Path) -> None:
    data = Data(train=source)
    longest = int(load_supervised(data, tokenizer, seed=0).train.lengths.max())
    load_supervised(data, tokenizer, seed=0, max_positions=longest)
    with pytest.raises(InputError, match=rf"^data\.max_length: 2048: .* is {longest - 1} tokens, .* has {longest}: "):
        load_supervised(data, tokenizer, seed=0, max_positions=longest - 1)
    data = Data(train=source, val=write(tmp_path / "val.jsonl", [row("a", "b " * 100)]))
    with pytest.raises(InputError, match=r"^data\.max_length"):
        load_supervised(data, tokenizer, seed=0, max_positions=longest)


def test_several_processes_tokenise_once(chatml_folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "x.jsonl", [row(f"What is {n}?", f"{n} is " * 20) for n in range(2000)])
    code = (
        "import sys\nfrom litrecipe.config.groups import Data\nfrom litrecipe.data.supervised import load_supervised\n"
        "from litrecipe.data.tokenizer import Tokenizer\n"
        "train = load_supervised(Data(train=sys.argv[1]), Tokenizer.load(sys.argv[2]), seed=0).train\n"
        "print((train.folder / 'complete.json').stat().st_mtime_ns, train.fingerprint)"
    )
    command = [sys.executable, "-c", code, source, str(chatml_folder)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ) for _ in range(2)]
    outputs = {process.communicate(timeout=120)[0] for process in processes}
    assert len(outputs) == 1 and len(outputs.pop().split()) == 2
    assert sum(path.is_dir() for path in (cache_folder(Data()) / "supervised").iterdir()) == 1

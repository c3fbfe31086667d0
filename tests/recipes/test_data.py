from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data, DataRecipe, Model
from litrecipe.data.preferences import read_preferences
from litrecipe.recipes.data import check, preview

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A `config.json` without weights, with a tokenizer of bytes beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>", "chat_template": TEMPLATE}))
    config = {
        "model_type": "llama",
        "vocab_size": backend.get_vocab_size(),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return Model(source=str(folder / "config.json"), init="random")


@pytest.fixture(autouse=True)
def quiet_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITRECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def write(path: Path, *pairs: tuple[str, str]) -> str:
    rows: list[dict[str, Any]] = [{"prompt": asked, "completion": said} for asked, said in pairs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_check_tells_repeats_leaks_and_cuts(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = write(tmp_path / "train.jsonl", ("Why?", "So."), ("Why?", "So."), ("Long", "x" * 100), ("Mute", " "))
    val = write(tmp_path / "val.jsonl", ("why?", "so."), ("How?", "Thus."))
    assert check(DataRecipe(model=model, data=Data(train=train, val=val, max_length=60))) == 0
    told = {" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()}
    assert "longer than data.max_length 60 and cut 25.0 %: 1 (train.jsonl:3)" in told
    assert "empty, dropped 25.0 %: 1 (train.jsonl:4)" in told
    assert "said before, word for word 25.0 %: 1 (train.jsonl:2)" in told
    assert "also in train, word for word none" in told
    assert "also in train, but for case and white space 50.0 %: 1 (val.jsonl:1)" in told


def test_check_refuses_rows_it_cannot_read(model: Model, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{\n[]\n")
    with pytest.raises(InputError) as caught:
        check(DataRecipe(model=model, data=Data(train=str(tmp_path / "train.jsonl"))))
    assert len(caught.value.mistakes) == 2


def test_preview_shows_the_first_rows_with_their_mask(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = write(tmp_path / "train.jsonl", ("Why?", "So. 🤗"), ("<end>", "[red]End"), ("Who?", "Me."))
    assert preview(DataRecipe(model=model, data=Data(train=train)), 2) == 0
    told = capsys.readouterr().out
    assert f"{train}:1\nuser: Why?<end>\nassistant: ⟦So. 🤗<end>\n⟧\n" in told
    assert f"{train}:2\nuser: <end><end>\nassistant: ⟦[red]End<end>\n⟧\n" in told
    assert "Who?" not in told and f"shown: {train}: 2 samples, " in told


def test_preview_of_a_generated_source(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(DataRecipe(model=model, data=Data(train="toy:units?n=9")), 3) == 0
    assert capsys.readouterr().out.count("⟦") == 3


def test_preferences_are_recognised(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(DataRecipe(model=model, data=Data(train="toy:units-pairs?n=9")), 2) == 0
    told = capsys.readouterr().out
    assert told.count("chosen") == 3 and told.count("⟦") == 4  # one of the former in the last line


def test_check_of_preferences_tells_length_repeats_and_leaks(
    model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [
        ("Why?", "Because.", "So."),
        ("Why?", "So.", "Because."),
        ("How?", "Thus it is.", "No."),
        ("Who?", "I", "I"),
    ]
    rows = [{"prompt": asked, "chosen": good, "rejected": bad} for asked, good, bad in pairs]
    for name, found in (("train", rows), ("val", rows[:1])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    data = Data(train=str(tmp_path / "train.jsonl"), val=str(tmp_path / "val.jsonl"))
    assert check(DataRecipe(model=model, data=data)) == 0
    told = {" ".join(line.replace("│", " ").split()) for line in capsys.readouterr().out.splitlines()}
    assert "the longer answer is the better one 66.7 %" in told
    assert "the same answer twice, dropped 25.0 %: 1 (train.jsonl:4)" in told
    assert "the same pair the other way round 50.0 %: 2 (train.jsonl:1, train.jsonl:2)" in told
    assert "prompt also in train 100.0 %: 1 (val.jsonl:1)" in told


def test_a_column_that_nobody_knows_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"q": "Why?", "good": "So.", "bad": "No."}) + "\n")
    named = Data(train=str(tmp_path / "p.jsonl"), columns={"prompt": "q", "chosen": "good", "rejcted": "bad"})
    with pytest.raises(InputError, match=r"data\.columns: rejcted: did you mean \{rejected: bad\}"):
        next(read_preferences(named.train, named))
    named.columns["rejected"] = named.columns.pop("rejcted")
    assert next(read_preferences(named.train, named)).answers[0]["content"] == "So."


def test_data_without_rows_is_refused(model: Model, tmp_path: Path) -> None:
    recipe = DataRecipe(model=model, data=Data(train=write(tmp_path / "d.jsonl")))
    for look in (check, lambda recipe: preview(recipe, 3)):
        with pytest.raises(InputError, match=r"data\.train: .*d\.jsonl: has no rows"):
            look(recipe)

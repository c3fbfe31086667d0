"""What a user may call a model, and what is said when it is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import HUB_FILES, NOT_FETCHED, open_asked, open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Model


def mistakes(source: object, **keys: object) -> str:
    with pytest.raises(InputError) as caught:
        load_model(open_model(str(source), **keys))
    return str(caught.value)


def test_a_folder(tiny_model: Path) -> None:
    files = open_model(str(tiny_model))
    assert files.source == files.base == str(tiny_model)
    assert files.config["hidden_size"] == files.architecture.hidden_size == 48
    assert files.tokenizer_dir == tiny_model
    assert files.shapes["model.norm.weight"] == (48,)
    assert {name for name, _ in files.tensors()} == set(files.shapes)
    assert "llama, 57,072 parameters in 2 layers of 48" in files.describe()


def test_opening_imports_no_torch(tiny_model: Path) -> None:
    code = f"""
import sys
from litrecipe.checkpoint.source import open_model
files = open_model({str(tiny_model)!r})
files.weights_hash()
sys.exit("torch" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_config_alone_is_for_random_weights(tiny_model: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((tiny_model / "config.json").read_bytes())
    for source in (config, tmp_path):
        assert "a config.json without weights" in mistakes(source)
        assert load_model(open_model(str(source)), init="random").architecture.hidden_size == 48
    assert open_model(str(config)).weights_hash() != open_model(str(tiny_model)).weights_hash()


def test_mistyped_paths_get_a_suggestion(tiny_model: Path, tmp_path: Path) -> None:
    wrong = tiny_model.parent / "modle"
    assert mistakes(wrong) == f"model.source: {wrong}: no such file or folder: did you mean {tiny_model}?"
    assert "give a Hugging Face folder, a hub id" in mistakes(tmp_path / "x" / "y" / "z")
    (tmp_path / "link").symlink_to("gone")
    assert "did you mean" not in mistakes(tmp_path / "link")
    assert "neither a folder nor a .gguf file" in mistakes("/dev/null")
    assert "model.source: missing" in mistakes("")


def test_a_hub_id_that_is_not_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    said = "model.source: nobody/nothing@main: no such file or folder, not in the hub cache"
    assert mistakes("nobody/nothing@main").startswith(said)
    assert "model.source: a/b--c: no name a model on the hub can have: " in mistakes("a/b--c")
    (tmp_path / "models" / "smollm2").mkdir(parents=True)
    assert mistakes("models/smolm2").endswith("did you mean models/smollm2?")


def test_a_hub_id_in_the_cache(tiny_model: Path, tmp_path: Path, litrecipe) -> None:
    repo = tmp_path / "models--org--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for file in tiny_model.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    code = "import sys; from litrecipe.checkpoint.source import open_model; print(open_model('org/tiny').tokenizer_dir)"
    env = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=60)
    assert done.stdout.strip() == str(snapshot), done.stderr


def test_files_and_folders_that_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    assert "neither a folder nor a .gguf file" in mistakes(tmp_path / "weights.bin")
    assert "no config.json in it" in mistakes(tmp_path)
    (tmp_path / "q4.gguf").write_bytes(b"")
    assert f"give {tmp_path / 'q4.gguf'}" in mistakes(tmp_path)
    (tmp_path / "recipe.yaml").write_text("")
    assert "this run has no final model yet" in mistakes(tmp_path)


def test_a_run_directory_is_its_final_model(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    copy(tiny_model, tmp_path / "final")
    (tmp_path / "recipe.yaml").write_text("")
    files = open_model(str(tmp_path))
    assert files.source == files.base == str(tmp_path / "final")


def test_what_is_fetched_from_the_hub() -> None:
    from huggingface_hub.utils import filter_repo_objects

    wanted = ["model-00001-of-00002.safetensors", "config.json", "tokenizer.model", "chat_template.jinja"]
    others = ["consolidated.safetensors", "onnx/model.safetensors", "original/params.json", "pytorch_model.bin"]
    files = [*wanted, *others, "manifest.json"]
    assert list(filter_repo_objects(files, allow_patterns=HUB_FILES, ignore_patterns=NOT_FETCHED)) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds a list"),
        ("\x80", "not valid JSON"),
        ('{"model_type": "llama"}', "hidden_size: missing"),
        ('{"model_type": "mamba"}', "model_type: mamba"),
        ('{"model_type": "llama", "quantization_config": {}}', "quantization_config"),
    ],
)
def test_a_damaged_config(tmp_path: Path, text: str, said: str) -> None:
    config = tmp_path / "config.json"
    config.write_text(text, encoding="latin-1")
    message = mistakes(config)
    assert said in message and all(line.startswith(f"{config}: ") for line in message.splitlines())


def copy(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_tokenizer_that_does_not_fit(tiny_model: Path, tmp_path: Path) -> None:
    file = copy(tiny_model, tmp_path) / "tokenizer.json"
    state = json.loads(file.read_text())
    state["added_tokens"].append({**state["added_tokens"][0], "id": 320, "content": "<one too many>"})
    file.write_text(json.dumps(state))
    assert mistakes(tmp_path).startswith(f"{file}: token id 320: the model's embedding has 320 rows")
    assert str(file) in mistakes(tiny_model, tokenizer=str(tmp_path))
    file.write_text('{"model": 3}')
    assert mistakes(tmp_path).startswith(f"{file}: ")


def test_fresh_weights_need_a_row_for_each_token(tiny_model: Path, tmp_path: Path) -> None:
    """Nothing was trained with a tokenizer yet: the config is what is too small, or the tokenizer too large."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads((tiny_model / "config.json").read_text()) | {"vocab_size": 300}))
    with pytest.raises(InputError) as error:
        open_asked(Model(source=str(config), init="random", tokenizer=str(tiny_model)))
    cure = "set it to 306 or more, or give another model.tokenizer"
    assert str(error.value) == f"model.source: vocab_size 300: {tiny_model}/tokenizer.json has ids up to 305: {cure}"


def test_another_tokenizer(tiny_model: Path, tmp_path: Path) -> None:
    assert "no tokenizer.json in it" in mistakes(tiny_model, tokenizer=str(tmp_path))
    copy(tiny_model, tmp_path)
    assert open_model(str(tiny_model), tokenizer=str(tmp_path)).tokenizer_dir == tmp_path


def test_weights_hash_follows_the_weights(tiny_model: Path, tmp_path: Path) -> None:
    before = open_model(str(tiny_model)).weights_hash()
    file = copy(tiny_model, tmp_path) / "model.safetensors"
    assert open_model(str(tmp_path)).weights_hash() == before
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    assert open_model(str(tmp_path)).weights_hash() != before


def test_one_process_hashes_for_all(tiny_model: Path, tmp_path: Path) -> None:
    copy(tiny_model, tmp_path)
    code = f"""
import time
from litrecipe.checkpoint import source
files = source.open_model({str(tmp_path)!r})
digest = source._digest
source._digest = lambda weights: print("hashed") or time.sleep(0.5) or digest(weights)
files.weights_hash()
"""
    ranks = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sum(rank.communicate(timeout=60)[0].count("hashed") for rank in ranks) == 1


def test_what_ships_with_recipes_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = open_model("hub:experiments/addition/config.json")
    assert files.weights is None and files.architecture.vocab_size == 14
    assert (files.tokenizer_dir / "tokenizer.json").is_file()
    assert open_model(files.source, tokenizer="hub:experiments/addition").tokenizer_dir == files.tokenizer_dir
    assert "no such file or folder" in mistakes("hub:experiments/nothing/config.json")


def test_the_tokenizer_of_sums_has_a_token_for_each_character() -> None:
    from litrecipe.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(open_model("hub:experiments/addition/config.json").tokenizer_dir)
    ids = tokenizer.encode("123+456=579")
    assert len(ids) == 11 and tokenizer.decode(ids) == "123+456=579"
    assert tokenizer.decode([*ids, *tokenizer.eos_ids]) == "123+456=579"
    assert len({*tokenizer.encode("0123456789+="), tokenizer.pad_id, *tokenizer.eos_ids}) == 14

"""Damaged weights end with an error that names the file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from litrecipe.checkpoint.manifest import FORMAT
from litrecipe.checkpoint.safetensors_files import INDEX, SafetensorsFile, find_weights
from litrecipe.config.errors import InputError

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b.weight": torch.randn(5, 2).bfloat16(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "half": torch.randn(7).half(),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("st") / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    return path


def read(path: Path) -> dict[str, torch.Tensor]:
    return dict(SafetensorsFile(path).tensors())


def test_reads_what_the_library_wrote(file: Path) -> None:
    found = read(file)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_stored_bytes_are_those_of_the_tensor(file: Path) -> None:
    weights = find_weights(file.parent)
    assert weights is not None
    assert weights.stored("a") == TENSORS["a"].numpy().tobytes()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_truncation_is_found(file: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = file.read_bytes()
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(InputError, match=str(damaged)):
        read(damaged)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_of_the_header_is_found_or_changes_no_value(
    file: Path, tmp_path: Path, data: st.DataObject
) -> None:
    whole = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(whole[:8], "little")
    bit = data.draw(st.integers(0, 8 * header - 1))
    whole[bit // 8] ^= 1 << bit % 8
    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(whole)
    try:
        found = read(damaged)
    except InputError as error:
        assert all(line.startswith(str(damaged)) for line in error.mistakes)
        return
    # What is left are flips inside the free metadata, inside a name, which the model then does not know, or in the
    # shape of a tensor without values, which is not the model's.
    assert len(found) == len(TENSORS)
    for name in found.keys() & TENSORS.keys():
        assert torch.equal(found[name].flatten(), TENSORS[name].flatten())


def assert_read_until_flipped(path: Path, content: bytearray) -> None:
    path.write_bytes(content)
    assert read(path).keys() == TENSORS.keys()
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: its sha256 is not"):
        read(path)


def test_flipped_weights_are_found_by_the_manifest(file: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "model.safetensors"
    whole = bytearray(file.read_bytes())
    entry = {"bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": {damaged.name: entry}}))
    assert_read_until_flipped(damaged, whole)


def test_flipped_weights_are_found_by_the_name_in_a_hub_cache(file: Path, tmp_path: Path) -> None:
    whole = bytearray(file.read_bytes())
    blob = tmp_path / "blobs" / hashlib.sha256(whole).hexdigest()
    blob.parent.mkdir()
    linked = tmp_path / "snapshots" / "1" / "model.safetensors"
    linked.parent.mkdir(parents=True)
    linked.symlink_to(blob)
    blob.write_bytes(whole)
    assert read(linked).keys() == TENSORS.keys()
    whole[-1] ^= 64
    blob.write_bytes(whole)
    with pytest.raises(InputError, match=f"{linked}: its sha256 is not"):
        read(linked)


def test_flipped_weights_are_found_by_what_a_download_into_a_folder_recorded(file: Path, tmp_path: Path) -> None:
    whole = bytearray(file.read_bytes())
    damaged = tmp_path / "model.safetensors"
    record = tmp_path / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    record.parent.mkdir(parents=True)
    record.write_text(f"{'c' * 40}\n{hashlib.sha256(whole).hexdigest()}\n1700000000.0\n")
    assert_read_until_flipped(damaged, whole)
    record.write_text(f"{'c' * 40}\n{'d' * 40}\n1700000000.0\n")  # a small file's git hash says nothing
    assert read(damaged).keys() == TENSORS.keys()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_not_finite_are_refused(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    path = tmp_path / "model.safetensors"
    largest = torch.finfo(dtype).max
    save_file({"w": torch.tensor([1.0, -largest, largest], dtype=dtype)}, path)
    read(path)
    save_file({"w": torch.tensor([1.0, value, 2.0], dtype=dtype)}, path)
    with pytest.raises(InputError, match=f"{path}: w: holds values that are not finite"):
        read(path)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w.qweight": torch.zeros(3, dtype=torch.int32)}, path)
    with pytest.raises(InputError, match=r"w\.qweight: type I32"):
        SafetensorsFile(path)


def test_shards(tmp_path: Path, make_llama) -> None:
    make_llama(tmp_path, shard="60KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    weights = find_weights(tmp_path)
    assert weights is not None and len(shards) > 2
    whole = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    assert all(torch.equal(tensor, whole.pop(name)) for name, tensor in weights.tensors()) and not whole

    shutil.move(shards[1], tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{shards[1]}: missing"):
        find_weights(tmp_path)
    save_file({"other": torch.zeros(1)}, shards[1])
    with pytest.raises(InputError, match=f"{shards[1]}: .*: not in it"):
        find_weights(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(InputError, match=f"{INDEX}: weight_map"):
        find_weights(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: a pickle can run code"):
        find_weights(tmp_path)

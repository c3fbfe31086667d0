from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from litrecipe.config.errors import InputError
from litrecipe.data.samples import SampleSet, is_complete
from litrecipe.model.row import Sample, Segment


def segment(*tokens: int, weights: list[float] | None = None, parent: int = -1) -> Segment:
    return Segment(
        np.array(tokens, dtype=np.int32),
        np.array(weights or [0.0, *[1.0] * (len(tokens) - 1)], dtype=np.float32),
        parent,
    )


PAIR = Sample("b:2", (segment(1, 2), segment(3, 4, 5, weights=[1, 1, 0], parent=0), segment(6, parent=0)))
SAMPLES = [Sample("a:1", (segment(7, 8, 9),)), PAIR, Sample("c:3", (segment(5, 6),))]


def same(one: Sample, other: Sample) -> None:
    assert one.id == other.id and len(one.segments) == len(other.segments)
    for left, right in zip(one.segments, other.segments, strict=True):
        np.testing.assert_array_equal(left.tokens, right.tokens)
        np.testing.assert_array_equal(left.weights, right.weights)
        assert left.parent == right.parent
        assert left.weights.dtype == np.float32


def test_what_is_written_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is on the disk before it has its name."""
    synced: list[Path] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(Path(f"/proc/self/fd/{file}").readlink()))
    written = SampleSet.write(tmp_path / "set", iter(SAMPLES), about=lambda: {"rows": 3})
    names = [f"set.part/{path.name}" for path in (tmp_path / "set").iterdir()]
    assert {str(path.relative_to(tmp_path)) for path in synced} == {*names, "set.part", "."} and len(names) == 7
    read = SampleSet(tmp_path / "set")
    assert len(read) == 3 and read.about == {"rows": 3}
    for index, sample in enumerate(SAMPLES):
        same(read[index], sample)
    assert read.lengths.tolist() == [3, 6, 2] == [sample.length for sample in SAMPLES]
    assert read.fingerprint == written.fingerprint
    assert isinstance(read[0].segments[0].tokens, np.memmap)


def test_weights_between_0_and_1_are_kept(tmp_path: Path) -> None:
    fractional = Sample("d:4", (segment(1, 2, 3, weights=[0, 0.25, 1]),))
    read = SampleSet.write(tmp_path / "set", [*SAMPLES, fractional, *SAMPLES])
    for index, sample in enumerate([*SAMPLES, fractional, *SAMPLES]):
        same(read[index], sample)


def test_extras_are_kept_sample_by_sample(tmp_path: Path) -> None:
    extras = [np.array(values, dtype=np.float32) for values in ([1.5], [], [2, -3])]
    scored = [Sample(s.id, s.segments, {"scores": extra}) for s, extra in zip(SAMPLES, extras, strict=True)]
    read = SampleSet.write(tmp_path / "set", scored)
    for index, extra in enumerate(extras):
        same(read[index], scored[index])
        np.testing.assert_array_equal(read[index].extra["scores"], extra)
    assert read.subset([2])[0].extra["scores"].tolist() == [2, -3]
    named = [Sample(s.id, (), {"ids": np.array([n, 60_000], dtype=np.uint16)}) for n, s in enumerate(SAMPLES)]
    ids = SampleSet.write(tmp_path / "named", named)
    assert [one.extra["ids"].tolist() for one in map(ids.__getitem__, range(3))] == [[n, 60_000] for n in range(3)]
    assert ids[0].extra["ids"].dtype == np.uint16 and ids[0].segments == ()
    assert read.fingerprint != SampleSet.write(tmp_path / "plain", SAMPLES).fingerprint
    assert not SampleSet(tmp_path / "plain")[0].extra


def test_a_subset_is_its_samples(tmp_path: Path) -> None:
    whole = SampleSet.write(tmp_path / "set", SAMPLES)
    part = whole.subset([2, 1])
    same(part[0], SAMPLES[2])
    assert part.lengths.tolist() == [2, 6]
    assert part.subset([1])[0].id == "b:2"
    assert len({whole.fingerprint, part.fingerprint, whole.subset([1, 2]).fingerprint}) == 3
    assert part.fingerprint == whole.subset(np.array([2, 1])).fingerprint


def test_fingerprints_follow_the_content(tmp_path: Path) -> None:
    one = SampleSet.write(tmp_path / "one", SAMPLES)
    assert one.fingerprint == SampleSet.write(tmp_path / "two", SAMPLES).fingerprint
    assert one.fingerprint != SampleSet.write(tmp_path / "three", SAMPLES[:2]).fingerprint
    elsewhere = [Sample(f"moved/{sample.id}", sample.segments) for sample in SAMPLES]
    assert one.fingerprint == SampleSet.write(tmp_path / "four", elsewhere).fingerprint


def test_an_empty_set(tmp_path: Path) -> None:
    assert len(SampleSet.write(tmp_path / "set", [])) == 0


@pytest.mark.parametrize("name", ["tokens.bin", "weights.bin", "segment_starts.bin", "ids.json"])
def test_altered_cut_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    path = SampleSet.write(tmp_path / "set", SAMPLES).folder / name
    good = path.read_bytes()
    for bad in (good[:-1], bytes([good[0] ^ 1]) + good[1:]):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=f"{name}: altered"):
            SampleSet(tmp_path / "set")
    path.unlink()
    with pytest.raises(InputError, match=f"{name}: missing"):
        SampleSet(tmp_path / "set")


def test_no_flipped_bit_of_the_marker_is_overlooked(tmp_path: Path) -> None:
    """Whatever it makes of the file: no JSON, no UTF-8, another hash, another name."""
    path = SampleSet.write(tmp_path / "set", SAMPLES, about=lambda: {"rows": {10: 1, 9: 2}}).folder / "complete.json"
    good = path.read_bytes()
    SampleSet(tmp_path / "set")
    for place in range(len(good)):
        for bit in (1, 128):
            path.write_bytes(good[:place] + bytes([good[place] ^ bit]) + good[place + 1 :])
            try:
                SampleSet(tmp_path / "set")
            except InputError as error:
                assert "complete.json" in str(error)
            else:  # white space, or the name of the seal itself
                assert good[place : place + 1].isspace() or place >= good.index(b'"seal"')


def test_nothing_appears_before_all_is_written(tmp_path: Path) -> None:
    def failing():
        yield SAMPLES[0]
        assert not is_complete(tmp_path / "set")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        SampleSet.write(tmp_path / "set", failing())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="no complete set"):
        SampleSet(tmp_path / "set")


def test_the_next_process_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\nfrom litrecipe.data.samples import SampleSet\n"
        "def killed():\n    os.kill(os.getpid(), signal.SIGKILL)\n    yield\n"
        "SampleSet.write(sys.argv[1], killed())"
    )
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "set")])
        assert len(list(tmp_path.iterdir())) == 1
    SampleSet.write(tmp_path / "set", SAMPLES)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]

"""Training state: complete or absent, bit for bit, and never silently damaged."""

import json
import os
import random
from itertools import combinations_with_replacement

import pytest
import torch
from safetensors.torch import save_file

from litrecipe.checkpoint import state
from litrecipe.checkpoint.manifest import MANIFEST
from litrecipe.config.errors import InputError
from litrecipe.model.tensor_plan import Held, held


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    weights = {"a.weight": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "scalar": torch.tensor(3.0)}
    optimizer = {"a.weight::exp_avg": torch.randn(5, 3), "a.weight::step": torch.tensor(4.0)}
    return weights, optimizer


def save(folder, step, tensors, **extra):
    target = state.step_folder(folder, step)
    state.save(target, *tensors, {"step": step, "rank": {"rng": step}, **extra})
    return target


def test_round_trip_is_exact(tmp_path, tensors):
    saved = state.Saved(save(tmp_path, 3, tensors))
    assert saved.state["step"] == 3
    assert saved.state["ranks"] == [{"rng": 3}]
    for kind, expected in zip(("weights", "optimizer"), tensors, strict=True):
        pieces = saved.tensors(kind)
        assert pieces.names() == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(pieces.read(name), tensor)
            assert pieces.read(name).dtype == tensor.dtype


def write_pieces(folder, whole, boxes, as_schema_1=False):
    """A file for each box of a tensor, which is a slice a dimension."""
    for rank, box in enumerate(boxes):
        offset = [part.start for part in box]
        layout = {"w": {"offset": offset[0] if as_schema_1 else offset, "shape": list(whole.shape)}}
        path = folder / f"weights-{rank:05d}.safetensors"
        save_file({"w": whole[box].clone()}, path, {"layout": json.dumps(layout)})
    return state.Pieces(sorted(folder.glob("weights-*")))


@pytest.mark.parametrize("as_schema_1", [False, True])
def test_pieces_of_any_number_of_ranks_are_read_by_any_other(tmp_path, as_schema_1):
    """Three ranks wrote rows 0-1, 2-3, 4 of a tensor; any range of rows can be read."""
    whole = torch.arange(15.0).reshape(5, 3)
    boxes = [(slice(start, stop), slice(0, 3)) for start, stop in [(0, 2), (2, 4), (4, 5)]]
    pieces = write_pieces(tmp_path, whole, boxes, as_schema_1)
    for start, stop in combinations_with_replacement(range(6), 2):
        assert torch.equal(pieces.read("w", (start, 0), (stop - start, 3)), whole[start:stop])
    assert torch.equal(pieces.read("w"), whole)


def test_pieces_along_several_dimensions_are_read_by_any_other_division(tmp_path):
    """Five ranks divided a tensor unevenly along both dimensions; any box of it can be read."""
    whole = torch.arange(35).reshape(5, 7)
    cuts = [(0, 2, 0, 3), (2, 5, 0, 3), (0, 3, 3, 6), (3, 5, 3, 6), (0, 5, 6, 7)]
    pieces = write_pieces(tmp_path, whole, [(slice(a, b), slice(c, d)) for a, b, c, d in cuts])
    for top, bottom in combinations_with_replacement(range(6), 2):
        for left, right in combinations_with_replacement(range(8), 2):
            box = pieces.read("w", (top, left), (bottom - top, right - left))
            assert torch.equal(box, whole[top:bottom, left:right])


def test_parts_of_projections_that_are_one_weight_are_written_where_they_belong(tmp_path):
    """q, k and v of 6, 4 and 2 rows: each of two ranks has half of each; what both have one of them writes."""
    whole, common = torch.arange(36.0).reshape(12, 3), torch.arange(5.0)
    for rank in (0, 1):
        what = held(0, [6, 4, 2], rank, 2)
        part = torch.cat([whole[start:stop] for start, stop in what.ranges])
        part.held, same = what, common.clone()
        same.held = Held(is_copy=rank > 0)
        written = state.pieces_of({"w": part, "norm": same}, state.Writer(rank, True, lambda value: [value]))
        assert list(written) == ["w", "w@1", "w@2", "norm"][: 4 - rank]
        state._write_pieces(tmp_path / f"weights-{rank:05d}.safetensors", written)
    pieces = state.Pieces(sorted(tmp_path.glob("weights-*")))
    assert pieces.names() == {"w", "norm"}
    assert torch.equal(pieces.read("w"), whole) and torch.equal(pieces.read("norm"), common)
    assert torch.equal(pieces.like("w", part), part)
    column = whole[:, 1:2].clone()
    column.held = held(1, [3], 1, 3)
    found = pieces.like("w", column)
    assert torch.equal(found, column) and found.is_contiguous()  # fused optimizers go by the memory


def test_a_piece_that_nobody_wrote_is_missed(tmp_path):
    pieces = write_pieces(tmp_path, torch.zeros(4, 3), [(slice(0, 3), slice(0, 3)), (slice(3, 4), slice(0, 2))])
    with pytest.raises(InputError, match=r"w: 1 of 12 values are missing: the checkpoint is damaged"):
        pieces.read("w")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_keeps_the_newest_and_never_counts_a_draft_or_a_copy(tmp_path, tensors):
    """Drafts and what a kill left of a replaced folder go; a user's copies stay and count for nothing."""
    copies = ["step-00000001.keep", "step-00000003 (copy)", "step-00000099.keep.tmp"]
    for name in (*copies, "step-00000009.tmp", ".step-00000002.x7_"):
        (tmp_path / name).mkdir()
    for step in (1, 2, 3):
        state.prune(save(tmp_path, step, tensors), keep=2)
    assert [path.name for path in state.all_checkpoints(tmp_path)] == ["step-00000003", "step-00000002"]
    assert names(tmp_path) == sorted([*copies, "step-00000002", "step-00000003"])
    assert state.newest_complete(tmp_path).name == "step-00000003"


@pytest.mark.parametrize("keep", [1, 2])
def test_what_was_just_written_stays_though_later_ones_are_there(tmp_path, tensors, keep):
    for step in (10, 20, 100, 150):
        save(tmp_path, step, tensors)
    state.prune(save(tmp_path, 50, tensors), keep)
    kept = {1: [50, 100, 150], 2: [20, 50, 100, 150]}[keep]
    assert names(tmp_path) == [f"step-{step:08d}" for step in kept]


def test_steps_of_nine_digits_are_newer_than_those_of_eight(tmp_path, tensors):
    newest = save(tmp_path, 100_000_001, tensors)
    save(tmp_path, 99_999_999, tensors)
    assert state.newest_complete(tmp_path) == newest


def test_a_checkpoint_that_is_written_again_is_replaced(tmp_path, tensors):
    save(tmp_path, 3, tensors, note="old")
    torn = tmp_path / "step-00000003" / "state.json"
    torn.write_text("")
    saved = state.Saved(save(tmp_path, 3, tensors, note="new"))
    assert saved.state["note"] == "new"
    assert names(tmp_path) == ["step-00000003"]


def test_a_damaged_checkpoint_without_an_older_one(tmp_path, tensors):
    (save(tmp_path, 3, tensors) / "state.json").write_text("")
    warnings: list[str] = []
    assert state.newest_complete(tmp_path, warnings.append) is None
    assert warnings[0].endswith("there is no older one")


@pytest.mark.parametrize("seed", range(12))
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, tensors, seed):
    """Truncate, flip a bit in, or remove a random file of the newest: the older one is taken, the file is named."""
    older, newest = save(tmp_path, 1, tensors), save(tmp_path, 2, tensors)
    rng = random.Random(seed)
    victim = rng.choice(sorted(newest.iterdir()))
    content = bytearray(victim.read_bytes())
    match rng.choice(["truncate", "flip", "remove"]):
        case "truncate":
            victim.write_bytes(content[: rng.randrange(len(content))])
        case "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            victim.write_bytes(content)
        case "remove":
            victim.unlink()
    warnings: list[str] = []
    found = state.newest_complete(tmp_path, warnings.append)
    if victim.name == MANIFEST and found == newest:
        return  # the flipped bit lies in white space or the like: every file still fits
    assert found == older
    assert len(warnings) == 1
    assert newest.name in warnings[0]
    with pytest.raises(InputError, match=newest.name):
        state.Saved(newest)


def test_a_failed_save_leaves_the_older_checkpoint(tmp_path, tensors):
    """A file-size limit stands in for a full disk: the write fails half-way, as ENOSPC would make it."""
    older = save(tmp_path, 1, tensors)
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            save(tmp_path, 2, tensors)
        except InputError as error:
            os._exit(2 if "step-00000001 is intact" in str(error) else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert state.newest_complete(tmp_path) == older
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001"]

"""Where a run continues, and what it must not run over."""

import os
import sys

import pytest
import torch

from litrecipe.checkpoint import state
from litrecipe.config.errors import InputError
from litrecipe.engine.rundir import RunDir, read_records


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints of the steps 50, 100 and 150."""
    for step in (50, 100, 150):
        save(tmp_path / "run", step)
    return RunDir(tmp_path / "run")


def save(run, step):
    target = state.step_folder(run / "checkpoints", step)
    state.save(target, {"w": torch.zeros(2)}, {}, {"step": step})
    return target


def tear(checkpoint):
    (checkpoint / "weights-00000.safetensors").write_bytes(b"")


def test_auto_takes_the_newest_complete_and_says_what_it_passes_over(run, tmp_path, capfd):
    assert run.find_resume("auto").name == "step-00000150"
    tear(run.checkpoints / "step-00000150")
    assert run.find_resume("auto").name == "step-00000100"
    assert "falling back to step-00000100" in capfd.readouterr().err
    for step in (50, 100):
        tear(run.checkpoints / f"step-{step:08d}")
    assert run.find_resume("auto") is None
    assert "no complete checkpoint: starting from the first step" in capfd.readouterr().err
    assert RunDir(tmp_path / "new").find_resume("auto") is None
    assert capfd.readouterr().err == f"{tmp_path}/new: no checkpoint to resume: starting from the first step\n"


def test_a_run_that_was_stopped_before_its_first_checkpoint_can_be_started_again(tmp_path):
    run = RunDir(tmp_path / "run")
    run.start("", 0)
    assert run.checkpoints.is_dir()
    run.check(None)


def test_auto_passes_over_a_users_copy(run):
    copy = run.checkpoints / "step-00000200.keep"
    (run.checkpoints / "step-00000150").rename(copy)
    assert run.find_resume("auto").name == "step-00000100"


def test_the_newest_may_be_named(run):
    newest = run.checkpoints / "step-00000150"
    assert run.find_resume(str(newest)) == newest


def test_an_earlier_one_is_refused_while_later_ones_are_complete(run, tmp_path):
    early = run.checkpoints / "step-00000050"
    with pytest.raises(InputError, match=r"step-00000050: .* holds step-00000150, which is later: .*another --out_dir"):
        run.find_resume(str(early))
    tear(run.checkpoints / "step-00000150")
    with pytest.raises(InputError, match="holds step-00000100, which is later"):
        run.find_resume(str(early))
    tear(run.checkpoints / "step-00000100")
    assert run.find_resume(str(early)) == early
    assert RunDir(tmp_path / "new").find_resume(str(early)) == early


def test_another_runs_checkpoint_is_refused_where_a_run_is(run, tmp_path):
    other = save(tmp_path / "other", 7)
    with pytest.raises(InputError, match=r"holds another run .*name another --out_dir"):
        run.find_resume(str(other))


@pytest.mark.parametrize("where", ["run", "run/final", "run/checkpoints", "nowhere"])
def test_what_is_no_checkpoint_is_told_from_one(run, tmp_path, where):
    run.final.mkdir()
    (run.final / "manifest.json").write_text('{"format": "litrecipe/1", "files": {}}')
    with pytest.raises(InputError) as error:
        RunDir(tmp_path / "new").find_resume(str(tmp_path / where))
    assert str(error.value).startswith(f"checkpoint.resume: {tmp_path / where}: no checkpoint: give a folder ")


def test_a_named_checkpoint_that_is_torn_is_refused(run):
    torn = run.checkpoints / "step-00000150"
    tear(torn)
    with pytest.raises(InputError, match=rf"^checkpoint\.resume: {torn}/weights-00000\.safetensors: torn"):
        run.find_resume(str(torn))


def test_an_out_dir_that_cannot_be_written_is_named_at_once(litrecipe, tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / "link", tmp_path / "link" / "run"):
        found = out.parent if out.name == "run" else out
        with pytest.raises(InputError, match=f"^out_dir: {out}: {found}: N.* directory: name another --out_dir"):
            RunDir(out).check(None)
    RunDir(tmp_path / "new" / "run").check(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]
    flags = ("--data.train", "toy:units?n=9&seed=0", "--data.cache_dir", tmp_path / "cache")
    done = litrecipe("finetune", "--model", tiny_model, "--out_dir", tmp_path / "file", *flags, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()  # nothing was said of the data, which come next
    assert "out_dir: " in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="Permission denied: name another --out_dir"):
        RunDir(tmp_path / "run").check(None)


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_goes(run):
    refused = pytest.raises(
        InputError,
        match=rf"^out_dir: {run.path}: another process trains here \(process {os.getpid()} on .*\): wait for it",
    )
    with run.held(), refused, RunDir(run.path).held():
        pytest.fail("both hold it")
    with RunDir(run.path).held():
        pass


def test_a_spoilt_record_is_left_out_with_a_warning(run, capfd):
    path = run.path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "eval_loss": 2.0}\n\x00\x00\x00\n[3]\n\xff{"step": 2}\n{"step": 3}\n{"st')
    assert read_records(path) == [{"step": 1, "eval_loss": 2.0}, {"step": 3}]
    said = capfd.readouterr().err.splitlines()
    assert [line.split(" no record")[0] for line in said] == [f"litrecipe: warning: {path}:{n}:" for n in (2, 3, 4)]
    run.start("", 3)
    assert path.read_text() == '{"step": 1, "eval_loss": 2.0}\n{"step": 3}\n'


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
def test_a_folder_where_not_even_root_may_write_is_named():
    with pytest.raises(InputError, match=r"^out_dir: /proc/run: /proc: .*: name another --out_dir"):
        RunDir("/proc/run").check("auto")


@pytest.mark.parametrize("resume", [None, "auto"])
def test_a_final_folder_of_somebody_else_is_told_before_training(tmp_path, resume):
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=f"^{tmp_path}/final: exists, and was not written by litrecipe"):
        RunDir(tmp_path).check(resume)

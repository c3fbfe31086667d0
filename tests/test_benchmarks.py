"""What must not go wrong after minutes of measuring."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    return module


def test_a_result_is_written_without_git_and_without_an_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(BENCHMARKS / "common.py", tmp_path / "benchmarks")
    common = load(tmp_path / "benchmarks" / "common.py", monkeypatch)
    assert common.MACHINE["commit"] is None and common.MACHINE["uncommitted_changes"] is None
    monkeypatch.setattr(common, "PACKAGES", ("torch", "no-such-package"))
    versions = common.machine()["versions"]
    assert versions["torch"] and versions["no-such-package"] is None
    assert common.write_result("none", {}).is_file()


def test_a_checkout_is_named_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (BENCHMARKS.parent / ".git").exists():
        pytest.skip("no history here")
    head = ["git", "-C", str(BENCHMARKS), "rev-parse", "HEAD"]
    commit = load(BENCHMARKS / "common.py", monkeypatch).machine()["commit"]
    assert subprocess.run(head, capture_output=True, text=True).stdout.startswith(commit)


@pytest.mark.parametrize(
    ("device", "flops"),
    [("NVIDIA L4", 121e12), ("NVIDIA L40", None), ("NVIDIA L40S", 362e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
)
def test_a_gpu_is_known_by_its_whole_name(device: str, flops: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_check = load(BENCHMARKS / "gpu_check.py", monkeypatch)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    assert gpu_check.peak_flops(SimpleNamespace(accelerator="cuda")) == flops


def test_one_broken_check_does_not_hide_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_check = load(BENCHMARKS / "gpu_check.py", monkeypatch)
    checks = {"first": lambda _: {}["missing"], "second": lambda _: {"ok": True}}
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--accelerator", "cpu"])
    with pytest.raises(SystemExit, match=r"failed: first$"):
        gpu_check.main()
    assert "second: ok" in capsys.readouterr().out

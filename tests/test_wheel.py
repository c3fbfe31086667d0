"""The wheel works away from the checkout: the hub of recipes ships inside it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment outside the checkout that holds the wheel; returns its `bin`.

    The third-party packages are those of the running environment. They are put on the path without processing that
    environment's own .pth files, so its editable litrecipe, and with it the checkout, stays out of sight.
    """
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(REPO)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("litrecipe-*.whl")
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    (site,) = environment.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", str(wheel)], check=True, capture_output=True)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def run(installed: Path, tmp_path: Path, *command: str) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        [installed / command[0], *command[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_checkout_is_out_of_sight(installed: Path, tmp_path: Path) -> None:
    where = Path(run(installed, tmp_path, "python", "-c", "import litrecipe; print(litrecipe.__file__)").strip())
    assert where.is_relative_to(installed.parent)
    assert (installed / "litrecipe").read_text().startswith(f"#!{installed}")
    path = run(installed, tmp_path, "python", "-c", "import sys; print(*sys.path, sep='\\n')").splitlines()
    assert str(REPO) not in path


@pytest.mark.slow
def test_the_hub_ships_inside(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "litrecipe", "recipes", "ls")
    for recipe in (REPO / "config_hub").rglob("*.yaml"):
        assert str(recipe.relative_to(REPO / "config_hub").with_suffix("")) in listed


@pytest.mark.slow
def test_every_recipe_that_ships_is_valid(installed: Path, tmp_path: Path) -> None:
    run(installed, tmp_path, "litrecipe", "recipes", "validate")

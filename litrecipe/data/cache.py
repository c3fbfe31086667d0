"""Where what was read or tokenised once is kept, and how several processes share it. Imports no torch."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from litrecipe.checkpoint.manifest import user_cache
from litrecipe.config.groups import Data
from litrecipe.config.progress import say


def cache_folder(data: Data) -> Path:
    """`data.cache_dir`, $LITRECIPE_CACHE, or `litrecipe` in the user's cache folder."""
    return Path(data.cache_dir).expanduser() if data.cache_dir else user_cache()


def key_of(*parts: Any) -> str:
    """A file name that stands for all of `parts` (JSON values)."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file while the body runs; waits while another process holds it. A dead process holds nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that prepares the same data")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

"""Where what was read or tokenised once is kept, and how several processes share it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from litrecipe.checkpoint.manifest import user_cache
from litrecipe.config.errors import InputError
from litrecipe.config.files import locked
from litrecipe.config.groups import Data


def cache_folder(data: Data) -> Path:
    """`data.cache_dir`, $LITRECIPE_CACHE, or `litrecipe` in the user's cache folder."""
    return Path(data.cache_dir).expanduser() if data.cache_dir else user_cache()


def key_of(*parts: Any) -> str:
    """A file name that stands for all of `parts` (JSON values)."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@contextmanager
def alone(entry: Path) -> Iterator[None]:
    """Hold the lock of a cache entry while the body makes it; raises InputError when it cannot be written."""
    try:
        with locked(entry.with_suffix(".lock"), "prepares the same data"):
            yield
    except OSError as error:
        cure = "make room, or name a folder that can be written"
        raise InputError(f"data.cache_dir: {entry.parent.parent}: {error.strerror or error}: {cure}") from error

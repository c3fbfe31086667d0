"""The hub: fetch a repository, and what a file had to be when it was fetched. Imports no torch."""

from __future__ import annotations

import re
from pathlib import Path

from litrecipe.config.errors import InputError
from litrecipe.config.files import nearest

HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(@(?P<revision>[\w./-]+))?")
"""`owner/name` or `owner/name@revision`; what begins with a dot is a path."""


def fetch(
    said: str,
    repo: str,
    revision: str | None = None,
    *,
    kind: str = "model",
    allow: list[str] | None = None,
    ignore: list[str] | None = None,
) -> Path:
    """The local copy of a repository, fetched where it is not there yet.

    `said` begins the message (`<key>: <value>`) of the InputError that is raised when it cannot be had; `allow` and
    `ignore` are patterns of file names, in which `*` matches slashes too.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    close = nearest(Path(repo))
    instead = f"did you mean {close}?" if close else "check the name, or give what is on this disk"
    try:
        return Path(
            snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        )
    except GatedRepoError as error:
        cure = "accept its terms on the hub and run `hf auth login`"
        raise InputError(f"{said}: the hub keeps it for those who asked: {cure}") from error
    except HFValidationError as error:
        raise InputError(f"{said}: no name a {kind} on the hub can have: {instead}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500:
            raise InputError(f"{said}: the hub does not know it ({status}): {instead}") from error
        raise InputError(f"{said}: the hub is out of order ({status}): try again later") from error
    except LocalEntryNotFoundError as error:
        raise InputError(
            f"{said}: no such file or folder, not in the hub cache, and the hub cannot be reached: "
            + (instead if close else "go online (HF_HUB_OFFLINE unset), or give what is on this disk")
        ) from error
    except OSError as error:  # the connection broke, or the disk is full
        raise InputError(f"{said}: could not be fetched ({error}): try again; what is there is kept") from error


def published_sha256(path: Path) -> str | None:
    """The digest the hub gave for a large file, where its cache or `hf download --local-dir` recorded it."""
    blob = path.resolve()
    record = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    digest = ""
    if blob.parent.name == "blobs":
        digest = blob.name
    elif record.is_file():  # lines: commit, digest, time
        digest = "".join(record.read_text(encoding="utf-8", errors="replace").splitlines()[1:2])
    # Large files are named by their sha256, small ones by a git hash of 40 digits.
    return digest if re.fullmatch(r"[0-9a-f]{64}", digest) else None

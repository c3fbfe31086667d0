"""Links: those that stay in a folder, and those of the hub's cache, are as good as the files themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.files import refuse_linked_files, refuse_links_out


def linked(folder: Path, target: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("{}")
    (folder / "config.json").symlink_to(target)
    return folder


def test_links_within_a_folder_and_in_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    refuse_linked_files(linked(tmp_path / "a", tmp_path / "a" / "real.json"))
    cache = tmp_path / "models--org--name"
    refuse_linked_files(linked(cache / "snapshots" / "0f", cache / "blobs" / "ab"))
    (tmp_path / "b").symlink_to(tmp_path / "a")
    refuse_linked_files(tmp_path / "b")


@pytest.mark.parametrize("target", ["outside.json", "a-sibling/x.json", "blobs/ab"])
def test_links_out_of_a_folder_are_refused(tmp_path: Path, target: str) -> None:
    folder = linked(tmp_path / "a", tmp_path / target)
    with pytest.raises(InputError, match=rf"a/config\.json: .*{target}: a link out of its folder: put the file"):
        refuse_linked_files(folder)
    snapshot = linked(tmp_path / "models--org--name" / "snapshots" / "0f", tmp_path / "elsewhere" / target)
    with pytest.raises(InputError, match="a link out of its folder"):
        refuse_linked_files(snapshot)


def test_names_that_lead_out_of_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("../b.bin", "/etc/passwd", "x/../../b.bin"):
        with pytest.raises(InputError, match="a link out of its folder"):
            refuse_links_out(tmp_path / "a", ["index.json", name])

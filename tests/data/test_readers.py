from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import pyarrow as pa
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from litrecipe.config.errors import InputError
from litrecipe.data.readers import Mistakes, _file_hash, check_source, read_rows, source_hash

ROWS = [{"text": f"row {number} é 🤗"} for number in range(1, 4)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def write(path: Path, content: bytes | str) -> Path:
    content = content.encode() if isinstance(content, str) else content
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.ZstdCompressor().compress(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def mistakes_of(path: Path) -> list[str]:
    with pytest.raises(InputError) as caught:
        list(read_rows(str(path)))
    return caught.value.mistakes


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_gives_rows_and_lines(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, "\ufeff" + JSONL.replace("\n", "\n\n"))
    assert list(read_rows(str(path))) == [(row, f"{path}:{2 * i + 1}") for i, row in enumerate(ROWS)]


def test_zst_frames_one_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(line.encode()) for line in JSONL.splitlines(True)))
    assert [row for row, _ in read_rows(str(path))] == ROWS


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.json.zst"])
@pytest.mark.parametrize("document", [ROWS, {"version": 1, "data": ROWS}])
def test_json_gives_rows_of_a_list(tmp_path: Path, name: str, document: object) -> None:
    path = write(tmp_path / name, json.dumps(document))
    assert list(read_rows(str(path))) == [(row, f"{path}:{i + 1}") for i, row in enumerate(ROWS)]


def test_parquet(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "é"}], "n": 1}, {"messages": [], "n": None}]
    file = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), file)
    for suffix in ("", ".gz", ".zst"):
        path = write(tmp_path / f"a.parquet{suffix}", file.getvalue())
        assert list(read_rows(str(path))) == [(row, f"{path}:{i + 1}") for i, row in enumerate(rows)]


def test_plain_text_has_a_row_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", "one\r\n\ntwo\n")
    assert list(read_rows(str(path))) == [({"text": "one"}, f"{path}:1"), ({"text": "two"}, f"{path}:3")]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a/z.jsonl.gz", ".hidden/x.jsonl", "README.md"):
        write(tmp_path / name, json.dumps({"text": name}))
    assert [row["text"] for row, _ in read_rows(str(tmp_path))] == ["a/z.jsonl.gz", "b.jsonl"]


def test_a_folder_is_read_by_its_splits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train.jsonl", "test/a.jsonl", "dev.jsonl", "more.jsonl"):
        write(tmp_path / name, json.dumps({"text": name}))

    def texts(query: str) -> list[str]:
        return [row["text"] for row, _ in read_rows(f"{tmp_path}{query}")]

    assert texts("") == ["train.jsonl"]
    assert f"{tmp_path}: takes train.jsonl of its 4 data files" in capsys.readouterr().err
    assert texts("?split=test") == ["test/a.jsonl"]
    assert texts("?split=validation") == ["dev.jsonl"]
    assert texts("?files=more*") == ["more.jsonl"]
    (tmp_path / "train.jsonl").unlink()
    assert "dev.jsonl, more.jsonl, test/a.jsonl: choose with ?split=" in mistakes_of(tmp_path)[0]


def test_papers_beside_the_data_are_no_data(tmp_path: Path) -> None:
    for name in ("LICENSE.txt", "license-mit.txt", "requirements.txt", "sub/README.txt"):
        write(tmp_path / name, "Permission is granted.")
    assert "no data files" in mistakes_of(tmp_path)[0]
    write(tmp_path / "noticed.txt", "a row")
    assert [row["text"] for row, _ in read_rows(str(tmp_path))] == ["a row"]
    assert len(list(read_rows(str(tmp_path / "LICENSE.txt")))) == 1, "whoever names it wants it"


def test_files_of_several_kinds_are_never_mixed(tmp_path: Path) -> None:
    write(tmp_path / "dataset_infos.json", "{}")
    write(tmp_path / "a.jsonl.gz", JSONL)
    assert len(list(read_rows(str(tmp_path)))) == 3
    write(tmp_path / "b.jsonl", JSONL)
    write(tmp_path / "c.txt", "a text")
    [mistake] = mistakes_of(tmp_path)
    assert mistake.startswith(
        f"{tmp_path}: files of several kinds (1 *.jsonl.gz, 1 *.jsonl, 1 *.txt): choose one with "
    )
    cure = mistake.split("such as ")[1].split(",")[0]
    assert len(list(read_rows(f"{tmp_path}{cure}"))) == 3
    assert len(list(read_rows(f"{tmp_path}?files=*.jsonl*"))) == 6


def test_broken_lines_are_gathered_with_their_places(tmp_path: Path) -> None:
    lines = [b'{"text": 1}', b'{"text": ', b"[1, 2]", b'{"text": "\xff"}', b"[" * 100_000, b'{"text": 2}']
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    mistakes = Mistakes()
    assert [row["text"] for row, _ in read_rows(str(path), mistakes)] == [1, 2]
    assert mistakes.count == 4
    expected = ["not valid JSON", "a row must be a JSON object", "not UTF-8", "nested too deeply"]
    for line, what, mistake in zip((2, 3, 4, 5), expected, mistakes.shown, strict=True):
        assert mistake.startswith(f"{path}:{line}: ") and what in mistake


def test_twenty_mistakes_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    found = mistakes_of(write(tmp_path / "a.jsonl", "{\n" * 50))
    assert len(found) == 21
    assert found[-1] == "… and 30 more mistakes"


@pytest.mark.parametrize(
    "name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.json.zst", "a.parquet.gz", "a.parquet.zst"]
)
@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_a_cut_compressed_file_is_said(tmp_path: Path, name: str, keep: float) -> None:
    path = write(tmp_path / name, JSONL * 3000)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "ends too early" in mistakes_of(path)[-1]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.json.gz", "a.parquet.gz", "a.parquet.zst"])
def test_a_file_that_is_not_compressed_at_all(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(JSONL.encode())
    assert "not a readable compressed file" in mistakes_of(tmp_path / name)[0]


def test_broken_json_names_its_line(tmp_path: Path) -> None:
    assert mistakes_of(write(tmp_path / "a.json", '[\n{"a": 1},\n{"a" 2}\n]'))[0].startswith(f"{tmp_path}/a.json:3: ")
    assert ".jsonl file" in mistakes_of(write(tmp_path / "b.json", JSONL))[0]
    assert "neither a list" in mistakes_of(write(tmp_path / "c.json", '{"a": 1}'))[0]
    assert mistakes_of(write(tmp_path / "d.json", "[{}, 7]"))[0].startswith(f"{tmp_path}/d.json:2: 7: ")
    assert "a.json:2: byte 0xff" in mistakes_of(write(tmp_path / "a.json", b'[\n"\xff"]'))[0]


def test_broken_parquet(tmp_path: Path) -> None:
    assert "not a readable Parquet file" in mistakes_of(write(tmp_path / "a.parquet", "PAR1 no"))[0]


def test_a_mistyped_path_gets_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "data" / "train.jsonl", JSONL)
    assert mistakes_of(tmp_path / "data" / "trian.jsonl") == [
        f"{tmp_path}/data/trian.jsonl: no such file or folder (did you mean {tmp_path}/data/train.jsonl?)"
    ]
    assert f"did you mean {tmp_path}/data?" in mistakes_of(tmp_path / "dta" / "train.jsonl")[0]
    with pytest.raises(InputError, match=r"^data\.val: .*no such file"):
        check_source("data.val", str(tmp_path / "nothing.jsonl"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    assert "data files end in" in mistakes_of(write(tmp_path / "a.csv", "a,b"))[0]
    assert "no data files" in mistakes_of(tmp_path)[0]


def test_source_hash_follows_the_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", JSONL)
    before = source_hash(str(path))
    assert source_hash(str(path)) == before
    write(path, JSONL + JSONL)
    assert source_hash(str(path)) != before
    assert source_hash("toy:units?n=3") != source_hash("toy:units?n=3&seed=1")


def test_source_hash_follows_names_and_where_one_file_ends(tmp_path: Path) -> None:
    write(tmp_path / "one" / "a" / "x.txt", "row")
    before = source_hash(str(tmp_path / "one"))
    (tmp_path / "one" / "a").rename(tmp_path / "one" / "b")
    assert source_hash(str(tmp_path / "one")) != before

    write(tmp_path / "two" / "a.txt", "row\n")
    write(tmp_path / "two" / "b.txt", "row")
    write(tmp_path / "glued" / "a.txt", "row\nb.txtrow")
    assert source_hash(str(tmp_path / "two")) != source_hash(str(tmp_path / "glued"))


def test_a_file_is_hashed_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", JSONL)
    source_hash(str(path))
    known = _file_hash.cache_info().misses
    source_hash(str(path))
    assert _file_hash.cache_info().misses == known
    write(path, JSONL + JSONL)
    source_hash(str(path))
    assert _file_hash.cache_info().misses == known + 1


@pytest.mark.parametrize("source", ["x" * 300 + ".jsonl", "~nobody-of-this-name/train.jsonl"])
def test_paths_that_cannot_be(source: str) -> None:
    with pytest.raises(InputError, match=rf"^data\.train: {source}: .*: give a file or folder"):
        check_source("data.train", source)


def hub_cache(root: Path, files: dict[str, str]) -> None:
    """The hub library's cache as it stands after a download of org/name."""
    repository = root / "datasets--org--name"
    for name, content in files.items():
        write(repository / "snapshots" / "abc" / name, content)
    for revision in ("main", "v1.0"):
        write(repository / "refs" / revision, "abc")


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does for the data set org/name; notes the files that are asked for."""

    files: ClassVar[dict[str, bytes]] = {}
    fetched: ClassVar[set[str]] = set()
    COMMIT = "c" * 40

    def do_GET(self) -> None:
        _, _, name = self.path.partition(f"/resolve/{self.COMMIT}/")
        if name:
            self.fetched.add(name)
            return self.answer(self.files[name], ETag=f'"{sha256(self.files[name]).hexdigest()[:40]}"')
        tree = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in self.files.items()]
        about = {"id": "org/name", "sha": self.COMMIT, "siblings": [{"rfilename": path} for path in self.files]}
        return self.answer(json.dumps(tree if "/tree/" in self.path else about).encode())

    do_HEAD = do_GET

    def answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for key, value in {**headers, "X-Repo-Commit": self.COMMIT, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_only_the_chosen_files_of_a_hub_data_set_are_fetched(tmp_path: Path) -> None:
    Hub.files = {f"data/{name}.jsonl": json.dumps({"text": name}).encode() for name in ("train-0", "train-1", "test-0")}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    online = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    assert read_from_hub(tmp_path, "org/name", **online).stdout == "['train-0', 'train-1']\n"
    server.shutdown()
    assert Hub.fetched == {"data/train-0.jsonl", "data/train-1.jsonl"}
    assert read_from_hub(tmp_path, "org/name").stdout == "['train-0', 'train-1']\n", "from the cache"
    next(tmp_path.rglob("train-1.jsonl")).unlink()
    assert "not in the hub cache" in read_from_hub(tmp_path, "org/name").stdout, "never a part of what was chosen"


def read_from_hub(root: Path, source: str, **more: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom litrecipe.data.readers import read_rows\nfrom litrecipe.config.errors import InputError\n"
        "try:\n    print([row['text'] for row, _ in read_rows(sys.argv[1])])\n"
        "except InputError as error:\n    print(error)\nassert 'torch' not in sys.modules"
    )
    environment = {"HF_HUB_CACHE": str(root), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ":".join(sys.path)} | more
    return subprocess.run(
        [sys.executable, "-c", code, source], env=environment, capture_output=True, text=True, check=True, cwd=root
    )


def test_hub_data_sets(tmp_path: Path) -> None:
    files = {f"data/{name}.jsonl": json.dumps({"text": name}) for name in ("train-00000", "test-00000", "dev")}
    hub_cache(tmp_path, files)
    assert read_from_hub(tmp_path, "org/name").stdout == "['train-00000']\n"
    assert read_from_hub(tmp_path, "org/name@v1.0?split=validation").stdout == "['dev']\n"
    assert "not in the hub cache" in read_from_hub(tmp_path, "org/name@v2.0").stdout
    assert read_from_hub(tmp_path, "org/name?split=test&files=*.jsonl").stdout == "['test-00000']\n"
    assert "no files of the split" in read_from_hub(tmp_path, "org/name?files=*.parquet").stdout
    assert "options are" in read_from_hub(tmp_path, "org/name?splt=test").stdout


def test_a_hub_data_set_offline_is_a_clear_error(tmp_path: Path) -> None:
    told = read_from_hub(tmp_path, "org/other").stdout
    assert told.startswith("org/other: ") and "HF_HUB_OFFLINE" in told


def test_a_hub_data_set_without_splits_is_read_whole(tmp_path: Path) -> None:
    hub_cache(tmp_path, {"a.jsonl": '{"text": "a"}', "b.jsonl": '{"text": "b"}'})
    assert read_from_hub(tmp_path, "org/name").stdout == "['a', 'b']\n"


def test_reading_imports_no_torch() -> None:
    code = (
        "import sys, litrecipe.data.readers, litrecipe.data.formats, litrecipe.data.toy, litrecipe.data.packing\n"
        "heavy = {'torch', 'transformers', 'peft', 'pyarrow', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=200) | st.text(alphabet='{}[]",:1e\\ud8\n', max_size=60).map(str.encode))
@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.txt", "a.parquet", "a.parquet.zst", "a.jsonl.gz", "a.jsonl.zst"]
)
def test_no_file_is_so_broken_that_it_is_not_said(
    tmp_path_factory: pytest.TempPathFactory, name: str, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("broken") / name
    path.write_bytes(content)
    mistakes = Mistakes()
    for row, where in read_rows(str(path), mistakes):
        assert isinstance(row, dict) and where.startswith(f"{path}:")
    assert all(mistake.startswith(f"{path}:") for mistake in mistakes.shown)


def test_numbers_too_long_for_python(tmp_path: Path) -> None:
    number = "1" * 5000
    assert "a number Python does not read" in mistakes_of(write(tmp_path / "a.jsonl", f'{{"a": {number}}}'))[0]
    assert "a number Python does not read" in mistakes_of(write(tmp_path / "a.json", f"[{number}]"))[0]


def test_what_is_neither_file_nor_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert mistakes_of(tmp_path / "pipe.jsonl") == [
        f"{tmp_path}/pipe.jsonl: neither a file nor a folder: write its rows to a file"
    ]
    assert "neither a file" in mistakes_of(Path("/dev/null"))[0]
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    assert mistakes_of(tmp_path / "link.jsonl") == [
        f"{tmp_path}/link.jsonl: a link to gone.jsonl, which is not there: mend it"
    ]

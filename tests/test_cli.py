"""The front door as a user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litrecipe import __version__, cli
from litrecipe.cli import main
from litrecipe.config import schema
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.verbs import VERBS

HEAVY = ("torch", "lightning_fabric", "peft", "transformers", "bitsandbytes", "lm_eval", "pyarrow", "numpy")


def errors(capsys: pytest.CaptureFixture[str], *argv: str) -> list[str]:
    """What a wrong line is answered with, without the prefix; nothing else may be said."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("litrecipe: error: ") for line in err.splitlines())
    return [line.removeprefix("litrecipe: error: ") for line in err.splitlines()]


@pytest.fixture
def recipe_given(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Verbs are not run: what they would be called with lands here."""
    calls: list[object] = []

    def call(code: str, *arguments: object, **options: object) -> int:
        calls.append((code, *arguments, options))
        return 0

    monkeypatch.setattr(cli, "call", call)
    return calls


# -- help and speed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "seconds"),
    [
        (["--help"], 0.5),
        (["--version"], 0.5),
        (["finetune", "--help"], 1.5),
        (["finetune", "--help", "train"], 1.5),
        (["evaluate", "--help"], 1.5),
        (["submit", "finetune", "--help"], 1.5),
        (["model", "import", "--help"], 0.5),
        (["recipes", "show", "finetune/smollm2-135m/lora"], 1.5),
    ],
)
def test_help_is_fast_and_imports_nothing_heavy(line: list[str], seconds: float) -> None:
    code = (
        "import sys, time; sys.argv[1:] = {line}; from litrecipe.cli import main; code = main(); "
        "assert not code, code; print('IMPORTED', *sys.modules, file=sys.stderr); "
        "print('SECONDS', time.process_time(), file=sys.stderr)"
    ).replace("{line}", repr(line))
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    imported, told = runs[0].stderr.strip().splitlines()[-2:]
    assert imported.startswith("IMPORTED") and told.startswith("SECONDS")
    assert not set(HEAVY) & set(imported.split())
    # Time of the processor, so that other work on the machine does not count.
    assert min(float(run.stderr.split()[-1]) for run in runs) < seconds


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_has_help_and_code_that_exists(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: litrecipe {verb}")
    module, _, function = VERBS[verb].code.partition(":")
    source = Path(cli.__file__).parent / f"{module.replace('.', '/')}.py"
    assert f"def {function}(" in source.read_text()


def test_short_help_lists_groups_and_long_help_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    main(["finetune", "--help"])
    short = capsys.readouterr().out
    assert all(f"  {group} " in short for group in vars(FinetuneRecipe()) if group not in ("out_dir", "schema_version"))
    assert "--out_dir" in short and "--dry_run" in short and "max_steps" not in short
    assert len(short.splitlines()) < 40
    main(["finetune", "--help", "train"])
    group = capsys.readouterr().out
    assert "--train.max_steps" in group and "Stop after this many steps. (type: int | null" in group
    assert "default: 4096" in group and "--optim.lr" not in group


def test_help_of_what_is_no_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert errors(capsys, "finetune", "--help", "optimizer") == [
        "--help: optimizer: no such group: did you mean `--help optim`?"
    ]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"litrecipe {__version__}\n"


# -- the line ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("finetne", "finetne: no such verb: did you mean `litrecipe finetune`?"),
        ("recipe ls", "recipe: no such verb: did you mean `litrecipe recipes`?"),
        (
            "xyzzy",
            "xyzzy: no such verb: give one of pretrain, finetune, align, evaluate, generate, chat, submit, recipes, "
            "data, model, runs",
        ),
        ("submit", "submit: missing: no verb that can be submitted: give one of pretrain, finetune, align reward"),
        ("submit finetun", "submit: finetun: no verb that can be submitted: did you mean `litrecipe submit finetune`?"),
        ("submit chat", "submit: chat: no verb that can be submitted"),
        ("submit finetune --sweeep optim.lr=1,2", "--sweeep: no such flag: did you mean `--sweep`?"),
        ("model", "model: missing: give one of import, export, merge, info"),
        ("model improt a b", "model: improt: did you mean `litrecipe model import`?"),
        (
            "model import a",
            "model import: the following arguments are required: OUT: see `litrecipe model import --help`",
        ),
        ("runs diff a b --tolerance x", "runs diff: argument --tolerance: invalid float value: 'x': see `litrecipe"),
        ("recipes show no/such", "no/such: no such file, and no recipe of the hub"),
        ("finetune --model", "--model: has no value"),
        ("finetune --config=", "--config: '': give a recipe file"),
        ("data preview --model m --data.train d --n many", "--n: many: give a whole number above 0"),
        ("finetune --model m --data.train d --dry_run=maybe", "--dry_run: maybe: give true or false"),
        ("finetune --model m --data.train d -- x", "--: names no key"),
        ("finetune --model m --data.train d lora.yaml", "lora.yaml: belongs to no flag"),
    ],
)
def test_wrong_lines(line: str, answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert errors(capsys, *line.split())[0].startswith(answer)


def test_no_verb_is_wrong_input_and_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: litrecipe VERB")


def test_flags_beat_files_wherever_they_stand(
    tmp_path: Path, recipe_given: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("litrecipe.data.formats.check_rows", lambda data, read: 0)
    (tmp_path / "a.yaml").write_text("model: {source: m}\ndata: {train: d}\ntrain: {seed: 1, max_steps: 7}\n")
    (tmp_path / "b.yaml").write_text("train: {seed: 2}\nfabric: {compile: true}\n")
    files = ["--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    flags = ["--train.seed", "3", "--optim.lr=1e-5", "--model", "other", "--train.max_steps", "null"]
    for line in ([*flags, *files], [*files, *flags], [*files[:2], *flags, *files[2:]]):
        assert main(["finetune", *line]) == 0
    first, *others = recipe_given
    assert all(call == first for call in others)
    code, recipe, options = first  # type: ignore[misc]
    assert code == "recipes.finetune:main" and options == {"dry_run": False}
    assert (recipe.train.seed, recipe.optim.lr, recipe.model.source) == (3, 1e-5, "other")
    assert (recipe.train.max_steps, recipe.fabric.compile, recipe.data.train) == (None, True, "d")


def test_help_is_no_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["finetune", "--dry_run", "-h"]) == 0
    assert "--config RECIPE" in capsys.readouterr().out


def test_switches_need_no_value(recipe_given: list[object]) -> None:
    main(["generate", "--raw", "--model", "m", "--prompt=--what", "--generate.temperature", "0.5"])
    main(["data", "preview", "--model", "m", "--data.train", "d", "--n", "5", "--fabric.compile"])
    (_, generate, _), (_, preview, options) = recipe_given  # type: ignore[misc]
    assert generate.raw and generate.prompt == "--what" and generate.generate.temperature == 0.5
    assert preview.fabric.compile and options == {"n": 5}


def test_a_negative_number_is_a_value(capsys: pytest.CaptureFixture[str]) -> None:
    told = errors(capsys, "evaluate", "--model", "m", "--tasks", "t", "--limit", "-1")
    assert told == ["limit: -1: give 1 or more"]


def test_mistakes_of_line_and_recipe_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.yaml").write_text("train:\n  max_stps: 3\n")
    told = errors(capsys, "finetune", "stray", "--config", str(tmp_path / "r.yaml"), "--optim.lr", "0", "--model", "m")
    # What is missing is not told: it may be what the wrong words were to be.
    assert [line.split(": ")[0] for line in told] == ["stray", f"{tmp_path}/r.yaml:2", "optim.lr"]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["finetune", "--dryrun"], "--dryrun: no such flag: did you mean `--dry_run`?"),
        (["finetune", "--confg", "my.yaml"], "--confg: no such flag: did you mean `--config`?"),
        (["finetune", "--confg=my.yaml"], "--confg: no such flag: did you mean `--config`?"),
        (["evaluate", "--modle", "m"], "--modle: no such flag: did you mean `--model`?"),
        (["data", "preview", "--mn", "3"], None),
    ],
)
def test_a_misspelt_flag_is_one_mistake(capsys: pytest.CaptureFixture[str], argv: list[str], told: str | None) -> None:
    found = errors(capsys, *argv)
    assert found == [told] if told else len(found) > 1


@pytest.mark.parametrize(
    ("verb", "recipe", "key"),
    [("evaluate", "finetune/smollm2-135m/lora", "adapter"), ("finetune", "evaluate/smollm2-135m/quickstart", "tasks")],
)
def test_a_recipe_of_another_verb_is_told_as_one(
    capsys: pytest.CaptureFixture[str], verb: str, recipe: str, key: str
) -> None:
    (told,) = errors(capsys, verb, "--config", recipe)
    assert f": {key}: is of a recipe for `litrecipe {recipe.split('/')[0]}`" in told


def test_plain_verbs_get_their_arguments_by_name(recipe_given: list[object]) -> None:
    main(["model", "import", "a", "b"])
    main(["runs", "ls"])
    main(["runs", "diff", "a", "b", "--tolerance", "1e-5"])
    main(["recipes", "validate", "x", "y"])
    assert recipe_given == [
        ("recipes.model:import_model", {"src": "a", "out": "b"}),
        ("cluster.listing:ls", {"folder": "runs"}),
        ("recipes.runs:diff", {"a": "a", "b": "b", "tolerance": 1e-5}),
        ("hub:validate", {"names": ["x", "y"]}),
    ]


BAD_YAML: dict[str, bytes] = {
    "unclosed": b"train: {max_steps: 1\n",
    "tab": b"train:\n\tmax_steps: 1\n",
    "list": b"- train\n",
    "word": b"train\n",
    "number": b"3\n",
    "twice": b"out_dir: a\nout_dir: b\n",
    "object": b"out_dir: !!python/object/apply:os.getcwd []\n",
    "binary": bytes(range(256)),
    "latin": "out_dir: \u00e9\n".encode("latin-1"),
    "utf-16": "out_dir: a\n".encode("utf-16"),
    "null byte": b"out_dir: a\x00b\n",
    "alias": b"a: &a [*a]\n",
    "bomb": b"a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "undefined alias": b"out_dir: *a\n",
    "deep": b"a: " + b"[" * 3000,
    "documents": b"out_dir: a\n---\nout_dir: b\n",
    "extends nothing": b"extends: no/such\n",
    "extends a list": b"extends: [a, b]\n",
    "extends null": b"extends:\n",
    "extends itself": b"extends: r.yaml\n",
    "newer": b"schema_version: 999\n",
    "older": b"schema_version: 0\n",
    "version a word": b"schema_version: one\n",
    "key a list": b"? [a]\n: b\n",
    "key a number": b"1: 2\n",
    "key null": b": 2\n",
    "dotted": b"train.seed: 2\n",
    "group a list": b"train: [1]\n",
    "key a group": b"train: {seed: {a: 1}}\n",
    "huge number": b"train: {seed: " + b"9" * 6000 + b"}\n",
}


@pytest.mark.parametrize("name", BAD_YAML)
def test_a_bad_recipe_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(BAD_YAML[name])
    told = errors(capsys, "finetune", "--config", str(path), "--model", "m", "--data.train", "d")
    about_it = [line for line in told if line.startswith(str(path))]
    assert about_it == told
    assert len(told) == {"alias": 2, "bomb": 7}.get(name, 1), told


@pytest.mark.parametrize("key", schema.keys(FinetuneRecipe))
def test_every_key_refuses_what_does_not_belong_there(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group, _, name = key.rpartition(".")
    for wrong in ("[[]]", "{a: [1]}", "[{}]"):
        path = tmp_path / "r.yaml"
        path.write_text(f"{group}:\n  {name}: {wrong}\n" if group else f"{name}: {wrong}\n")
        told = errors(
            capsys, "finetune", "--config", str(path), *MISSING.get(key, ["--model", "m", "--data.train", "d"])
        )
        assert [line.split(": ")[:2] for line in told] == [[f"{path}:{2 if group else 1}", key]]


MISSING = {"model.source": ["--data.train", "d"], "data.train": ["--model", "m"]}
"""What is given beside a wrong required key, so that the flag does not hide it."""


# -- how it ends ------------------------------------------------------------------------------------------------------


def test_bad_data_is_told_before_torch_is_imported(tmp_path: Path) -> None:
    rows = [json.dumps({"prompt": "a", "completion": "b"}), "{", json.dumps({"prompt": "a"})]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    flags = ["--model", "m", "--data.train", str(tmp_path / "d.jsonl"), "--data.cache_dir", str(tmp_path / "cache")]
    code = (
        "import sys; from litrecipe.cli import main; assert main(sys.argv[1:]) == 2; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, "finetune", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert "d.jsonl:2" in lines[0] and "d.jsonl:3" in lines[1]


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 130), (RuntimeError("operator torchvision::nms does not exist"), 2), (BrokenPipeError(), 0)],
)
def test_ends_without_a_traceback(
    raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise raised

    monkeypatch.setattr(cli, "call", fail)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    assert main(["runs", "ls"]) == code
    err = capfd.readouterr().err
    assert ("pip uninstall torchvision" in err) == (code == 2)
    assert len(err.splitlines()) == (code == 2)


@pytest.mark.parametrize(
    ("raised", "line", "told"),
    [
        (RuntimeError("a bug"), ["runs", "ls"], "a bug"),
        (BrokenPipeError(), ["finetune", "--model", "m", "--data.train", "toy:units?n=2"], "which is not over"),
    ],
)
def test_what_is_unexpected_keeps_its_traceback(
    raised: Exception, line: list[str], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a pipe that broke, too, where it is not what was printed: a run is not done for that."""

    def fail(*_: object, **__: object) -> int:
        raise raised

    monkeypatch.setattr(cli, "call", fail)
    with pytest.raises(RuntimeError, match=told):
        main(line)


def test_a_closed_pipe_is_no_failure() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    line = [sys.executable, "-m", "litrecipe", "recipes", "show", "finetune/smollm2-135m/lora"]
    done = subprocess.run(line, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGUSR1, 85), (signal.SIGINT, 130)])
def test_signals_during_set_up(number: int, code: int) -> None:
    program = (
        "import sys, time; from litrecipe.config import stop; install = stop.install\n"
        "def told(): install(); print('ready', flush=True)\n"
        "stop.install = told; from litrecipe.data import formats\n"
        "formats.check_rows = lambda data, read: time.sleep(60)  # set-up that takes its time\n"
        "from litrecipe.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", program, "finetune", "--model", "m", "--data.train", "d.jsonl"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    assert process.poll() is None, process.communicate()
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert "Traceback" not in err


@pytest.mark.parametrize(("variable", "lines"), [("LOCAL_RANK", 0), ("SLURM_LOCALID", 0), ("RANK", 1)])
def test_a_mistake_is_told_once_on_each_machine(
    variable: str, lines: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, "3")
    assert main(["finetune", "--train.stesp", "3", "--model", "m", "--data.train", "d"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == lines


def test_data_for_another_verb_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    [told] = errors(capsys, "finetune", "--model", "m", "--data.train", "toy:units-pairs?n=30")
    assert told.endswith("holds preferences: learn from them with `litrecipe align dpo` or `litrecipe align reward`")
    [told] = errors(capsys, "align", "dpo", "--model", "m", "--data.train", "toy:units?n=30")
    assert told.endswith("holds conversations: learn from them with `litrecipe finetune`, or give pairs")


def test_a_full_disk_is_one_line_whatever_was_written():
    command = [sys.executable, "-m", "litrecipe", "recipes", "ls"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    cure = "make room, and run the same again"
    assert done.stderr == f"litrecipe: error: disk full: [Errno 28] No space left on device: {cure}\n"

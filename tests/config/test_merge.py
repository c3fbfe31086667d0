"""Reading recipes: YAML with lines, `extends`, layers, hub names."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litrecipe.config import merge as merging
from litrecipe.config.merge import Mistakes, Node, find, hub_names, merge, plain, read_yaml


def data(node: Node) -> object:
    """A node as plain Python; flags as their text."""
    if node.is_group:
        return {key: data(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [data(item) for item in node.value]
    return node.text if node.is_flag else node.value


def merged(*configs: Path | str, flags: list[tuple[str, str]] | None = None) -> object:
    """The layers as plain Python; raises when there is a mistake."""
    mistakes = Mistakes()
    tree = merge(configs, flags or [], mistakes)
    assert not mistakes
    return data(tree)


def mistakes_of(path: Path) -> list[str]:
    mistakes = Mistakes()
    merge([path], [], mistakes)
    return mistakes


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E5", 2e5),
        ("-3", -3),
        ("1_000_000", 1_000_000),
        ("010", 10),
        (".5", 0.5),
        ("5.", 5.0),
        ("true", True),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30:00", "1:30:00"),
        ("2024-07-26", "2024-07-26"),
        ("1_", "1_"),
        ("0x10", "0x10"),
        ("nan", "nan"),
        ("9" * 5000, float("inf")),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_read_as_python_writes_them(number: float) -> None:
    assert plain(repr(number)) == number


def test_quotes_make_text() -> None:
    node = read_yaml("a: '3'\nb: \"null\"", None, Mistakes())
    assert data(node) == {"a": "3", "b": "null"}


def test_later_files_win_key_by_key_and_flags_over_all(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("train: {seed: 1, max_steps: 5}\nout_dir: a\n")
    second.write_text("train: {seed: 2}\n")
    assert merged(first, second) == {"train": {"seed": 2, "max_steps": 5}, "out_dir": "a"}
    assert merged(second, first) == {"train": {"seed": 1, "max_steps": 5}, "out_dir": "a"}
    assert merged(first, flags=[("train.seed", "9"), ("out_dir", "b")]) == {
        "train": {"seed": "9", "max_steps": 5},
        "out_dir": "b",
    }


def test_a_group_with_nothing_below_changes_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("train: {seed: 1}\n")
    second.write_text("train:\n  # seed: 3\n")
    assert merged(first, second) == {"train": {"seed": 1}}


def test_extends_is_a_chain_of_files_beside_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text("out_dir: base\nlog: {every: 1, project: p}\n")
    (tmp_path / "middle.yaml").write_text("extends: deep/base.yaml\nlog: {every: 2}\n")
    (tmp_path / "top.yaml").write_text("extends: middle.yaml\nout_dir: top\n")
    monkeypatch.chdir("/")
    assert merged(tmp_path / "top.yaml") == {"out_dir": "top", "log": {"every": 2, "project": "p"}}


def test_extends_takes_a_hub_name(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: finetune/smollm2-135m/lora\nout_dir: mine\n")
    tree = merged(tmp_path / "mine.yaml")
    assert isinstance(tree, dict)
    assert tree["out_dir"] == "mine"
    assert tree["adapter"]["method"] == "lora"


def test_a_circle_is_told_with_all_its_links(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    [mistake] = mistakes_of(tmp_path / "a.yaml")
    assert "b.yaml:1: extends: a.yaml: a recipe cannot extend itself" in mistake
    assert mistake.count("→") == 2


def test_hub_names_and_their_unique_ends() -> None:
    mistakes = Mistakes()
    for name in ("finetune/smollm2-135m/lora", "smollm2-135m/quickstart", "smollm2-135m/quickstart.yaml", "quickstart"):
        path = find(name, None, mistakes)
        assert path is not None and path.is_file(), mistakes
    assert not mistakes


def test_a_name_of_several_verbs_is_that_of_the_verb_that_runs(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: smollm2-135m/lora\n")
    for verb, out in (("finetune", "runs/smollm2-135m-lora"), ("align dpo", "runs/smollm2-135m-dpo-lora")):
        for config in ("smollm2-135m/lora", tmp_path / "mine.yaml"):
            mistakes = Mistakes()
            assert merge([config], [], mistakes, verb).value["out_dir"].text == out, mistakes


def test_an_ambiguous_name_lists_what_it_could_be() -> None:
    mistakes = Mistakes()
    assert find("lora", None, mistakes) is None
    [mistake] = mistakes
    assert all(name in mistake for name in hub_names() if name.endswith("/lora"))


def test_an_unknown_name_gets_the_nearest() -> None:
    mistakes = Mistakes()
    assert find("finetune/smollm-135m/lora", None, mistakes) is None
    assert "did you mean finetune/smollm2-135m/lora" in mistakes[0]


def test_a_file_comes_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dora").write_text("out_dir: here\n")
    assert merged("dora") == {"out_dir": "here"}


@pytest.mark.parametrize(
    ("text", "begin"),
    [
        ("a: 1\nb: 2\na: 3\n", ":3: a: given twice: line 1"),
        ("g:\n  k: 1\n  k: 1\n", ":3: g.k: given twice: line 2"),
        ("a: &x 1\nb: *x\n", ":1: b: an alias"),
        ("a: &x [*x]\n", ":1: a: an alias"),
        ("a: 1\nb: !!python/name:os.system ''\n", ":2: b: tag:yaml.org,2002:python/name:os.system"),
        ("a: [1\n", ":2: YAML:"),
        ("a: b: c\n", ":1: YAML:"),
        ("a:\n\tb: 1\n", ":2: YAML:"),
        ("a: 1\n---\nb: 1\n", ":2: YAML:"),
        ("- 1\n", ":1: [1]: a recipe is made of"),
        ("word\n", ":1: word: a recipe is made of"),
        ("? [1]\n: 2\n", ":1: recipe: a list or mapping as a key"),
        ("a: " + "[" * 5000, ": YAML: nested too deeply"),
        ("a: \x01\n", ": YAML: character 3"),
        ("schema_version: 2\nunheard_of: 1\n", ":1: schema_version: 2: this program knows up to 1"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(tmp_path: Path, text: str, begin: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    [mistake] = mistakes_of(path)
    assert mistake.startswith(f"{path}{begin}")


def test_bytes_that_are_no_text_and_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("out_dir: é".encode("latin-1"))
    assert "is not UTF-8" in mistakes_of(tmp_path / "latin.yaml")[0]
    assert "is a folder" in mistakes_of(tmp_path)[0]
    assert "no such file" in mistakes_of(tmp_path / "none.yaml")[0]


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfout_dir: a\n")
    assert merged(tmp_path / "bom.yaml") == {"out_dir": "a"}


def test_every_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    mistakes = Mistakes()
    merge([tmp_path / "a.yaml", tmp_path / "b.yaml"], [], mistakes)
    assert len(mistakes) == 2
    assert mistakes.unread


def test_the_hub_is_found_inside_the_package_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "litrecipe"
    (package / "config").mkdir(parents=True)
    monkeypatch.setattr(merging, "__file__", str(package / "config" / "merge.py"))
    assert merging.hub_folder() == tmp_path / "config_hub"
    (package / "config_hub").mkdir()
    assert merging.hub_folder() == package / "config_hub"

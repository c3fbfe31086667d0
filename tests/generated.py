"""Wrong recipes and wrong data as hypothesis draws them: right ones, with a few mistakes at places that the dataclasses
and the layouts of rows give. conftest.py puts this folder on the path."""

from __future__ import annotations

import gzip
import json
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from hypothesis import HealthCheck, Phase, assume, given, seed, settings
from hypothesis import strategies as st

from litrecipe.config import schema
from litrecipe.config.checks import RANGES
from litrecipe.config.pretrain import OF_A_STAGE
from litrecipe.config.recipes import RECIPES
from litrecipe.config.stages import GIVEN

MODEL, OUT, FILE = "MODEL", "OUT", "FILE"
"""Stand for a model's folder, a folder to write, and the file with the data."""
TOY = {"data": {"train": "toy:units?n=8"}}
PAIRS = {"data": {"train": "toy:units-pairs?n=8"}}
JUDGED = {"rewards": {"sources": {"length?target=60": 1.0}}}
OF_A_MODEL: dict[str, Any] = {"model": {"source": MODEL}, "fabric": {"accelerator": "cpu"}}
PIPELINE = {
    "sft": {"verb": "finetune", **OF_A_MODEL, **TOY},
    "dpo": {"verb": "align dpo", "model": {"source": "stage:sft"}, **PAIRS},
}
STAGES = {"core": {"train": {"max_steps": 2}}, "long": {"train": {"max_steps": 2}, "data": {"max_length": 64}}}
RIGHT: dict[str, dict[str, Any]] = {
    "pretrain": {**OF_A_MODEL, "data": {"train": "texts.jsonl"}, "out_dir": OUT, "stages": STAGES},
    "finetune": {**OF_A_MODEL, **TOY, "out_dir": OUT},
    "align reward": {**OF_A_MODEL, **PAIRS, "out_dir": OUT},
    "align dpo": {**OF_A_MODEL, **PAIRS, "out_dir": OUT},
    "align ppo": {**OF_A_MODEL, **TOY, **JUDGED, "out_dir": OUT},
    "align grpo": {**OF_A_MODEL, **TOY, **JUDGED, "out_dir": OUT},
    "align rloo": {**OF_A_MODEL, **TOY, **JUDGED, "out_dir": OUT},
    "align iterative-dpo": {**OF_A_MODEL, **TOY, **JUDGED, "out_dir": OUT},
    "align rejection-sampling": {**OF_A_MODEL, **TOY, **JUDGED, "out_dir": OUT},
    "align pipeline": {"out_dir": OUT, "stages": PIPELINE},
    "data prepare": {"sources": ["texts.jsonl"], "tokenizer": MODEL, "out": OUT},
    "evaluate": {**OF_A_MODEL, "tasks": ["perplexity:texts.txt"], "out": f"{OUT}.json"},
    "generate": {**OF_A_MODEL, "prompt": "hello"},
}
"""Verb → a recipe in which nothing is wrong."""


@dataclass(frozen=True)
class Wrong:
    """A wrong file, and the command that reads it."""

    verb: str
    content: bytes
    must_say: list[str]
    """What the lines have to name: a line each where the file can be read at all."""
    name: str = "recipe.yaml"
    more: dict[str, Any] = field(default_factory=dict)
    """Flags besides."""

    def command(self, path: Path, model: Path, out: Path) -> list[str]:
        """The words of a command line that reads it at a path; the model and what is to be written lie elsewhere."""
        places = {MODEL: str(model), OUT: str(out), FILE: str(path)}
        flags = [word for key, value in self.more.items() for word in (f"--{key}", str(value))]
        words = [*self.verb.split(), *flags]
        for mark, place in places.items():
            words = [word.replace(mark, place) for word in words]
        return words if self.more else [*words, "--config", str(path)]

    def write(self, path: Path, model: Path, out: Path) -> None:
        """Puts it there; a recipe with its places filled in."""
        content = self.content
        if not self.more:
            content = content.replace(MODEL.encode(), str(model).encode()).replace(OUT.encode(), str(out).encode())
        path.write_bytes(content)


def drawn(strategy: st.SearchStrategy[Wrong], count: int, number: int) -> list[Wrong]:
    """So many different ones, always the same for a seed."""
    found: dict[tuple[str, bytes], Wrong] = {}

    @seed(number)
    @settings(
        max_examples=4 * count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def gather(wrong: Wrong) -> None:
        found.setdefault((wrong.verb, wrong.content), wrong)

    gather()
    return list(found.values())[:count]


# -- recipes ----------------------------------------------------------------------------------------------------------


def wrong_values(hint: Any) -> list[Any]:
    """Values that do not belong to a type."""
    kind = get_origin(hint) or hint
    if kind is Literal or kind is bool:
        return ["nonsense", 17, [1]]
    if kind in (list, dict):
        return ["nonsense", 17] if kind is dict else [{"a": 1}]
    if kind is tuple:
        return ["nonsense", 17, [1], [1, 2, 3], {"a": 1}]
    members = set(get_args(hint)) - {type(None)} or {hint}
    if int in members or float in members:
        return ["many", [1], {"a": 1}]
    return [[1], {"a": 1}]


def out_of_range(key: str, hint: Any) -> st.SearchStrategy[Any] | None:
    """Values of a key's type that it may not have; None where all are right."""
    members = set(get_args(hint)) or {hint}
    if key not in RANGES or get_origin(hint) is tuple:
        return None
    is_right, _ = RANGES[key]
    if int in members:
        return st.integers(-(10**6), 10**6).filter(lambda value: not is_right(value))
    if float in members:
        numbers = st.floats(-1e6, 1e6).map(lambda value: round(value, 3))
        return numbers.filter(lambda value: not is_right(value))
    return None


Change = tuple[dict[str, Any], str]
"""A tree to lay over a recipe, and what the line about it has to name."""


@st.composite
def changes(draw: st.DrawFn, keys: dict[str, Any], prefix: str) -> dict[str, Change]:
    """A few mistakes in a recipe of these keys, by the key they are about; `prefix` begins the names in messages."""
    found: dict[str, Change] = {}
    for key in draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=4, unique=True)):
        hint, ranged = keys[key], out_of_range(key, keys[key])
        how = draw(
            st.sampled_from(["misspelt", "of another type", *(["out of range"] * 2 if ranged is not None else [])])
        )
        if how == "misspelt":
            place = draw(st.integers(1, len(key.rpartition(".")[2])))
            cut = len(key) - len(key.rpartition(".")[2]) + place
            name = f"{key[:cut]}{draw(st.sampled_from('xzq7_'))}{key[cut:]}"
            assume(name not in keys)
            found[key] = (nested(name, 1), f"{prefix}{name}: 1: no such key")
        elif how == "of another type":
            value = draw(st.sampled_from(wrong_values(hint)))
            found[key] = (nested(key, value), f"{prefix}{key}: ")
        else:
            assert ranged is not None
            found[key] = (nested(key, draw(ranged)), f"{prefix}{key}: ")
    return found


def nested(key: str, value: Any) -> dict[str, Any]:
    """`a.b` as {a: {b: value}}."""
    for name in reversed(key.split(".")):
        value = {name: value}
    return typing.cast(dict[str, Any], value)


def laid_over(tree: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """A tree with another over it."""
    merged = dict(tree)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict) and key != "sources"
        merged[key] = laid_over(merged[key], value) if both else value
    return merged


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "unclosed": lambda text: text + b"\nlog: {every: 1\n",
    "a tab": lambda text: text + b"\nlog:\n\tevery: 1\n",
    "a list": lambda text: b"- a\n- b\n",
    "a word": lambda text: b"train\n",
    "twice": lambda text: text + b"\nschema_version: 1\nschema_version: 1\n",
    "a tag": lambda text: text + b"\nschema_version: !!python/object/apply:os.getcwd []\n",
    "an alias": lambda text: text + b"\nschema_version: *a\n",
    "not UTF-8": lambda text: text + "\nschema_version: é\n".encode("latin-1"),
    "control characters": lambda text: text + b"\nschema_version: \x00\x01\n",
    "extends nothing": lambda text: text + b"\nextends: no/such/recipe\n",
    "extends itself": lambda text: text + b"\nextends: recipe.yaml\n",
    "of the future": lambda text: text + b"\nschema_version: 999\n",
}


def written(tree: dict[str, Any]) -> bytes:
    """A recipe as YAML (JSON is)."""
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in tree.items()).encode()


@st.composite
def wrong_recipes(draw: st.DrawFn, verbs: list[str] | None = None) -> Wrong:
    """One to four things wrong with a recipe of any verb, or with its text."""
    verb = draw(st.sampled_from(verbs or sorted(RIGHT)))
    tree, kind = RIGHT[verb], RECIPES[verb]
    if draw(st.integers(0, 9)) == 0:
        without = {key: value for key, value in tree.items() if key not in ("out_dir", "schema_version")}
        damage = draw(st.sampled_from(sorted(DAMAGE)))
        return Wrong(verb, DAMAGE[damage](written(without)), ["recipe.yaml"])
    keys = {key: hint for key, hint in schema.keys(kind).items() if key not in ("stages", "schema_version")}
    in_a_stage = "stages" in tree and draw(st.booleans())
    if not in_a_stage:
        found = draw(changes(keys, ""))
        for top, _ in found.values():
            tree = laid_over(tree, top)
    else:
        stage = draw(st.sampled_from(sorted(tree["stages"])))
        if kind is RECIPES["pretrain"]:
            keys = {f"{group}.{name}": keys[f"{group}.{name}"] for group, names in OF_A_STAGE.items() for name in names}
        else:
            keys = dict(schema.keys(RECIPES[PIPELINE[stage]["verb"]]))
            for given_ in (".".join(path) for path in GIVEN):
                del keys[given_]
            del keys["schema_version"]
        found = draw(changes(keys, f"stages.{stage}."))
        for top, _ in found.values():
            tree = laid_over(tree, {"stages": {stage: top}})
    return Wrong(verb, written(tree), [said for _, said in found.values()])


# -- data -------------------------------------------------------------------------------------------------------------

ASK, SAY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": [ASK, SAY]},
    {"prompt": "Why?", "completion": "So."},
    {"instruction": "Why?", "input": "", "output": "So."},
    {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
]
PREFERENCES: list[dict[str, Any]] = [
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"chosen": [ASK, SAY], "rejected": [ASK, {**SAY, "content": "No."}]},
    {"prompt": "Why?", "completion": "So.", "label": True},
]
PROMPTS: list[dict[str, Any]] = [{"prompt": "Why?"}, {"messages": [ASK]}, {"messages": [ASK, SAY]}]
DOCUMENTS: list[dict[str, Any]] = [{"text": "Once upon a time."}]
TRAINING = {"model": MODEL, "data.train": FILE, "out_dir": OUT, "fabric.accelerator": "cpu"}
READERS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "pretrain": (TRAINING | {"data.workers": 1}, DOCUMENTS),
    "finetune": (TRAINING, CONVERSATIONS),
    "align reward": (TRAINING, PREFERENCES[:2]),
    "align dpo": (TRAINING, PREFERENCES),
    **{
        f"align {verb}": (TRAINING | {"rewards.sources": '{"length?target=60": 1.0}'}, PROMPTS)
        for verb in ("ppo", "grpo", "rloo", "iterative-dpo", "rejection-sampling")
    },
    "data prepare": ({"sources": FILE, "tokenizer": MODEL, "out": OUT, "workers": 1}, DOCUMENTS),
    "data check": ({"model": MODEL, "data.train": FILE}, CONVERSATIONS),
}
"""Verb → its flags, and rows that it reads."""
NO_TEXT = st.sampled_from([3, 1.5, True, [1, 2], [{"a": 1}], {"a": {"b": 1}}])


@st.composite
def wrong_rows(draw: st.DrawFn, rows: list[dict[str, Any]]) -> bytes:
    """A line that is no row, or lacks what its layout needs."""
    row = dict(draw(st.sampled_from(rows)))
    text = json.dumps(row).encode()
    how = draw(st.sampled_from(["cut", "no object", "a column", "a column", "without", "bytes", "surrogate", "nested"]))
    if how == "cut":
        return text[: draw(st.integers(1, len(text) - 1))]
    if how == "no object":
        return json.dumps(draw(st.sampled_from([3, [], "row", None, True, [row]]))).encode()
    if how == "a column":
        key = draw(st.sampled_from([key for key in row if key not in ("input", "label")]))
        return json.dumps(row | {key: draw(NO_TEXT)}).encode()
    if how == "without":
        return json.dumps({"title": 1, "url": "a"}).encode()
    if how == "bytes":
        place = draw(st.integers(1, len(text) - 1))
        return text[:place] + draw(st.sampled_from([b"\xff", b"\xc3", b"\xe2\x82"])) + text[place:]
    if how == "surrogate":
        return text.replace(b"Why?", b"\\ud800").replace(b"Once", b"\\ud800")
    return b'{"a":' * 100_000


@st.composite
def wrong_data(draw: st.DrawFn, verbs: list[str] | None = None) -> Wrong:
    """One to four wrong rows among right ones, or a file that cannot be read."""
    verb = draw(st.sampled_from(verbs or sorted(READERS)))
    flags, rows = READERS[verb]
    row = draw(st.sampled_from(rows))
    good = json.dumps(row).encode() + b"\n"
    if draw(st.integers(0, 3)) == 0:
        name, content = draw(wrong_files(good * 40))
        return Wrong(verb, content, [name], name, flags)
    lines = [good] * draw(st.integers(2, 9))
    places = draw(st.lists(st.integers(0, len(lines) - 1), min_size=1, max_size=4, unique=True))
    for place in places:
        lines[place] = draw(wrong_rows(rows)) + b"\n"
    return Wrong(verb, b"".join(lines), [f"data.jsonl:{place + 1}: " for place in places], "data.jsonl", flags)


@st.composite
def wrong_files(draw: st.DrawFn, good: bytes) -> tuple[str, bytes]:
    """Name and content of a file that is cut, altered, or none of its kind."""
    import zstandard

    packed = {
        "data.jsonl.gz": gzip.compress(good, mtime=0),
        "data.jsonl.zst": zstandard.ZstdCompressor().compress(good),
    }
    packed["data.parquet"] = b"PAR1" + good + b"PAR1"
    how = draw(st.sampled_from(["cut", "altered", "foreign", "unknown"]))
    if how == "cut":
        name = draw(st.sampled_from(sorted(packed)))
        return name, packed[name][: draw(st.integers(1, len(packed[name]) - 1))]
    if how == "altered":  # gzip knows the sum of what it holds
        content = packed["data.jsonl.gz"]
        place = draw(st.integers(len(content) - 8, len(content) - 1))
        return "data.jsonl.gz", content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    if how == "foreign":
        name = draw(st.sampled_from([*sorted(packed), "data.json"]))
        return name, draw(st.binary(min_size=1, max_size=60).map(lambda noise: b"\xff" + noise))
    return f"data.{draw(st.sampled_from(['csv', 'docx', 'pt', 'zip', 'arrow', 'xml']))}", good

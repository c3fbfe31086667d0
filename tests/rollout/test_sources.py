"""Reward models are fed what trained them, functions are held to what they promise, specs are told apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from litrecipe.checkpoint.hf import save_reward_model
from litrecipe.checkpoint.load import load_reward_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data, Fabric
from litrecipe.config.online import Rewards
from litrecipe.data.comparisons import load_comparisons
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.reward import RewardModel
from litrecipe.model.row import Sample, Segment, make_row
from litrecipe.rollout.sources import Completions, ModelSource, check_columns_of, make_source, make_sources

CPU = Fabric(accelerator="cpu")
MEAN, STD = 0.5, 2.0
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 7?"}
SAID = {"role": "assistant", "content": "Seven."}


@pytest.fixture(scope="session")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on the tiny model, whose weights all matter."""
    model = load_reward_model(open_model(str(tiny_model)))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    folder = tmp_path_factory.mktemp("reward") / "model"
    save_reward_model(folder, model, tiny_model, pad_token="<|endoftext|>", statistics=(MEAN, STD))
    return folder


@pytest.fixture
def model(folder: Path) -> RewardModel:
    return load_reward_model(open_model(str(folder))).eval()


@pytest.fixture
def source(folder: Path, tokenizer: Tokenizer) -> ModelSource:
    found = make_source(f"model:{folder}", tokenizer, CPU, "cpu")
    assert isinstance(found, ModelSource)
    return found


@torch.no_grad()
def reward(model: RewardModel, ids: list[int]) -> float:
    """Of one text, in units of good answers."""
    weights = np.eye(len(ids), dtype=np.float32)[-1]
    [value] = model(make_row([Sample("text", (Segment(np.array(ids), weights),))])).tolist()
    return (value - MEAN) / STD


def test_a_model_is_fed_exactly_what_trained_it(
    source: ModelSource, model: RewardModel, ask: Any, complete: Any, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """The scores of two answers are those of their branches in the samples of `align reward`, line end and all."""
    row = {"prompt": [SYSTEM, USER], "chosen": "Seven is odd.", "rejected": "It is 8."}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    sample = load_comparisons(Data(train=str(tmp_path / "pairs.jsonl")), tokenizer, seed=0).train[0]
    with torch.no_grad():
        trained = (model(make_row([sample])) - MEAN) / STD
    prompt = ask(prompt=[SYSTEM, USER])
    completions = complete([prompt] * 2, ["Seven is odd.", "It is 8."])
    assert source(completions) == pytest.approx(trained.tolist(), abs=1e-5)
    without_line_end = [reward(model, [*prompt.tokens.tolist(), *tokens]) for tokens in completions.tokens]
    assert np.abs(np.array(without_line_end) - trained.numpy()).min() > 1e-3


@torch.no_grad()
def test_scores_are_those_of_transformers(
    source: ModelSource, folder: Path, ask: Any, complete: Any, tokenizer: Tokenizer
) -> None:
    """Padded on the right, read at the last token that is no padding; completions of prompts in any order."""
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    prompts = [ask(prompt="What is 7?"), ask(where="f:2", messages=[SYSTEM, USER, SAID, USER])]
    prompts = [prompts[place] for place in (0, 1, 1, 0, 0)]
    completions = complete(prompts, ["Seven.", "the fox", "", "a much longer answer than that", "Seven."])
    line_end = tokenizer.encode("\n")
    ids = [[*p.tokens.tolist(), *t, *line_end] for p, t in zip(prompts, completions.tokens, strict=True)]
    longest, pad = max(map(len, ids)), theirs.config.pad_token_id
    padded = torch.tensor([one + [pad] * (longest - len(one)) for one in ids])
    expected = (theirs(input_ids=padded, attention_mask=(padded != pad).long()).logits[:, 0] - MEAN) / STD
    assert source(completions) == pytest.approx(expected.tolist(), abs=1e-5)
    assert expected.std() > 0.05


def test_the_ids_are_those_that_were_sampled(source: ModelSource, model: RewardModel, ask: Any) -> None:
    """A model may spell a word as its tokenizer would not; the pad token of a reward model does not matter."""
    prompt, the = ask(prompt="What is 7?"), source.tokenizer.encode("the")
    spelt = [source.tokenizer.backend.token_to_id(letter) for letter in "the"]
    assert the != spelt
    [end], line_end = source.tokenizer.eos_ids, source.tokenizer.encode("\n")
    found = source(Completions([prompt], ["the"], [[*spelt, end]], ["eos"]))
    assert found == pytest.approx([reward(model, [*prompt.tokens.tolist(), *spelt, end, *line_end])], abs=1e-5)


def test_what_was_cut_is_scored_as_if_it_had_ended(source: ModelSource, ask: Any, complete: Any) -> None:
    prompt = ask(prompt="What is 7?")
    cut = complete([prompt] * 2, ["the quick", "brown"], ["length", "stop"])
    assert source(cut) == source(complete([prompt] * 2, ["the quick", "brown"]))


@pytest.fixture
def another(folder: Path, tmp_path: Path, tokenizer: Tokenizer) -> ModelSource:
    """The same reward model behind a template that writes `Q: …` and `A: …`."""
    other = shutil.copytree(folder, tmp_path / "other", ignore=lambda *_: ["manifest.json"])
    template = (
        "{% for m in messages %}{{ ('A: ' if m.role == 'assistant' else 'Q: ') + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A: ' }}{% endif %}"
    )
    settings = json.loads((other / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (other / "tokenizer_config.json").write_text(json.dumps(settings))
    (other / "chat_template.jinja").unlink(missing_ok=True)
    found = make_source(f"model:{other}", tokenizer, CPU, "cpu")
    assert isinstance(found, ModelSource)
    return found


def test_a_model_of_another_tongue_reads_its_own_template(
    another: ModelSource, model: RewardModel, ask: Any, complete: Any, tokenizer: Tokenizer
) -> None:
    """What ended the policy's completions is no part of it."""
    [end] = tokenizer.eos_ids
    expected = [
        reward(model, [*tokenizer.encode("Q: What is 7?"), end, *tokenizer.encode(f"A: {text}"), end])
        for text in ("Seven.", "the fox", "")
    ]
    completions = complete([ask(prompt="What is 7?")] * 3, ["Seven.", "the fox", ""])
    assert another(completions) == pytest.approx(expected, abs=1e-5)


def test_a_model_of_another_tongue_reads_a_text_whole(
    another: ModelSource, model: RewardModel, ask: Any, complete: Any, tokenizer: Tokenizer
) -> None:
    expected = [reward(model, [*tokenizer.encode(f"the qu{text}"), *tokenizer.eos_ids]) for text in ("ick", "x")]
    assert another(complete([ask(text="the qu")] * 2, ["ick", "x"])) == pytest.approx(expected, abs=1e-5)


def test_texts_are_scored_without_a_template(source: ModelSource, model: RewardModel, ask: Any, complete: Any) -> None:
    prompt = ask(text="the quick ")
    [end] = source.tokenizer.eos_ids
    expected = [*source.tokenizer.encode("the quick "), *source.tokenizer.encode("fox"), end]
    assert source(complete([prompt], ["fox"])) == pytest.approx([reward(model, expected)], abs=1e-5)


@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_rows_do_not_matter(source: ModelSource, ask: Any, complete: Any, budget: int) -> None:
    """Completions share their prompt as far as a row holds them: all in one row, or each in its own."""
    prompts = [ask(prompt=f"What is {n // 3}?") if n % 3 == 0 else None for n in range(9)]
    prompts = [prompts[n - n % 3] for n in range(9)]
    completions = complete(prompts, [f"It is {'very ' * n}{n}." for n in range(9)])
    alone = [source(completions.at([n]))[0] for n in range(9)]
    rows: list[int] = []
    source.model.register_forward_pre_hook(lambda _, given: rows.append(len(given[0].tokens)))
    small = ModelSource("m", source.model, source.tokenizer, source.tokenizer, budget=budget)
    assert small(completions) == pytest.approx(alone, abs=1e-5)
    asked, said = [len(prompt.tokens) for prompt in prompts], [len(tokens) + 1 for tokens in completions.tokens]
    if budget == 1:
        assert sorted(rows) == sorted(map(sum, zip(asked, said, strict=True)))
    elif budget == 100:
        assert max(rows) <= budget + 3 and 1 < len(rows) < 9  # line ends are not counted before
    else:
        assert rows == [sum(asked[::3]) + sum(said)]
    assert source(Completions([], [], [], [])) == []


def test_a_model_is_frozen(source: ModelSource) -> None:
    assert not source.model.training and not any(p.requires_grad for p in source.model.parameters())


def test_completions_longer_than_a_model_reads(source: ModelSource, ask: Any, complete: Any) -> None:
    with pytest.raises(InputError, match=r"rewards.sources: model:.*: f:1: 5\d\d tokens .*reads 512: lower"):
        source(complete([ask(prompt="What is 7?")], ["z" * 500]))


def test_models_that_are_none(tiny_model: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"rewards.sources: model:.*: a language model, it has no score"):
        make_source(f"model:{tiny_model}", tokenizer, CPU, "cpu")
    with pytest.raises(InputError, match=r"^rewards.sources: .*nowhere: no such file or folder"):
        make_source(f"model:{tmp_path / 'nowhere'}", tokenizer, CPU, "cpu")


def test_ranks_split_no_model_of_a_quantised_run(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "final").symlink_to(folder)
    nf4 = "adapter: {method: lora}\nquantize: {method: nf4}\n"
    (tmp_path / "recipe.yaml").write_text(f"model: {{source: b}}\ndata: {{train: d}}\nout_dir: run\n{nf4}")
    fabric, ranks = (
        Fabric(accelerator="cpu", devices=2, tensor_parallel=2),
        cast(Any, SimpleNamespace(share_models=True)),
    )
    with pytest.raises(InputError, match=rf"^rewards.sources: model:{tmp_path}: its base is quantised.*final/"):
        make_source(f"model:{tmp_path}", tokenizer, fabric, "cpu", ranks=ranks)


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer):
    """Writes the body of a function into a module of the current folder and makes a source of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [one for one in __import__("sys").path if one])
    count = iter(range(10**6))

    def function(body: str) -> Any:
        name = f"mine_{tmp_path.name.replace('-', '_')}_{next(count)}"
        Path(f"{name}.py").write_text(f"def judge(prompts, completions, rows):\n    {body}\n")
        return make_source(f"function:{name}:judge", tokenizer, CPU, "cpu")

    return function


def test_functions_are_given_prompts_completions_and_rows(function: Any, ask: Any, complete: Any) -> None:
    completions = complete([ask(prompt="What is 7?", best=6), ask(text="It was")], ["Seven.", "good"])
    assert function("return [r.get('best') for r in rows]")(completions) == [6.0, None]
    assert function("return [len(c) for c in completions]")(completions) == [6.0, 4.0]
    assert function("return [p == 'It was' for p in prompts]")(completions) == [0.0, 1.0]
    assert function("return [isinstance(p, list) and p[-1]['content'] == 'What is 7?' for p in prompts]")(
        completions
    ) == [1.0, 0.0]
    assert function("return [r.setdefault('best', 1) and r.clear() for r in rows]")(completions) == [None, None]
    assert completions.prompts[0].row["best"] == 6 and "best" not in completions.prompts[1].row
    for array in ("numpy.float32([1, 2])", "torch.tensor([1.0, 2.0])", "(x for x in (1, 2))"):
        assert function(f"import numpy, torch; return {array}")(completions) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("body", "mistake"),
    [
        (
            "return [1 / (len(c) - 1) for c in completions]",
            r"f:1: ZeroDivisionError: division by zero \(.*mine.*py:2\)$",
        ),
        ("return [rows[1]['prompt']] if len(rows) == 1 else 1 / 0", r"f:1: IndexError: list index out of range"),
        ("return [1.0] if len(rows) == 1 else 1 / 0", r"ZeroDivisionError: division by zero \(.*py:2\)$"),
        ("raise SystemError", r"f:1: SystemError \(.*py:2\)$"),
        ("return [1.0]", r"returned 1 value for 2 completions: give one for each$"),
        ("return None", r"TypeError: 'NoneType' object is not iterable"),
        ("return [0.0, float('nan')]", r"g:2: nan: not a finite number"),
        ("return [float('-inf'), 0.0]", r"f:1: -inf: not a finite number"),
        ("return [1, 'good']", r"g:2: 'good': not a finite number"),
        ("return [1, 1j]", r"g:2: 1j: not a finite number"),
    ],
)
def test_what_functions_do_wrong(function: Any, ask: Any, complete: Any, body: str, mistake: str) -> None:
    completions = complete([ask(prompt="a"), ask(prompt="b", where="g:2")], ["x", "y"])
    with pytest.raises(InputError, match=r"^rewards.sources: function:mine_.*:judge: .*" + mistake.lstrip(": ")):
        function(body)(completions)


@pytest.mark.parametrize(
    ("spec", "mistake"),
    [
        ("exat?column=answer", "exat?column=answer: no such source (did you mean exact?); there are exact, "),
        ("modle:runs/reward", "modle:runs/reward: no such source (did you mean model?)"),
        ("runs/reward", "runs/reward: no such source; there are"),
        ("exact?colum=a", "exact?colum=a: colum: no such option (did you mean column?)"),
        ("function:brevity", "function:brevity: give function:MODULE:NAME"),
        ("function:no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("function:json:lods", "lods: not in json (did you mean loads?)"),
        ("function:json:__name__", "__name__: a str: give a function"),
    ],
)
def test_wrong_specs(spec: str, mistake: str, tokenizer: Tokenizer) -> None:
    """All are told, before a model is looked for."""
    with pytest.raises(InputError) as caught:
        make_sources(Rewards({spec: 1.0, "model:nowhere": 1.0, "odd": 1.0}), tokenizer, CPU, "cpu")
    first, second = caught.value.mistakes
    assert first.startswith(f"rewards.sources: {spec}: ") and mistake in first
    assert second.startswith("rewards.sources: odd: no such source")


def test_a_recipe_needs_sources(tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=r"rewards.sources: missing"):
        make_sources(Rewards(), tokenizer, CPU, "cpu")


def test_rules_see_rows_and_name_the_wrong_one(tokenizer: Tokenizer, ask: Any, complete: Any) -> None:
    completions = complete([ask(prompt="a", answer="7"), ask(prompt="b"), ask(prompt="c", answer="x")], ["7", "7", "7"])
    exact, numeric, length = make_sources(
        Rewards({"exact": 1.0, "numeric": 0.5, "length?max=1": 1.0}), tokenizer, CPU, "cpu"
    )
    assert (exact.source(completions), exact.weight, numeric.weight) == ([1.0, None, 0.0], 1.0, 0.5)
    assert length.source(completions) == [0.0] * 3  # two tokens each: the end token counts
    with pytest.raises(InputError, match=r"^rewards.sources: numeric: f:1: answer: 'x': no number in it"):
        numeric.source(completions)


def test_columns_that_no_row_has(tokenizer: Tokenizer, ask: Any) -> None:
    config = Rewards({"exact?column=anser": 1.0, "numeric": 1.0, "repetition": 1.0, "regex?pattern=a": 1.0})
    sources = make_sources(config, tokenizer, CPU, "cpu")
    with pytest.raises(InputError) as caught:
        check_columns_of([one.source for one in sources], [ask(prompt="a", answer="7"), ask(prompt="b")])
    assert caught.value.mistakes == [
        "rewards.sources: exact?column=anser: anser: no row has this column (did you mean answer?)"
    ]

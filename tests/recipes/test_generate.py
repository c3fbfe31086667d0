"""`litrecipe generate`, beside transformers on the same folder."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys

import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate, GenerateRecipe, Model
from litrecipe.recipes import chat
from litrecipe.recipes.generate import main

QUESTION = "what does the fox say?"


def recipe(folder, **keys) -> GenerateRecipe:
    return GenerateRecipe(model=Model(source=str(folder)), generate=Generate(max_new_tokens=12), **keys)


@pytest.fixture(scope="module")
def transformers_says(varied_model):
    """Greedy continuation of a text by transformers, as text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(varied_model)
    model = AutoModelForCausalLM.from_pretrained(varied_model, dtype=torch.float32)

    def say(text: str | list) -> str:
        if isinstance(text, list):
            text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    return say


def test_only_the_answer_goes_to_standard_output(varied_model, transformers_says, capsys) -> None:
    assert main(recipe(varied_model, prompt=QUESTION)) == 0
    captured = capsys.readouterr()
    assert captured.out == transformers_says([{"role": "user", "content": QUESTION}]) + "\n"
    assert "tokens read, 12 sampled" in captured.err


def test_the_default_length_fits_a_short_context(varied_model, tmp_path, capsys, monkeypatch) -> None:
    """Of 40 tokens; what was asked for is not changed behind one's back."""
    shutil.copytree(varied_model, tmp_path / "short")
    config = json.loads((varied_model / "config.json").read_text()) | {"max_position_embeddings": 40}
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    short = Model(source=str(tmp_path / "short"))
    main(GenerateRecipe(model=short, prompt="the quick", raw=True))
    told = re.search(r"(\d+) tokens read, (\d+) sampled", capsys.readouterr().err)
    assert told and int(told[2]) > 0 and int(told[1]) + int(told[2]) <= 40
    with pytest.raises(
        InputError, match=r"generate\.max_new_tokens: 39: the longest prompt has \d+ tokens and the model"
    ):
        main(GenerateRecipe(model=short, generate=Generate(max_new_tokens=39), prompt="the quick", raw=True))
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n"))
    chat.main(GenerateRecipe(model=short))
    assert capsys.readouterr().out.strip()


def test_a_system_message(varied_model, transformers_says, capsys) -> None:
    main(recipe(varied_model, prompt=QUESTION, system="be brief"))
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": QUESTION}]
    assert capsys.readouterr().out == transformers_says(messages) + "\n"


def test_raw_text_from_standard_input(varied_model, transformers_says, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick brown"))
    main(recipe(varied_model, prompt="-", raw=True))
    assert capsys.readouterr().out == transformers_says("the quick brown") + "\n"


def test_without_a_chat_template_raw_text_is_the_cure(varied_model, tmp_path, capsys) -> None:
    folder = shutil.copytree(varied_model, tmp_path / "bare")
    for name in ("chat_template.jinja", "manifest.json"):  # a manifest would tell that something is missing
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"^model\.chat_template: this model has none: .* with `--raw`$"):
        main(recipe(folder, prompt=QUESTION))
    with pytest.raises(
        InputError, match=r"^model\.chat_template: this model has none: .* use `litrecipe generate --raw`$"
    ):
        chat.main(recipe(folder, prompt=QUESTION))
    assert main(recipe(folder, prompt=QUESTION, raw=True)) == 0


@pytest.mark.parametrize("raw", [True, False])
def test_a_prompt_that_is_not_unicode(varied_model, raw: bool) -> None:
    with pytest.raises(InputError, match="prompt: holds bytes that are not UTF-8"):
        main(recipe(varied_model, prompt="\udcff hi", raw=raw))


def test_a_terminal_sees_the_answer_piece_by_piece(varied_model, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

        def write(self, text: str) -> int:
            pieces.append(text)
            return len(text)

    pieces: list[str] = []
    monkeypatch.setattr(sys, "stdout", Terminal())
    main(recipe(varied_model, prompt=QUESTION))
    answer = [piece for piece in pieces if piece != "\n"]
    assert len(answer) > 3
    assert pieces[-1] == "\n"


def test_mistakes(varied_model) -> None:
    with pytest.raises(InputError) as caught:
        main(recipe(varied_model, raw=True, system="x"))
    assert [mistake.split(":")[0] for mistake in caught.value.mistakes] == ["prompt", "system"]
    with pytest.raises(InputError, match=r"generate\.max_new_tokens: 12: the longest prompt has \d+ tokens"):
        main(recipe(varied_model, prompt="word " * 600))
    with pytest.raises(InputError, match=r"fabric\.precision: bf16-mixed"):
        wrong = recipe(varied_model, prompt="x")
        wrong.fabric.precision = "bf16-mixed"
        main(wrong)

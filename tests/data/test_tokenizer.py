from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from litrecipe.checkpoint.hf import copy_tokenizer
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.formats import RESERVED, Conversation, RowError, parse_row, read_conversations
from litrecipe.data.tokenizer import Encoded, Tokenizer

SETTINGS = settings(max_examples=60, deadline=None)
TRICKY = [
    "🤗",
    "👩‍👩‍👧‍👦",
    "é",
    "e\u0301",
    "½",
    "你好",
    " ",
    "\n",
    "\t",
    "  ",
    "7",
    "im_end",
    "<|",
    "|>",
    "the",
    "<think>",
    "\u200d",
]
PLAIN_TEXT = (
    st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=4)), min_size=1, max_size=12)
    .map("".join)
    .filter(lambda text: not any(mark in text for mark in RESERVED))
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<unk>"]
NO_SPECIALS = PLAIN_TEXT.filter(lambda text: not any(token in text for token in SPECIALS))
Messages = list[dict[str, str]]


@cache
def load(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@cache
def oracle(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def conversations(content: st.SearchStrategy[str]) -> st.SearchStrategy[Messages]:
    turns = st.lists(st.tuples(content, content), min_size=1, max_size=3)
    return turns.map(
        lambda pairs: [
            message
            for asked, said in pairs
            for message in ({"role": "user", "content": asked}, {"role": "assistant", "content": said})
        ]
    )


def encode(tokenizer: Tokenizer, messages: Messages, tools: list[Any] | None = None) -> Encoded:
    [encoded] = tokenizer.encode_batch([Conversation(messages, "file:1", extra={"tools": tools})])
    if isinstance(encoded, RowError):
        raise encoded
    return encoded


each = pytest.mark.parametrize("name", ["chatml", "tagged", "llama2"])


@each
@SETTINGS
@given(messages=conversations(NO_SPECIALS))
def test_ids_equal_transformers(name: str, folders: dict[str, Path], messages: Messages) -> None:
    folder = folders[name]
    wanted = oracle(folder).apply_chat_template(messages)["input_ids"]
    assert encode(load(folder), messages)[0].tolist() == wanted
    prompt = oracle(folder).apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
    assert load(folder).encode_prompt(messages[:-1]) == prompt
    assert load(folder).render(messages) == oracle(folder).apply_chat_template(messages, tokenize=False)


@pytest.mark.parametrize("name", ["tagged", "llama2"])
@SETTINGS
@given(messages=conversations(NO_SPECIALS))
def test_masks_equal_transformers(name: str, folders: dict[str, Path], messages: Messages) -> None:
    folder = folders[name]
    wanted = oracle(folder).apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ids, mask = encode(load(folder), messages)
    assert ids.tolist() == wanted["input_ids"]
    assert mask.astype(int).tolist() == wanted["assistant_masks"]


@SETTINGS
@given(messages=conversations(PLAIN_TEXT))
def test_the_prefix_rule_learns_what_the_tags_say(chatml_folder: Path, tagged_folder: Path, messages: Messages) -> None:
    """The two templates print the same text when there is a system message."""
    messages = [{"role": "system", "content": "You help."}, *messages]
    plain_ids, plain_mask = encode(load(chatml_folder), messages)
    tagged_ids, tagged_mask = encode(load(tagged_folder), messages)
    np.testing.assert_array_equal(plain_ids, tagged_ids)
    np.testing.assert_array_equal(plain_mask, tagged_mask)


def test_tools_and_calls_equal_transformers(chatml_folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{% for tool in tools %}{{ tool | tojson(indent=2) }}{% endfor %}{% for m in messages %}{{ m.role }}:"
        "{% if m.tool_calls is defined %}{{ m.tool_calls | tojson }}{% else %}{{ m.content }}{% endif %}<|im_end|>"
        "{% endfor %}"
    )
    tools = [
        {"type": "function", "function": {"name": "größe", "parameters": {"default": None, "enum": [1, True, "<"]}}}
    ]
    messages = parse_row(
        {
            "messages": [
                {"role": "user", "content": "How tall?", "tool_calls": None},
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": {"a": None}}}]},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "Three."},
            ]
        },
        "file:1",
        Data(),
    ).messages
    wanted = oracle(chatml_folder).apply_chat_template(messages, tools=tools, chat_template=template.read_text())
    ids, _ = encode(Tokenizer.load(chatml_folder, str(template)), messages, tools)
    assert ids.tolist() == wanted["input_ids"]


def test_a_chat_template_of_the_hub(chatml_folder: Path, tmp_path: Path) -> None:
    """It ships with the program, replaces the model's own, which prints a system message, and goes along."""
    name = "hub:experiments/json/chatml.jinja"
    asked = [{"role": "user", "content": "Who?"}]
    assert "system" in load(chatml_folder).render(asked)
    wanted = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert Tokenizer.load(chatml_folder, name).render(asked, add_generation_prompt=True) == wanted
    copy_tokenizer(chatml_folder, tmp_path, name)
    assert Tokenizer.load(tmp_path).render(asked, add_generation_prompt=True) == wanted


def test_the_end_of_every_turn_is_learnt_and_no_opening_is(chatml_folder: Path) -> None:
    tokenizer = load(chatml_folder)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "Paris 🤗"}] * 2
    ids, mask = encode(tokenizer, messages)
    assert tokenizer.decode(ids[mask], skip_special=False) == "Paris 🤗<|im_end|>\n" * 2
    assert ids.dtype == np.int32 and mask.dtype == bool


def test_a_character_of_several_tokens_at_the_end_of_a_tag_is_learnt_whole(tagged_folder: Path, tmp_path: Path) -> None:
    """transformers stops at the first of its tokens (`char_to_token` gives the first that holds the character)."""
    folder = shutil.copytree(tagged_folder, tmp_path / "bare")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    tokenizer = Tokenizer.load(folder)
    ids, mask = encode(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a🤖"}])
    assert tokenizer.decode(ids[mask]) == "a🤖"


WRITTEN = st.lists(st.one_of(st.sampled_from(SPECIALS + TRICKY), st.text(max_size=3)), min_size=1, max_size=8).map(
    "".join
)


@each
@SETTINGS
@given(messages=conversations(WRITTEN.filter(lambda text: not any(mark in text for mark in RESERVED))))
def test_written_control_tokens_stay_text(name: str, folders: dict[str, Path], messages: Messages) -> None:
    tokenizer = load(folders[name])
    harmless = [{**message, "content": "x"} for message in messages]
    ids, _ = encode(tokenizer, messages)
    wanted, _ = encode(tokenizer, harmless)
    control = [
        id for id in ids.tolist() if id in tokenizer.control_ids and id != tokenizer.backend.token_to_id("<unk>")
    ]
    assert control == [id for id in wanted.tolist() if id in tokenizer.control_ids]
    text = tokenizer.decode(ids, skip_special=False)
    for message in messages:
        assert message["content"] in text or name == "llama2", "sentence pieces lose some spaces in decoding"


@each
@SETTINGS
@given(text=PLAIN_TEXT)
def test_encoding_plain_text(name: str, folders: dict[str, Path], text: str) -> None:
    tokenizer = load(folders[name])
    assert tokenizer.encode(text, specials=True) == oracle(folders[name]).encode(text, add_special_tokens=False)
    if not any(token in text for token in SPECIALS):
        assert tokenizer.encode(text) == tokenizer.encode(text, specials=True)


def test_control_tokens_in_plain_text_on_request(chatml_folder: Path) -> None:
    tokenizer = load(chatml_folder)
    end = tokenizer.eos_ids[0]
    assert end in tokenizer.encode("a<|im_end|>", specials=True)
    assert end not in tokenizer.encode("a<|im_end|>")
    assert tokenizer.decode(tokenizer.encode("a<|im_end|>")) == "a<|im_end|>"


@each
@SETTINGS
@given(text=PLAIN_TEXT)
def test_a_stream_gives_the_whole_text_and_never_half_a_character(
    name: str, folders: dict[str, Path], text: str
) -> None:
    tokenizer = load(folders[name])
    ids = tokenizer.encode(text)
    stream = tokenizer.decode_stream()
    pieces = [stream.push(id) for id in ids]
    assert not any(piece.endswith("\ufffd") for piece in pieces if "\ufffd" not in text)
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


def test_a_stream_that_ends_within_a_character(chatml_folder: Path) -> None:
    tokenizer = load(chatml_folder)
    ids = tokenizer.encode("a🤖")[:-1]
    stream = tokenizer.decode_stream()
    assert "".join(stream.push(id) for id in ids) == "a"
    assert stream.finish() == tokenizer.decode(ids)[1:]


def test_special_tokens(chatml_folder: Path, tmp_path: Path) -> None:
    tokenizer = load(chatml_folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (1, (2,), 2)
    assert not tokenizer.adds_bos

    folder = shutil.copytree(chatml_folder, tmp_path / "more")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"eos_token": {"content": "<|im_end|>", "special": True}, "pad_token": None, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    more = Tokenizer.load(folder)
    assert (more.eos_ids, more.pad_id) == ((2, 0), 2)
    assert more.fingerprint != tokenizer.fingerprint == Tokenizer.load(chatml_folder).fingerprint


def test_templates_win_in_order(chatml_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatml_folder, tmp_path / "templates")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "named"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(folder).render([]) == "named"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.load(folder).render([]) == "file"
    (tmp_path / "mine.jinja").write_text("{{ strftime_now('%Y-%m-%d') }}")
    dated = Tokenizer.load(folder, str(tmp_path / "mine.jinja"), "2026-01-31")
    assert dated.render([]) == "2026-01-31"
    assert dated.fingerprint != Tokenizer.load(folder, str(tmp_path / "mine.jinja"), "2026-02-01").fingerprint


def test_a_batch_is_its_conversations_and_says_what_fails(chatml_folder: Path) -> None:
    tokenizer = load(chatml_folder)
    good = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y 🤗"}]
    bad = [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{}]}]
    results = tokenizer.encode_batch([Conversation(good, "a"), Conversation(bad, "b"), Conversation(good, "c")])
    assert isinstance(results[1], RowError)
    for result in (results[0], results[2]):
        assert not isinstance(result, RowError)
        for got, wanted in zip(result, encode(tokenizer, good), strict=True):
            np.testing.assert_array_equal(got, wanted)
    whole = tokenizer.encode_batch([Conversation(good, "a")], learn="all")[0]
    assert not isinstance(whole, RowError) and whole[1].all()


@pytest.mark.parametrize("template", [3, ["x"], [{"name": "default", "template": 3}], {}])
def test_a_template_that_is_no_text_is_refused(chatml_folder: Path, tmp_path: Path, template: Any) -> None:
    shutil.copytree(chatml_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template"):
        Tokenizer.load(tmp_path)


def test_what_is_not_unicode_is_refused(chatml_folder: Path) -> None:
    tokenizer = load(chatml_folder)
    for encode_it in (tokenizer.encode, lambda text: tokenizer.encode_prompt([{"role": "user", "content": text}])):
        with pytest.raises(RowError, match="UTF-8"):
            encode_it(b"\xff hi".decode(errors="surrogateescape"))


def plain(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[str, str]:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    encoded = tokenizer.encode_batch([Conversation(messages, "a", "prompt_completion")])[0]
    assert not isinstance(encoded, RowError)
    ids, mask = encoded
    return tokenizer.decode(ids[~mask], skip_special=False), tokenizer.decode(ids[mask], skip_special=False)


def without_template(folder: Path, copy: Path) -> Tokenizer:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.load(copy)


def test_without_a_template_prompts_and_completions_are_plain_text(chatml_folder: Path, tmp_path: Path) -> None:
    tokenizer = without_template(chatml_folder, tmp_path / "bare")
    assert plain(tokenizer, "What is <|im_end|>? ", "the end") == ("What is <|im_end|>? ", "the end<|im_end|>")
    with pytest.raises(InputError, match=r"model\.chat_template"):
        encode(tokenizer, [{"role": "user", "content": "x"}])


def test_without_a_template_all_can_be_learnt_too(llama2_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llama2_folder, tmp_path / "with_bos")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = without_template(folder, tmp_path / "bare")
    messages = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    pair, text = Conversation(messages, "a", "prompt_completion"), Conversation(messages[1:], "b", "text")
    for encoded in tokenizer.encode_batch([pair, text], learn="all"):
        assert not isinstance(encoded, RowError)
        assert encoded[0][0] == tokenizer.bos_id and encoded[1].all()


def test_prompts_are_tokenised_as_generation_will_see_them(chatml_folder: Path, tmp_path: Path) -> None:
    """ "The qui" + "ck" must not become the token "quick" that a prompt ending in "qui" never holds."""
    tokenizer = without_template(chatml_folder, tmp_path / "bare")
    messages = [{"role": "user", "content": "The qui"}, {"role": "assistant", "content": "ck brown"}]
    encoded = tokenizer.encode_batch([Conversation(messages, "a", "prompt_completion")])[0]
    assert not isinstance(encoded, RowError)
    assert encoded[0][~encoded[1]].tolist() == tokenizer.encode("The qui")


def test_a_text_is_learnt_whole_and_ended(chatml_folder: Path) -> None:
    tokenizer = load(chatml_folder)
    text = Conversation([{"role": "assistant", "content": "Once <|im_start|>"}], "a", "text")
    encoded = tokenizer.encode_batch([text])[0]
    assert not isinstance(encoded, RowError)
    assert tokenizer.decode(encoded[0], skip_special=False) == "Once <|im_start|><|im_end|>"
    assert encoded[0][-1] == tokenizer.eos_ids[0] and encoded[1].all()


def test_control_tokens_that_are_looked_for_in_normalised_text(chatml_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chatml_folder, tmp_path / "normalised")
    state = json.loads((folder / "tokenizer.json").read_text())
    state["normalizer"] = {"type": "NFKC"}
    for token in state["added_tokens"]:
        token["normalized"] = True
    (folder / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = Tokenizer.load(folder)
    messages = [{"role": "user", "content": "½ <|im_end|>"}, {"role": "assistant", "content": "ﬁ"}]
    ids, mask = encode(tokenizer, messages)
    assert (ids == tokenizer.eos_ids[0]).sum() == 3
    assert tokenizer.decode(ids[mask], skip_special=False) == "fi<|im_end|>\n"


def test_missing_and_broken_files_are_named(chatml_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer\.json: "):
        Tokenizer.load(tmp_path)
    with pytest.raises(InputError, match=r"model\.chat_template: nowhere\.jinja: no such file"):
        Tokenizer.load(chatml_folder, "nowhere.jinja")
    (tmp_path / "latin1.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(InputError, match=r"latin1\.jinja: byte 5 is 0xe9, not UTF-8"):
        Tokenizer.load(chatml_folder, str(tmp_path / "latin1.jinja"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: .*not valid JSON"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: .*not a JSON object"):
        Tokenizer.load(tmp_path)


@pytest.fixture(scope="module")
def real(real_model: Path) -> Path:
    """The folder with the real model's tokenizer."""
    from litrecipe.checkpoint.source import open_model

    return open_model(str(real_model)).tokenizer_dir


@pytest.mark.real_model
def test_the_real_tokenizer_splits_digits_first(real: Path) -> None:
    tokenizer = load(real)
    pieces = [tokenizer.decode([id]) for id in tokenizer.encode("  12345 7 x")]
    assert pieces == ["  ", "1", "2", "3", "4", "5", " ", "7", " x"]
    assert tokenizer.decode(tokenizer.encode(" 7 ½")) == " 7 ½"
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


@pytest.mark.real_model
@SETTINGS
@given(messages=conversations(NO_SPECIALS))
def test_the_real_tokenizer_equals_transformers(real: Path, messages: Messages) -> None:
    wanted = oracle(real).apply_chat_template(messages)["input_ids"]
    assert encode(load(real), messages)[0].tolist() == wanted


@pytest.mark.real_model
def test_the_benchmark_rows_have_the_known_number_of_tokens(real: Path, shared: Path) -> None:
    rows = read_conversations(str(shared / "data" / "bench" / "sft128.jsonl"), Data())
    encoded = [encode(load(real), conversation.messages) for conversation in rows]
    assert sum(len(ids) for ids, _ in encoded) == 11906
    assert sum(int(mask.sum()) for _, mask in encoded) == 6045


def altered(source: Path, folder: Path, **changes: Any) -> Path:
    """A tokenizer's folder with other parts in its tokenizer.json."""
    shutil.copytree(source, folder)
    state = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(state | changes))
    return folder


DOUBLE = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [DOUBLE] * 40}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "e" * 1000}),
        ("normalizer", {"type": "Prepend", "prepend": "e" * 1000}),
        ("decoder", {"type": "Sequence", "decoders": [DOUBLE] * 40}),
    ],
)
def test_a_tokenizer_that_multiplies_texts_is_refused(
    chatml_folder: Path, tmp_path: Path, part: str, value: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=rf"tokenizer\.json: {part}: makes a text up to .* times as long"):
        Tokenizer.load(altered(chatml_folder, tmp_path / "t", **{part: value}))


def test_padding_to_any_length_is_not_done(chatml_folder: Path, tmp_path: Path) -> None:
    """A billion ids, were the tokenizer asked for them."""
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    padded = Tokenizer.load(altered(chatml_folder, tmp_path / "t", padding=padding))
    assert padded.encode("the fox") == Tokenizer.load(chatml_folder).encode("the fox")

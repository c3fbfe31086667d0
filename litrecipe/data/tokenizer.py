"""Text ↔ token ids: the `tokenizers` library, special tokens and the chat template, as a Hugging Face folder has them.

Shapes: n tokens of a conversation.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import normalizers

from litrecipe.config.errors import InputError
from litrecipe.config.files import read_json
from litrecipe.config.merge import path_of
from litrecipe.data.formats import Conversation, Message, RowError, is_unicode
from litrecipe.data.template import WRITTEN, ChatTemplate, Rendered

MOST_GROWTH = 100
"""How many times as long a tokenizer may make a text."""
Encoded = tuple[np.ndarray, np.ndarray]
"""(n,) int32 token ids, and (n,) bool: which of them the assistant says."""


class Tokenizer:
    """A model's tokenizer. Never adds BOS or EOS by itself: the chat template prints them; see also `adds_bos`.

    Control tokens written in a conversation stay plain text; only the chat template writes control tokens.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: dict[str, str],
        chat_template: str | None = None,
        more_eos_ids: Sequence[int] = (),
        today: datetime.date | None = None,
        name: str = "chat template",
    ) -> None:
        """Take over `backend`. `special_tokens`: `bos_token`, … → text. `more_eos_ids` end an answer besides EOS."""
        added = backend.get_added_tokens_decoder()
        serialised = backend.to_str()
        backend.no_truncation()
        backend.no_padding()
        self.text_fingerprint = sha256(serialised.encode()).hexdigest()
        """Changes with whatever changes the ids of plain text; no chat template does."""
        self.backend = _dropping_marks(backend)
        self.special_tokens = special_tokens
        self.control_ids = frozenset(id for id, token in added.items() if token.special)
        self.bos_id = self._id("bos_token")
        eos = self._id("eos_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys([*([] if eos is None else [eos]), *more_eos_ids]))
        pad = self._id("pad_token")
        self.pad_id: int = pad if pad is not None else next(iter(self.eos_ids), 0)
        self.adds_bos = self.bos_id is not None and self.bos_id in backend.encode("", add_special_tokens=True).ids
        """Whether the tokenizer's own post-processor starts plain text with BOS."""
        # A control token of a single character cannot be broken up by a mark.
        control_tokens = [token.content for token in added.values() if token.special and len(token.content) > 1]
        self.has_template = chat_template is not None
        self.template = ChatTemplate(
            chat_template or "", special_tokens=special_tokens, control_tokens=control_tokens, today=today, name=name
        )
        parts = [serialised, chat_template, special_tokens, self.eos_ids]
        if self.template.tells_time:
            parts.append(str(today or datetime.date.today()))
        self.fingerprint = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        """Changes with whatever changes ids or masks."""
        self.size = max(backend.get_vocab().values(), default=-1) + 1
        """How many ids there are."""
        state = json.loads(serialised)
        plain = [state[part] for part in ("model", "normalizer", "pre_tokenizer", "added_tokens")]
        self.text_fingerprint = sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        """Changes with whatever changes the ids of plain text."""

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None, date: str | None = None) -> Tokenizer:
        """Read `tokenizer.json` and what lies beside it.

        `chat_template` is a Jinja file that replaces the model's own template, `date` the ISO date that templates see
        as today. Raises InputError naming the file that is missing or broken.
        """
        folder = Path(folder)
        names = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
        config, legacy, generation = (read_json(folder / name) if (folder / name).is_file() else {} for name in names)
        template, name = _find_template(folder, config, chat_template)
        ends = generation.get("eos_token_id", [])
        return cls(
            _read_backend(folder / "tokenizer.json"),
            special_tokens=_token_texts(legacy) | _token_texts(config),
            chat_template=template,
            more_eos_ids=[ends] if isinstance(ends, int) else ends or [],
            today=datetime.date.fromisoformat(date) if date else None,
            name=name,
        )

    def encode(self, text: str, *, specials: bool = False) -> list[int]:
        """Ids of a text. Control tokens written in it are plain text, or control tokens with `specials`.

        Raises RowError for what is not Unicode.
        """
        return self._ids(text if specials else self.template.guard(text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; bytes that are no whole character give U+FFFD."""
        return self.backend.decode([int(id) for id in ids], skip_special_tokens=skip_special)

    def decode_stream(self, skip_special: bool = True) -> DecodeStream:
        """Decodes token by token and holds back what is no whole character yet."""
        return DecodeStream(self, skip_special)

    def render(
        self, messages: list[Message], add_generation_prompt: bool = False, tools: list[Message] | None = None
    ) -> str:
        """The text the chat template makes of messages (control tokens in it can no longer be told from text)."""
        self.need_template()
        text = self.template.render(messages, tools, add_generation_prompt=add_generation_prompt)
        return text.replace(WRITTEN, "")

    def encode_prompt(self, messages: list[Message], tools: list[Message] | None = None) -> list[int]:
        """Ids of a conversation so far, with the opening of the assistant's turn.

        Raises RowError when the template refuses it, and for what is not Unicode.
        """
        self.need_template()
        text = self.template.render(messages, tools, add_generation_prompt=True)
        return self._ids(text)

    def encode_batch(
        self, conversations: Sequence[Conversation], learn: Literal["assistant", "all"] = "assistant"
    ) -> list[Encoded | RowError]:
        """Ids of conversations, in parallel; in place of one that cannot be rendered, why.

        Learnt is what the assistant says: its words and the end of its turn. A text is learnt whole, between BOS (if
        the tokenizer adds one) and EOS. Without a chat template a prompt and its completion are plain text, ended by
        EOS. With `learn` all, masks are True everywhere.
        """
        results: dict[int, Encoded | RowError] = {}
        rendered: dict[int, Rendered] = {}
        for index, conversation in enumerate(conversations):
            try:
                if conversation.layout == "text":
                    results[index] = self._encode_plain("", conversation.messages[-1]["content"], learn)
                elif conversation.layout == "prompt_completion" and not self.has_template:
                    *prompt, completion = (message["content"] for message in conversation.messages)
                    results[index] = self._encode_plain("\n".join(prompt), completion, learn)
                else:
                    self.need_template()
                    messages, tools = conversation.messages, conversation.tools
                    if learn == "all":
                        text = self.template.render(messages, tools)
                        rendered[index] = Rendered(text, [(0, len(text))])
                    else:
                        rendered[index] = self.template.render_learnt(messages, tools)
            except RowError as error:
                results[index] = error
        encodings = self.backend.encode_batch([one.text for one in rendered.values()], add_special_tokens=False)
        for (index, one), encoding in zip(rendered.items(), encodings, strict=True):
            results[index] = _with_mask(encoding, one)
        return [results[index] for index in range(len(conversations))]

    def _ids(self, text: str) -> list[int]:
        if not is_unicode(text):
            raise RowError("holds bytes that are not UTF-8, or lone surrogates: give it as UTF-8")
        return self.backend.encode(text, add_special_tokens=False).ids

    def _encode_plain(self, prompt: str, completion: str, learn: Literal["assistant", "all"]) -> Encoded:
        """Prompt and completion end to end, EOS after them.

        Where the two grow together into one token they are encoded apart, because generation starts after the whole
        prompt.
        """
        before = self.encode(prompt)
        ids = self.encode(prompt + completion)
        if ids[: len(before)] != before:
            ids = before + self.encode(completion)
        bos = [self.bos_id] if self.adds_bos and self.bos_id is not None else []
        all_ids = np.array([*bos, *ids, *self.eos_ids[:1]], dtype=np.int32)
        return all_ids, np.arange(len(all_ids)) >= (0 if learn == "all" else len(bos) + len(before))

    def need_template(self, cure: str = "use rows with prompt and completion") -> None:
        """Raise InputError where there is none; `cure` says how to do without."""
        if not self.has_template:
            raise InputError(f"model.chat_template: this model has none: give a Jinja file, or {cure}")

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)


class DecodeStream:
    """Token after token into text; what is given out never changes and, put together, is the text of all ids.

    The tokens of the last piece given out are decoded along, because decoders treat the start of a text differently.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._given: list[int] = []
        self._held: list[int] = []

    def push(self, id: int) -> str:
        """The text that is certain with this token: empty while a character is incomplete."""
        self._held.append(id)
        text = self._text_of_held()
        if not text or text.endswith("\ufffd"):
            return ""
        self._given, self._held = self._held, []
        return text

    def finish(self) -> str:
        """What was held back (U+FFFD for bytes that never became a character)."""
        text = self._text_of_held()
        self._given, self._held = [], []
        return text

    def _text_of_held(self) -> str:
        before = self._tokenizer.decode(self._given, self._skip_special)
        return self._tokenizer.decode(self._given + self._held, self._skip_special)[len(before) :]


def _dropping_marks(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Make a tokenizer drop WRITTEN marks after it has looked for control tokens, as the first step of normalising."""
    if any(token.special and token.normalized for token in backend.get_added_tokens_decoder().values()):
        # These would be looked for in the normalised text.
        state = json.loads(backend.to_str())
        for token in state["added_tokens"]:
            token["normalized"] = token["normalized"] and not token["special"]
        backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    drop = normalizers.Replace(WRITTEN, "")
    own = backend.normalizer
    backend.normalizer = normalizers.Sequence([drop, own]) if own else drop
    return backend


def _with_mask(encoding: tokenizers.Encoding, rendered: Rendered) -> Encoded:
    """Character spans → tokens: from the first that touches a span to the last that does."""
    ids = np.array(encoding.ids, dtype=np.int32)
    mask = np.zeros(len(ids), dtype=bool)
    starts, stops = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2).T
    for start, stop in rendered.learnt:
        touching = np.flatnonzero((starts < stop) & (stops > start))
        if len(touching):
            mask[touching[0] : touching[-1] + 1] = True
    return ids, mask


def _find_template(folder: Path, config: dict[str, Any], replacement: str | None) -> tuple[str | None, str]:
    """The chat template and the name of its file: the user's, `chat_template.jinja`, or the one in the config."""
    if replacement is not None:
        path = path_of(replacement)
        if not path.is_file():
            raise InputError(f"model.chat_template: {replacement}: no such file: give a Jinja file")
        return _read_template(path), str(path)
    if (path := folder / "chat_template.jinja").is_file():
        return _read_template(path), str(path)
    template, name = config.get("chat_template"), f"{folder / 'tokenizer_config.json'}: chat_template"
    if isinstance(template, list) and all(isinstance(one, dict) for one in template):  # several by name
        template = {one.get("name"): one.get("template") for one in template}.get("default")
    if template is not None and not isinstance(template, str):
        raise InputError(f"{name}: {template!r}: not a template: mend it, or give a Jinja file as model.chat_template")
    return template, name


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        place, byte = error.start + 1, error.object[error.start]
        raise InputError(f"{path}: byte {place} is 0x{byte:02x}, not UTF-8: save the chat template as UTF-8") from error


def _read_backend(path: Path) -> tokenizers.Tokenizer:
    if not path.is_file():
        raise InputError(f"{path}: no such file: give the folder of a tokenizer.json as model.tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{path}: {error}: not a tokenizer the tokenizers library reads; fetch it again") from error
    for name in ("normalizer", "decoder"):
        part = getattr(backend, name)
        if part is not None and (growth := _growth(json.loads(part.__getstate__()))) > MOST_GROWTH:
            said = f"makes a text up to {growth:.3g} times as long, which no tokenizer needs"
            raise InputError(f"{path}: {name}: {said}: fetch it from whom you trust")
    return backend


def _growth(part: dict[str, Any]) -> float:
    """How many times as long a normalizer or a decoder may make a text, by what it is made of; those that put one
    character for another count as 1."""
    if part["type"] == "Sequence":
        return math.prod(map(_growth, part.get("normalizers") or part.get("decoders") or []))
    if part["type"] == "Prepend":
        return 1 + len(part["prepend"])
    if part["type"] != "Replace":
        return 1
    length, literal = len(part["content"]), part["pattern"].get("String")
    return max(1, length / len(literal)) if literal else 1 + length


def _token_texts(config: dict[str, Any]) -> dict[str, str]:
    """`*_token` → text; a token is a string or an object with `content`."""
    texts = {}
    for name, token in config.items():
        if name.endswith("_token") and isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):
            texts[name] = token
    return texts

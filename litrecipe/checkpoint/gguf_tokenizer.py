"""The tokenizer inside a GGUF file as the files a Hugging Face folder has. Imports no torch."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from litrecipe.checkpoint.gguf import GgufWeights
from litrecipe.checkpoint.manifest import keeping_in_cache, user_cache, write_text
from litrecipe.config.errors import InputError
from litrecipe.config.files import write_json

FORMAT = 2
"""Raise it when other files come out for the same input, so that older copies are not used."""
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
"""Kinds of token (`tokenizer.ggml.token_type`); the latter two are found in the text before it is cut."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CUTS = {
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [LLAMA3],
    "gpt-2": [GPT2],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
"""`tokenizer.ggml.pre` → where text is cut before byte pairs are merged; each expression cuts the pieces of the one
before it."""


def write_tokenizer(weights: GgufWeights) -> Path:
    """Folder with tokenizer.json and what belongs to it, made once a file header and kept in the user's cache."""
    folder = user_cache() / "gguf" / f"{weights.header_digest[:32]}-{FORMAT}"
    if folder.is_dir():
        return folder
    meta = weights.metadata
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre", "default")
    if kind not in ("gpt2", "llama") or pre not in CUTS:
        raise InputError(
            f"{weights.path}: tokenizer.ggml.model {kind}, tokenizer.ggml.pre {pre}: only llama, and gpt2 with one of "
            f"{', '.join(CUTS)} can be rebuilt: use the model's Hugging Face folder"
        )
    try:
        tokenizer = _byte_level(meta, pre) if kind == "gpt2" else _sentence_piece(meta)
        _add_tokens(tokenizer, meta, adds_bos=kind == "llama" or pre == "llama-bpe")
        settings = _settings(meta, weights.config["max_position_embeddings"])
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{weights.path}: its tokenizer is damaged ({error}): fetch the file again") from error
    ids = {key: weights.config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with keeping_in_cache():
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=folder.parent))
        write_text(draft / "tokenizer.json", tokenizer.to_str(pretty=True))
        write_json(draft / "tokenizer_config.json", settings)
        write_json(draft / "generation_config.json", {key: id for key, id in ids.items() if id is not None})
        if template := meta.get("tokenizer.chat_template"):
            write_text(draft / "chat_template.jinja", template)
    try:
        draft.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(draft)
    return folder


def _byte_level(meta: dict[str, Any], pre: str) -> Tokenizer:
    """Byte-level BPE with the file's tokens at the file's ids."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: id for id, token in enumerate(tokens)}
    # Llama 3 looks a whole piece up before it merges.
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


SPACE = "▁"
"""How SentencePiece writes a space."""


def _sentence_piece(meta: dict[str, Any]) -> Tokenizer:
    """SentencePiece's BPE: it joins the two neighbours whose whole has the highest score, and falls back to bytes.

    Its model has scores where others have a list of merges: every way to cut a token into two is one, and those of
    higher scores come first.
    """
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    scores: list[float] = meta["tokenizer.ggml.scores"]
    kinds: list[int] = meta.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        if kind == NORMAL:
            halves = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
            found = [(vocab[left], vocab[right], score) for left, right in halves if left in vocab and right in vocab]
            merges += sorted(found)
    merges.sort(key=lambda merge: -merge[2])
    unknown = tokens[meta.get("tokenizer.ggml.unknown_token_id", 0)]
    pairs = [(tokens[left], tokens[right]) for left, right, _ in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    begins = bool(meta.get("tokenizer.ggml.add_space_prefix", True))
    tokenizer.normalizer = normalizers.Sequence(
        [*[normalizers.Prepend(SPACE)] * begins, normalizers.Replace(" ", SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *[decoders.Strip(" ", 1, 0)] * begins,
        ]
    )
    return tokenizer


def _add_tokens(tokenizer: Tokenizer, meta: dict[str, Any], *, adds_bos: bool) -> None:
    """Tokens that are found before the text is cut; the first token of a text, where the file, or its default, has
    one."""
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    kinds: list[int] = meta.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in _of_kind(tokens, kinds, CONTROL)]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in _of_kind(tokens, kinds, USER_DEFINED)])
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if meta.get("tokenizer.ggml.add_bos_token", adds_bos) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", "$B:1"], special_tokens=[(tokens[bos], bos)]
        )


def _of_kind(tokens: list[str], kinds: list[int], kind: int) -> list[str]:
    return [token for token, own in zip(tokens, kinds, strict=True) if own == kind]


def _pre_tokenizer(pre: str) -> pre_tokenizers.PreTokenizer:
    if pre == "smollm":  # as the model's authors wrote it; the same cuts
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    cuts = [pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in CUTS[pre]]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _settings(meta: dict[str, Any], context: int) -> dict[str, Any]:
    """A tokenizer_config.json."""
    tokens = meta["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{short}_token": tokens[meta[key]]
        for own, short in names.items()
        if (key := f"tokenizer.ggml.{own}_token_id") in meta
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
        **special,
    }

"""A tokenizer of one's own: a byte-level BPE learnt from texts, in the files a Hugging Face folder has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from litrecipe.checkpoint.manifest import write_text
from litrecipe.config.errors import InputError
from litrecipe.config.files import write_json

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
"""The first ids: what begins a text, what ends it, and what pads it and never ends one."""
BYTES = 256


CHAT = ("<|im_start|>", "<|im_end|>")
"""ChatML's control tokens: what begins a turn, and what ends it."""
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def learn_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    split_digits: bool = False,
    min_frequency: int = 0,
) -> tokenizers.Tokenizer:
    """Byte-level BPE (1508.07909, with GPT-2's way of splitting words) of at most `vocab_size` ids.

    The ids begin with BOS, EOS, PAD, then `special_tokens`, which only a chat template may write, then the 256 bytes:
    every text has ids, and their text is that text. It starts with BOS where special tokens are asked for. With
    `split_digits` each digit is a token of its own, as in Llama 2 and SmolLM2; pairs seen less than `min_frequency`
    times are not merged. The order of the texts does not matter. Raises InputError for a vocabulary that has no room
    for all that, and for special tokens that are empty or given twice.
    """
    specials = [BOS, EOS, PAD, *special_tokens]
    if not all(specials) or len(set(specials)) < len(specials):
        raise InputError(f"--special: {' '.join(special_tokens)}: give each once, none of {BOS}, {EOS} and {PAD}")
    if vocab_size < (least := len(specials) + BYTES):
        raise InputError(f"--vocab_size: {vocab_size}: {BYTES} bytes and {len(specials)} tokens are {least}: give more")
    if min_frequency < 0:
        raise InputError(f"--min_frequency: {min_frequency}: give 0 or more")
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words]) if split_digits else words
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
    )
    return backend


def write_tokenizer(folder: Path, backend: tokenizers.Tokenizer, *, chat: bool = False) -> None:
    """`tokenizer.json`, and the config from which transformers and litrecipe know its special tokens.

    With `chat` ChatML is the chat template, and the token that ends a turn ends an answer as EOS does.
    """
    write_text(folder / "tokenizer.json", backend.to_str(pretty=True))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    if chat:
        settings["chat_template"] = CHATML
        ends = [backend.token_to_id(token) for token in (EOS, CHAT[1])]
        write_json(folder / "generation_config.json", {"eos_token_id": ends, "pad_token_id": backend.token_to_id(PAD)})
    write_json(folder / "tokenizer_config.json", settings)

"""`litrecipe generate`: answer one prompt. The answer goes to standard output, everything else to standard error."""

from __future__ import annotations

import sys
import time

from litrecipe.config.errors import InputError
from litrecipe.config.groups import GenerateRecipe
from litrecipe.config.progress import counted, say
from litrecipe.data.formats import Message, RowError
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.evaluation.sampling import complete, plain_prompt
from litrecipe.evaluation.session import open_session


def main(recipe: GenerateRecipe) -> int:
    """Print the model's answer to `prompt`, as it is sampled when standard output is a terminal."""
    prompt = _prompt(recipe)

    def longest(tokenizer: Tokenizer) -> int:
        return len(_encode(tokenizer, prompt, recipe)) + recipe.generate.max_new_tokens

    session = open_session(recipe.model, recipe.quantize, recipe.fabric, longest=longest)
    ids = _encode(session.tokenizer, prompt, recipe)
    streaming = sys.stdout.isatty()
    start = time.perf_counter()
    [answer] = complete(session.model, session.tokenizer, [ids], recipe.generate, on_text=_show if streaming else None)
    seconds = time.perf_counter() - start
    print("" if streaming else answer.text, flush=True)
    rate = len(answer.tokens) / seconds
    say(f"{counted(len(ids), 'token')} read, {len(answer.tokens)} sampled in {seconds:.1f} s ({rate:.1f} tokens/s)")
    return 0


def _prompt(recipe: GenerateRecipe) -> str:
    mistakes = []
    prompt = sys.stdin.read() if recipe.prompt == "-" else recipe.prompt
    if not prompt:
        mistakes.append('prompt: missing: give `--prompt "…"`, or `--prompt -` and the text on standard input')
    if recipe.raw and recipe.system is not None:
        mistakes.append("system: raw text has no system message: leave out `raw` or `system`")
    if mistakes:
        raise InputError(*mistakes)
    assert prompt is not None
    return prompt


def _encode(tokenizer: Tokenizer, prompt: str, recipe: GenerateRecipe) -> list[int]:
    """Raises InputError for what the chat template or the tokenizer cannot take."""
    if not recipe.raw:
        tokenizer.need_template("continue the prompt as plain text with `--raw`")
    messages: list[Message] = [{"role": "user", "content": prompt}]
    if recipe.system is not None:
        messages.insert(0, {"role": "system", "content": recipe.system})
    try:
        return plain_prompt(tokenizer, prompt) if recipe.raw else tokenizer.encode_prompt(messages)
    except RowError as error:
        raise InputError(f"prompt: {error}") from error


def _show(text: str) -> None:
    print(text, end="", flush=True)

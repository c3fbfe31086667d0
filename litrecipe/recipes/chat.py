"""`litrecipe chat`: talk with a model in the terminal."""

from __future__ import annotations

import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate, GenerateRecipe
from litrecipe.config.progress import say
from litrecipe.data.formats import Message, RowError
from litrecipe.evaluation.sampling import complete
from litrecipe.evaluation.session import Session, open_session

HELP = """\
/reset          forget what was said
/system TEXT    say who the model is (without TEXT: nobody in particular); forgets what was said
/help           these lines
/quit           leave (also Ctrl-D, or Ctrl-C twice)
Ctrl-C stops an answer. Pasted lines are sent as one message."""
COMMAND = re.compile(r"/(\w+)(?:\s+(.*))?", re.DOTALL)
PASTE_PAUSE = 0.05
"""Seconds in which the next line of a paste arrives."""


def main(recipe: GenerateRecipe) -> int:
    """Read a message, stream the answer, and so on until the user leaves. `prompt` is the first message."""
    if recipe.raw:
        raise InputError("raw: true: a chat needs the chat template: use `litrecipe generate` for raw text")
    session = open_session(recipe.model, recipe.quantize, recipe.fabric)
    session.tokenizer.need_template("use `litrecipe generate --raw`")
    chat = Chat(session, recipe.generate, recipe.system)
    with suppress(ImportError):
        import readline  # noqa: F401  # line editing and history for input()
    say("/help lists the commands")
    first, interrupted = recipe.prompt, False
    with _keyboard_interrupts():
        while not chat.over:
            try:
                line, first = first or _read(), None
                chat.take(line)
                interrupted = False
            except EOFError:
                break
            except KeyboardInterrupt:
                if interrupted:
                    break
                interrupted = True
                say("\n(Ctrl-C again to leave)")
    return 0


class Chat:
    """A conversation and the commands that act on it."""

    def __init__(self, session: Session, generate: Generate, system: str | None) -> None:
        self.session = session
        self.generate = generate
        self.start: list[Message] = [{"role": "system", "content": system}] if system else []
        self.said: list[Message] = []
        self.over = False

    def take(self, line: str) -> None:
        """Obey a command or answer a message."""
        command = COMMAND.fullmatch(line.strip())
        if command:
            self._obey(command[1], command[2] or "")
        elif line.strip():
            self._answer(line)

    def _obey(self, name: str, text: str) -> None:
        if name in ("quit", "exit"):
            self.over = True
        elif name == "reset":
            self.said = []
        elif name == "system":
            self.start = [{"role": "system", "content": text}] if text else []
            self.said = []
        elif name == "help":
            say(HELP)
        else:
            say(f"/{name}: no such command; /help lists them")

    def _answer(self, text: str) -> None:
        """Stream an answer. One that is interrupted is kept as far as it came; one that fails leaves no trace."""
        self.said.append({"role": "user", "content": text})
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        try:
            complete(self.session.model, self.session.tokenizer, [self._prompt()], self.generate, on_text=show)
        except (InputError, RowError) as error:
            say(str(error))
        finally:
            print(flush=True)
            answer = "".join(pieces)
            if answer:
                self.said.append({"role": "assistant", "content": answer})
            else:
                self.said.pop()

    def _prompt(self) -> list[int]:
        """The conversation's tokens; the oldest exchanges are forgotten when it outgrows the model."""
        reads, answer = self.session.model.architecture.max_positions, self.generate.max_new_tokens
        room = reads - (min(answer, reads // 2) if answer == Generate.max_new_tokens else answer)
        ids = self.session.tokenizer.encode_prompt(self.start + self.said)
        while len(ids) > room and len(self.said) > 2:
            say("(the oldest exchange no longer fits and is forgotten)")
            del self.said[:2]
            ids = self.session.tokenizer.encode_prompt(self.start + self.said)
        return ids


def _read() -> str:
    """One message: a line, or at a terminal all lines of a paste."""
    lines = [input("> " if sys.stdin.isatty() else "")]
    while sys.stdin.isatty() and select.select([sys.stdin], [], [], PASTE_PAUSE)[0]:
        lines.append(input())
    return "\n".join(lines)


@contextmanager
def _keyboard_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt here, instead of ending the program."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)

"""`litrecipe chat`, talked to through standard input."""

from __future__ import annotations

import io
import os
import pty
import select
import signal
import sys
import time

import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Fabric, Generate, GenerateRecipe, Model, Quantize
from litrecipe.evaluation.session import open_session
from litrecipe.recipes.chat import Chat, main


@pytest.fixture(scope="module")
def session(varied_model):
    return open_session(Model(source=str(varied_model)), Quantize(), Fabric(accelerator="cpu"))


@pytest.fixture
def talk(varied_model, monkeypatch, capsys):
    """Run a chat over these lines; returns standard output and standard error."""

    def run(*lines: str, **keys) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        recipe = GenerateRecipe(model=Model(source=str(varied_model)), generate=Generate(max_new_tokens=8), **keys)
        assert main(recipe) == 0
        return capsys.readouterr()

    return run


def test_end_of_input_leaves(talk) -> None:
    out, err = talk()
    assert out == ""
    assert "/help" in err


def test_each_line_is_answered_and_quit_leaves(talk) -> None:
    out, _ = talk("the fox", "", "the dog", "/quit", "never read")
    assert len(out.splitlines()) == 2


def test_a_prompt_is_the_first_message(talk) -> None:
    assert talk(prompt="the fox")[0] == talk("the fox")[0]


def test_what_is_not_unicode_is_told_and_the_chat_goes_on(talk) -> None:
    out, err = talk("\udcff", "the dog")
    assert "not UTF-8" in err
    assert out.strip() == talk("the dog")[0].strip()


def test_help_and_unknown_commands(talk) -> None:
    out, err = talk("/help", "/nonsense")
    assert out == ""
    assert "Ctrl-C stops an answer" in err
    assert "/nonsense: no such command" in err


def test_history_is_kept_until_reset(session) -> None:
    chat = Chat(session, Generate(max_new_tokens=4), system="be brief")
    chat.take("the fox")
    chat.take("the dog")
    assert [message["role"] for message in chat.said] == ["user", "assistant", "user", "assistant"]
    text = session.tokenizer.decode(chat._prompt(), skip_special=False)
    assert text.index("be brief") < text.index("the fox") < text.index("the dog")
    chat.take("/reset")
    assert chat.said == []
    assert chat.start == [{"role": "system", "content": "be brief"}]


def test_the_system_message_can_be_changed(session) -> None:
    chat = Chat(session, Generate(max_new_tokens=4), system="old")
    chat.take("/system You are a fox.\nBe brief.")
    assert chat.start == [{"role": "system", "content": "You are a fox.\nBe brief."}]
    chat.take("/system")
    assert chat.start == []


def test_a_path_is_a_message(session) -> None:
    chat = Chat(session, Generate(max_new_tokens=4), system=None)
    chat.take("/etc/passwd what is it?")
    assert chat.said[0]["content"] == "/etc/passwd what is it?"


def test_the_oldest_exchange_is_forgotten_when_the_model_is_full(session, capsys) -> None:
    chat = Chat(session, Generate(max_new_tokens=4), system="be brief")
    for word in ("first ", "second ", "third "):
        chat.take(word * 15)
    assert "first" not in str(chat.said)
    assert "third" in str(chat.said)
    assert "no longer fits" in capsys.readouterr().err
    chat.take("too long " * 500)
    assert "shorten the prompt" in capsys.readouterr().err
    assert "too long" not in str(chat.said)


class InterruptingTerminal(io.StringIO):
    """Standard output at which the user presses Ctrl-C when the third piece of an answer appears."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces = 0

    def write(self, text: str) -> int:
        self.pieces += 1
        if self.pieces == 3:
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_the_chat_goes_on(varied_model, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the fox\nthe dog\n"))
    terminal = InterruptingTerminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    before = signal.getsignal(signal.SIGINT)
    recipe = GenerateRecipe(model=Model(source=str(varied_model)), generate=Generate(max_new_tokens=40))
    assert main(recipe) == 0
    stopped, whole = (len(answer) for answer in terminal.getvalue().split("\n")[:2])
    assert 0 < stopped < whole
    assert "Ctrl-C again to leave" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


class Terminal:
    """The program in a pseudo-terminal, at which keys are pressed and read what it shows."""

    def __init__(self, *words: str) -> None:
        self.shown = ""
        self.pid, self.screen = pty.fork()
        if not self.pid:
            os.execv(sys.executable, [sys.executable, "-m", "litrecipe", *words])

    def press(self, keys: str) -> None:
        self.shown = ""
        os.write(self.screen, keys.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What is shown since the last key, as soon as `text` is in it."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            if not select.select([self.screen], [], [], max(0, end - time.monotonic()))[0]:
                pytest.fail(f"{text!r} does not come, only {self.shown!r}")
            self.shown += os.read(self.screen, 1024).decode(errors="replace")
        return self.shown

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal(varied_model) -> None:
    words = ["--model", str(varied_model), "--generate.max_new_tokens", "200", "--prompt", "the quick fox"]
    terminal = Terminal("chat", *words)
    _, _, answer = terminal.wait_for("commands\r\n").partition("commands\r\n")
    while len(answer) < 3:
        answer += os.read(terminal.screen, 1024).decode(errors="replace")
    terminal.press("\x03")
    terminal.wait_for("(Ctrl-C again to leave)")
    assert terminal.wait_for("> ").endswith("(Ctrl-C again to leave)\r\n> ")
    terminal.press("the dog\r")
    assert len(terminal.wait_for("\n> ")) > len("the dog\r\n\n> ")
    terminal.press("\x04")
    assert terminal.code() == 0


def test_ctrl_c_twice_leaves(varied_model, monkeypatch, capsys) -> None:
    class Impatient(io.StringIO):
        def readline(self, size: int = -1) -> str:
            signal.raise_signal(signal.SIGINT)
            return super().readline(size)

    monkeypatch.setattr(sys, "stdin", Impatient("the fox\n" * 5))
    assert main(GenerateRecipe(model=Model(source=str(varied_model)))) == 0
    assert capsys.readouterr().out == ""


def test_raw_text_is_not_a_chat(varied_model) -> None:
    with pytest.raises(InputError, match="raw: true"):
        main(GenerateRecipe(model=Model(source=str(varied_model)), raw=True))

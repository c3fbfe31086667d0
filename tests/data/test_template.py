from __future__ import annotations

import json
import subprocess
import sys
from datetime import date

import pytest

from litrecipe.config.errors import InputError
from litrecipe.data.formats import RowError
from litrecipe.data.sandbox import ALLOWANCE
from litrecipe.data.template import WRITTEN, ChatTemplate

ASK = {"role": "user", "content": "Why?"}
SAY = {"role": "assistant", "content": "So."}


def template(source: str, **options: object) -> ChatTemplate:
    return ChatTemplate(source, **{"special_tokens": {}, "control_tokens": ["<end>"], **options})  # type: ignore[arg-type]


def learnt(source: str, messages: list[dict[str, str]]) -> list[str]:
    rendered = template(source).render_learnt(messages)
    return [rendered.text[start:stop] for start, stop in rendered.learnt]


PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def test_without_tags_a_turn_is_learnt_from_its_opening_to_the_next_turn() -> None:
    assert learnt(PLAIN, [ASK, SAY, ASK, {**SAY, "content": "é🤗"}]) == ["So.<end>\n", "é🤗<end>\n"]


def test_tags_say_what_is_learnt() -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    )
    assert learnt(source, [ASK, SAY, ASK, SAY]) == ["So.<end>", "So.<end>"]
    assert template(source).render([ASK, SAY]) == "user:Why?assistant:So.<end>"


def test_a_turn_that_is_written_otherwise_later_is_never_guessed() -> None:
    """As templates that drop the reasoning of all turns but the last."""
    source = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' and loop.last %}(thinking) {% endif %}"
        "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    assert learnt(source, [ASK, SAY]) == ["(thinking) So.<end>\n"]
    with pytest.raises(RowError, match=r"message 2 \(assistant\).*generation"):
        learnt(source, [ASK, SAY, ASK, SAY])


def test_a_generation_prompt_that_the_turn_does_not_begin_with_is_refused() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}BOT{% endif %}"
    with pytest.raises(RowError, match="message 2"):
        learnt(source, [ASK, SAY])


def test_written_control_tokens_are_marked_wherever_they_stand() -> None:
    messages = [{"role": "user", "content": "a<end>b<<end>><end<end>"}, SAY]
    text = template(PLAIN).render(messages)
    assert text.replace(WRITTEN, "") == "user: a<end>b<<end>><end<end><end>\nassistant: So.<end>\n"
    assert text.count("<end>") == 2, "those of the template"
    tools = [{"name": "f<end>", "parameters": {"<end>": "<end>"}}]
    assert "<end>" not in template("{{ tools | tojson }}").render([ASK], tools)


def test_overlapping_control_tokens_are_both_marked() -> None:
    text = template("{{ messages[0].content }}", control_tokens=["ab", "bc"]).render(
        [{"role": "user", "content": "abc"}]
    )
    assert "ab" not in text and "bc" not in text and text.replace(WRITTEN, "") == "abc"


def test_the_date_is_pinned() -> None:
    source = "{{ strftime_now('%d %B %Y') }}"
    assert template(source, today=date(2026, 1, 31)).render([]) == "31 January 2026"
    assert template(source).tells_time


def test_json_is_written_without_html_escapes() -> None:
    assert template("{{ messages[0] | tojson }}").render([{"a": "<é>'"}]) == '{"a": "<é>\'"}'


def test_a_refusal_of_the_template_is_told() -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowError, match="the chat template refuses this conversation: roles must alternate"):
        template(source).render([ASK])


def test_a_template_that_does_not_parse_names_its_line() -> None:
    with pytest.raises(InputError, match=r"mine\.jinja:2: "):
        template("{% if 1 %}\n{% endfor %}", name="mine.jinja")


FILL_THE_MEMORY = [
    "{{ '%1000000000d' % 1 }}",
    "{{ '%(a)1000000000d' % {'a': 1} }}",
    "{{ '%*d' % (1000000000, 1) }}",
    "{{ '%1000000000d'|format(1) }}",
    "{{ '%1000000000d'.encode() % 1 }}",
    "{{ '{:1000000000}'.format(1) }}",
    "{{ '{:{}}'.format(1, 1000000000) }}",
    "{% set x = 'x'|center(1000000000) %}{{ x }}",
    "{{ 'x'|center(width=1000000000) }}",
    "{{ 'x'.ljust(1000000000) }}",
    "{{ 'x'.encode().zfill(1000000000) }}",
    "{{ (1).to_bytes(1000000000, 'big') }}",
    "{{ [1]|tojson(indent=1000000000) }}",
    "{{ 'x\n\nx'|indent(1000000000) }}",
    "{{ [1]|batch(1000000000, 0)|list }}",
    "{{ lipsum(100000) }}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
]


NESTED = "{% set a = [1] * 1000 %}{% set b = [a] * 1000 %}{% set c = [b] * 1000 %}"
LONG = "{% set long = 'x' * 1000000 %}"
MAKE_MUCH_OF_LITTLE = [
    LONG + "{{ long.replace('x', long) }}",
    LONG + "{{ long|replace('x', long) }}",
    LONG + "{{ ([1] * 1000000)|join(long) }}",
    LONG + "{{ long.join(['a'] * 1000000) }}",
    LONG + "{{ long.translate({120: long}) }}",
    LONG + "{{ ('{0}' * 1000).format(long) }}",
    LONG + "{{ ('%(a)s' * 900) % {'a': long} }}",
    LONG
    + "{% macro f() %}{{ long }}{{ long }}{% endmacro %}{% set x = f() %}{% for i in range(9) %}{{ x }}{% endfor %}",
    NESTED + "{{ c }}",
    NESTED + "{{ c|tojson }}",
    NESTED + "{{ c == [c] }}",
    NESTED + "{{ [c, 1] is eq([c, 2]) }}",
    NESTED + "{{ namespace(x=c) }}",
    "{% set a = [1] * 1000000 %}{{ ([a] * 1000000)|sum(start=[])|length }}",
    "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 1.5|round(1000000000, 'ceil') }}",
    "{{ ('x\n' * 5000000)|indent(1000) }}",
    "{{ ('\t' * 5000000).expandtabs(1000) }}",
    "{{ strftime_now('%Y' * 5000000) }}",
]


def test_templates_that_would_fill_the_memory_are_stopped_before_they_do() -> None:
    code = (
        "import json, resource, sys\nfrom litrecipe.config.errors import InputError\n"
        "from litrecipe.data.template import ChatTemplate\n"
        "resource.setrlimit(resource.RLIMIT_AS, (700_000_000, 700_000_000))\n"
        "for source in json.load(sys.stdin):\n    try:\n"
        "        ChatTemplate(source, special_tokens={}, control_tokens=[]).render([])\n"
        "    except InputError as error:\n        print('stopped')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, input=json.dumps(FILL_THE_MEMORY), capture_output=True, text=True)
    assert (done.stdout.count("stopped"), done.stderr) == (len(FILL_THE_MEMORY), "")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) if false %}{% endfor %}" * 20,
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for a in [range(999)] * 999 recursive %}{{ loop(a) if a is iterable }}{% endfor %}" * 9,
        "{% set x = 'ab' * 1000000 %}{% for a in range(99999) %}{% set y = x[1:] %}{% endfor %}",
        "{% for a in range(99999) %}{% set x = range(99999)|list|sort %}{% endfor %}",
        "{% for a in range(99999) %}{% set x = ('a ' * 100000).split() %}{% endfor %}",
    ],
)
def test_templates_that_run_away_are_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litrecipe.data.sandbox.ALLOWANCE", 1_000_000)
    with pytest.raises(InputError, match=r"mine\.jinja: .*it runs for ever, or nearly: mend it"):
        template(source, name="mine.jinja").render([ASK])


def test_the_allowance_is_that_of_each_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    half = template("{% for a in range(9999) %}{{ a }}{% endfor %}")
    half.render([ASK])
    monkeypatch.setattr("litrecipe.data.sandbox.ALLOWANCE", 1.5 * half._sandbox.spent)
    assert [len(half.render([ASK])) for _ in range(3)] == [38_886] * 3


def test_memory_that_is_held_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("litrecipe.data.sandbox.MOST_MEMORY", 20_000_000)
    body = "{% set ns.x = ns.x + [messages[0].content ~ i] %}"
    held = template("{% set ns = namespace(x=[]) %}{% for i in range(400) %}" + body + "{% endfor %}")
    with pytest.raises(InputError, match="fills the memory"):
        # 36 MB each, for which the C library always asks the system, whatever earlier tests have left free.
        held.render([{"role": "user", "content": "\N{GRINNING FACE}" * 9_000_000}])
    assert held.render([ASK]) == ""


@pytest.mark.parametrize(
    "source",
    ["{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% if 1 %}" * 3000, "{{ " + "9" * 9999 + " }}", " " * 1_000_001],
)
def test_templates_that_cannot_be_compiled_name_their_file(source: str) -> None:
    with pytest.raises(InputError, match=r"^mine\.jinja: .*: mend it or give model\.chat_template$"):
        template(source, name="mine.jinja")


def test_a_long_conversation_stays_far_within_the_allowance() -> None:
    conversation = [ASK, SAY] * 2000
    asked = template(PLAIN.replace("{{ m.content }}", "{{ m.content | trim | replace('a', 'b') }}"))
    assert asked.render(conversation).count("<end>") == 4000
    assert asked._sandbox.spent < ALLOWANCE / 30


def test_what_templates_do_write_is_not_stopped() -> None:
    source = (
        "{{ '%05d %s %%' % (123456, 'a') }} {{ '%s'|format(99999) }} {{ '{:>5} {}'.format('a', 2024) }} "
        "{{ 'x'.ljust(3) }}|{{ 20240726|tojson }} {{ {'a': 5000}|tojson(indent=1) }} {{ 'a'|center(3) }}|"
        "{{ 'axb'.split('x', 5000) }} {{ 'a' ~ 1 ~ messages ~ nothing }} {{ [1] + [2] }}"
    )
    wanted = "123456 a % 99999     a 2024 x  |20240726 {\n \"a\": 5000\n}  a |['a', 'b'] a1[] [1, 2]"
    assert template(source).render([]) == wanted


def test_tags_with_a_plus_mark_generation_too() -> None:
    source = "{% for m in messages %}{%+ generation +%}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert learnt(source, [SAY]) == ["So."]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 1000000000 }}",
        "{{ [1] * 1000000000 }}",
        "{{ 10 ** 100000000 }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ messages|map(attribute='__class__')|list }}",
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id') }}",
        "{{ self._TemplateReference__context }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        *FILL_THE_MEMORY,
        *MAKE_MUCH_OF_LITTLE,
    ],
)
def test_hostile_templates_are_stopped(source: str) -> None:
    with pytest.raises(InputError):
        template(source).render([ASK])

"""Rules: what they score, of what rows they say nothing, and what is wrong with their options."""

from __future__ import annotations

import json
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from litrecipe.config.errors import InputError
from litrecipe.data.formats import RowError
from litrecipe.data.toy import toy_rows
from litrecipe.evaluation.tasks import same_answer
from litrecipe.rollout.verifiable import RULES, Answer, final_number, parse_rule


def score(spec: str, text: str, length: int = 1, **row: Any) -> float | None:
    return parse_rule(spec).score(Answer(text, length, row))


def test_exact_is_the_exact_match_of_evaluation() -> None:
    assert score("exact", " 7 m\n", answer="7 m") == 1
    assert score("exact", "70 m", answer="7 m") == 0
    assert score("exact?column=gold", '{"a":1,"b":2}', gold={"b": 2, "a": 1.0}) == 1
    assert score("exact", "true", answer="1") == 0
    assert score("exact?column=gold", "7", answer="7") is None
    assert score("exact", "7", answer=None) is None


def test_toy_answers_are_exact() -> None:
    """Also those of `fields`, written otherwise; the wrong answers of pairs are not."""
    for row, _ in toy_rows("toy:fields?n=20"):
        assert score("exact", json.dumps(json.loads(row["answer"]), indent=1), **row) == 1
    for row, _ in toy_rows("toy:units-pairs?n=20"):
        assert score("exact?column=chosen", row["rejected"], **row) == 0


def test_regex_finds_a_pattern_of_its_own_or_of_the_row() -> None:
    assert score(r"regex?pattern=^\d+ m$", "700 m") == 1  # + is no space
    assert score(r"regex?pattern=^\d+ m$", "about 700 m") == 0
    assert score("regex?pattern=a.c", "a\nc") == 1
    assert score("regex?pattern=a%26b", "a&b") == 1
    assert score("regex?pattern=(?=.*x)", "yx") == 1
    assert score("regex?pattern=a=b", "a=b") == 1
    assert score("regex?column=wanted", "yes", wanted="y|z") == 1
    assert score("regex?column=wanted", "yes") is None
    with pytest.raises(RowError, match="not a pattern"):
        score("regex?column=wanted", "yes", wanted="(")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", "42"),
        ("12 apples and 30 pears", "30"),
        ("She has 3 + 4 = 7\n#### 7", "7"),
        ("#### 1,234 apples, 5 left", "1234"),
        ("#### 8\n#### 9", "9"),
        ("It costs $1,234.50", "1234.50"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("−5 °C", "-5"),
        ("10-20", "20"),
        ("x = -3", "-3"),
        ("(4)-3", "3"),
        (".5", "0.5"),
        ("3.", "3"),
        ("12,345,678", "12345678"),
        ("1, 2,3", "3"),
        ("1,2345", "2345"),
        ("50%", "50"),
        ("6.02e23", "6.02e23"),
        ("2eggs", "2"),
        ("none", None),
        ("5 apples ####", None),
        ("", None),
    ],
)
def test_the_number_a_text_ends_in(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


@given(st.integers(), st.sampled_from(["{}", "so {}.", "1 or 2:\n#### {} (3)", "{:,}", "${:,} in all", "2 = {:.2f}"]))
def test_every_whole_number_is_read(number: int, form: str) -> None:
    number %= 2**50  # exact as a float
    for one in (number, -number):
        assert final_number(form.format(one)) == one


def test_numeric() -> None:
    assert score("numeric", "5 + 2 = 7", answer="2+5\n#### 7") == 1
    assert score("numeric", "7.0 m", answer=7) == 1
    assert score("numeric", "8", answer=7) == 0
    assert score("numeric", "seven", answer=7) == 0
    assert score("numeric?tolerance=0.1", "0.3", answer=0.2) == 1  # exactly at the tolerance, in tenths
    assert score("numeric?tolerance=0.1", "0.31", answer=0.2) == 0
    assert score("numeric?column=gold", "7", answer=7) is None
    with pytest.raises(RowError, match=r"answer: 'seven': no number in it"):
        score("numeric", "7", answer="seven")


@pytest.fixture
def schema(tmp_path: Path):
    def write(rules: Any) -> str:
        (tmp_path / "schema.json").write_text(json.dumps(rules))
        return f"json?schema={tmp_path / 'schema.json'}"

    return write


PERSON = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def test_json_gives_credit_in_part(schema: Any) -> None:
    """Parses, fits the schema, and half of its fields are right: (1 + 1 + 1/2) / 3."""
    spec, right = f"{schema(PERSON)}&column=answer", {"name": "Ida", "age": 40}
    assert score(spec, json.dumps(right), answer=right) == 1
    assert score(spec, json.dumps(right), answer=json.dumps(right)) == 1
    assert score(spec, '{"name": "Ida", "age": 41}', answer=right) == pytest.approx(2.5 / 3)
    assert score(spec, '{"name": "Ida"}', answer=right) == pytest.approx(1.5 / 3)
    assert score(spec, "[1]", answer=right) == pytest.approx(1 / 3)
    assert score(spec, "Ida, 40", answer=right) == 0
    assert score(spec, json.dumps(right)) is None
    assert score(schema(PERSON), '{"name": "Ida"}') == 0.5
    assert score("json", "[]") == 1 and score("json", "[") == 0
    assert score("json?column=answer", "[2]", answer="[2]") == 1
    assert score("json?column=answer", '{"a": true}', answer={"a": 1}) == 0.5


def test_a_schema_of_the_hub() -> None:
    """It ships with the program, and is found from everywhere."""
    spec = "json?schema=hub:experiments/json/person.schema.json&column=answer"
    right = {"name": "Ida", "age": 40, "city": "Oslo"}
    assert score(spec, json.dumps(right), answer=right) == 1
    assert score(spec, json.dumps(right | {"age": "40"}), answer=right) == pytest.approx((1 + 0 + 2 / 3) / 3)


WILD = {
    "no number": "NaN",
    "digits": "9" * 5000,
    "brackets": "[" * 100_000,
    "beyond": "1e999]",
    "surrogate": "\ud800",
    "nested": '{"a": ' * 20_000,
}


@pytest.mark.parametrize("text", WILD.values(), ids=WILD)
def test_whatever_a_model_writes_is_scored(text: str, schema: Any) -> None:
    assert score(f"{schema({'type': 'integer'})}&column=answer", text, answer={"a": 1}) == 0


@pytest.mark.parametrize(
    ("rules", "mistake"),
    [
        ({"type": "text"}, "schema.json: $.type: 'text' is not valid"),
        ({"items": {"minimum": "1"}}, "schema.json: $.items.minimum: '1' is not of type 'number'"),
    ],
)
def test_what_is_no_schema_is_said_at_once(schema: Any, rules: Any, mistake: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_rule(schema(rules))
    assert mistake in str(caught.value)


def test_length() -> None:
    """A target of 10: 1 at 10, 0.5 at 5 and 15, 0 at 20 and beyond. At most 10: 1 up to 10, 0.5 at 15, 0 at 20."""
    assert [score("length?target=10", "", n) for n in (0, 5, 10, 15, 20, 99)] == [0, 0.5, 1, 0.5, 0, 0]
    assert [score("length?max=10", "", n) for n in (0, 10, 15, 20, 99)] == [1, 1, 0.5, 0, 0]
    assert score("length?target=2&unit=words", "a  b", 9) == 1
    assert score("length?target=4&unit=characters", "a  b", 9) == 1


def test_repetition() -> None:
    """`a b a b a` has four pairs of words, two of them different: -(1 - 2/4)."""
    assert score("repetition?n=2", "a b a b a") == -0.5
    assert score("repetition", "a b c d") == 0
    assert score("repetition", "a a") == 0
    assert score("repetition?n=1", "a a a a") == -0.75


def test_sentiment() -> None:
    assert score("sentiment", "A wonderful, happy day!") > 0.5 > -0.5 > score("sentiment", "A sad and terrible day.")
    with pytest.raises(InputError, match="analyzer: no such option; there are none"):
        parse_rule("sentiment?analyzer=x")


@pytest.mark.parametrize(
    ("module", "spec"),
    [("vaderSentiment.vaderSentiment", "sentiment"), ("jsonschema.validators", "json?schema=x.json")],
)
def test_rules_that_need_a_package_say_so(monkeypatch: pytest.MonkeyPatch, module: str, spec: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"needs a package: pip install 'litrecipe\[rewards\]'"):
        parse_rule(spec)


@pytest.mark.parametrize(
    ("spec", "mistake"),
    [
        ("exact?colum=a", "exact?colum=a: colum: no such option (did you mean column?); there are column"),
        ("numeric?tolerance=x", "numeric?tolerance=x: tolerance=x: give a number"),
        ("numeric?tolerance=-1", "tolerance=-1: give 0 or more"),
        ("numeric?tolerance=nan", "tolerance=nan: give a number"),
        ("regex", "pattern: give pattern=… or column=…"),
        ("regex?pattern=a&column=b", "pattern: give pattern=… or column=…"),
        ("regex?pattern=(", "pattern: '(': not a pattern"),
        ("json?schema=nowhere.json", "nowhere.json: no such file: give one that is there"),
        ("length", "target: give target=… or max=…"),
        ("length?target=0", "target: give at least 1"),
        ("length?target=1.5", "target=1.5: give a whole number"),
        ("length?max=5&unit=lines", "unit=lines: give tokens, words or characters"),
        ("repetition?n=0", "n=0: give at least 1"),
    ],
)
def test_wrong_options(spec: str, mistake: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_rule(spec)
    assert mistake in str(caught.value)


def test_all_mistakes_of_a_spec_are_told() -> None:
    with pytest.raises(InputError) as caught:
        parse_rule("length?targe=1&max=x")
    assert len(caught.value.mistakes) == 2


@given(text=st.text(), answer=st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans()))
def test_rules_never_fail_on_a_text(text: str, answer: Any) -> None:
    for spec in ("exact", "json?column=answer", "repetition", "length?max=3"):
        found = score(spec, text, answer=answer)
        assert found is not None and -1 <= found <= 1
    assert (score("exact", text, answer=text) == 1) and same_answer(text, text)
    assert score("numeric?column=gold", text, gold=3) in (0.0, 1.0)
    assert set(RULES) >= {"exact", "json", "numeric"}

"""The tables of docs/scaling.md are those that the code makes."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_tables", REPO / "scripts" / "scaling_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def in_page(made: ModuleType, name: str) -> list[str]:
    """Lines of a table."""
    page = made.PAGE.read_text()
    return page.partition(f"<!-- {name} -->\n")[2].partition("<!-- end -->")[0].splitlines()


@pytest.mark.parametrize(
    ("model", "layout"), [("llama-3.1-8b", (64, 8)), ("llama-3.1-70b", (64, 1)), ("mixtral-8x22b", (512, 1))]
)
def test_the_plans_of_the_page_are_the_codes(
    made: ModuleType, model: str, layout: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row of each: all take half a minute."""
    assert len(in_page(made, model)) == 2 + len(made.LAYOUTS)
    monkeypatch.setattr(made, "LAYOUTS", (layout,))
    head, line, row = made.markdown(list(made.plans(model))).splitlines()
    assert in_page(made, model)[:2] == [head, line]
    assert row in in_page(made, model)


def test_what_was_published_and_measured_is_on_the_page(made: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_page(made, "measured") == made.markdown(list(made.measured())).splitlines()
    assert len(in_page(made, "published")) == 2 + len(made.PUBLISHED)
    monkeypatch.setattr(made, "PUBLISHED", made.PUBLISHED[:2])
    assert made.markdown(list(made.published())).splitlines() == in_page(made, "published")[:4]

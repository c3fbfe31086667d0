"""Wrong data for every verb, as hypothesis draws it: a line a mistake, which names the place."""

from __future__ import annotations

from pathlib import Path

import pytest
from generated import READERS, Wrong, wrong_data
from hypothesis import HealthCheck, given, settings

from litrecipe import cli, verbs
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Data
from litrecipe.data.documents import Documents, Unread
from litrecipe.data.formats import check_rows

READ_BY = {name: verb.rows for name, verb in verbs.VERBS.items() if isinstance(verb, verbs.RecipeVerb) and verb.rows}
READ_BY |= {"data check": verbs.CONVERSATIONS}


def mistakes_of(wrong: Wrong, folder: Path) -> list[str]:
    path = folder / wrong.name
    path.write_bytes(wrong.content)
    with pytest.raises(InputError) as caught:
        if rows := READ_BY.get(wrong.verb):
            check_rows(Data(train=str(path), cache_dir=str(folder / "cache")), cli.found(rows))
        else:
            read = [one.event for one in Documents([str(path)]).read()]
            raise InputError(*(f"{event.where}: {event.why}" for event in read if isinstance(event, Unread)))
    return caught.value.mistakes


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(wrong=wrong_data())
def test_each_wrong_row_has_a_line(wrong: Wrong, tmp_path_factory: pytest.TempPathFactory) -> None:
    mistakes = mistakes_of(wrong, tmp_path_factory.getbasetemp())
    assert len(mistakes) == len(wrong.must_say), mistakes
    for said in wrong.must_say:
        assert any(said in line for line in mistakes), (said, mistakes)


def test_all_verbs_that_read_rows_are_drawn() -> None:
    assert READ_BY.keys() <= READERS.keys()

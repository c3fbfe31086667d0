"""Files made to do harm are refused by the program with a line, and nothing of them is run. Bombs have tests of their
own (tests/data/test_unpacking.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import ESCAPED, attacks

from litrecipe import cli


def test_hostile_files_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LITRECIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("litrecipe.data.sandbox.ALLOWANCE", 1_000_000)
    counts: dict[str, int] = {}
    for attack in attacks(tmp_path / "files", tiny_model, without_bombs=True):
        code = cli.main([str(word) for word in attack.command])
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("litrecipe: error: ")]
        assert (code, bool(told)) == (2, True), attack
        assert any(attack.must_say in line for line in told), (attack, told)
        assert attack.lines in (len(told), None), told
        counts[attack.kind] = counts.get(attack.kind, 0) + 1
    assert min(counts.values()) >= 4 and len(counts) == 7
    assert not list(tmp_path.rglob(ESCAPED))


def test_the_payload_would_be_seen(tmp_path: Path) -> None:
    """What the test above looks for is there once a pickle is read by somebody who trusts it."""
    import pickle

    from hostile import Payload

    pickle.loads(pickle.dumps(Payload(tmp_path)))
    assert (tmp_path / ESCAPED).exists()

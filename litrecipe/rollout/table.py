"""Rollouts for people: JSON lines with everything, and a few completions in the terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from litrecipe.config.progress import counted
from litrecipe.rollout.rewards import Scores
from litrecipe.rollout.sources import Completions

SHOWN = 300
"""Characters of a text in a table."""


def records(step: int, completions: Completions, scores: Scores, kl: Tensor | None = None) -> Iterator[dict[str, Any]]:
    """One object a completion; `kl` (A,) is the divergence of each whole completion from the reference, in nats."""
    for place, prompt in enumerate(completions.prompts):
        yield {
            "step": step,
            "prompt_id": prompt.where,
            "prompt": prompt.said,
            "completion": completions.texts[place],
            "tokens": len(completions.tokens[place]),
            "reward": float(scores.total[place]),
            "rewards": {name: values[place] for name, values in scores.by_source.items()},
            "kl": None if kl is None else float(kl[place]),
            "stop": completions.ended[place],
        }


def write_rollout(path: Path, step: int, completions: Completions, scores: Scores, kl: Tensor | None = None) -> None:
    """Add `records` to a file of JSON lines, in one piece."""
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in records(step, completions, scores, kl)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(lines))


def sample_table(completions: Completions, scores: Scores, kl: Tensor | None = None, *, title: str = "") -> Table:
    """The best, the median and the worst completion, with what each source said; texts fold at any width."""
    table = Table(title=Text(title), title_justify="left", box=box.HORIZONTALS)
    table.add_column("", no_wrap=True)
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("completion", ratio=3, overflow="fold")
    table.add_column("reward", overflow="fold")
    for name, place in places_shown(scores.total.tolist()).items():
        table.add_row(
            name,
            shown(_as_text(completions.prompts[place].said)),
            shown(completions.texts[place]),
            Text("\n".join(_said(place, completions, scores, kl))),
        )
    return table


def places_shown(rewards: Sequence[float]) -> dict[str, int]:
    """Places of the best, the median (the lower of two) and the worst reward, as far as these are different places."""
    order = sorted(range(len(rewards)), key=lambda place: (rewards[place], place))
    wanted = {"best": order[-1:], "median": order[(len(order) - 1) // 2 :][:1], "worst": order[:1]}
    taken: dict[str, int] = {}
    for name in ("best", "worst", "median"):
        if wanted[name] and wanted[name][0] not in taken.values():
            taken[name] = wanted[name][0]
    return {name: taken[name] for name in wanted if name in taken}


def shown(text: str) -> Text:
    """A text in one paragraph, cut in its middle; control characters, which a model may well write, do nothing."""
    text = " ⏎ ".join(text.splitlines())
    if len(text) > SHOWN:
        text = f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
    return Text("".join(one if one.isprintable() else "\ufffd" for one in text))


def _said(place: int, completions: Completions, scores: Scores, kl: Tensor | None) -> list[str]:
    """Reward, its parts where there are several, how long, and why it ended."""
    parts = {name: values[place] for name, values in scores.by_source.items()}
    told = [f"{float(scores.total[place]):.3g}"]
    if len(parts) > 1:
        told += [f"{name} {'-' if part is None else format(part, '.3g')}" for name, part in parts.items()]
    told += [f"KL {float(kl[place]):.3g}"] if kl is not None else []
    return [*told, f"{counted(len(completions.tokens[place]), 'token')}, {completions.ended[place]}"]


def _as_text(said: list[dict[str, Any]] | str) -> str:
    """What was asked last, after what was said before it."""
    if isinstance(said, str):
        return said
    if len(said) == 1:
        return str(said[0].get("content"))
    return "\n".join(f"{message['role']}: {message.get('content')}" for message in said)

"""How data looks to a person: a sample with its loss mask, and a table of what is wrong with a data set."""

from __future__ import annotations

from rich.text import Text

from litrecipe.data.tokenizer import Tokenizer
from litrecipe.model.row import Sample

LEARNT = "bold green"
CONTEXT = "dim"


def render_sample(sample: Sample, tokenizer: Tokenizer) -> Text:
    """The text of a sample; what is learnt is green and between ⟦ ⟧, so that it shows without colours too.

    Control tokens are shown as they are written. A character whose bytes fall into several tokens is shown with its
    last one.
    """
    text = Text(f"{sample.id}\n", style="bold")
    for segment in sample.segments:
        stream = tokenizer.decode_stream(skip_special=False)
        learning = False
        for token, weight in zip(segment.tokens.tolist(), segment.weights.tolist(), strict=True):
            if (weight > 0) != learning:
                text.append("⟧" if learning else "⟦", style=LEARNT)
                learning = not learning
            text.append(stream.push(token), style=LEARNT if learning else CONTEXT)
        text.append(stream.finish() + ("⟧" if learning else ""), style=LEARNT if learning else CONTEXT)
        text.append("\n")
    return text

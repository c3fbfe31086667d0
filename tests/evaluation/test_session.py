"""What a model is opened with."""

from __future__ import annotations

import shutil

from litrecipe.config import groups
from litrecipe.evaluation.session import open_session


def test_a_run_is_read_on_the_date_it_was_trained_on(tiny_model, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "final")
    (run / "final" / "chat_template.jinja").write_text(
        "{{ strftime_now('%d %b %Y') }}{% for message in messages %} {{ message['content'] }}{% endfor %}"
    )
    (run / "recipe.yaml").write_text("model: {source: base}\ndata: {train: 'toy:units', date: '2020-02-03'}\n")
    session = open_session(groups.Model(source=str(run)), groups.Quantize(), groups.Fabric(accelerator="cpu"))
    ids = session.tokenizer.encode_prompt([{"role": "user", "content": "hello"}])
    assert session.tokenizer.decode(ids) == "03 Feb 2020 hello"

"""Pretraining from text: stages, what a run tells, equality with transformers, resuming, ranks, and bad input."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from processes import assert_equal_runs, kill_at, on_two_ranks, start
from safetensors.torch import load_file

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.data.pretraining import open_stream
from litrecipe.data.tokenizer import Tokenizer
from litrecipe.engine.fit import fit
from litrecipe.engine.optim import make_optimizer
from litrecipe.engine.rundir import read_records
from litrecipe.model.decoder import Decoder
from litrecipe.model.teacher import StudentAndTeacher, Teacher
from litrecipe.objectives.causal_lm import CausalLM
from litrecipe.objectives.loss import Loss
from litrecipe.recipes import finetune, pretrain
from litrecipe.recipes.pretrain import as_asked, tell_of, treatment

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "and", "asks", "what", "answer", "is"]


def write_texts(path: Path, count: int, seed: int) -> Path:
    """Documents of a few to a few dozen words."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(3, 60))) for _ in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for name, count, seed in (("books", 400, 0), ("peps", 300, 1), ("val", 12, 2)):
        write_texts(folder / f"{name}.jsonl", count, seed)
    return folder


@pytest.fixture(scope="module")
def flags(tiny_model: Path, texts: Path) -> dict[str, Any]:
    """Two stages: growing batches of short sequences of two sources, then long ones."""
    return {
        "model": tiny_model,
        "model.init": "random",
        "data.sources": f"{{books: {texts}/books.jsonl, peps: {texts}/peps.jsonl}}",
        "data.mix": "{books: 0.51, peps: 0.49}",
        "data.max_length": 32,
        "data.val": texts / "val.jsonl",
        "data.cache_dir": texts / "cache",
        "data.workers": 1,
        "optim.lr": 3e-3,
        "train.micro_batch_tokens": 256,
        "eval.every": 5,
        "checkpoint.every": 2,
        "log.loggers": "[]",
        "fabric.accelerator": "cpu",
        "stages.core.train.max_steps": 6,
        "stages.core.train.global_batch_size": 8,
        "stages.core.train.initial_batch_size": 2,
        "stages.core.train.batch_warmup_steps": 3,
        "stages.core.schedule.name": "constant",
        "stages.core.schedule.warmup_steps": 2,
        "stages.long.data.max_length": 128,
        "stages.long.model.rope_theta": 1e5,
        "stages.long.train.max_steps": 4,
        "stages.long.train.global_batch_size": 3,
        "stages.long.optim.lr": 1e-3,
        "stages.long.schedule.name": "linear",
    }


Load = Callable[..., PretrainRecipe]


@pytest.fixture
def recipe(flags: dict[str, Any], tmp_path: Path) -> Load:
    def load(stages: bool = True, **changes: Any) -> PretrainRecipe:
        given = {key: value for key, value in flags.items() if stages or not key.startswith("stages.")}
        given |= {"out_dir": tmp_path / "run"} | {key.replace("__", "."): value for key, value in changes.items()}
        given["model.source"] = given.pop("model")
        return schema.load(PretrainRecipe, [], [(key, str(value)) for key, value in given.items()])

    return load


def records(run: Path, key: str) -> list[dict[str, Any]]:
    return [record for record in read_records(run / "metrics.jsonl") if key in record]


def test_stages_hand_over_and_the_result_is_what_the_last_one_made(recipe: Load, tmp_path: Path, capsys) -> None:
    transformers = pytest.importorskip("transformers")
    assert pretrain.main(recipe()) == 0
    said = capsys.readouterr().err
    assert "stage core: steps 1 to 6" in said and "stage long: steps 7 to 10" in said
    run = tmp_path / "run"
    steps = records(run, "grad_norm")
    assert [round(step["lr"], 7) for step in steps] == [
        *(0.001, 0.002, 0.003, 0.003, 0.003, 0.003),
        *(0.001, 0.00075, 0.0005, 0.00025),
    ]
    sizes = [len(record["samples"]) for record in read_records(run / "flight.jsonl")]
    assert sizes == [2, 4, 6, 8, 8, 8, 3, 3, 3, 3]
    assert [step["tokens"] for step in steps][5:] == [36 * 32, *(36 * 32 + n * 3 * 128 for n in (1, 2, 3, 4))]
    assert steps[5]["share/books"] == pytest.approx(0.51, abs=0.02)
    assert steps[-1]["share/books"] + steps[-1]["share/peps"] == pytest.approx(1)
    assert 0 < steps[-1]["mfu"] < 1
    evaluations = records(run, "eval_loss")
    assert [evaluation["step"] for evaluation in evaluations] == [5, 10]
    files = open_model(str(run))
    assert (files.config["rope_theta"], files.config["max_position_embeddings"]) == (1e5, 512)
    ours, theirs = load_model(files), transformers.AutoModelForCausalLM.from_pretrained(run / "final")
    tokens = torch.arange(40, 140)
    with torch.no_grad():
        assert torch.allclose(ours.logits(tokens), theirs(tokens[None]).logits[0], atol=1e-4)


def test_bits_per_byte_is_the_loss_of_all_tokens_over_the_bytes_of_the_text(recipe: Load, tmp_path: Path) -> None:
    """The mean over predicted tokens in bits, by the mean bytes of a token, both counted here from the text."""
    asked = recipe(stages=False, train__max_steps=1)
    pretrain.main(asked)
    [evaluation] = records(tmp_path / "run", "eval_loss")
    tokenizer = Tokenizer.load(asked.model.source)
    rows = [json.loads(line)["text"] for line in Path(asked.data.val or "").read_text().splitlines()]
    tokens = sum(len(tokenizer.encode(text)) + 1 for text in rows)
    bytes_each = sum(len(text.encode()) for text in rows) / tokens
    assert evaluation["eval_bits_per_byte"] == pytest.approx(evaluation["eval_loss"] / math.log(2) / bytes_each)


@pytest.mark.parametrize("attend_across", [False, True])
def test_losses_are_those_of_transformers_trained_on_the_same_sequences(
    recipe: Load, tmp_path: Path, attend_across: bool
) -> None:
    """Twenty steps of AdamW on the whole, against theirs on padded rows; documents apart by a mask, or together."""
    transformers = pytest.importorskip("transformers")
    asked = recipe(
        stages=False,
        train__max_steps=20,
        train__global_batch_size=6,
        data__attend_across=attend_across,
        pretrain__spike_sigmas="null",
        eval__every="null",
        model__init="pretrained",
    )
    pretrain.main(asked)
    ours = [step["loss"] for step in records(tmp_path / "run", "grad_norm")]
    model = transformers.AutoModelForCausalLM.from_pretrained(asked.model.source, attn_implementation="eager")
    model.model.embed_tokens.padding_idx = None  # their embedding of the end of a text would learn nothing: it pads too
    decay = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 0, 20)
    source = open_stream(asked, Tokenizer.load(asked.model.source)).source
    for ours_of_step in ours:
        total, count = torch.zeros(()), 0
        for sample in source.next_step():
            tokens = torch.cat([torch.tensor(segment.tokens) for segment in sample.segments])
            positions = torch.cat([torch.arange(len(segment.tokens)) for segment in sample.segments])
            document = torch.cat([torch.full((len(s.tokens),), n) for n, s in enumerate(sample.segments)])
            seen = (document[:, None] == document) & torch.ones(len(tokens), len(tokens)).tril().bool()
            mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
            logits = model(tokens[None], attention_mask=mask, position_ids=positions[None]).logits[0]
            labels = torch.where(positions == 0, -100, tokens)
            total = total + torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
            count += int((labels[1:] != -100).sum())
        loss = total / count
        assert ours_of_step == pytest.approx(loss.item(), abs=1e-4)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@pytest.mark.slow
def test_kill_9_and_resume_equals_the_unbroken_run_across_stages(
    litrecipe, flags: dict[str, Any], tmp_path: Path
) -> None:
    rng = random.Random(0)
    changes = {"stages.core.train.max_steps": 9, "stages.long.train.max_steps": 9, "checkpoint.resume": "auto"}

    def command(out: Path) -> list[object]:
        given = flags | changes | {"out_dir": out}
        return ["pretrain", *(word for key, value in given.items() for word in (f"--{key}", value))]

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    litrecipe(*command(unbroken))
    killed = 0
    for kind in ("between steps", "inside a save", "between steps", "between steps"):
        process = start(command(broken), broken, tmp_path / "log")
        killed += kill_at(kind, process, broken, rng)
        process.wait()
    assert killed >= 3, (tmp_path / "log").read_text()
    litrecipe(*command(broken))
    assert_equal_runs(unbroken, broken, 18)


def test_a_run_is_lengthened_by_a_stage_and_a_stage_that_was_begun_must_stay(
    recipe: Load, flags: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At another rate too, which is told."""
    pretrain.main(recipe())
    last = {"stages__last__train__max_steps": 2, "stages__last__schedule__name": "linear"}
    longer = recipe(checkpoint__resume="auto", stages__long__optim__lr=5e-4, **last)
    assert pretrain.main(longer) == 0
    assert "stages.long.optim.lr: was 0.001, is 0.0005 from here on" in capsys.readouterr().err
    steps = records(tmp_path / "run", "grad_norm")
    assert [step["step"] for step in steps] == list(range(1, 13))
    was = r"the checkpoint was made with"
    for change, told in (
        ({"stages__core__train__global_batch_size": 9}, rf"stages\.core\.train\.global_batch_size: 9: {was} 8"),
        ({"train__seed": 5}, rf"stages\.core\.train\.seed: 5: {was} 0"),
        ({"data__attend_across": "true"}, rf"stages\.core\.data\.attend_across: True: {was} False"),
    ):
        with pytest.raises(InputError, match=told):
            pretrain.main(recipe(checkpoint__resume="auto", **change))
    other = {"model.source": longer.model.source, "data.train": "toy:units?n=9&seed=0", "out_dir": longer.out_dir}
    other |= {"checkpoint.resume": "auto", "data.cache_dir": longer.data.cache_dir, "fabric.accelerator": "cpu"}
    with pytest.raises(InputError, match="of another verb's run"):
        finetune.main(schema.load(FinetuneRecipe, [], [(key, str(value)) for key, value in other.items()]))


RANKS = """
import json, sys
from litrecipe.config import schema
from litrecipe.config.pretrain import PretrainRecipe
from litrecipe.recipes import pretrain

for flags in json.loads(sys.argv[3]):
    assert pretrain.main(schema.load(PretrainRecipe, [], [(key, str(value)) for key, value in flags.items()])) == 0
print("done")
"""


@pytest.mark.slow
def test_two_ranks_equal_one(flags: dict[str, Any], varied_model: Path, tmp_path: Path) -> None:
    """The first stage has a teacher, the second none."""
    given = {key: str(value) for key, value in flags.items() if key != "model"} | {"model.source": str(flags["model"])}
    given |= {"distil.teacher": str(varied_model), "stages.long.distil.teacher": "null"}
    runs = {name: given | {"out_dir": str(tmp_path / name)} for name in ("one", "ddp", "fsdp")}
    pretrain.main(schema.load(PretrainRecipe, [], list(runs["one"].items())))
    of_two = [run | {"fabric.strategy": name, "fabric.devices": "2"} for name, run in runs.items() if name != "one"]
    told = on_two_ranks(RANKS, tmp_path, json.dumps(of_two))
    assert all("done" in words for words in told), told
    one = [step["loss"] for step in records(tmp_path / "one", "grad_norm")]
    for name in ("ddp", "fsdp"):
        assert [step["loss"] for step in records(tmp_path / name, "grad_norm")] == pytest.approx(one, abs=1e-5)


def test_a_teacher_whose_answers_are_kept_teaches_as_one_that_is_asked_in_each_step(
    recipe: Load, tiny_model: Path, varied_model: Path, tmp_path: Path
) -> None:
    """The likeliest 16 tokens, over two stages. What is kept is fp32, so only sums in another order differ."""
    losses = []
    for cache in ("true", "false"):
        asked = recipe(
            out_dir=tmp_path / cache,
            distil__teacher=varied_model,
            distil__method="top_k",
            distil__top_k=16,
            distil__cache=cache,
            distil__alpha=0.3,
            pretrain__z_loss=1e-3,
        )
        assert pretrain.main(asked) == 0
        steps = records(tmp_path / cache, "grad_norm")
        losses.append([step["loss"] for step in steps])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert {"kl", "log_z"} & {name.partition("/")[0] for name in steps[0]}


def test_a_stage_does_without_the_teacher_of_the_one_before(
    recipe: Load, tiny_model: Path, varied_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """It learns from the tokens alone, as reckoned from the weights at its start; the teacher is not asked and gone.
    Resumed before the boundary and on it the run is the unbroken one to the bit."""
    asked_at, steps_of = [], []
    plain = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda self, row: asked_at.append(len(steps_of)) or plain(self, row))
    monkeypatch.setattr(pretrain, "fit", lambda job: fit(replace(job, after_step=lambda *_: steps_of.append(job))))
    taught = {"distil__teacher": varied_model, "distil__method": "top_1", "stages__long__distil__teacher": "null"}
    taught |= {"checkpoint__keep": 9, "data__val": "null", "eval__every": "null"}
    assert pretrain.main(recipe(**taught)) == 0
    assert sorted(set(asked_at)) == list(range(6))
    assert isinstance(steps_of[-1].module, StudentAndTeacher) and steps_of[-1].module.teacher is None
    run = tmp_path / "run"
    steps = records(run, "grad_norm")
    assert ["kl" in step for step in steps] == [True] * 6 + [False] * 4
    assert all(step["loss"] == pytest.approx(0.1 * step["nll"] + 0.9 * step["kl"], rel=1e-5) for step in steps[:6])
    source = open_stream(recipe(**taught), Tokenizer.load(tiny_model)).source
    samples = [source.next_step() for _ in range(7)][6]
    weights = load_file(run / "checkpoints" / "step-00000006" / "weights-00000.safetensors")
    model = Decoder(steps_of[-1].module.student.architecture)
    model.load_state_dict({name.removeprefix("student."): weight for name, weight in weights.items()}, strict=False)
    model.tie_weights()
    texts = [torch.tensor(segment.tokens) for sample in samples for segment in sample.segments if segment.weights.any()]
    losses = torch.cat([F.cross_entropy(model.logits(text)[:-1], text[1:], reduction="none") for text in texts])
    assert steps[6]["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    for step in (4, 6):
        folder = tmp_path / str(step) / "checkpoints" / f"step-{step:08}"
        shutil.copytree(run / "checkpoints" / folder.name, folder)
        assert pretrain.main(recipe(**taught, out_dir=tmp_path / str(step), checkpoint__resume="auto")) == 0
        flights = [read_records(path / "flight.jsonl")[-4:] for path in (run, tmp_path / str(step))]
        assert flights[0] == flights[1]
        last = [path / "final" / "model.safetensors" for path in (run, tmp_path / str(step))]
        assert last[0].read_bytes() == last[1].read_bytes()
    assert "optim.lr: was" not in capsys.readouterr().err
    with pytest.raises(InputError, match=r"stages\.long\.distil\.teacher: asked: the checkpoint was made with null"):
        pretrain.main(recipe(**taught | {"stages__long__distil__teacher": varied_model}, checkpoint__resume="auto"))


def test_a_spike_is_passed_over_counted_and_said(recipe: Load, tmp_path: Path, monkeypatch, capsys) -> None:
    """One step of 30 has a gradient a thousand times too large, another one that is not finite."""
    plain, calls = CausalLM.__call__, []

    def spiked(self, predictions, row):
        loss = plain(self, predictions, row)
        calls.append(0)
        factor = {21: 1000.0, 25: float("nan")}.get(len(calls), 1.0)
        return Loss(tuple(replace(term, sum=term.sum * factor) for term in loss.terms), loss.metrics)

    monkeypatch.setattr(CausalLM, "__call__", spiked)
    changes = {"train__max_steps": 30, "train__global_batch_size": 8, "pretrain__spike_window": 32}
    pretrain.main(recipe(stages=False, eval__every="null", data__val="null", **changes))
    said = capsys.readouterr().err
    assert re.search(
        r"step 21: loss \S+ lies \S+ standard deviations above the last 20 steps: passed over \(1 so", said
    )
    assert "step 25: loss nan: passed over (2 so far)" in said
    steps = records(tmp_path / "run", "grad_norm")
    assert [step["passed_over"] for step in steps] == [0.0] * 20 + [1.0] * 4 + [2.0] * 6
    assert len(steps) == 30 and all(math.isfinite(step["loss"]) for step in steps[25:])


def test_fresh_weights_are_drawn_as_asked(recipe: Load) -> None:
    """Deviations over a whole matrix; 48 · 48 numbers are within a tenth."""
    for scaled in ("true", "false"):
        asked = recipe(stages=False, model__init_std=0.05, model__scaled_init=scaled)
        files = open_model(asked.model.source)
        tokenizer = Tokenizer.load(files.tokenizer_dir)
        files = replace(files, architecture=as_asked(asked, files.architecture, tokenizer))
        model = load_model(files, init="random", seed=0)
        layer = model.model.layers[1]
        assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.05, rel=0.1)
        expected = 0.05 / math.sqrt(2 * 2) if scaled == "true" else 0.05
        for matrix in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert matrix.weight.std().item() == pytest.approx(expected, rel=0.1)
        assert (model.architecture.eos_ids, model.architecture.bos_id) == (tokenizer.eos_ids, tokenizer.bos_id)


def test_by_mup_the_layers_matrices_learn_and_start_by_their_width(recipe: Load) -> None:
    """Width 48 with a base of 12: a quarter of the rate, half of the deviation; nothing else changes."""
    asked = recipe(stages=False, optim__mup_base_width=12, model__init_std=0.04, optim__decay_embeddings="false")
    files = open_model(asked.model.source)
    tokenizer = Tokenizer.load(files.tokenizer_dir)
    files = replace(files, architecture=as_asked(asked, files.architecture, tokenizer))
    model = load_model(files, init="random", seed=0)
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.04, rel=0.1)
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer(parameters, asked.optim, treatment=partial(treatment, asked, 48))
    found = {
        id(p): (group["peak_lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    assert len(found) == len(parameters)
    for name, parameter in parameters.items():
        inner, matrix = ".layers." in name and parameter.dim() == 2, parameter.dim() == 2
        assert found[id(parameter)] == (3e-3 / 4 if inner else 3e-3, 0.1 if matrix and "embed" not in name else 0.0)


@pytest.mark.parametrize(
    ("base", "divisor", "warns"), [(12, 1, True), (12, 4, False), (48, 1, False), ("null", 1, False)]
)
def test_mup_is_told_to_be_half_of_it_where_logits_are_not_divided(
    recipe: Load, base: object, divisor: float, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe(stages=False, optim__mup_base_width=base)
    tell_of(asked, replace(open_model(asked.model.source).architecture, logit_divisor=divisor))
    said = (
        "warning: optim.mup_base_width: 12: the rate carries over in part: this model's logits are not divided by 48/12"
    )
    assert (said in capsys.readouterr().err) == warns


def test_a_dry_run_and_a_plan_show_stages_memory_and_scaling_and_train_nothing(
    recipe: Load, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert pretrain.main(recipe(), dry_run=True) == 0
    shown = capsys.readouterr().out
    for start_of in ("stage core", "stage long", "memory of one rank (1 in all)", "steps", "data", "one sequence"):
        assert re.search(rf"^\s*{re.escape(start_of)}", shown, re.MULTILINE), start_of
    assert re.search(r"core\s+6\s+2 to 8\s+32\s+1,152\s+0\.003\s+0\.003", shown)
    assert re.search(r"long\s+4\s+3\s+128\s+1,536\s+0\.001\s+0\.00025", shown)
    assert "51.0% of the stream" in shown
    assert pretrain.main(recipe(), plan=True) == 0
    shown = capsys.readouterr().out
    assert "2,688 tokens in the recipe" in shown and "replication, 2404.10102" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__mix": "{books: 1, peps: 0}"}, r"data\.mix: peps: 0: give a number above 0, or leave the source out"),
        ({"data__mix": "{books: 1, peps: 1, pep: 2}"}, r"data\.mix: pep: no such source: there are books, peps"),
        ({"data__mix": "{books: 1}"}, r"data\.mix: peps: missing: give all sources a share, or none"),
        ({"data__sources": "{books: nowhere.jsonl}", "data__mix": "{}"}, r"nowhere\.jsonl: no such file"),
        (
            {"data__max_epochs": "{books: 1, peps: 1}", "train__max_steps": 5000},
            r"data\.max_epochs: books: 1, peps: 1: leaves \d+ of 5,000 steps: raise it, or give train\.max_steps \d+",
        ),
        ({"data__mask": "all"}, r"data\.mask: all: of documents all is learnt"),
        ({"data__max_length": 512}, r"data\.max_length: 512: train\.micro_batch_tokens 256 cannot hold a sequence"),
        ({"train__initial_batch_size": 4}, r"train\.initial_batch_size: 4: give train\.batch_warmup_steps"),
    ],
)
def test_mistakes_are_one_line_each(recipe: Load, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        pretrain.main(recipe(stages=False, **changes), dry_run=True)
    assert len(error.value.mistakes) == 1


def test_a_stage_is_told_how_many_steps_its_sources_last(recipe: Load, tiny_model: Path) -> None:
    """And lasts so many, not one more."""
    limits = {"stages__core__data__max_epochs": "{books: 0.1, peps: 0.05}", "stages__core__train__max_steps": 5000}
    tokenizer = Tokenizer.load(tiny_model)
    told = (
        r"^stages\.core\.data\.max_epochs: books: 0\.1, peps: 0\.05: leaves ([\d,]+) of 5,000 steps: raise it, or give "
    )
    with pytest.raises(InputError, match=rf"{told}stages\.core\.train\.max_steps (\d+)$") as error:
        open_stream(recipe(**limits), tokenizer)
    steps = int(str(error.value).rpartition(" ")[2])
    assert open_stream(recipe(**limits | {"stages__core__train__max_steps": steps}), tokenizer)
    with pytest.raises(InputError, match=f"leaves {steps} of {steps + 1} steps"):
        open_stream(recipe(**limits | {"stages__core__train__max_steps": steps + 1}), tokenizer)


def test_what_cannot_be_meant_is_refused(recipe: Load, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"adapter\.method: lora: fresh weights are nothing to adapt"):
        recipe(adapter__method="lora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "recipe.yaml").write_text("precious")
    with pytest.raises(InputError, match=r"out_dir: .*mine: holds a recipe\.yaml that no run wrote"):
        pretrain.main(recipe(out_dir=tmp_path / "mine"))
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 512, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps(gpt2 | {"layer_norm_epsilon": 1e-5}))
    positions = {"model": tmp_path / "config.json", "model__tokenizer": tiny_model}
    with pytest.raises(InputError, match=r"model\.rope_theta: this model's positions do not turn"):
        pretrain.main(recipe(**positions), dry_run=True)


def test_a_plan_needs_neither_data_nor_tokenizer(recipe: Load, tmp_path: Path, capsys) -> None:
    sources = {"data__sources": "{books: nowhere, peps: neither}", "model__tokenizer": "nowhere/either"}
    assert pretrain.main(recipe(**sources), plan=True) == 0
    assert "2,688 tokens in the recipe" in capsys.readouterr().out


def test_the_line_of_a_stage_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(
        "model: {source: x}\n"
        "data: {train: y}\n"
        "stages:\n"
        "  core:\n"
        "    optim: {name: sgd}\n"
        "    train: {max_stps: 3}\n"
        "  long tail: {}\n"
        "  long: 4\n"
    )
    with pytest.raises(InputError) as error:
        schema.load(PretrainRecipe, [path])
    assert [line.partition("bad.yaml:")[2] for line in error.value.mistakes] == [
        "5: stages.core.optim.name: sgd: is the same in all stages: write it outside of them",
        "6: stages.core.train.max_stps: 3: no such key: did you mean `stages.core.train.max_steps`?",
        "7: stages.long tail: no name for a stage: use a-z, A-Z, 0-9, and behind the first also - and _",
        "8: stages.long: 4: is a group: give the keys in which the stage differs",
    ]


def test_a_dumped_recipe_reads_back_with_its_stages(recipe: Load, tmp_path: Path) -> None:
    asked = recipe()
    path = tmp_path / "recipe.yaml"
    path.write_text(schema.dump(asked))
    assert schema.kind_of(path) is PretrainRecipe
    assert schema.load(PretrainRecipe, [path]) == asked
    assert list(asked.parts) == ["core", "long"] and asked.stages["long"].data.max_length == 128


@pytest.mark.slow
def test_a_pipeline_begins_with_a_pretraining_in_stages(litrecipe, flags: dict[str, Any], tmp_path: Path) -> None:
    """And is continued when it is over: nothing is done again."""
    given = {f"stages.base.{key}": value for key, value in flags.items() if key != "model"}
    given |= {"stages.base.model.source": flags["model"], "out_dir": tmp_path / "run"}
    (tmp_path / "p.yaml").write_text(
        "stages:\n  base: {verb: pretrain}\n  sft:\n    verb: finetune\n    model: {source: stage:base}\n"
        "    data: {train: 'toy:units?n=8&seed=0'}\n    train: {max_steps: 2}\n    log: {loggers: []}\n"
    )
    command = ["align", "pipeline", "--config", tmp_path / "p.yaml", "--checkpoint.resume", "auto"]
    command += [word for key, value in given.items() for word in (f"--{key}", value)]
    litrecipe(*command)
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    steps = records(tmp_path / "run" / "base", "grad_norm")
    assert len(steps) == 10
    assert "finished before" in (again := litrecipe(*command)).stdout + again.stderr

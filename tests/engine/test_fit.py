"""The fit loop on a tiny model: a step does not depend on how it is cut, and what goes wrong is said."""

import json
import math
import os
import re

import numpy as np
import pytest
import torch

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Adapter, FinetuneRecipe
from litrecipe.data.source import RecordedSource
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, Run, fit
from litrecipe.engine.rundir import RunDir, read_records
from litrecipe.model.adapters import add_adapter
from litrecipe.model.decoder import Decoder
from litrecipe.model.families import read_architecture
from litrecipe.model.row import Sample, Segment
from litrecipe.objectives.causal_lm import CausalLM


class Samples(list):
    """Conversations of random tokens; about half of each is learnt."""

    def __init__(self, count, seed=0):
        rng = np.random.default_rng(seed)
        super().__init__()
        for i in range(count):
            n = int(rng.integers(5, 40))
            weights = (rng.random(n) < 0.5).astype(np.float32)
            weights[0], weights[-1] = 0, 1
            self.append(Sample(f"row:{i}", (Segment(rng.integers(3, 300, n), weights),)))
        self.lengths = np.array([sample.length for sample in self])


def make_job(out_dir, config, *, samples=None, adapter="none", val=None, **train):
    recipe = FinetuneRecipe(out_dir=str(out_dir), adapter=Adapter(method=adapter, r=4))
    recipe.fabric.accelerator = "cpu"
    recipe.log.loggers = []
    recipe.optim.lr = 1e-3
    for name, value in train.items():
        setattr(recipe.train, name, value)
    torch.manual_seed(0)
    model = Decoder(read_architecture(config))
    model.init_weights(seed=0)
    if adapter != "none":
        add_adapter(model, recipe.adapter)
    samples = samples if samples is not None else Samples(16)
    return Job(
        fabric=make_fabric(recipe.fabric),
        recipe=recipe,
        module=model,
        objective=CausalLM(),
        source=RecordedSource(samples, recipe.train),
        val=val,
        save_final=lambda folder: folder.mkdir(parents=True, exist_ok=True),
    )


@pytest.fixture
def config(tiny_model):
    return json.loads((tiny_model / "config.json").read_text())


def gradients(job):
    """The gradients with which the first optimizer step is taken."""
    run = Run(job)
    taken = {}
    run.raw_optimizer.register_step_pre_hook(
        lambda *_: taken.update({name: p.grad.clone() for name, p in run.parameters.items()})
    )
    run.train_step(job.source.next_step())
    run.teller.close()
    return taken


@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_equal_batches_cut_differently_give_equal_gradients(tmp_path, config, adapter):
    """Eight samples as one row, as two of four, as eight of one, and packed by budgets in between."""
    whole = None
    for budget in (10_000, 120, 80, 55, 40):
        job = make_job(
            tmp_path / str(budget),
            config,
            adapter=adapter,
            micro_batch_tokens=budget,
            global_batch_size=8,
            grad_clip=None,
        )
        taken = gradients(job)
        if whole is None:
            whole = taken
            continue
        for name, gradient in taken.items():
            scale = whole[name].abs().max().clamp(min=1e-3)
            assert ((gradient - whole[name]).abs().max() / scale).item() < 1e-5, (name, budget)
            assert (gradient - whole[name]).abs().max().item() < 1e-6, (name, budget)


def test_a_step_that_is_refused_moves_nothing_and_adam_remembers_nothing_of_it(tmp_path, config, capsys):
    """The second of three steps: weights as after the first, its moments too, and the third as the unbroken second."""
    states = []

    def train(name, refuses, samples):
        job = make_job(tmp_path / name, config, samples=samples, global_batch_size=8, max_steps=3)
        job.recipe.schedule.name = "constant"
        job.refuses = refuses
        run = Run(job)
        for _ in range(len(samples) // 8):
            result = run.train_step(job.source.next_step())
            weights = [p.detach().clone() for p in run.parameters.values()]
            moments = [run.raw_optimizer.state[p]["exp_avg"].clone() for p in run.parameters.values()]
            states.append((name, result.refused, weights, moments))
            run.at.step += 1
        run.teller.close()

    def same(a, b):
        return all(torch.equal(x, y) for part in (2, 3) for x, y in zip(a[part], b[part], strict=True))

    asked = []
    train("refused", lambda metrics: asked.append(metrics) or ("odd" if len(asked) == 2 else None), Samples(24))
    assert [state[1] for state in states] == [None, "odd", None]
    assert same(states[0], states[1]) and not same(states[1], states[2])
    assert "step 2: odd" in capsys.readouterr().err


def test_loss_is_the_token_mean_over_the_step(tmp_path, config):
    """Against cross-entropy of each sample alone, weighted by hand: Σ w·nll / Σ w."""
    job = make_job(tmp_path, config, micro_batch_tokens=60, global_batch_size=8)
    run = Run(job)
    samples = job.source.next_step()
    total = count = 0.0
    with torch.no_grad():
        for sample in samples:
            tokens = torch.tensor(np.asarray(sample.segments[0].tokens))
            logits = job.module.logits(tokens).double()
            nll = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
            weights = torch.tensor(sample.segments[0].weights[1:]).double()
            total += float((nll * weights).sum())
            count += float(weights.sum())
    assert run.train_step(samples).loss == pytest.approx(total / count, rel=1e-5)
    run.teller.close()


def test_loss_falls_and_everything_is_told(tmp_path, config):
    samples = Samples(8)
    job = make_job(tmp_path, config, samples=samples, val=Samples(4, seed=1), epochs=8, global_batch_size=4)
    job.recipe.eval.every = 5
    job.recipe.optim.lr = 1e-2
    assert fit(job) == 0
    steps = [r for r in read_records(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 17))
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    assert {"lr", "grad_norm", "tokens", "tokens_per_second", "memory", "mean_token_accuracy"} <= steps[0].keys()
    assert steps[-1]["tokens"] == 8 * int(samples.lengths.sum())
    evaluated = [r["step"] for r in read_records(tmp_path / "metrics.jsonl") if "eval_loss" in r]
    assert evaluated == [5, 10, 15, 16]
    assert (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("adapter", ["none", "lora", "dora"])
def test_low_precision_learns_and_keeps_adapters_in_fp32(tmp_path, config, precision, adapter):
    job = make_job(tmp_path, config, samples=Samples(8), adapter=adapter, epochs=6, global_batch_size=8)
    job.recipe.optim.lr = 1e-2
    job.recipe.fabric.precision = precision
    job.fabric = make_fabric(job.recipe.fabric)
    if precision == "bf16-true":
        for parameter in job.module.parameters():
            if adapter == "none" or not parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
    assert fit(job) == 0
    losses = [r["loss"] for r in read_records(tmp_path / "metrics.jsonl") if "loss" in r]
    assert losses[-1] < losses[0] - 0.02
    trained = {p.dtype for p in job.module.parameters() if p.requires_grad}
    assert trained == {torch.bfloat16 if precision == "bf16-true" and adapter == "none" else torch.float32}


def test_a_nan_stops_before_the_step_and_names_the_row(tmp_path, config):
    """A weight of the embedding that one sample alone uses is NaN: its row is named, and no other."""
    samples = Samples(8)
    poisoned = samples[3]
    poisoned.segments[0].tokens[0] = 310
    job = make_job(
        tmp_path, config | {"tie_word_embeddings": False}, samples=samples, micro_batch_tokens=60, global_batch_size=8
    )
    with torch.no_grad():
        job.module.model.embed_tokens.weight[310] = math.nan
    run = Run(job)
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    step = job.source.next_step()
    with pytest.raises(InputError, match="loss is nan at step 1") as error:
        run.train_step(step)
    (row,) = [row for row in run.rows_of_this_rank(step) if poisoned.id in row.sample_ids]
    assert 1 < len(row.sample_ids) < 8
    assert re.findall(r"row:\d+", str(error.value)) == list(row.sample_ids)
    for name, parameter in run.parameters.items():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num())
    run.teller.close()


def test_a_gradient_that_is_not_finite_names_the_whole_step(tmp_path, config):
    """No row's loss is bad, so every sample of the step may be the one."""
    job = make_job(tmp_path, config, samples=Samples(8), micro_batch_tokens=60, global_batch_size=4)
    run = Run(job)
    job.module.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    step = job.source.next_step()
    with pytest.raises(InputError, match=r"gradient norm is (nan|inf) at step 1") as error:
        run.train_step(step)
    assert re.findall(r"row:\d+", str(error.value)) == [sample.id for sample in step]
    run.teller.close()


def test_an_oversized_sample_is_skipped_and_said(tmp_path, config, capfd):
    samples = Samples(6)
    longest = int(samples.lengths.max())
    job = make_job(tmp_path, config, samples=samples, micro_batch_tokens=longest - 1, global_batch_size=6)
    assert fit(job) == 0
    (record,) = [r for r in read_records(tmp_path / "metrics.jsonl") if "loss" in r]
    assert math.isfinite(record["loss"])
    assert record["tokens"] == int(samples.lengths[samples.lengths < longest].sum())
    skipped = json.loads((tmp_path / "checkpoints" / "step-00000001" / "state.json").read_text())["skipped"]
    assert skipped == int((samples.lengths == longest).sum()) > 0
    assert "do not fit train.micro_batch_tokens" in capfd.readouterr().err


def test_a_second_run_does_not_overwrite_the_first(tmp_path, config):
    assert fit(make_job(tmp_path, config, max_steps=1)) == 0
    with pytest.raises(InputError, match=r"out_dir.*resume auto"):
        fit(make_job(tmp_path, config, max_steps=1))


def test_two_processes_do_not_train_in_one_folder(tmp_path, config):
    job = make_job(tmp_path, config, max_steps=1)
    job.recipe.checkpoint.resume = "auto"
    with RunDir(tmp_path).held(), pytest.raises(InputError, match="another process trains here"):
        fit(job)
    assert fit(job) == 0


def test_the_model_of_an_earlier_end_is_not_that_of_a_lengthened_run(tmp_path, config, capfd):
    final = tmp_path / "final"
    for steps, stays in ((2, False), (2, True), (1, True), (3, False)):
        job = make_job(tmp_path, config, max_steps=steps, global_batch_size=2)
        job.recipe.checkpoint.resume = "auto"
        Run(job).teller.close()
        assert final.exists() == stays
        assert ("step 2 is beyond 1, where" in capfd.readouterr().err) == (steps == 1)
        if not stays:
            assert fit(job) == 0
    assert (tmp_path / "final.earlier").is_dir()


@pytest.mark.parametrize("what", ["moved", "a file instead"])
def test_a_folder_that_goes_away_during_the_run_is_told(tmp_path, config, capfd, what):
    job = make_job(tmp_path / "run", config, max_steps=2, global_batch_size=2)

    def take_away(*_):
        if not (tmp_path / "moved").exists():
            (tmp_path / "run").rename(tmp_path / "moved")
            if what == "a file instead":
                (tmp_path / "run").write_text("")

    job.module.register_forward_hook(take_away)
    if what == "moved":
        assert fit(job) == 0
        assert f"out_dir: {tmp_path}/run: is gone" in capfd.readouterr().err
        assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").exists()
    else:
        with pytest.raises(InputError, match=f"^out_dir: {tmp_path}/run: cannot be written .*Not a directory"):
            fit(job)


def test_a_run_too_short_for_its_schedule_is_warned_of_and_done(tmp_path, config, capsys):
    job = make_job(tmp_path, config, max_steps=2)
    job.recipe.schedule.warmup_steps = 3
    assert fit(job) == 0
    assert "schedule.warmup_steps 3: the run ends after 2 steps" in capsys.readouterr().err


def test_max_time_saves_and_finishes(tmp_path, config):
    job = make_job(tmp_path, config, max_steps=10_000, max_time="2s")
    assert fit(job) == 0
    last = read_records(tmp_path / "metrics.jsonl")[-1]["step"]
    assert 1 <= last < 10_000
    assert json.loads((tmp_path / "checkpoints" / f"step-{last:08d}" / "state.json").read_text())["step"] == last
    assert (tmp_path / "final").is_dir()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("another base", r"made with other base weights \(absent, now 0123\)"),
        ("another optimizer", r"optim\.name: sgd"),
        ("other weights", r"trains other weights \(model\..*: \[320, 48\], now absent"),
        ("another rank", r"trains other weights \(model\..*lora_A.*: \[4, 96\], now \[1, 96\]"),
        ("another seed", r"train\.seed: 1: the checkpoint was made with 0"),
    ],
)
def test_resuming_something_else_is_refused(tmp_path, config, change, said):
    adapter = "lora" if change == "another rank" else "none"
    assert fit(make_job(tmp_path, config, adapter=adapter, max_steps=1)) == 0
    job = make_job(tmp_path, config, max_steps=2, seed=int(change == "another seed"))
    if change in ("other weights", "another rank"):
        add_adapter(job.module, Adapter(method="lora", r=1))
    if change == "another base":
        job.identity = {"base weights": "0123"}
    if change == "another optimizer":
        job.recipe.optim.name = "sgd"
    job.recipe.checkpoint.resume = "auto"
    before = {name: p.detach().clone() for name, p in job.module.named_parameters()}
    with pytest.raises(InputError, match=said):
        fit(job)
    if change != "another optimizer":
        assert all(torch.equal(p, before[name]) for name, p in job.module.named_parameters())


def test_a_checkpoint_is_read_once_before_it_is_loaded(tmp_path, config, monkeypatch):
    """Hashing a large checkpoint takes minutes."""
    from litrecipe.checkpoint import manifest

    assert fit(make_job(tmp_path, config, max_steps=1)) == 0
    job = make_job(tmp_path, config, max_steps=2)
    job.recipe.checkpoint.resume = "auto"
    read = []
    hashed = manifest.sha256_of
    monkeypatch.setattr(manifest, "sha256_of", lambda path: read.append(path.name) or hashed(path))
    Run(job).teller.close()
    assert sorted(read) == ["optimizer-00000.safetensors", "state.json", "weights-00000.safetensors"]


def test_a_full_disk_at_the_very_start_names_out_dir(tmp_path, config):
    """A file-size limit stands in for the full disk: recipe.yaml cannot be written."""
    job = make_job(tmp_path, config, max_steps=1)
    child = os.fork()
    if child == 0:
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        try:
            fit(job)
        except InputError as error:
            os._exit(2 if str(error).startswith(f"out_dir: {tmp_path}: disk full") else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2

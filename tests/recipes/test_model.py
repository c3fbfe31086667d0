"""Models in and out of runs: import, export, merge, info, as a user calls them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litrecipe.checkpoint.load import load_model
from litrecipe.checkpoint.source import open_model
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Quantize
from litrecipe.recipes.model import export, import_model, info, merge

TOKENS = torch.tensor([5, 3, 90, 41, 2, 7, 60])


@torch.no_grad()
def logits(folder: Path, **keys) -> torch.Tensor:
    return load_model(open_model(str(folder)), **keys).logits(TOKENS)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path):
    """Finished runs by what they train; made when first asked for."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            flags = {
                "full": [],
                "lora": ["--adapter.method", "lora"],
                "lora-nf4-bf16": [
                    *("--adapter.method", "lora", "--quantize.method", "nf4", "--fabric.precision", "bf16-true"),
                ],
                "dora-nf4": ["--adapter.method", "dora", "--quantize.method", "nf4"],
            }[kind]
            made[kind] = tmp_path_factory.mktemp("runs") / kind
            command = [sys.executable, "-m", "litrecipe", "finetune", "--model", tiny_model, "--out_dir", made[kind]]
            command += ["--data.train", "toy:units?n=8&seed=0", "--train.max_steps", "2", "--optim.lr", "0.05"]
            subprocess.run([*command, "--fabric.accelerator", "cpu", *flags], check=True, timeout=240)
        return made[kind]

    return run


def test_import_keeps_weights_and_precision(tiny_model: Path, tmp_path: Path) -> None:
    assert import_model(str(tiny_model), str(tmp_path / "a")) == 0
    assert torch.equal(logits(tmp_path / "a"), logits(tiny_model))
    shutil.copytree(tiny_model, tmp_path / "b")
    config = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    import_model(str(tmp_path / "b"), str(tmp_path / "c"))
    assert {tensor.dtype for _, tensor in open_model(str(tmp_path / "c")).tensors()} == {torch.bfloat16}


def test_nothing_foreign_is_overwritten(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear")
    for verb in (import_model, export, merge):
        with pytest.raises(InputError, match=f"{tmp_path}: exists"):
            verb(str(tiny_model), str(tmp_path))


@pytest.mark.parametrize("kind", ["full", "lora", "dora-nf4"])
def test_a_checkpoint_exports_as_the_final_model(runs, tmp_path: Path, tiny_model: Path, kind: str) -> None:
    run = runs(kind)
    quantize = Quantize(method="nf4") if kind == "dora-nf4" else None
    expected = logits(run / "final", quantize=quantize)
    assert (expected - logits(tiny_model, quantize=quantize)).abs().max() > 0.01
    export(str(run), str(tmp_path / "final"))
    assert torch.equal(logits(tmp_path / "final", quantize=quantize), expected)
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert torch.equal(logits(tmp_path / "out", quantize=quantize), expected)
    names = {path.name for path in (run / "final").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(InputError, match="neither a final model nor a complete checkpoint"):
        export(str(tmp_path / "run"), str(tmp_path / "out"))


def test_a_damaged_or_outdated_final_model_is_not_exported(runs, tmp_path: Path, capsys) -> None:
    run, out = tmp_path / "run", str(tmp_path / "out")
    shutil.copytree(runs("full"), run)
    export(str(run), out)
    assert f"from {run}/final, step 2" in capsys.readouterr().err
    weights = run / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(InputError, match=r"final/model\.safetensors: altered"):
        export(str(run), out)
    os.utime(run / "checkpoints" / "step-00000002" / "manifest.json")
    export(str(run), out)
    assert "step-00000002, which is newer than" in capsys.readouterr().err
    assert torch.equal(logits(Path(out)), logits(runs("full") / "final"))


@pytest.mark.parametrize("kind", ["lora", "dora-nf4"])
def test_merged_equals_unmerged(runs, tmp_path: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM

    run = runs(kind)
    expected = logits(run / "final", quantize=Quantize(method="nf4") if kind == "dora-nf4" else None)
    merge(str(run), str(tmp_path / "from run"))
    merge(str(run / "final"), str(tmp_path / "from final"))
    for folder in (tmp_path / "from run", tmp_path / "from final"):
        assert (logits(folder) - expected).abs().max() <= 1e-5 * expected.abs().max()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "from run", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS[None]).logits[0], expected, atol=1e-4, rtol=1e-5)


def test_a_quantised_run_in_bf16_merges_into_the_levels_it_was_trained_on(runs, tmp_path: Path) -> None:
    run = runs("lora-nf4-bf16")
    trained = load_model(open_model(str(run)), dtype=torch.bfloat16, quantize=Quantize(method="nf4"))
    with torch.no_grad():
        expected = trained.float().logits(TOKENS)  # the weights stay what they are; only the sums are exact
    merge(str(run), str(tmp_path / "out"))
    assert (logits(tmp_path / "out") - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_what_is_read_is_not_overwritten(runs, tiny_model: Path, tmp_path: Path) -> None:
    base, run = tmp_path / "base", tmp_path / "run"
    import_model(str(tiny_model), str(base))
    shutil.copytree(runs("lora"), run)
    config = run / "final" / "adapter_config.json"
    (config.parent / "manifest.json").unlink()
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(base)}))
    adapter = tmp_path / "adapter"
    export(str(run), str(adapter))  # has a manifest again
    shutil.copytree(adapter, run / "final", dirs_exist_ok=True)
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace(str(tiny_model), str(base)))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for verb, source, out, said in (
        (merge, run, run / "final", "would replace"),
        (merge, run, run / "merged", "in the run directory"),
        (merge, run, base, "would replace"),
        (merge, adapter, adapter, "would replace"),
        (merge, adapter, base, "would replace"),
        (export, run, run / "final", "would replace"),
        (export, run, run / "exported", "in the run directory"),
        (export, run, base, "would replace"),
        (import_model, base, base, "would replace"),
        (import_model, base, base / ".." / "base", "would replace"),
        (import_model, base, run / "final", "in the run directory"),
    ):
        with pytest.raises(InputError, match=said):
            verb(str(source), str(out))
    shutil.rmtree(run / "final")
    with pytest.raises(InputError, match="would replace"):
        export(str(run), str(base))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == {path: content for path, content in before.items() if path.parent != run / "final"}


def test_wrong_sources(runs, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter_config\.json in it"):
        merge(str(tiny_model), str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"no adapter_config\.json in it"):
        merge(str(runs("full")), str(tmp_path / "out"))
    with pytest.raises(InputError, match=r"no recipe\.yaml in it"):
        export(str(tiny_model), str(tmp_path / "out"))
    with pytest.raises(InputError, match="litrecipe model merge"):
        import_model(str(runs("lora") / "final"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_info(tiny_model: Path, runs, capsys: pytest.CaptureFixture[str]) -> None:
    assert info(str(tiny_model)) == 0
    said = capsys.readouterr().out
    for fact in ("57,072", "15,360", "4 of 12, 2 for keys and values", "tied to the embedding", "192 bytes a token"):
        assert fact in said
    for run in (runs("lora"), runs("lora") / "final"):
        info(str(run))
        assert "with a lora adapter" in capsys.readouterr().out


def test_as_verbs(litrecipe, tiny_model: Path, tmp_path: Path) -> None:
    litrecipe("model", "import", tiny_model, tmp_path / "out")
    assert "57,072 parameters" in litrecipe("model", "info", tmp_path / "out").stdout
    done = litrecipe("model", "import", tmp_path / "nothing", tmp_path / "other", check=False)
    assert done.returncode == 2 and done.stderr.startswith(f"litrecipe: error: model.source: {tmp_path / 'nothing'}: ")

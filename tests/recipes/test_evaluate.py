"""`litrecipe evaluate` on every kind of source."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.groups import EvaluateRecipe, Fabric, Generate, Model, Quantize
from litrecipe.recipes.evaluate import main

TEXT = "the quick brown fox jumps over the lazy dog and asks what the answer is " * 4
RECIPE = "model: {source: base}\ndata: {train: 'toy:units'}\nout_dir: run\n"


@pytest.fixture
def spec(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return f"perplexity:{tmp_path / 'text.txt'}"


def perplexity(source: object, spec: str, out: Path, **keys) -> float:
    recipe = EvaluateRecipe(model=Model(source=str(source)), tasks=[spec], out=str(out), **keys)
    assert main(recipe) == 0
    return json.loads(out.read_text())["results"][spec]["perplexity,none"]


def transformers_perplexity(model, folder: Path) -> float:
    import torch
    from transformers import AutoTokenizer

    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False).input_ids])
    with torch.no_grad():
        return math.exp(model(ids, labels=ids).loss.item())


def test_a_hugging_face_folder(tiny_model, spec, tmp_path, capsys) -> None:
    from transformers import AutoModelForCausalLM

    wanted = transformers_perplexity(AutoModelForCausalLM.from_pretrained(tiny_model), tiny_model)
    assert perplexity(tiny_model, spec, tmp_path / "results.json") == pytest.approx(wanted, rel=1e-5)
    printed = capsys.readouterr()
    assert f" {wanted:.4f}"[:6] in printed.out
    assert str(tmp_path / "results.json") in printed.err


def test_a_run_directory_is_its_final_model(tiny_model, spec, tmp_path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(RECIPE)
    with pytest.raises(InputError, match="no final model yet"):
        perplexity(run, spec, tmp_path / "results.json")
    (run / "final").symlink_to(tiny_model)
    direct = perplexity(tiny_model, spec, tmp_path / "direct.json")
    assert perplexity(run, spec, tmp_path / "results.json") == direct
    assert json.loads((tmp_path / "results.json").read_text())["config"]["model"] == str(run)


def test_a_peft_adapter_folder(tiny_model, spec, tmp_path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), settings)
    model.save_pretrained(tmp_path / "adapter")
    wanted = transformers_perplexity(model, tiny_model)
    measured = perplexity(tmp_path / "adapter", spec, tmp_path / "results.json")
    assert measured == pytest.approx(wanted, rel=1e-5)
    assert abs(measured - perplexity(tiny_model, spec, tmp_path / "base.json")) > 1e-2


def test_the_run_of_a_qlora_is_measured_on_a_quantised_base(tiny_model, spec, tmp_path, capsys) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    run = tmp_path / "run"
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), settings).save_pretrained(run / "final")
    (run / "recipe.yaml").write_text(RECIPE + "adapter: {method: lora}\nquantize: {method: nf4, double_quant: false}\n")
    nf4 = Quantize(method="nf4", double_quant=False)
    wanted = perplexity(run / "final", spec, tmp_path / "nf4.json", quantize=nf4)
    assert wanted != perplexity(run / "final", spec, tmp_path / "plain.json")
    assert perplexity(run, spec, tmp_path / "results.json") == wanted
    assert json.loads((tmp_path / "results.json").read_text())["config"]["quantize"] == "nf4"
    assert "base quantised to nf4" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 85), (signal.SIGINT, 130)])
def test_a_signal_ends_it_at_once(tiny_model, number, code) -> None:
    """There is nothing to save: 85 says, as in training, that the same command is to be run again."""
    words = ["evaluate", "--model", str(tiny_model), "--tasks", "exact_match:toy:units?n=2700", "--batch_tokens", "600"]
    command = [sys.executable, "-m", "litrecipe", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(8)
    process.send_signal(number)
    out, err = process.communicate(timeout=15)
    assert process.returncode == code, err
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_a_quantised_model(tiny_model, spec, tmp_path, method) -> None:
    plain = perplexity(tiny_model, spec, tmp_path / "plain.json")
    quantised = perplexity(tiny_model, spec, tmp_path / "results.json", quantize=Quantize(method=method))
    assert quantised != plain
    assert quantised == pytest.approx(plain, rel=0.05)


def test_bf16(tiny_model, spec, tmp_path) -> None:
    plain = perplexity(tiny_model, spec, tmp_path / "plain.json")
    rounded = perplexity(tiny_model, spec, tmp_path / "results.json", fabric=Fabric(precision="bf16-true"))
    assert rounded != plain
    assert rounded == pytest.approx(plain, rel=0.02)


def test_samples_beside_the_results(tiny_model, tmp_path) -> None:
    task = "exact_match:toy:units?n=3"
    recipe = EvaluateRecipe(
        model=Model(source=str(tiny_model)),
        tasks=[task],
        limit=2,
        generate=Generate(max_new_tokens=4),
        log_samples=True,
        out=str(tmp_path / "deep" / "results.json"),
    )
    assert main(recipe) == 0
    [samples] = (tmp_path / "deep").glob("results.samples.*.jsonl")
    assert [json.loads(line)["doc_id"] for line in samples.read_text().splitlines()] == [0, 1]


def test_mistakes_are_told_before_the_model_is_opened(tmp_path) -> None:
    recipe = EvaluateRecipe(model=Model(source="no/such/model"), tasks=["perplexty:x.txt", "exact_match"])
    with pytest.raises(InputError) as caught:
        main(recipe)
    assert len(caught.value.mistakes) == 2
    recipe = EvaluateRecipe(tasks=["exact_match:toy:unit"], log_samples=True)
    with pytest.raises(InputError) as caught:
        main(recipe)
    assert [mistake.split(":")[0] for mistake in caught.value.mistakes] == ["log_samples", "tasks"]
    with pytest.raises(InputError, match="is a folder"):
        main(EvaluateRecipe(tasks=["exact_match:toy:units"], out=str(tmp_path)))


@pytest.mark.parametrize("out", ["/proc/x", "/proc/x/y.json", "/dev/null/x.json"])
def test_a_place_that_cannot_be_written_is_told_before_the_model_is_opened(spec, out: str) -> None:
    with pytest.raises(InputError, match=f"^out: {out}: .*: name a file that can be written"):
        main(EvaluateRecipe(model=Model(source="nowhere"), tasks=[spec], out=out))


def test_a_disk_that_fills_up_leaves_the_table(tiny_model, spec, capsys) -> None:
    with pytest.raises(InputError, match="out: /dev/full: No space left"):
        main(EvaluateRecipe(model=Model(source=str(tiny_model)), tasks=[spec], out="/dev/full"))
    assert "perplexity" in capsys.readouterr().out

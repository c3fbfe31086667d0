"""The recipes that ship with the program."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from litrecipe import hub
from litrecipe.config import schema
from litrecipe.config.errors import InputError
from litrecipe.config.groups import DpoRecipe, EvaluateRecipe, FinetuneRecipe, RewardRecipe
from litrecipe.config.merge import hub_folder, hub_names
from litrecipe.config.online import GrpoRecipe, PpoRecipe, RlooRecipe
from litrecipe.config.pipeline import PipelineRecipe
from litrecipe.config.recipes import RECIPES
from litrecipe.config.rounds import IterativeDpoRecipe, RejectionSamplingRecipe

ALIGNING = {
    "reward": RewardRecipe,
    "dpo": DpoRecipe,
    "ppo": PpoRecipe,
    "grpo": GrpoRecipe,
    "rloo": RlooRecipe,
    "iterative-dpo": IterativeDpoRecipe,
    "rejection-sampling": RejectionSamplingRecipe,
    "pipeline": PipelineRecipe,
}


@pytest.mark.parametrize("name", hub_names())
def test_a_recipe_says_what_it_is(name: str) -> None:
    path = hub_folder() / f"{name}.yaml"
    words, hardware = hub.headline(path)
    assert words and hardware
    kind = hub.kind_of(path)  # of the folder's verb; of an experiment, by its keys
    verbs = [verb for verb, other in RECIPES.items() if other is kind]
    assert any(f"#   litrecipe {verb} --config {name}\n" in path.read_text() for verb in verbs), verbs


def test_the_recipes_that_must_be_there() -> None:
    for folder, recipes in {
        "finetune/smollm2-135m": ("full", "lora", "dora", "qlora"),
        "finetune/llama-3.1-8b": ("lora", "qlora", "full-fsdp"),
        "finetune/openelm-270m": ("lora", "dora"),
        "pretrain/smollm2-135m": ("scratch", "continue", "decay-on-instructions"),
        "pretrain": (
            *("pythia-14m", "openelm-270m", "mixtral-tiny", "llama-3.1-8b", "afm-3b-three-stage", "qwen2-two-stage"),
            *("gemma2-2b-distil", "bloomberg-mix", "books-14m"),
        ),
        "align/dpo/openelm-270m": ("hinge",),
        "finetune/llama-3.2-1b": ("lora", "qlora", "full-fsdp"),
        "align/reward/smollm2-135m": ("lora", "hydra"),
        "align/reward/llama-3.1-8b": ("lora", "qlora", "full-fsdp", "hydra-nf4"),
        "align/dpo/smollm2-135m": ("full", "lora", "dora"),
        "align/dpo/llama-3.1-8b": ("lora", "qlora", "full-fsdp"),
        "align/ppo/smollm2-135m": ("lora", "hydra"),
        "align/ppo/llama-3.1-8b": ("hydra-nf4",),
        "align/grpo/smollm2-135m": ("lora",),
        "align/grpo/llama-3.1-8b": ("lora",),
        "align/rloo/smollm2-135m": ("lora", "mdloo"),
        "align/iterative-dpo/smollm2-135m": ("lora",),
        "align/iterative-dpo/llama-3.1-8b": ("lora",),
        "align/rejection-sampling/smollm2-135m": ("lora",),
    }.items():
        assert {f"{folder}/{recipe}" for recipe in recipes} <= set(hub_names())


def test_recipes_of_preference_learning_belong_to_their_verbs() -> None:
    """What they hold out is never trained on, and Llama 3's settings are those of its report."""
    for name in hub_names():
        if not name.startswith("align/"):
            continue
        kind = hub.kind_of(hub_folder() / f"{name}.yaml")
        assert kind is ALIGNING[name.split("/")[1]]
        recipe = schema.load(kind, [name])
        for stage in recipe.stages.values() if isinstance(recipe, PipelineRecipe) else [recipe]:
            data = (stage.recipe if isinstance(recipe, PipelineRecipe) else stage).data
            assert "test" not in data.train and "test" in (data.val or "test")
            assert data.val or isinstance(recipe, PipelineRecipe)
    recipe = schema.load(DpoRecipe, ["align/dpo/llama-3.1-8b/full-fsdp"])
    assert (recipe.dpo.beta, recipe.dpo.nll_coef, recipe.dpo.mask_format_tokens) == (0.1, 0.2, True)
    assert recipe.optim.lr == 1e-5


def test_all_are_valid_and_large_models_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert hub.validate([]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert set(lines) == set(hub_names())
    assert lines["finetune/llama-3.1-8b/full-fsdp"] == "valid, 8,030,261,248 parameters, all trained"
    assert lines["finetune/llama-3.2-1b/full-fsdp"] == "valid, 1,235,814,400 parameters, all trained"
    for name, count in (
        ("llama-3.1-8b", 8_030_261_248),
        ("openelm-270m", 271_527_168),
        ("pythia-14m", 14_067_712),
        ("gemma2-2b-distil", 2_614_341_888),
        ("qwen2-two-stage", 494_032_768),
        ("smollm2-135m/scratch", 134_515_008),
    ):
        assert lines[f"pretrain/{name}"] == f"valid, {count:,} parameters, all trained"
    # rank 16 on seven projections: r * (in + out) each
    per_layer = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    for verb in ("finetune", "align/dpo"):
        assert f" {32 * per_layer:,} more are trained" in lines[f"{verb}/llama-3.1-8b/lora"]
    # without the head of the vocabulary, with a score that trains
    head, score = 128_256 * 4096, 4096
    assert lines["align/reward/llama-3.1-8b/lora"] == (
        f"valid, {8_030_261_248 - head:,} parameters, {32 * per_layer + score:,} more are trained in the adapter"
    )
    assert (
        lines["align/reward/llama-3.1-8b/full-fsdp"]
        == f"valid, {8_030_261_248 - head + score:,} parameters, all trained"
    )
    # one base under the adapters of policy and critic, and the critic's score
    assert lines["align/ppo/llama-3.1-8b/hydra-nf4"] == (
        f"valid, 8,030,261,248 parameters, {2 * 32 * per_layer + score:,} more are trained in the adapter"
    )


def test_validate_tells_the_mistakes_of_all(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: {source: m}\ndata: {train: 'toy:unit?n=3'}\n")
    (tmp_path / "b.yaml").write_text("model: {source: m}\ntasks: [x]\nlimit: 0\n")
    with pytest.raises(InputError) as wrong:
        hub.validate([str(tmp_path / "a.yaml"), "no-such", str(tmp_path / "b.yaml")])
    toy, missing, limit = wrong.value.mistakes
    assert "data.train" in toy and "units" in toy
    assert "no-such" in missing
    assert "b.yaml:3: limit: 0" in limit


@pytest.mark.parametrize(
    ("config", "message"),
    [('{"model_type": "nothing known"}', "model_type: nothing known"), ("{", "not valid JSON")],
)
def test_validate_reads_the_model_a_recipe_names(tmp_path: Path, config: str, message: str) -> None:
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "r.yaml").write_text(f"model: {{source: {tmp_path}/config.json}}\ndata: {{train: d}}\n")
    with pytest.raises(InputError) as wrong:
        hub.validate([str(tmp_path / "r.yaml")])
    (mistake,) = wrong.value.mistakes
    assert mistake.startswith(f"{tmp_path}/r.yaml: {tmp_path}/config.json: ")
    assert message in mistake


def test_validate_takes_no_other_config_for_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "r.yaml").write_text("model: {source: org/name}\ndata: {train: d}\n")
    assert hub.validate([str(tmp_path / "r.yaml")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/r.yaml: valid\n"


def test_validate_counts_models_that_are_only_read(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.yaml").write_text(f"model: {{source: {tiny_model}}}\ntasks: ['exact_match:toy:units?n=3&seed=0']\n")
    assert hub.validate([str(tmp_path / "e.yaml")]) == 0
    assert capsys.readouterr().out.endswith(": valid, 57,072 parameters\n")


def test_validate_looks_tasks_up(tmp_path: Path) -> None:
    (tmp_path / "e.yaml").write_text("model: {source: m}\ntasks: ['exact_match:toy:unit']\n")
    (tmp_path / "f.yaml").write_text("model: {source: m}\ndata: {train: d}\neval: {tasks: ['exact_mach:x']}\n")
    with pytest.raises(InputError) as wrong:
        hub.validate([str(tmp_path / "e.yaml"), str(tmp_path / "f.yaml")])
    toy, task = wrong.value.mistakes
    assert toy.startswith(f"{tmp_path}/e.yaml: ") and "units" in toy
    assert task.startswith(f"{tmp_path}/f.yaml: ") and "exact_match" in task


def test_what_cannot_be_read_or_written_is_wrong_input(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"model: \xff\n")
    with pytest.raises(InputError, match="byte 7 is not UTF-8"):
        hub.show(str(tmp_path / "r.yaml"))
    with pytest.raises(InputError, match=r"/proc/x\.yaml: "):
        hub.copy("finetune/smollm2-135m/lora", "/proc/x.yaml")


def test_the_kind_of_a_file_is_seen_by_its_keys(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_text("model: {source: m}\ntrain: {seed: 1}\n")
    (tmp_path / "e.yaml").write_text("model: {source: m}\ntasks: [a]\n")
    (tmp_path / "x.yaml").write_text("extends: evaluate/smollm2-135m/quickstart\n")
    assert hub.kind_of(tmp_path / "f.yaml") is FinetuneRecipe
    assert hub.kind_of(tmp_path / "e.yaml") is EvaluateRecipe
    assert hub.kind_of(tmp_path / "x.yaml") is EvaluateRecipe


PIPELINE = """\
stages:
  sft: {verb: finetune, extends: finetune/smollm2-135m/full, data: {train: 'toy:units?n=9'}}
  dpo:
    verb: align dpo
    model: {source: 'stage:sft'}
    data: {train: 'stage:sft/pairs.jsonl', val: 'toy:unit-pairs'}
    eval: {tasks: ['exact_mach:x']}
"""


def test_pipelines_and_experiments_are_known_by_their_keys(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PIPELINE)
    (tmp_path / "q.yaml").write_text("extends: p.yaml\nseed: 4\n")
    assert hub.kind_of(tmp_path / "p.yaml") is hub.kind_of(tmp_path / "q.yaml") is PipelineRecipe
    assert hub.kind_of(hub_folder() / "align" / "pipeline" / "smollm2-135m.yaml") is PipelineRecipe


def test_validate_checks_each_stage_and_names_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But for what other stages make, which is not there."""
    (tmp_path / "p.yaml").write_text(PIPELINE)
    with pytest.raises(InputError) as wrong:
        hub.validate([str(tmp_path / "p.yaml")])
    [toy] = wrong.value.mistakes
    assert toy.startswith(f"{tmp_path}/p.yaml:6: stages.dpo.data.val: toy:unit-pairs")
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("toy:unit-", "toy:units-"))
    with pytest.raises(InputError, match=rf"{tmp_path}/p\.yaml:7: stages\.dpo\.eval\.tasks: exact_mach:x"):
        hub.validate([str(tmp_path / "p.yaml")])
    (tmp_path / "p.yaml").write_text(PIPELINE.replace("toy:unit-", "toy:units-").replace("mach:x", "match:toy:units"))
    assert hub.validate([str(tmp_path / "p.yaml")]) == 0
    assert "p.yaml: valid, 2 stages: sft" in capsys.readouterr().out


def test_a_stage_that_extends_what_lies_beside_it_finds_it_from_a_copy(tmp_path: Path) -> None:
    source = hub_folder() / "finetune" / "smollm2-135m" / "dora.yaml"
    assert hub._extends_by_name("    extends: lora.yaml\n", source) == "    extends: finetune/smollm2-135m/lora\n"
    assert hub._extends_by_name("extends: no/such.yaml\n", source) == "extends: no/such.yaml\n"


def test_ls_names_every_recipe_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    hub.ls()
    first_words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert first_words[1:] == hub_names()


def test_show_as_written_and_resolved(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hub.show("finetune/smollm2-135m/dora")
    assert capsys.readouterr().out == (hub_folder() / "finetune/smollm2-135m/dora.yaml").read_text()
    hub.show("finetune/smollm2-135m/dora", resolved=True)
    (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
    assert schema.load(FinetuneRecipe, [tmp_path / "r.yaml"]) == schema.load(
        FinetuneRecipe, ["finetune/smollm2-135m/dora"]
    )


@pytest.mark.parametrize("name", hub_names())
def test_a_copy_means_the_same_away_from_the_hub(name: str, tmp_path: Path) -> None:
    kind = hub.kind_of(hub_folder() / f"{name}.yaml")
    hub.copy(name, str(tmp_path / "mine.yaml"))
    assert schema.load(kind, [tmp_path / "mine.yaml"]) == schema.load(kind, [name])


def test_cp_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("precious")
    with pytest.raises(InputError, match=r"mine\.yaml: exists"):
        hub.copy("finetune/smollm2-135m/lora", str(tmp_path / "mine.yaml"))
    assert (tmp_path / "mine.yaml").read_text() == "precious"
    with pytest.raises(InputError, match="no such folder"):
        hub.copy("finetune/smollm2-135m/lora", str(tmp_path / "none" / "mine.yaml"))
    hub.copy("finetune/smollm2-135m/lora", str(tmp_path))
    assert (tmp_path / "lora.yaml").is_file()


def test_the_llama_configs_are_those_of_the_models() -> None:
    import json

    from litrecipe.model.families import read_architecture

    facts = {
        "llama-3.1-8b": SimpleNamespace(
            hidden_size=4096, num_layers=32, head_dim=128, tie_embeddings=False, factor=8.0
        ),
        "llama-3.2-1b": SimpleNamespace(hidden_size=2048, num_layers=16, head_dim=64, tie_embeddings=True, factor=32.0),
    }
    for name, fact in facts.items():
        architecture = read_architecture(json.loads((hub_folder() / "finetune" / name / "config.json").read_text()))
        for key, value in vars(fact).items():
            assert (architecture.ropes[0].scaling or {}).get(key, getattr(architecture, key, None)) == value

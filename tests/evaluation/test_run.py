"""Whole evaluations on a tiny model: local lm-eval tasks beside lm-eval's own backend, and the built-in tasks."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Generate
from litrecipe.evaluation.run import evaluate, plan, table, write

CHOICE = """\
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: multiple_choice
validation_split: validation
doc_to_text: "Question: {{{{goal}}}}\\nAnswer:"
doc_to_target: label
doc_to_choice: "{{{{[sol1, sol2]}}}}"
num_fewshot: 1
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 2.5
"""
ANSWER = """\
task: tiny_answer
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {data}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{goal}}}}"
doc_to_target: sol1
generation_kwargs:
  until: ["e"]
  max_gen_toks: 6
metric_list:
  - metric: exact_match
"""
ROWS = [
    {
        "goal": f"How do I ready cage {n}?",
        "sol1": f"Provide {n} paper strips",
        "sol2": f"Provide {n} dogs",
        "label": n % 2,
    }
    for n in range(12)
]
TOKENS = ["tokenizer_pad_token", "tokenizer_eos_token", "tokenizer_bos_token", "eot_token_id", "max_length"]


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory) -> Path:
    """Two lm-eval tasks over a local file."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "choice.yaml").write_text(CHOICE.format(data=data))
    (folder / "answer.yaml").write_text(ANSWER.format(data=data))
    return folder


@pytest.fixture(autouse=True)
def no_shared_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_all_unknown_tasks_are_told_with_the_nearest_names(task_folder) -> None:
    with pytest.raises(InputError) as caught:
        plan(["perplexity", "perplexty:a.txt", "no/such/folder:task", "exact_match:toy:unit"])
    assert caught.value.mistakes == [
        "tasks: perplexity: needs data: perplexity:FILE",
        "tasks: perplexty:a.txt: no such folder or built-in task: did you mean `perplexity:a.txt`?",
        "tasks: no/such/folder:task: no such folder or built-in task",
        caught.value.mistakes[3],
    ]
    assert "did you mean units" in caught.value.mistakes[3]
    with pytest.raises(InputError, match="tiny_chioce: no such task: did you mean `tiny_choice`"):
        plan([f"{task_folder}:tiny_chioce"])
    with pytest.raises(InputError, match=r"^eval\.tasks: .*:a: no such task: `litrecipe evaluate --help` tells"):
        plan([f"{task_folder}:a"], key="eval.tasks")
    with pytest.raises(InputError, match="nothing to measure"):
        plan([])


def test_names_of_lm_eval(task_folder) -> None:
    with pytest.raises(InputError, match="tasks: piqaa: no such task: did you mean `piqa`"):
        plan(["arc_easy", "piqaa", f"{task_folder}:tiny_choice"])
    found = plan(["piqa", "arc_e?sy", "mmlu", str(task_folder)]).lm_eval
    assert found == ["tiny_answer", "tiny_choice", "piqa", "arc_easy", "mmlu"]


def test_local_tasks_equal_lm_evals_own_backend(tiny, tiny_hf, task_folder) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    wanted = simple_evaluate(tiny_hf, tasks=["tiny_choice", "tiny_answer"], task_manager=manager, limit=10)
    ours = evaluate(tiny.model, tiny.tokenizer, [str(task_folder)], limit=10, log_samples=True, chatty=False)
    for task in ("tiny_choice", "tiny_answer"):
        assert ours["results"][task] == wanted["results"][task]
        for mine, theirs in zip(ours["samples"][task], wanted["samples"][task], strict=True):
            assert mine["arguments"] == theirs["arguments"]
            assert mine["doc_hash"] == theirs["doc_hash"]
            if task == "tiny_answer":
                assert mine["resps"] == theirs["resps"]
            else:
                assert [r[0][0] for r in mine["resps"]] == pytest.approx([r[0][0] for r in theirs["resps"]], abs=1e-3)
    for key in ("versions", "n-shot", "higher_is_better", "n-samples", "group_subtasks"):
        assert ours[key] == wanted[key]
    assert set(wanted) <= set(ours)
    assert {key: ours[key] for key in TOKENS} == {key: wanted[key] for key in TOKENS}


def test_fewshot_can_be_chosen(tiny, task_folder) -> None:
    results = evaluate(
        tiny.model,
        tiny.tokenizer,
        [f"{task_folder}:tiny_choice"],
        limit=2,
        num_fewshot=3,
        log_samples=True,
        chatty=False,
    )
    assert results["n-shot"] == {"tiny_choice": 3}
    assert results["samples"]["tiny_choice"][0]["arguments"][0][0].count("Question:") == 4


def test_a_task_whose_data_is_missing(tiny, task_folder, tmp_path) -> None:
    (tmp_path / "lost.yaml").write_text(CHOICE.format(data=tmp_path / "gone.jsonl").replace("tiny_choice", "lost"))
    with pytest.raises(InputError, match=r"tasks: lost: the data cannot be had .*gone.jsonl"):
        evaluate(tiny.model, tiny.tokenizer, [str(tmp_path)], chatty=False)


def test_perplexity_is_that_of_the_logits(tiny, tmp_path) -> None:
    import torch

    text = "The quick brown fox\njumps over the lazy dog. é 🎈 " * 8
    (tmp_path / "text.txt").write_text(text)
    spec = f"perplexity:{tmp_path / 'text.txt'}?window=16&windows=5"
    results = evaluate(tiny.model, tiny.tokenizer, [spec], log_samples=True, chatty=False)
    ids = torch.tensor(tiny.tokenizer.encode(text))
    nll = 0.0
    for window in ids.split(16)[:5]:
        logps = tiny.model.logits(window).log_softmax(-1)
        nll -= logps[:-1].gather(1, window[1:, None]).sum().item()
    measured = results["results"][spec]
    assert measured["perplexity,none"] == pytest.approx(math.exp(nll / (5 * 15)), rel=1e-5)
    spoken = sum(len(tiny.tokenizer.decode(window[1:].tolist()).encode()) for window in ids.split(16)[:5])
    assert measured["bits_per_byte,none"] == pytest.approx(nll / math.log(2) / spoken, rel=0.02)
    assert results["n-samples"][spec] == {"original": len(ids.split(16)), "effective": 5}
    assert sum(sample["nll"] for sample in results["samples"][spec]) == pytest.approx(nll, rel=1e-5)
    assert sum(sample["tokens"] for sample in results["samples"][spec]) == 75


def test_a_window_longer_than_the_model_reads(tiny, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("text " * 100)
    with pytest.raises(InputError, match="window=257: the model reads at most 256 tokens"):
        evaluate(tiny.model, tiny.tokenizer, [f"perplexity:{tmp_path / 'text.txt'}?window=257"], chatty=False)


def test_a_model_in_training_is_measured_without_dropout_and_goes_on_training(tiny, tmp_path) -> None:
    tiny.model.train()
    seen = []
    handle = tiny.model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    (tmp_path / "text.txt").write_text("text " * 100)
    evaluate(tiny.model, tiny.tokenizer, [f"perplexity:{tmp_path / 'text.txt'}"], chatty=False)
    handle.remove()
    assert seen == [False]
    assert tiny.model.training
    tiny.model.eval()


def test_exact_match_counts_right_answers(tiny, tmp_path) -> None:
    """References are the model's own greedy answers for half of the rows."""
    spec = "exact_match:toy:units?n=6&seed=1"
    settings = Generate(max_new_tokens=8)
    first = evaluate(tiny.model, tiny.tokenizer, [spec], generate=settings, log_samples=True, chatty=False)
    assert first["results"][spec]["exact_match,none"] == 0.0
    rows = [
        {**sample["doc"], "answer": sample["resps"][0][0] if index < 3 else "else"}
        for index, sample in enumerate(first["samples"][spec])
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows))
    second = evaluate(tiny.model, tiny.tokenizer, [f"exact_match:{path}"], generate=settings, chatty=False)
    measured = second["results"][f"exact_match:{path}"]
    assert measured["exact_match,none"] == 0.5
    assert measured["exact_match_stderr,none"] == pytest.approx(math.sqrt(0.3 / 6))
    assert "samples" not in second


def test_results_file_and_table(tiny, task_folder, tmp_path) -> None:
    specs = [f"{task_folder}:tiny_choice", "exact_match:toy:units?n=3"]
    results = evaluate(
        tiny.model, tiny.tokenizer, specs, limit=2, log_samples=True, generate=Generate(max_new_tokens=4), chatty=False
    )
    written = write(results, tmp_path / "out" / "results.json")
    assert [path.name for path in written] == [
        "results.json",
        "results.samples.tiny_choice.jsonl",
        "results.samples.exact_match_toy_units_n_3.jsonl",
    ]
    loaded = json.loads(written[0].read_text())
    assert loaded["results"]["tiny_choice"]["acc,none"] == results["results"]["tiny_choice"]["acc,none"]
    assert loaded["n-samples"][specs[1]] == {"original": 3, "effective": 2}
    assert len(written[1].read_text().splitlines()) == len(written[2].read_text().splitlines()) == 2
    shown = table(results)
    assert shown.row_count == 3
    assert list(shown.columns[1].cells) == ["acc", "acc_norm", "exact_match"]
    assert list(shown.columns[4].cells) == ["2", "2", "2"]


def test_built_in_tasks_do_without_lm_eval(varied_model, tmp_path) -> None:
    (tmp_path / "text.txt").write_text("some text " * 20)
    program = f"""
import sys
from litrecipe.config import groups
from litrecipe.recipes.evaluate import main
main(groups.EvaluateRecipe(
    model=groups.Model(source={str(varied_model)!r}),
    tasks=["exact_match:toy:units?n=2", {f"perplexity:{tmp_path / 'text.txt'}"!r}],
    generate=groups.Generate(max_new_tokens=4),
))
heavy = {{"lm_eval", "datasets", "transformers", "peft"}} & set(sys.modules)
assert not heavy, heavy
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "exact_match" in done.stdout and "bits_per_byte" in done.stdout


def test_piqa_from_a_local_file(tiny, tiny_hf, shared, tmp_path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = CHOICE.format(data=shared / "data/eval/piqa_val.jsonl.gz").replace("tiny_choice", "piqa_local")
    (tmp_path / "piqa.yaml").write_text(task.replace("num_fewshot: 1", "num_fewshot: 0"))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    wanted = simple_evaluate(tiny_hf, tasks=["piqa_local"], task_manager=manager, limit=20)
    ours = evaluate(tiny.model, tiny.tokenizer, [str(tmp_path)], limit=20, chatty=False)
    assert ours["results"]["piqa_local"] == wanted["results"]["piqa_local"]

#!/usr/bin/env bash
# The main job on a real model: measure, fine-tune with LoRA, measure again, and ask one question. `make quickstart`
# runs it after set-up. OUT chooses another run directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH="$PWD/.venv/bin:$PATH"
model=.models/SmolLM2-135M-Instruct.Q4_1.gguf
recipe=finetune/smollm2-135m/lora
out=${OUT:-runs/quickstart}
test_split='toy:units?n=64&seed=0&split=test'
question='Convert 2.5 km to m.'

score() {  # the exact-match score in a results file, as a percentage
    python - "$1" <<'PY'
import json, sys
(task,) = json.load(open(sys.argv[1]))["results"].values()
print(f"{100 * task['exact_match,none']:.1f} %")
PY
}

mkdir -p "$out"
began=$SECONDS
echo "== 1/4 the model as it comes, on 64 questions it will not be trained on"
litrecipe evaluate --model "$model" --tasks "exact_match:$test_split" --out "$out/before.json"
echo "== 2/4 LoRA fine-tuning with the recipe $recipe"
litrecipe finetune --config "$recipe" --model "$model" --out_dir "$out"
echo "== 3/4 the fine-tuned model on the same questions"
litrecipe evaluate --model "$out/final" --tasks "exact_match:$test_split" --out "$out/after.json"
echo "== 4/4 one answer"
echo "$question"
litrecipe generate --model "$out/final" --prompt "$question"

echo
echo "exact match before: $(score "$out/before.json")    after: $(score "$out/after.json")    ($((SECONDS - began)) s)"
echo "The run is in $out: recipe.yaml, metrics.jsonl, checkpoints/, final/. Talk to it: litrecipe chat --model $out/final"

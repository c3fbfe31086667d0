#!/usr/bin/env bash
# The main job on a real model: measure, fine-tune with LoRA, measure again, and ask one question. `make quickstart`
# runs it after set-up. OUT chooses another run directory.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PATH="$PWD/.venv/bin:$PATH"
train=finetune/smollm2-135m/lora
measure=evaluate/smollm2-135m/quickstart
out=${OUT:-runs/quickstart}
question='How many cm are 37 m? Answer with number and unit only.'

score() {  # the exact-match score in a results file, as a percentage
    python - "$1" <<'PY'
import json, sys
(task,) = json.load(open(sys.argv[1]))["results"].values()
print(f"{100 * task['exact_match,none']:.1f} %")
PY
}

if [ -e "$out/checkpoints" ]; then
    echo "quickstart: $out holds a run already: remove it, or set OUT to another folder" >&2
    exit 2
fi
mkdir -p "$out"
began=$SECONDS
echo "== 1/4 the model as it comes, on 64 questions it will not be trained on"
litrecipe evaluate --config "$measure" --out "$out/before.json"
echo "== 2/4 fine-tuning with the recipe $train"
litrecipe finetune --config "$train" --out_dir "$out"
echo "== 3/4 the fine-tuned model on the same questions"
litrecipe evaluate --config "$measure" --model "$out/final" --out "$out/after.json"
echo "== 4/4 one answer to: $question"
litrecipe generate --model "$out/final" --prompt "$question"

echo
echo "exact match before: $(score "$out/before.json")    after: $(score "$out/after.json")    ($((SECONDS - began)) s)"
echo "The run is in $out: recipe.yaml, metrics.jsonl, checkpoints/, final/. Talk to it:"
echo "  .venv/bin/litrecipe chat --model $out/final"

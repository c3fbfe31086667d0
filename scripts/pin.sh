#!/usr/bin/env bash
# Writes constraints.txt from what is installed in .venv. Run the whole suite before committing the result.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv}

# A pin with a local label such as torch 2.13.0+cpu would fit one build only, so the label is dropped.
pins=$("$VENV/bin/python" -m pip freeze --exclude-editable 2>/dev/null | sed -E 's/^([^=]+==[^+]+)\+.*/\1/')
cat > constraints.txt <<TEXT
# The set of versions that litrecipe is tested with, for \`pip install -c constraints.txt\`.
# torch carries no +cpu or +cu label, so that the pin fits whichever build your machine offers; keep it in every later
# pip command, or another package may replace torch. Refresh with \`make constraints\`, then run the tests.
$pins
TEXT

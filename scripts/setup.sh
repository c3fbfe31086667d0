#!/usr/bin/env bash
# Makes .venv with litrecipe (editable), every extra and the versions of constraints.txt. Does nothing when nothing
# changed. PYTHON chooses the interpreter (3.11 or newer), VENV another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
stamp="$VENV/.litrecipe-setup"
wanted=$(cat pyproject.toml constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)

if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "setup: $PYTHON is $("$PYTHON" --version 2>&1), litrecipe needs Python 3.11 or newer: set PYTHON=/path/to/python" >&2
    exit 2
fi
if [ ! -x "$VENV/bin/python" ]; then
    echo "setup: creating $VENV"
    "$PYTHON" -m venv "$VENV"
fi

install() {
    if ! "$VENV/bin/python" -m pip install -qq --disable-pip-version-check --root-user-action ignore \
        --constraint constraints.txt "$@"; then
        echo "setup: pip could not install: $*" >&2
        echo "setup: the lines above are pip's own; without a network, point PIP_FIND_LINKS at a folder of wheels" >&2
        exit 1
    fi
}

# torch comes first and pinned: installed after anything that asks for it without a version, pip would take the newest
# build with several gigabytes of CUDA packages even where a fitting one is at hand.
echo "setup: installing torch"
install "$(grep '^torch==' constraints.txt)" hatchling
echo "setup: installing litrecipe and its extras"
install --no-build-isolation --editable '.[dedup,eval,gguf,loggers,rewards,dev]'

# A torchvision that does not fit torch breaks every `import torchmetrics` and with it Lightning and transformers.
# litrecipe does not need it, so a broken one is removed and a working one left alone.
if ! "$VENV/bin/python" - 2> /dev/null <<'PY'
import importlib.util
if importlib.util.find_spec("torchvision") is not None:
    import torchvision
PY
then
    echo "setup: the installed torchvision does not fit this torch: removing it (litrecipe does not use it)" >&2
    "$VENV/bin/python" -m pip uninstall --quiet --yes --disable-pip-version-check torchvision
fi

echo "$wanted" > "$stamp"
echo "setup: done, use $VENV/bin/litrecipe"

# What people run in a checkout. `make` alone lists it.
.DEFAULT_GOAL := help
SHELL := /bin/bash
BIN := .venv/bin

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

setup:  ## create .venv and install everything at the tested versions
	@scripts/setup.sh

model: setup  ## fetch the real model (SmolLM2-135M-Instruct, 92 MB) into .models/
	@$(BIN)/python scripts/fetch_model.py

quickstart: setup model  ## evaluate, fine-tune and evaluate again on two CPU cores
	@scripts/quickstart.sh

# Most tests start processes, which take their time to import: workers side by side, with a thread each.
test: setup model  ## all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

lint: setup  ## ruff: format and rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup  ## mypy
	$(BIN)/mypy

check: lint types  ## what to run before a commit: lint, types, the fast tests
	$(BIN)/pytest -q -m 'not slow and not real_model'

format: setup  ## let ruff format and mend the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup model  ## the benchmarks that need no GPU (long); PEERS='--peers-python …' measures others beside ours
	$(BIN)/python benchmarks/quickstart.py
	$(BIN)/python benchmarks/perplexity.py
	$(BIN)/python benchmarks/first_use.py
	$(BIN)/python benchmarks/prepare.py
	$(BIN)/python benchmarks/pretrain.py $(PEERS)
	$(BIN)/python benchmarks/books.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/finetune.py $(PEERS)
	$(BIN)/python benchmarks/dpo.py $(PEERS)
	$(BIN)/python benchmarks/preferences.py
	$(BIN)/python benchmarks/sampling.py
	$(BIN)/python benchmarks/hydra.py
	$(BIN)/python benchmarks/bandit.py
	$(BIN)/python benchmarks/ladder.py
	$(BIN)/python benchmarks/budget.py
	$(BIN)/python benchmarks/smollm2_ppo.py
	$(BIN)/python benchmarks/kills.py
	$(BIN)/python benchmarks/malformed.py
	$(BIN)/python benchmarks/sharding.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/preemption.py
	$(BIN)/python benchmarks/reliability.py

gpu-check: setup  ## what only a GPU shows, in under ten minutes
	$(BIN)/python benchmarks/gpu_check.py

constraints: setup  ## pin constraints.txt to the versions in .venv
	@scripts/pin.sh

clean:  ## remove what was built or cached (not .venv, .models or runs)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help setup model quickstart test lint types check format bench gpu-check constraints clean

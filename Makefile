# Everything a person types. Needs make and Python 3.11 or newer with venv; nothing is installed outside .venv.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
ARGS ?=

.PHONY: demo test test-wide lint types docs evidence evidence-process evidence-reward-models bench wheel clean

# Train the embedded job, about five minutes on two cores. An earlier demo is kept once, as runs/demo.previous.
demo: $(INSTALLED)
	@$(BIN)/python -c "import fcntl, os; \
	os.path.exists('runs/demo/lock') and fcntl.flock(open('runs/demo/lock'), fcntl.LOCK_EX | fcntl.LOCK_NB)" \
	2>/dev/null || { echo "A demo is running already, in runs/demo."; exit 1; }
	@if [ -d runs/demo ]; then rm -rf runs/demo.previous && mv runs/demo runs/demo.previous; fi
	@$(BIN)/groupwise train --run runs/demo

# make test ARGS="-k resume" runs some of it. A file's tests stay in one process: they share what they made.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile $(ARGS)

# Every causal class that transformers has, against the stock model, about half an hour; what differs from docs/models.json
# fails. make test-wide ARGS="--part 2/8" runs an eighth of it.
test-wide: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 8 -m wide tests/wide $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .

types: $(INSTALLED)
	$(BIN)/mypy

# The pages that are written by the code; a test fails when they are stale.
docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

# Three seeds of the embedded job; the results are committed.
evidence: $(INSTALLED)
	$(BIN)/python benchmarks/evidence.py

# Outcome against process supervision, about an hour; cells that are there are kept.
evidence-process: $(INSTALLED)
	$(BIN)/python -m benchmarks.evidence_process $(ARGS)

# Recipes that train a reward model, with and without refresh and replay, about an hour; cells that are there are kept.
evidence-reward-models: $(INSTALLED)
	$(BIN)/python -m benchmarks.evidence_reward_models $(ARGS)

# Speed against TRL, generate and vLLM's CPU build, about an hour; rows that are there for this commit are kept.
# make bench ARGS="--cases tiny-p16 --pairs 2" measures some of it, ARGS=--table prints what is stored.
bench: $(INSTALLED)
	@$(BIN)/python -m benchmarks.speed $(ARGS)

wheel: $(INSTALLED)
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist

# Generated files only: runs/ stays, it is yours.
clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis src/*.egg-info

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "groupwise needs Python 3.11 or newer: install it, or name it with make PYTHON=..."; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

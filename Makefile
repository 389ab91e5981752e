# make train | test | check | bench      (needs Python 3.11 or newer, git and make; everything else goes into .venv)
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.mmskip-ready

.PHONY: train test check bench env clean

train: $(READY)
	$(BIN)/python train.py --config videollm_mod.yaml $(ARGS)

# Two workers with one thread each: more threads than cores make the small CPU tests several times slower.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	set -e; for script in $$(grep -L "Old name of" benchmarks/*.py); do echo "== $$script"; $(BIN)/python $$script $(ARGS); done

env: $(READY)
	$(BIN)/python -m mmskip.env

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "mmskip needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

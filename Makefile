# make train | test | check | docs | bench      (needs Python 3.11 or newer, git and make; everything else goes into .venv)
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin
READY := $(VENV)/.mmskip-ready
DOCS_READY := $(VENV)/.mmskip-docs-ready

.PHONY: train test check docs bench env clean

train: $(READY)
	$(BIN)/python train.py --config videollm_mod.yaml $(ARGS)

# Two workers with one thread each: more threads than cores make the small CPU tests several times slower.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(DOCS_READY)
	$(BIN)/python docs/tables.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet
	@echo "open site/index.html; with search: $(BIN)/python -m http.server --directory site"

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

$(DOCS_READY): $(READY)
	$(BIN)/python -m pip install -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache

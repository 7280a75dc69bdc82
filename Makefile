PYTHON ?= python3
BIN := .venv/bin
# One thread per process: several processes share the cores, and the figures are comparable between machines.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-whole lint bench bench-scaling bench-memory bench-variants test-gpu docs docs-links wheel test-versions clean

help: ## Show the targets
	@grep -E '^[a-z.-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

.venv: .venv/.installed ## Create the virtual environment with the pinned packages

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv ## Fine-tune a small BERT and a small ViT with AdamW, SAM and SAMPa; a table and a picture (under 3 minutes)
	$(BIN)/python benchmarks/demo.py

# Two files at a time, in the order of their names: those of tests/distributed, of which some take long, come first.
TWO_FILES := -n 2 --dist loadfile --no-loadscope-reorder

test: lint ## Lint, then a test of every property, two files at a time (24 minutes on two slow cores)
	$(BIN)/python -m pytest $(TWO_FILES) $(PYTEST_ARGS)

test-all: lint ## Lint, then all tests that need no GPU: every combination, all optimizers, launchers, benchmarks, the documentation
	$(BIN)/python -m pytest $(TWO_FILES) -m "not gpu" $(PYTEST_ARGS)

test-whole: .venv ## What test-all has and test has not
	$(BIN)/python -m pytest $(TWO_FILES) -m "whole and not gpu" $(PYTEST_ARGS)

lint: .venv ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv ## Measure seconds per step, memory and traffic of AdamW, SAM and SAMPa
	$(BIN)/python benchmarks/step_time.py --ddp

bench-scaling: .venv ## Measure the same for 2 to 12 layers and 8 to 128 tokens, and what 2 to 8 processes take beside the cost model
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/rank_scaling.py

bench-memory: .venv ## Measure the memory of AdamW, SAM and SAMPa, in fp32 and under bf16 autocast
	$(BIN)/python benchmarks/memory.py

bench-variants: .venv ## Train a small ViT with every variant: accuracy, time, memory; a table and a picture (under 40 minutes)
	$(BIN)/python benchmarks/variants.py

test-gpu: .venv ## The tests that need a CUDA device; some need two
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

test-versions: .venv ## The tests against the lowest, middle and newest versions of transformers, torch and others; a table
	# nox knows interpreters by what is on the path: Python 3.10, 3.12 and 3.13.
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m nox -s versions $(NOX_ARGS)

wheel: .venv ## Build the wheel and the sdist into dist/, and check what a package index will make of them
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

docs: .venv ## Build the documentation, and say where its first page is
	$(BIN)/python -m sphinx -b html -E -W --keep-going -n -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-links: .venv ## Try every link of the documentation that leads out of it; needs a network
	$(BIN)/python -m sphinx -b linkcheck -q docs docs/_build/links

clean: ## Remove the virtual environment and what the targets wrote
	rm -rf .nox .venv build dist out/demo out/versions out/mutation out/scaling out/sharpness out/variants docs/_build
	rm -rf .import_linter_cache .pytest_cache .ruff_cache

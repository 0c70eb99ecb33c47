# The commands of the README. `make demo` and `make test` need Python >= 3.11, git and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
HOST ?= 127.0.0.1
PORT ?= 8000
JOBS ?= 2
UV := $(shell command -v uv 2>/dev/null)
BIN := $(VENV)/bin
DECLARED := pyproject.toml client/pyproject.toml

.PHONY: demo serve test test-all lint venv clean

# An existing environment is kept, so a build of torch that was put there beforehand stays.
$(BIN)/python:
ifdef UV
	uv venv --python $(PYTHON) $(VENV)
else
	$(PYTHON) -m venv $(VENV)
endif

ifdef UV
INSTALL = uv pip install --python $(BIN)/python
else
INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet
endif

$(VENV)/.installed: $(DECLARED) | $(BIN)/python
	@$(BIN)/python -c 'import sys; sys.exit("Clearfold needs Python >= 3.11; say make PYTHON=python3.12") if sys.version_info < (3, 11) else None'
	@echo "Installing into $(VENV) (several GB where torch comes with CUDA; minutes) ..."
	$(INSTALL) -e ./client -e .
	@touch $@

$(VENV)/.installed-test: $(DECLARED) | $(BIN)/python
	@echo "Installing into $(VENV) with the test extras ..."
	$(INSTALL) -e ./client -e '.[test]'
	@touch $@ $(VENV)/.installed

venv: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/python -m app.demo --host $(HOST) --port $(PORT) $(if $(ONCE),--once)

serve: $(VENV)/.installed
	$(BIN)/clearfold serve --host $(HOST) --port $(PORT)

# Files run side by side, one core each; a process takes up to 4 GB.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" --durations=15

test-all: $(VENV)/.installed-test
	$(PYTEST) --durations=30

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) demo-output

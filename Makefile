# make demo: set up, then turn a 135M LLaMA into a Mixture-of-Experts and judge it.   make test: set up, then every check.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test check versions setup clean

demo: setup
	@moeforge run demo
	@echo 'moeforge, dvc and prefect are found in a shell after: source $(VENV)/bin/activate'

test: setup check
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadgroup

check: setup
	@ruff check .
	@ruff format --check .
	@mypy

versions: setup # the lowest and the newest versions that pyproject.toml allows; half an hour
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@python -m bench.versions

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Moeforge needs Python 3.11 or newer; set PYTHON=python3.11")'
	@echo "Installing into $(VENV) (two to three minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .scratch

# make demo     set up, then turn a 135M LLaMA into a Mixture-of-Experts and judge it
# make test     set up, then every check
# make quick    set up, then lint, types and the tests that need neither a model nor another process
# make house    print the import graph, with circles, upward arrows, large files and crowded rooms
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
QUICK := tests/test_code.py tests/test_scratch.py tests/settings tests/bench/test_house.py tests/flows/test_quality_gate.py

.PHONY: demo test quick check house versions setup clean

demo: setup
	@moeforge run demo
	@echo 'moeforge, dvc and prefect are found in a shell after: source $(VENV)/bin/activate'

test: setup check
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m pytest -q -n 2 --dist loadgroup

quick: check
	@OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 python -m pytest -q -n 2 -m 'not e2e' $(QUICK)

check: setup house
	@ruff check .
	@ruff format --check .
	@mypy

versions: setup # the lowest and the newest versions that pyproject.toml allows; half an hour
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@python -m bench.versions

house: setup
	@python -m bench.house

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Moeforge needs Python 3.11 or newer; set PYTHON=python3.11")'
	@echo "Installing into $(VENV) (two to three minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .scratch

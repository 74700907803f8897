# make demo     set up, then turn a 135M LLaMA into a Mixture-of-Experts and evaluate it
# make test     set up, then every check
# make quick    set up, then lint, types and the tests that need neither a model nor another process
# make imports  print the import graph, with circles, upward imports, large files and crowded packages
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Folders and files whose tests need neither a trained model nor another process
QUICK := tests/settings tests/recipes $(wildcard tests/test_*.py) tests/bench/test_import_graph.py \
  $(addprefix tests/corpus/,filters readers tokenizer test_shards.py sampling/test_weights.py sampling/test_windows.py) \
  $(addprefix tests/moe/test_,counts.py files.py gate.py gguf.py internals_contract.py loss.py routing_record.py) \
  $(addprefix tests/partition/test_,convert.py index.py router_init.py split_methods.py) \
  $(addprefix tests/pretrain/,test_schedule.py test_trainable.py checkpoints/test_resume_settings.py) \
  $(addprefix tests/pretrain/loss/test_,balance.py distil.py divergence.py objective.py) \
  $(addprefix tests/evaluate/,test_likelihood.py report/test_charts.py) tests/mixture/test_methods.py \
  $(addprefix tests/flows/test_,plan.py preflight.py progress.py quality_gate.py) \
  $(addprefix tests/kernels/test_,config.py cpu.py routing.py)
# Bytecode is kept: a suite of some hundred processes would compile the project again in each of them
TESTS := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= python -m pytest -q -n 2

.PHONY: demo test suite quick check imports versions setup clean

demo: setup
	@moeforge run demo
	@echo 'moeforge, dvc and prefect are found in a shell after: source $(VENV)/bin/activate'

test: setup # mypy keeps one core busy for a minute, so the suite does not wait for it
	@$(MAKE) --no-print-directory -j2 check suite

suite:
	@$(TESTS) --dist loadfile --no-loadscope-reorder

quick: check
	@$(TESTS) -m 'not e2e' $(QUICK)

check: setup imports
	@ruff check .
	@ruff format --check .
	@mypy

versions: setup # the lowest and the newest versions that pyproject.toml allows; half an hour
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	@python -m bench.versions

imports: setup
	@python -m bench.import_graph

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Moeforge needs Python 3.11 or newer; set PYTHON=python3.11")'
	@echo "Installing into $(VENV) (two to three minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) .scratch

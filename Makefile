# `make demo` and `make test` do all of their own set-up, from nothing.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
READY   = $(VENV)/.ready
ARGS   ?=
# Tests that run at a time.
JOBS   ?= 2

.PHONY: demo test test-slow test-seqio test-harness flink-test check requirements clean

demo: $(READY)
	$(BIN)/internlm2 run experiments/demo/pipeline.py $(ARGS)

test: $(READY)
	$(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(READY)
	XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m pytest -q -m "slow and not flink"

# seqio brings TensorFlow, so it has an environment of its own.
test-seqio:
	$(PYTHON) -m venv $(VENV)-seqio
	$(VENV)-seqio/bin/python -m pip install --quiet -e ".[seqio]" pytest pytest-timeout hypothesis
	$(VENV)-seqio/bin/python -m pytest -q tests/data_beam/test_tasks.py

# lm-evaluation-harness beside our own scores, and the hub's client.
test-harness:
	$(PYTHON) -m venv $(VENV)-harness
	$(VENV)-harness/bin/python -m pip install --quiet -r requirements.txt -e ".[harness,hub]"
	$(VENV)-harness/bin/python -m pytest -q tests/evals/test_harness.py tests/evals/test_hub.py

# A real Flink cluster on this machine; needs Java 11 to 17, Maven, a network the first time.
flink-test: $(READY)
	$(BIN)/python -m pytest -q tests/integration/test_flink.py -m flink

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The environment is whole or made again: the marker is written last.
$(READY): requirements.txt setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed, $(PYTHON) is older; use make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $(READY)

# Resolves the pins of requirements.txt again, for every supported Python.
requirements: $(READY)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 setup.cfg --extra dev --extra data --extra serve --extra verify -o requirements.txt

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .mypy_cache *.egg-info

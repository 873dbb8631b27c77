# make demo: the whole way on the embedded model. make test: lint, types and tests. make test-oldest: the engine's tests with
# the oldest transformers that is supported. make test-integrations: the plug-ins for lmms-eval and vLLM. The last two have environments
# of their own. All work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
INTEGRATIONS := .venv-integrations/bin

.PHONY: demo test test-oldest test-integrations lint train data clean

demo: .venv/installed
	$(BIN)/fitprune demo

test: .venv/installed lint
	$(BIN)/python -m pytest --durations=10

test-oldest: .venv-oldest/installed
	.venv-oldest/bin/python -m pytest --durations=5 tests/test_families.py tests/test_full_sizes.py tests/test_pruning.py \
		tests/test_refusals.py tests/test_conversations.py tests/test_hub.py tests/test_llava_hr.py

test-integrations: .venv-integrations/installed
	$(INTEGRATIONS)/python -m pytest tests/integrations --durations=5

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch is pinned: a bare `torch` may bring gigabytes of CUDA libraries where its CPU build would do.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-oldest
	sed 's/^transformers==.*/transformers==5.19.0/' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt \
		-e '.[llava-hr]' accelerate hypothesis pytest
	touch $@

# Apart from .venv, because lmms-eval needs torchvision, whose torch brings gigabytes of CUDA libraries, and vLLM another
# transformers.
.venv-integrations/installed: pyproject.toml requirements-integrations.txt
	$(PYTHON) -m venv .venv-integrations
	$(INTEGRATIONS)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-integrations.txt
	$(INTEGRATIONS)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# Trains the embedded model again (about 80 minutes on two cores) and renders its data again.
train: .venv/installed
	$(BIN)/python training/train.py --out training/run
data: .venv/installed
	$(BIN)/python training/render.py --out src/fitprune/data

clean:
	rm -rf .venv .venv-oldest .venv-integrations build dist demo-output src/*.egg-info

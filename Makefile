# make demo: the whole way on the bundled model. make quick: lint, types, and of each test function one case, under a
# minute. make test: lint, types and all tests. make test-oldest, make test-newest: the engine's tests with the oldest and
# the newest transformers that is supported. make test-integrations: the plug-ins for lmms-eval and vLLM. The last three
# have environments of their own. make test-integrations-next: the plug-in for vLLM with the newest vLLM. make test-app:
# the web page, in a real Chromium; its environment borrows what .venv has. All work on a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
INTEGRATIONS := .venv-integrations/bin
APP := .venv-app/bin

# What depends on the insides of transformers.
ENGINE := $(addprefix tests/,behaviour/test_families.py behaviour/test_full_sizes.py engine behaviour/test_refusals.py \
	behaviour/test_conversations.py recipes/test_hub.py families/test_llava_hr.py _support/test_host.py behaviour/test_attach.py)

# Two test processes of one thread each: tiny models gain nothing by a second one. The tests of a file stay together, and
# share what they build; files go out in alphabetical order, since the long ones are not those of most tests.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder
quick test test-oldest test-newest test-integrations test-integrations-next test-app: export OMP_NUM_THREADS := 1

.PHONY: demo quick test test-oldest test-newest test-integrations test-integrations-next test-app lint train data clean

demo: .venv/installed
	$(BIN)/fitprune demo

quick: .venv/installed lint
	PYTHONPATH=tests $(BIN)/python $(PYTEST) -p helpers.quick

test: .venv/installed lint
	$(BIN)/python $(PYTEST) --durations=10

test-oldest test-newest: test-%: .venv-%/installed
	.venv-$*/bin/python $(PYTEST) --durations=5 $(ENGINE)

test-integrations: .venv-integrations/installed
	$(INTEGRATIONS)/python $(PYTEST) --durations=10 tests/integrations

# Not in CI: it downloads 340 MB. PYTHONPATH is how the processes that vLLM starts find it.
test-integrations-next: .venv-integrations/next/installed
	PYTHONPATH=$(CURDIR)/.venv-integrations/next $(INTEGRATIONS)/python $(PYTEST) --durations=10 \
		$(wildcard tests/integrations/test_vllm*.py)

test-app: .venv-app/installed
	@command -v chromium >/dev/null || { echo "the web page is tested in Chromium: apt-get install chromium" >&2; exit 1; }
	$(APP)/python $(PYTEST) --durations=10 tests/browser

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/flake8 src
	$(BIN)/mypy

# torch is pinned: a bare `torch` may bring gigabytes of CUDA libraries where its CPU build would do.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv-oldest/installed: TRANSFORMERS := 5.19.0
.venv-newest/installed: TRANSFORMERS := 5.24.0
.venv-oldest/installed .venv-newest/installed: .venv-%/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-$*
	sed 's/^transformers==.*/transformers==$(TRANSFORMERS)/' constraints.txt > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-$*/constraints.txt \
		-e '.[llava-hr]' accelerate hypothesis pytest-xdist
	touch $@

# Apart from .venv, because lmms-eval needs torchvision, whose torch brings gigabytes of CUDA libraries, and vLLM another
# transformers.
.venv-integrations/installed: pyproject.toml requirements-integrations.txt
	$(PYTHON) -m venv .venv-integrations
	$(INTEGRATIONS)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-integrations.txt
	$(INTEGRATIONS)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

.venv-integrations/next/installed: .venv-integrations/installed tests/helpers/vllm_overlay.py
	rm -rf $(@D)
	$(INTEGRATIONS)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest $(@D) vllm==0.33.0
	$(INTEGRATIONS)/python tests/helpers/vllm_overlay.py $(@D)/*.whl $(@D)
	$(INTEGRATIONS)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(@D) 'orjson>=3.11.6'
	rm $(@D)/*.whl
	touch $@

# Packages of .venv are found through a .pth file, so that there is one torch. Root gets Chromium, where it is missing.
.venv-app/installed: .venv/installed requirements-app.txt
	command -v chromium >/dev/null || test "$$(id -u)" != 0 || { apt-get update -qq && apt-get install -y -qq chromium; }
	$(PYTHON) -m venv .venv-app
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		>"$$($(APP)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/venv.pth"
	$(APP)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-app.txt -e .
	touch $@

# Trains the bundled model again (about 80 minutes on two cores) and renders its data again.
train: .venv/installed
	$(BIN)/python training/train.py --out training/run
data: .venv/installed
	$(BIN)/python training/render.py --out src/fitprune/data

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-integrations .venv-app build dist demo-output src/*.egg-info

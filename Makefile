# Everything a newcomer needs: `make demo` runs the main job, `make test` passes the tests, `make` lists the rest.
# Each target creates .venv and installs what it needs when it is not there yet.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# What `make test-fast` runs: mathematics, capture, state and ranks, without the workbench, processes and whole runs.
FAST := $(addprefix tests/test_,exact.py linalg.py triangles.py conv.py norms.py capture.py passes.py laws_layers.py \
	momentum.py ranks.py state.py habits.py additions.py structure.py packing.py placement.py schedules.py)

# What `make test-lowest` runs besides: numbers that must come out on every version. LOWEST_TESTS=tests is the whole suite.
LOWEST_TESTS ?= -m "not slow" $(FAST) $(addprefix tests/test_,golden.py laws_curvature.py laws_optimizers.py bad_numbers.py)

.PHONY: help setup demo test test-fast test-lowest test-newest lint bench docs format release clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## .venv with everything for working on natgrad; the other targets do this by themselves

demo: $(READY)  ## the main job: SP-NGD beside tuned first-order optimizers, and a report
	$(BIN)/natgrad compare text --profile demo --ranks 2 --out runs/demo

test: $(READY)  ## the whole suite, some minutes on 2 cores
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test-fast: $(READY)  ## a part of the suite that ends within a minute on 2 cores
	@start=$$(date +%s); \
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" --durations=5 $(FAST) || exit 1; \
	took=$$(($$(date +%s) - start)); [ $$took -le 60 ] || \
	echo "test-fast took $$took s, more than 60: if nothing else ran, take the slowest file out of FAST (Makefile)"

test-lowest: $(VENV)-lowest/.ready  ## the fast part and numerics on the lowest versions that pyproject.toml allows
	$(VENV)-lowest/bin/python -m pytest -n 2 --dist loadfile $(LOWEST_TESTS)

test-newest: $(VENV)-newest/.ready  ## the whole suite on the newest versions that pip finds
	$(VENV)-newest/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(READY)  ## ruff, import-linter, pyright, structure
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --verbose
	$(BIN)/pyright
	$(BIN)/python tests/structure.py

format: $(READY)  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)  ## the figures of the README (hours); DATA=folder of CIFAR-100
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py $(if $(DATA),--data $(DATA))

docs: $(VENV)/.ready-docs  ## the site
	$(BIN)/mkdocs build --strict

release: $(READY)  ## build sdist and wheel into dist/, test the wheel in a clean environment; uploads nothing
	$(BIN)/python tools/release.py $(if $(TRIAL),--trial)

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

$(VENV)-lowest/.ready: pyproject.toml constraints-lowest.txt
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --constraint constraints-lowest.txt --editable ".[dev]"
	touch $@

$(VENV)-newest/.ready: pyproject.toml
	test -x $(VENV)-newest/bin/python || $(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable ".[dev]"
	touch $@

$(VENV)/.ready-docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:  ## remove what these targets have made, runs too
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-newest runs site build dist .pytest_cache .ruff_cache .hypothesis

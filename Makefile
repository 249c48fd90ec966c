# One command measures, one command tests. Both use the active environment if it has torch, else a local .venv.

SHELL := /bin/bash
TORCH ?= torch>=2.11
PYTHON3 ?= python3
HAS_TORCH := $(shell $(PYTHON3) -c 'import importlib.util as u, sys; print(int(u.find_spec("torch") is not None))' 2>/dev/null)
ifeq ($(HAS_TORCH),1)
PYTHON := $(PYTHON3)
STAMPS := build/stamps
else
PYTHON := .venv/bin/python
STAMPS := .venv/stamps
endif
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
CLANG_FORMATTED := $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/csrc/*.cpp tests/csrc/*.h tests/csrc/*.cu)

.PHONY: help build test tsan tiles lint format bench gpu clean
help:
	@echo "make bench   build, measure on this machine in under 10 minutes, end with a report page"
	@echo "make test    build and run every test"
	@echo "make tsan    run the CUDA recurrences on the host under the thread sanitizer"
	@echo "make tiles   test the tile unit's kernels where there is none: emulated, on AVX-512 with bfloat16"
	@echo "make build   build the extension in place"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make format  let ruff and clang-format rewrite the files"
	@echo "make gpu     everything that needs a CUDA device: build, tests, compute-sanitizer, benchmarks"
	@echo "make clean   remove what was built"
	@echo "OPTIONS='--any-load --text FILE' goes to make bench; python -m benchmarks.run --help lists what there is"
	@echo "OPTIONS='--steps benchmarks --seconds 300' goes to make gpu; so does python -m benchmarks.gpu --help"
	@echo "TORCH='torch==X.Y.Z' chooses the torch that is installed where none is (now: $(TORCH))"

.venv/bin/python:
	$(PYTHON3) -m venv .venv
	.venv/bin/python -m pip install --quiet '$(TORCH)'

# The requirements are installed only where they are missing, so an environment without a network works if it has them.
$(STAMPS)/build: $(SOURCES) | $(filter .venv/bin/python,$(PYTHON))
	@mkdir -p $(STAMPS)
	$(PYTHON) -m pip install --quiet 'setuptools>=77' 'pybind11>=2.13' ninja numpy
	$(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

# What an extra names, without building the package once more.
EXTRA = import importlib.metadata as m; from pip._vendor.packaging.requirements import Requirement as R; print(*(r.name + str(r.specifier) for r in map(R, m.requires("s2s_kernels")) if r.marker and r.marker.evaluate({"extra": "$*"})))
$(STAMPS)/%: pyproject.toml | $(STAMPS)/build
	$(PYTHON) -m pip install --quiet $$($(PYTHON) -c '$(EXTRA)')
	@touch $@

build: $(STAMPS)/build

# A process for each core, at most four. Forced by the environment, only the tests that force no backend themselves differ.
PYTEST := -m pytest -q -n auto --maxprocesses=4
test: $(STAMPS)/build $(STAMPS)/test
	$(PYTHON) $(PYTEST)
	S2S_BACKEND=reference $(PYTHON) $(PYTEST) tests/test_operators.py -k "not (reference or cpu or triton or cuda)"
	S2S_BACKEND=cpu $(PYTHON) $(PYTEST) tests/test_operators.py -k "not (reference or cpu or triton or cuda)"

RACES := build/emulated/races
tsan:
	@mkdir -p $(dir $(RACES))
	$(CXX) -std=c++20 -O1 -g -pthread -ffp-contract=off -fsanitize=thread -Wno-tsan -Itests/csrc tests/csrc/recurrence_races.cpp -o $(RACES)
	TSAN_OPTIONS=halt_on_error=1 $(RACES)

# A copy of the tree whose kernels for the tile unit are compiled with its instructions emulated; their tests, and those of what calls them.
TILES := build/emulated/tiles
tiles: FROM_THERE = $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
tiles: $(STAMPS)/build $(STAMPS)/test
	@mkdir -p $(TILES)
	cp -ru --preserve=timestamps setup.py pyproject.toml README.md csrc s2s_kernels benchmarks tests $(TILES)
	cd $(TILES) && CFLAGS="-include $(abspath tests/csrc/emulated_tiles.h)" $(FROM_THERE) setup.py --quiet build_ext --inplace
	cd $(TILES) && S2S_CPU_ISA=amx $(FROM_THERE) $(PYTEST) tests/ops tests/nn tests/test_operators.py -k "not (triton or cuda)"

lint: $(STAMPS)/build $(STAMPS)/lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	PATH="$(dir $(PYTHON)):$$PATH" clang-format --dry-run --Werror $(CLANG_FORMATTED)

format: $(STAMPS)/lint
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	PATH="$(dir $(PYTHON)):$$PATH" clang-format -i $(CLANG_FORMATTED)

bench: $(STAMPS)/build $(STAMPS)/bench
	$(PYTHON) -m benchmarks.run --quick $(OPTIONS)

# Nothing is built or installed where there is no CUDA device. What the build takes counts for the time of it all.
gpu:
	@$(PYTHON3) benchmarks/gpu.py --present
	since=$$(date +%s); $(MAKE) $(STAMPS)/build $(STAMPS)/test; built=$$?; \
	$(PYTHON) -m benchmarks.gpu --since $$since $(OPTIONS) && exit $$built

clean:
	rm -rf build dist out .venv *.egg-info s2s_kernels/*.so

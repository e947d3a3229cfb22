# make demo     train on digits with averaged weights: a table and a picture
# make test     every check and test that needs no GPU
# make bench    updates timed beside their peers
# make docs     the documentation site, in build/site
# make format   apply the formatters
# make clean    remove what was built, the virtual environment too
#
# BENCH="--models resnet50" and the like are passed on to the benchmark.
# Each sets up what it needs in .venv; PYTHON=... picks the interpreter (3.11 or later).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
CONSTRAINTS := --constraint requirements/constraints.txt
SOURCES := setup.py pyproject.toml CMakeLists.txt ema_fused/__init__.py \
	$(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/*.in)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh \
	csrc/tests/*.h csrc/tests/*.cpp csrc/tests/*.cu csrc/tests/*/*.h)
HOST_TESTS := build/host_tests

.PHONY: demo test bench docs format lint host-test clean
.DELETE_ON_ERROR:

demo: $(VENV)/.built
	$(BIN)/python examples/digits.py

test: lint host-test
	$(BIN)/python -m pytest

bench: $(VENV)/.built
	$(BIN)/python -m benchmarks $(BENCH)

docs: $(VENV)/.dependencies
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.built
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# The kernels' bodies on the host, under the address and undefined-behaviour sanitizers.
host-test: $(VENV)/.dependencies
	@echo "building the host tests"
	@$(BIN)/cmake -S . -B $(HOST_TESTS) -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
		-DEMA_FUSED_PYTHON=OFF -DEMA_FUSED_CUDA=OFF -DEMA_FUSED_TESTS=ON -DEMA_FUSED_SANITIZE=ON \
		>$(VENV)/host_tests.log || { cat $(VENV)/host_tests.log; exit 1; }
	@$(BIN)/cmake --build $(HOST_TESTS)
	$(BIN)/ctest --test-dir $(HOST_TESTS) --output-on-failure --no-tests=error

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later that can make a virtual environment was" \
		"found (on Debian: apt-get install python3-venv). PYTHON=... names one."; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dependencies: $(VENV)/.created $(wildcard requirements/*.txt)
	@echo "installing the pinned dependencies (the first time this downloads torch)"
	@$(PIP) install $(CONSTRAINTS) --requirement requirements/develop.txt
	@$(PIP) install --target $(VENV)/mmcv_build --upgrade --requirement requirements/mmcv_build.txt
	@PYTHONPATH=$(CURDIR)/$(VENV)/mmcv_build $(PIP) install $(CONSTRAINTS) --no-deps \
		--no-build-isolation --requirement requirements/originals.txt
	@rm -rf $(VENV)/unpacked
	@grep == requirements/unpacked.txt | while read pin; do \
		$(PIP) install --no-deps --target "$(VENV)/unpacked/$$pin" "$$pin" || exit 1; done
	@touch $@

$(VENV)/.built: $(VENV)/.dependencies $(SOURCES)
	@echo "building ema_fused"
	@rm -f $(VENV)/build.log
	@CMAKE_ARGS="-DEMA_FUSED_PTXAS_VERBOSE=ON $(CMAKE_ARGS)" $(PIP) --log $(VENV)/build.log \
		install --no-build-isolation --no-deps --editable .
	@$(BIN)/python -m ema_fused info
	@touch $@

clean:
	rm -rf build dist $(VENV) *.egg-info ema_fused/*.so

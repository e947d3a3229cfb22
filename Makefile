# make demo         train on digits with averaged weights: a table and a picture
# make test-quick   what an edit needs: tests without frameworks, in a minute
# make test         every check and test that needs no GPU; tests of one are rehearsed on the CPU
# make ptx-test     the PTX of the kernels, executed on the CPU (part of make test)
# make bench        updates timed beside their peers
# make wheel        a wheel for every Linux since glibc 2.28, in dist/
# make docs         the documentation site, in build/site
# make format       apply the formatters
# make clean        remove what was built, the virtual environment too
#
# BENCH="--models resnet50" and the like are passed on to the benchmark, TESTS="tests/modules -k swap"
# to pytest. Each target sets up what it needs in .venv, and no more; PYTHON=... picks the
# interpreter (3.11 or later).

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Without bytecode: for the demo it is written when a module is first imported, and most never are.
# The tests start many programs; for them COMPILE writes it beforehand, on all cores.
INSTALL := $(PIP) install --no-compile --constraint requirements/constraints.txt
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib*/python*/site-packages || true
unexport PYTHONDONTWRITEBYTECODE
SOURCES := setup.py pyproject.toml CMakeLists.txt cmake/portable_linking.cmake ema_fused/__init__.py \
	$(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh csrc/*.in)
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*.cu csrc/*.cuh \
	csrc/tests/*.h csrc/tests/*.cpp csrc/tests/*.cu csrc/tests/*/*.h csrc/tests/*/*.cpp)
HOST_TESTS := build/host_tests
CMAKE_OPTIONS := -DEMA_FUSED_PTXAS_VERBOSE=ON $(CMAKE_ARGS)
# The newest that a wheel may ask for: what torch itself asks for.
PLATFORM := manylinux_2_28_$(shell uname -m)
PTX_TESTS := build/ptx_tests
# Where setup.py builds the extension, by the name that Python gives itself (cpython-311).
KEPT_PTX = $(CURDIR)/build/cmake-$(shell $(BIN)/python -c \
	'import sys; print(sys.implementation.cache_tag)')
# Tests over the cores there are; tests/conftest.py says which of them one process runs.
PARALLEL := -n logical --maxprocesses 8 --no-loadscope-reorder
# Tests that need neither a framework nor a build, and start few processes.
QUICK := tests/engine tests/offloading tests/modules tests/saving tests/posthoc tests/averages \
	tests/project/test_layers.py

.PHONY: demo test-quick test python-test bench wheel docs format lint host-test ptx-test clean
.DELETE_ON_ERROR:

# The build needs nothing of what is installed meanwhile.
demo: $(VENV)/.created
	@$(MAKE) --no-print-directory --jobs 2 $(VENV)/.demo $(VENV)/.built-here
	$(BIN)/python examples/digits.py

test-quick: $(VENV)/.quick $(VENV)/.built-here
	$(BIN)/ruff check
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" $(or $(TESTS),$(QUICK))

# Beside the Python tests, which take longest, the others take turns: a core would be idle while mypy
# reads, or the last of the kernels' tests is compiled.
test: $(VENV)/.test $(VENV)/.built
	@$(MAKE) --no-print-directory --jobs 2 python-test lint host-test ptx-test

python-test: $(VENV)/.test $(VENV)/.built
	$(BIN)/python -m pytest $(PARALLEL) --rehearse $(TESTS)

bench: $(VENV)/.test $(VENV)/.built
	$(BIN)/python -m benchmarks $(BENCH)

# What was compiled for the tests is linked once more; auditwheel looks what the result needs and
# names the wheel accordingly, or fails.
wheel: $(VENV)/.built
	@rm -rf build/lib* build/bdist* build/wheel
	@EMA_FUSED_NATIVE=1 CMAKE_ARGS="$(CMAKE_OPTIONS)" $(PIP) wheel --no-build-isolation --no-deps \
		--wheel-dir build/wheel .
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --plat $(PLATFORM) --wheel-dir dist \
		build/wheel/*.whl

docs: $(VENV)/.test
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(VENV)/.test $(VENV)/.built
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

# The kernels' bodies on the host, under the address and undefined-behaviour sanitizers.
host-test: $(VENV)/.test
	@echo "building and running the kernels' tests on the host"
	@{ $(BIN)/cmake -S . -B $(HOST_TESTS) -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
		-DEMA_FUSED_PYTHON=OFF -DEMA_FUSED_CUDA=OFF -DEMA_FUSED_TESTS=ON -DEMA_FUSED_SANITIZE=ON \
		&& $(BIN)/cmake --build $(HOST_TESTS); } >$(VENV)/host_tests.log 2>&1 \
		|| { cat $(VENV)/host_tests.log; exit 1; }
	@$(BIN)/ctest --test-dir $(HOST_TESTS) --output-on-failure --no-tests=error

# What nvcc makes of the kernels, executed on the CPU. The build has kept it, unless it was told what
# to build: then it is made here.
ptx-test: $(VENV)/.built
	@echo "building and running the tests of the kernels' PTX"
	@{ $(BIN)/cmake -S . -B $(PTX_TESTS) -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" \
		-DEMA_FUSED_PYTHON=OFF -DEMA_FUSED_TESTS=ON \
		-DEMA_FUSED_CUDA=$(if $(filter 0 off,$(EMA_FUSED_CUDA)),OFF,AUTO) \
		-DEMA_FUSED_PTX_OF="$(if $(TORCH_CUDA_ARCH_LIST)$(CMAKE_ARGS),,$(KEPT_PTX))" \
		&& $(BIN)/cmake --build $(PTX_TESTS) --target ptx_tests; } >$(VENV)/ptx_tests.log 2>&1 \
		|| { cat $(VENV)/ptx_tests.log; exit 1; }
	@$(BIN)/ctest --test-dir $(PTX_TESTS) -L ptx -j --output-on-failure --no-tests=error

# ---- What is installed: for the demo, for its quick tests too, for all ---------------------------

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or later that can make a virtual environment was" \
		"found (on Debian: apt-get install python3-venv). PYTHON=... names one."; exit 1; }
	@echo "making $(VENV) with $(PYTHON)"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# torch's wheel brings its own compiled tests along, 120 MB that nothing here runs. The imports write
# the bytecode that the demo needs.
$(VENV)/.demo: requirements/demo.txt requirements/constraints.txt | $(VENV)/.created
	@echo "installing what the demo needs (the first time this downloads torch)"
	@$(INSTALL) --requirement $<
	@rm -rf $(VENV)/lib*/python*/site-packages/torch/test \
		$(VENV)/lib*/python*/site-packages/torch/bin/test_*
	@$(BIN)/python -c 'import matplotlib.figure, sklearn.datasets, torch._dynamo, tqdm'
	@touch $@

$(VENV)/.quick: requirements/quick.txt $(VENV)/.demo
	@echo "installing what the quick tests need"
	@$(INSTALL) --requirement $<
	@$(COMPILE)
	@touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.quick $(wildcard requirements/*.txt)
	@echo "installing what all tests need: the frameworks, the documentation's tools"
	@$(INSTALL) --requirement $<
	@$(PIP) install --target $(VENV)/mmcv_build --upgrade --requirement requirements/mmcv_build.txt
	@PYTHONPATH=$(CURDIR)/$(VENV)/mmcv_build $(INSTALL) --no-deps \
		--no-build-isolation --requirement requirements/originals.txt
	@rm -rf $(VENV)/unpacked
	@grep == requirements/unpacked.txt | while read pin; do \
		$(PIP) install --no-compile --no-deps --target "$(VENV)/unpacked/$$pin" "$$pin" || exit 1; done
	@$(COMPILE)
	@touch $@

# ---- What is built: what this machine can run, or all ------------------------------------------

# Once the build's tools are in the environment they are used; before, pip gets them for the build
# alone, in the versions of the constraints (which older and newer pips know by two names).
BUILD = if [ -e $(VENV)/.quick ]; then isolation=--no-build-isolation; else \
		isolation=; export PIP_CONSTRAINT="$(CURDIR)/requirements/constraints.txt"; \
		export PIP_BUILD_CONSTRAINT="$$PIP_CONSTRAINT"; fi; \
	rm -f $(VENV)/build.log; \
	CMAKE_ARGS="$(CMAKE_OPTIONS)" $(PIP) --log $(VENV)/build.log \
		install $$isolation --no-deps --editable .

# Kernels for GPUs only where there is one, so that the first run doesn't wait for them.
$(VENV)/.built-here: $(SOURCES) | $(VENV)/.created
	@echo "building ema_fused for this machine"
	@export EMA_FUSED_CUDA="$${EMA_FUSED_CUDA:-$(if $(wildcard /dev/nvidiactl /dev/dxg),auto,0)}"; \
		$(BUILD)
	@touch $@

$(VENV)/.built: $(SOURCES) | $(VENV)/.test
	@echo "building ema_fused, with CUDA where nvcc is found"
	@$(BUILD)
	@$(BIN)/python -m ema_fused info
	@touch $@ $(VENV)/.built-here

clean:
	rm -rf build dist $(VENV) *.egg-info ema_fused/*.so

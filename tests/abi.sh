#!/bin/sh
# One built file serves every torch from 2.10 on: audit the wheel, then run the tests on that very
# file beside torch 2.10. About 3 GB of downloads. `make abi` calls this.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
rm -rf .venv-abi dist/abi
"$root/.venv/bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir dist/abi .
"${PYTHON:-python3}" -m venv .venv-abi
bin="$root/.venv-abi/bin"
"$bin/pip" install --quiet "torch==2.10.*" pytest numpy expecttest hypothesis tqdm
"$bin/pip" install --quiet --no-deps dist/abi/*.whl
"$root/.venv/bin/pip" install --quiet torch-abi-audit
"$root/.venv/bin/torch-abi-audit" --check torch "$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/moe_ext"
# What binds the CUDA kernels, against the headers of the oldest torch; the kernels see none of torch.
flags=$("$root/.venv/bin/python" -c 'from moe_ext import build; print(*build.compile_flags())')
headers=$("$bin/python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
"${CXX:-c++}" -std=c++17 -fsyntax-only $flags -isystem "$headers" csrc/cuda_ops.cpp
# Away from the tree, or its package would be found instead of the wheel's.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r examples "$work"
mkdir "$work/tests"
cp tests/*.py "$work/tests"
cd "$work/tests"
"$bin/python" -c 'import torch, moe_ext; print(torch.__version__, moe_ext.ops.registry.library)'
rm test_bench.py test_build.py test_demo.py test_toolkit.py  # of the tree
"$bin/python" -m pytest -p no:cacheprovider .

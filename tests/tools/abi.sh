#!/bin/sh
# One built file serves every torch from 2.10 on: the tests on the wheel of dist/cpu in clean
# environments, with the oldest torch and with the newest. About 6 GB of downloads. `make abi` calls
# this.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
cd "$root"
for torch in "torch==2.10.*" "torch"; do
    rm -rf .venv-abi
    "${PYTHON:-python3}" -m venv .venv-abi
    bin="$root/.venv-abi/bin"
    "$bin/pip" install --quiet "$torch" pytest numpy expecttest tqdm matplotlib
    "$bin/pip" install --quiet --no-deps dist/cpu/*.whl
    if [ "$torch" != torch ]; then
        # What binds the CUDA kernels, against the oldest headers; the kernels see none of torch.
        flags=$("$root/.venv/bin/python" -c 'from moe_ext import toolkit; print(*toolkit.compile_flags())')
        headers=$("$bin/python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
        "${CXX:-c++}" -std=c++17 -fsyntax-only $flags -isystem "$headers" csrc/cuda_ops.cpp
    fi
    sh tests/tools/installed.sh "$root" "$bin/python"
done

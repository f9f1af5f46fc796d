#!/bin/sh
# The tests on the moe_ext that is installed beside a python, away from the tree, or its package would
# be found instead:
#
#   sh tests/tools/installed.sh <the tree> <python>
set -eu
root=$1
python=$2
# callgrind's own process is whatever python is first.
export PATH="$(dirname "$python"):$PATH"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp -r "$root/examples" "$work"
mkdir "$work/tests" "$work/csrc"
cp "$root/csrc/contracts.h" "$work/csrc"
cp "$root"/tests/*.py "$work/tests"
for folder in ops layers parallel peers tools; do
    mkdir "$work/tests/$folder"
    cp "$root/tests/$folder"/*.py "$work/tests/$folder"
done
cd "$work/tests"
"$python" -c 'import torch, moe_ext; print(torch.__version__, moe_ext.ops.registry.libraries.library)'
# Without a GPU a library that cannot be loaded is no problem to doctor.
if [ "${FORCE_CUDA:-0}" = 1 ]; then
    "$python" -c 'from moe_ext.ops import registry; assert registry.libraries.cuda_library, registry.libraries.cuda_load_error'
fi
"$python" -m moe_ext doctor || echo "doctor found something"
# These are of the tree.
(cd tools && rm test_build.py test_counts.py test_cpp.py test_demo.py test_docs.py test_mutants.py test_toolkit.py)
rm */test_bench*.py
"$python" -m pytest -p no:cacheprovider .

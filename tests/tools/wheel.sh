#!/bin/sh
# The wheels of this machine: dist/cpu and, where there is a CUDA toolkit, dist/cuda. What they ask of
# torch is audited: nothing but the stable ABI of the oldest torch that they are for. `make wheel`
# calls this.
set -eu
root=$(cd "$(dirname "$0")/../.." && pwd)
bin="$root/.venv/bin"
cd "$root"
# A file that is no longer there would still be in setuptools' copy.
rm -rf dist/cpu dist/cuda dist/unpacked build/lib* build/bdist*
sizes='
import sys, zipfile
files = sorted(zipfile.ZipFile(sys.argv[1]).infolist(), key=lambda file: -file.compress_size)
for file in files:
    print(f"{file.file_size:10,} {file.compress_size:10,}  {file.filename}")
total = [sum(getattr(file, name) for file in files) for name in ("file_size", "compress_size")]
print("{:10,} {:10,}  in all".format(*total))
'
wheel() {
    FORCE_CUDA=$1 "$bin/pip" wheel --quiet --no-build-isolation --no-deps --wheel-dir "dist/$2" .
    "$bin/python" -m zipfile -e dist/"$2"/*.whl "dist/unpacked/$2"
    echo "$2: size of each file, then in the wheel"
    "$bin/python" -c "$sizes" dist/"$2"/*.whl
    "$bin/torch-abi-audit" --check torch "dist/unpacked/$2/moe_ext"
    "$bin/auditwheel" show dist/"$2"/*.whl
}
"$bin/pip" install --quiet torch-abi-audit auditwheel
wheel 0 cpu
if "$bin/python" moe_ext/toolkit.py; then
    wheel 1 cuda
fi
ls -l dist/*/*.whl

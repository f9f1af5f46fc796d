"""Break the CUDA kernels, one fault at a time, and see that the kernel tests notice.

    python tests/cusim/mutants.py [word ...]    the mutants whose file or change has all the words

Every mutant is compiled in a copy of the tree and given to kernel_tests until one fails: as it is,
with AddressSanitizer and UndefinedBehaviorSanitizer, with ThreadSanitizer. A mutant that none
notices survives, and this program fails, unless it is listed as equivalent with the reason.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import faults
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
COPY = ROOT / "build" / "mutants"
BUILDS = ("", "_memory", "_thread")
SECONDS = 300  # a mutant may run for ever


def update(source: str, target: str) -> None:
    """Copy what differs, as of now: a killed run may have left a mutant, and objects made of it."""
    if not Path(target).exists() or not filecmp.cmp(source, target, shallow=False):
        shutil.copy(source, target)


def copy_tree() -> None:
    """The sources in a tree of their own, configured like build/cusim."""
    COPY.mkdir(parents=True, exist_ok=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "tests", "moe_ext"):
        shutil.copytree(
            ROOT / name, COPY / name, ignore=ignore, copy_function=update, dirs_exist_ok=True
        )
    update(ROOT / "CMakeLists.txt", COPY / "CMakeLists.txt")
    configure = ["cmake", "-S", str(COPY), "-B", str(COPY / "build"), "-G", "Ninja"]
    configure += ["-DMOE_EXT_CUSIM=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)


def notice(build: str, tests: list[str]) -> str | None:
    """What the build of that name says of the tree as it is: None where it passes."""
    target = f"kernel_tests{build}"
    made = subprocess.run(
        ["cmake", "--build", str(COPY / "build"), "--target", target],
        capture_output=True,
        text=True,
    )
    if made.returncode != 0:
        raise RuntimeError(made.stdout[-4000:])
    program = COPY / "build" / "tests" / "cusim" / target
    try:
        run = subprocess.run([program, *tests], capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "does not end"
    return None if run.returncode == 0 else f"kernel_tests{build}"


def try_mutant(mutant: faults.Mutant, tests: list[str]) -> str | None:
    """Who noticed, or None."""
    path = COPY / "csrc" / mutant.path
    original = path.read_text()
    try:
        path.write_text(mutant.applied(original))
        return next((said for build in BUILDS if (said := notice(build, tests))), None)
    finally:
        path.write_text(original)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    mutants = [
        (mutant, tests)
        for mutant, tests in faults.load()
        if all(word in str(mutant) for word in words)
    ]
    if not mutants:
        parser.error(f"no mutant has {' '.join(words)}")
    for mutant, _ in mutants:
        mutant.applied((faults.CSRC / mutant.path).read_text())
    copy_tree()
    for build in BUILDS:
        if said := notice(build, []):
            sys.exit(f"{said} fails before any mutation")
    wrong, by = [], Counter()
    for mutant, tests in (bar := tqdm(mutants, unit="mutant")):
        noticed = try_mutant(mutant, tests)
        by[noticed or "equivalent"] += 1
        if (noticed is None) != bool(mutant.equivalent):
            what = (
                f"{noticed} notices, though it is listed as equivalent" if noticed else "survives"
            )
            wrong.append(f"{mutant}: {what}")
            bar.write(wrong[-1])
    print(f"{len(mutants)} mutants:", ", ".join(f"{count} {name}" for name, count in by.items()))
    if wrong:
        sys.exit("\n".join([f"{len(wrong)} not as listed:", *wrong]))


if __name__ == "__main__":
    main()

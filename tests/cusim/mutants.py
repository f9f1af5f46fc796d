"""Break the CUDA kernels, one fault at a time, and see that the kernel tests notice.

    python tests/cusim/mutants.py [word ...]    the mutants whose file or change has all the words

Every mutant is compiled in a copy of the tree and given to kernel_tests until one fails: as it is,
with AddressSanitizer and UndefinedBehaviorSanitizer, with ThreadSanitizer. A mutant that none
notices survives, and this program fails, unless it is listed as equivalent with the reason. Two
copies work side by side.
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

import faults
from test_programs import BUILDS, ORDERS, SANITIZED
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
COPIES = 2
SECONDS = 600  # a mutant may run for ever; the tree as it is has to end by then


def update(source: str, target: str) -> None:
    """Copy what differs, as of now: a killed run may have left a mutant, and objects made of it."""
    if not Path(target).exists() or not filecmp.cmp(source, target, shallow=False):
        shutil.copy(source, target)


class Copy:
    """The sources in a tree of their own, configured like build/cusim."""

    def __init__(self, number: int) -> None:
        self.root = ROOT / "build" / "mutants" / str(number)
        self.root.mkdir(parents=True, exist_ok=True)
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        for name in ("csrc", "tests", "moe_ext"):
            to = self.root / name
            shutil.copytree(
                ROOT / name, to, ignore=ignore, copy_function=update, dirs_exist_ok=True
            )
        update(ROOT / "CMakeLists.txt", self.root / "CMakeLists.txt")
        configure = ["cmake", "-S", str(self.root), "-B", str(self.root / "build"), "-G", "Ninja"]
        configure += ["-DMOE_EXT_CUSIM=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
        configure += ["-DCMAKE_CXX_FLAGS_RELEASE=-O1"]  # most time goes into compiling
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)

    def notice(self, build: str, tests: list[str]) -> str | None:
        """What the build of that name says of the tree as it is: None where it passes."""
        target = f"kernel_tests{build}"
        made = subprocess.run(
            ["cmake", "--build", str(self.root / "build"), "--target", target],
            capture_output=True,
            text=True,
        )
        if made.returncode != 0:
            raise RuntimeError(made.stdout[-4000:])
        program = self.root / "build" / "tests" / "cusim" / target
        command = [program, *(SANITIZED if build else ORDERS), *tests]
        try:
            run = subprocess.run(command, capture_output=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "does not end"
        return None if run.returncode == 0 else target

    def try_mutant(self, mutant: faults.Mutant, tests: list[str]) -> str | None:
        """Who noticed, or None."""
        path = self.root / "csrc" / mutant.path
        original = path.read_text()
        try:
            path.write_text(mutant.applied(original))
            said = (self.notice(build, tests) for build in BUILDS)
            return next(filter(None, said), None)
        except RuntimeError as error:
            raise RuntimeError(f"{mutant}: {error}") from error
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
    free: SimpleQueue[Copy] = SimpleQueue()

    def prepare(number: int) -> str | None:
        free.put(copy := Copy(number))
        return next(filter(None, (copy.notice(build, []) for build in BUILDS)), None)

    def attempt(task: tuple[faults.Mutant, list[str]]) -> tuple[faults.Mutant, str | None]:
        copy = free.get()
        try:
            return task[0], copy.try_mutant(*task)
        finally:
            free.put(copy)

    wrong, by = [], Counter()
    with ThreadPoolExecutor(COPIES) as pool:
        try:
            if failed := next(filter(None, pool.map(prepare, range(COPIES))), None):
                sys.exit(f"{failed} fails before any mutation")
            tried = as_completed([pool.submit(attempt, task) for task in mutants])
            for done in (bar := tqdm(tried, unit="mutant", total=len(mutants))):
                mutant, noticed = done.result()
                by[noticed or "equivalent"] += 1
                if (noticed is None) != bool(mutant.equivalent):
                    listed = f"{noticed} notices, though it is listed as equivalent"
                    wrong.append(f"{mutant}: {listed if noticed else 'survives'}")
                    bar.write(wrong[-1])
        finally:
            pool.shutdown(cancel_futures=True)  # those in hand put their source back
    print(f"{len(mutants)} mutants:", ", ".join(f"{count} {name}" for name, count in by.items()))
    if wrong:
        sys.exit("\n".join([f"{len(wrong)} not as listed:", *wrong]))


if __name__ == "__main__":
    main()

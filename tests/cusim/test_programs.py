"""The kernels under every sanitizer, and the emulator itself: what it says of planted faults."""

import json
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ORDERS = ("forward", "reverse", "random1", "random2", "random3")
BUILDS = ("", "_memory", "_thread")
# Sanitizers report a planted fault in every order; two orders are also two sets of numbers.
SANITIZED = ("forward", "random1")
OPERATORS = sorted(path.stem for path in Path(__file__).parent.glob("kernels/*.cpp"))

RACE = "WARNING: ThreadSanitizer: data race"
OVERFLOW = "ERROR: AddressSanitizer: heap-buffer-overflow"

# Misuse that ends the launch, in every build and order, with a message that says where.
ENDS = {
    "barrier_after_return": r"deadlock.*threads 0-49: __syncthreads.*threads 50-63: returned",
    "barrier_in_branches": r"divergent barrier.*threads 0-39: __sync.*threads 40-63: __sync",
    "barrier_and_shuffle": r"deadlock.*threads 0-15: __shfl_xor_sync.*threads 16-63: __syncthreads",
    "masks_disagree": r"different masks.*__reduce_max_sync\(0x00ffffff\) at .*planted.cu:\d+",
    "operations_disagree": r"wait for each other in different operations.*__ballot_sync.*planted",
    "shuffle_from_absent": r"__shfl_xor_sync.*reads lane \d+, which takes no part",
    "too_much_shared": r"takes 32 bytes of shared memory, the launch gave 16",
    "more_shared_than_there_is": r"invalid launch of f: 1 blocks of 32 threads, 65552 bytes",
    "copies_on_their_way": r"thread \d+, lane \d+: returns before 2 of its copies are done",
    "misaligned_copy": r"a misaligned asynchronous copy",
    "too_many_threads": r"invalid launch of f: 1 blocks of 1056 threads",
}
# Reported by the sanitizers of one build, in every order.
REPORTED = {
    "out_of_bounds_global": ("memory", OVERFLOW),
    "out_of_bounds_shared": ("memory", OVERFLOW),
    "out_of_bounds_local": ("memory", "ERROR: AddressSanitizer: stack-buffer-overflow"),
    "misaligned": ("memory", "misaligned address .* requires 16 byte alignment"),
    "racy_blocks": ("thread", RACE),
    "warp_exchange": ("thread", RACE),
    "product_without_barrier": ("thread", RACE),
} | {
    f"{fault}_{n}": ("thread", RACE)
    for fault in ("reverse", "rounds", "count")
    for n in (64, 256, 1024)
}
# A wrong result in some order, without any sanitizer.
WRONG = {"uninitialised_shared", "order_of_atomics", "short_wait", "product_without_barrier"}
WRONG |= {"swapped_words", "wrong_place", "not_transposed"}
WRONG |= {f"{fault}_{n}" for fault in ("reverse", "rounds") for n in (64, 256, 1024)}


@pytest.fixture
def run(cusim: ModuleType):
    """Runs a program beside the emulated kernels: its exit code and output."""

    def run(program: str, *arguments: str) -> tuple[int, str]:
        path = Path(cusim.__file__).with_name(program)
        done = subprocess.run([path, *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels(run, operator, build):
    orders = SANITIZED if build else ORDERS
    code, output = run(f"kernel_tests{build}", *orders, operator)
    assert code == 0, output
    (checks,) = re.findall(r"^(\d+) checks: 0 failed", output, re.MULTILINE)
    assert int(checks) >= 20_000 * len(orders)


def test_every_planted_kernel_is_listed(run):
    _, output = run("planted")
    wrong = {name for name in output.split() if not name.startswith("right_")}
    assert wrong == ENDS.keys() | REPORTED.keys() | WRONG
    assert len(output.split()) - len(wrong) == 12


@pytest.mark.parametrize("build", BUILDS)
def test_nothing_is_said_of_what_is_right(run, build):
    for case in run("planted")[1].split():
        for order in ORDERS if case.startswith("right_") else ():
            assert run(f"planted{build}", case, order) == (0, ""), (case, order)


@pytest.mark.parametrize("case", ENDS)
def test_misuse_ends_the_launch(run, case):
    for build in BUILDS:
        for order in ORDERS:
            code, output = run(f"planted{build}", case, order)
            assert code == 2, (build, order, output)
            assert re.search(ENDS[case], output, re.DOTALL), (build, order, output)


@pytest.mark.parametrize("case", REPORTED)
def test_a_sanitizer_reports_it(run, case):
    sanitizer, report = REPORTED[case]
    for order in ORDERS:
        code, output = run(f"planted_{sanitizer}", case, order)
        assert code != 0, order
        assert re.search(report, output), (order, output)
        assert "planted.cu" in output


@pytest.mark.parametrize("case", sorted(WRONG))
def test_some_order_gives_a_wrong_result(run, case):
    outcomes = [run("planted", case, order) for order in ORDERS]
    assert any(code == 1 and re.match(r"out\[\d+\] is", output) for code, output in outcomes)


COUNTERS = Path(__file__).parents[2] / "bench" / "results" / "counters.json"
ROW_OPERATORS = {"dispatch", "combine", "combine_backward", "route_dot"}
ROW_OPERATORS |= {"activate", "activate_backward"}


def test_counts_of_accesses(run):
    """What a profiler would show: whole sectors, no conflict between banks."""
    code, output = run("count_accesses")
    assert code == 0, output
    counted = json.loads(output)
    for launch in counted:
        assert "past" not in launch, launch
        if launch["kernel"] in ROW_OPERATORS:
            assert launch["bytes_asked"] >= 0.97 * launch["sector_bytes"], launch
        # The plan counts in a place for each expert, wherever routes send it.
        if not launch["kernel"].startswith("plan_"):
            assert launch["wavefronts"] <= 1.05 * launch["least_wavefronts"], launch
    assert {launch["kernel"] for launch in counted} >= ROW_OPERATORS | {"gate", "plan_place"}
    assert counted == json.loads(COUNTERS.read_text()), f"commit {output} as {COUNTERS}"


def test_the_counter_counts(run):
    counted = {
        (c["kernel"], c["shape"]): c for c in json.loads(run("count_accesses", "planted")[1])
    }
    for stride, sectors in ((1, 4), (2, 8), (32, 32)):
        read = counted["read", f"stride {stride}"]
        assert (read["bytes_asked"], read["sector_bytes"]) == (256, (sectors + 4) * 32)
        share = counted["share", f"stride {stride}"]
        assert share["requests"] == share["least_wavefronts"] == stride + 2
        assert share["wavefronts"] == stride + 1 + stride
        assert share["barriers"] == 2
        assert "past" not in share
        assert counted["past", f"stride {stride}"]["past"] == 128

"""Kept memory of large CPU results: its reuse, its limit, and its return to the system."""

import gc
import os
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

import moe_ext
from moe_ext import memory
from moe_ext.cli import doctor

PAGE = 1 << 21
WIDTH = PAGE // 4  # numbers in a row of one page

pytestmark = pytest.mark.skipif(
    moe_ext.keep_memory().limit == 0,
    reason="needs the compiled library, Linux and torch 2.11 or later",
)


@pytest.fixture(autouse=True)
def nothing_kept():
    """Each test begins with nothing kept, and with a limit of a gigabyte."""
    gc.collect()  # results of other tests may hang in cycles
    limit = moe_ext.keep_memory().limit
    moe_ext.keep_memory(0)
    moe_ext.keep_memory(1 << 30)
    yield
    moe_ext.keep_memory(limit)


def result(pages: int, value: float = 0.0, width: int = WIDTH) -> Tensor:
    """An operator's result of so many pages, filled with the value."""
    plan = moe_ext.make_plan(torch.zeros(pages, 1, dtype=torch.int32), 1)
    return moe_ext.dispatch(torch.full((pages, width), value), plan)


def kept() -> float:
    """The number of kept pages."""
    return moe_ext.keep_memory().kept / PAGE


def apart(*results: Tensor) -> None:
    """Skip if the system put results side by side: their memory would become one span."""
    ends = {tensor.data_ptr() + tensor.nbytes for tensor in results}
    if ends & {tensor.data_ptr() for tensor in results}:
        pytest.skip("the system put results side by side")


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
def test_the_limit_is_a_quarter_of_the_containers(tmp_path, file):
    """Both versions of control groups; a folder takes the place of the system's."""
    groups = Path("/proc/self/cgroup").read_text()
    if ("0::/" if file == "memory.max" else ":memory:/") not in groups:
        pytest.skip("the system has no such control group")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(f"{1 << 31}\n")
    bind = f"mount --bind {tmp_path} /sys/fs/cgroup"
    if subprocess.run(["unshare", "--mount", "sh", "-c", bind], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    code = "import moe_ext; print(moe_ext.keep_memory().limit)"
    shown = subprocess.check_output(
        ["unshare", "--mount", "sh", "-c", f"{bind} && exec {sys.executable} -c '{code}'"]
    )
    assert int(shown) == 1 << 29


def test_a_freed_result_serves_the_next():
    first = result(4)
    address = first.data_ptr()
    assert kept() == 0
    del first
    assert kept() == 4
    second = result(4, 1.0)
    assert second.data_ptr() == address
    assert kept() == 0
    assert (second == 1).all()


def test_a_smaller_result_takes_a_part():
    large = result(6)
    begin = large.data_ptr()
    del large
    small = result(2, 1.0)
    assert begin <= small.data_ptr() < begin + 6 * PAGE
    assert kept() == 4
    del small
    assert kept() == 6
    assert result(6).data_ptr() == begin  # the parts are one again
    parts = [result(2), result(4)]
    while parts:
        del parts[0]
    assert result(6).data_ptr() == begin  # in the other order too


def test_a_result_takes_the_smallest_memory_that_holds_it():
    large, between, small = result(8), result(1), result(3)
    apart(large, small)
    addresses = large.data_ptr(), small.data_ptr()
    del large, small
    assert result(3).data_ptr() == addresses[1]
    assert result(8).data_ptr() == addresses[0]
    del between


def test_part_of_a_page_takes_a_page():
    some = result(3, width=WIDTH - 16)
    del some
    assert kept() == 3


def test_memory_is_kept_when_its_last_view_has_died():
    part = result(2, 1.0)[1:]
    assert kept() == 0
    other = result(2, 2.0)
    assert (part == 1).all()
    del part
    assert kept() == 2
    del other


def test_a_gradient_is_kept_when_it_is_set_to_none():
    experts = moe_ext.GroupedExperts(2, 512, 1024)  # gradients of four and of two pages
    plan = moe_ext.make_plan(torch.tensor([[0], [1]], dtype=torch.int32), 2)
    out = experts.routed(torch.randn(2, 512), plan, torch.ones(2, 1))
    out.sum().backward()
    assert kept() == 0
    experts.zero_grad(set_to_none=True)
    assert kept() == 6


def test_small_results_are_torchs():
    small = result(1, width=WIDTH - 16)
    small.untyped_storage().resize_(4 * WIDTH)
    del small
    assert kept() == 0


def test_no_more_is_kept_than_the_limit():
    moe_ext.keep_memory(5 * PAGE)
    results = [result(pages) for pages in (1, 2, 3, 4)]
    while results:
        results.pop()
        assert kept() <= 5
    assert kept() == 5
    found = moe_ext.keep_memory(2 * PAGE + 1)
    assert found == (2 * PAGE, 2 * PAGE + 1)
    assert str(found) == "4 MiB are kept, at most 4"


def test_small_memory_goes_first():
    moe_ext.keep_memory(8 * PAGE)
    small, *between = result(2), result(1), result(6), result(1), result(3)
    large = between.pop(1)
    address = large.data_ptr()
    apart(small, large, between[2])
    del large, small
    del between[2]
    assert kept() == 8  # 6, and 2 of 3
    assert result(6).data_ptr() == address


SMAPS = Path("/proc/self/smaps_rollup")


def offered() -> int:
    """Count the pages that were offered to the system, which counts a few small ones late."""
    lines = SMAPS.read_text()
    return round(int(re.search(r"LazyFree:\s*(\d+) kB", lines)[1]) * 1024 / PAGE)


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux 4.14 or later")
def test_more_than_an_eighth_of_the_limit_is_offered_to_the_system():
    before = offered()
    moe_ext.keep_memory(16 * PAGE)
    neighbour, small, large = result(1), result(2), result(4, 1.0)
    del small
    assert offered() == before
    del large
    assert offered() == before + 6
    large = result(4, 2.0)
    assert offered() == before + 2  # what was written is no longer offered
    assert (large == 2).all()
    assert (neighbour == 0).all()
    del large
    moe_ext.keep_memory(8 * PAGE)
    assert offered() == before + 6


@pytest.mark.skipif(not SMAPS.exists(), reason="needs Linux 4.14 or later")
@pytest.mark.parametrize("is_given_back", [False, True])
def test_memory_in_use_is_not_offered(is_given_back):
    before = offered()
    moe_ext.keep_memory(80 * PAGE)
    first, other = result(8), result(11)
    begin = first.data_ptr()
    del first
    if is_given_back:
        moe_ext.keep_memory(0)
        moe_ext.keep_memory(80 * PAGE)
    again = result(2, 1.0)
    if not begin <= again.data_ptr() < begin + 8 * PAGE:
        pytest.skip("the system put it elsewhere")
    del other
    assert offered() == before + 11 + (0 if is_given_back else 6)
    assert (again == 1).all()


def is_mapped(address: int) -> bool:
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(it, 16) for it in line.split()[0].split("-")] for line in lines]
    return any(begin <= address < end for begin, end in ranges)


def test_a_limit_of_zero_keeps_none():
    moe_ext.keep_memory(0)
    some = result(4, 1.0)
    address = some.data_ptr()
    assert (some == 1).all()
    assert is_mapped(address)
    del some
    assert kept() == 0
    assert not is_mapped(address)


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="keep_memory: limit must be at least 0, got -1"):
        moe_ext.keep_memory(-1)
    with pytest.raises(RuntimeError, match="keep_memory: limit must be at least 0 bytes, got -1"):
        torch.ops.moe_ext.keep_memory(torch.empty(0), -1)


def test_doctor_shows_it(monkeypatch):
    assert doctor._table(doctor._facts())["kept memory"] == str(moe_ext.keep_memory())
    monkeypatch.setattr(doctor, "keep_memory", lambda: memory.KeptMemory(0, 0))
    assert (
        doctor._facts()["kept_memory"]
        == "none: it needs the compiled library, Linux and torch 2.11 or later"
    )


def test_the_default_device_does_not_matter():
    with torch.device("meta"):
        found = moe_ext.keep_memory(3 * PAGE)
    assert found == moe_ext.keep_memory() == (0, 3 * PAGE)


def test_a_compiled_function_cannot_call_it():
    compiled = torch.compile(moe_ext.keep_memory, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="call keep_memory outside of compiled code"):
        compiled(0)


def test_large_results_cannot_be_resized():
    with pytest.raises(RuntimeError, match="not resizable"):
        result(2).resize_(3, WIDTH)


def test_other_devices_keep_none():
    assert torch.ops.moe_ext.keep_memory(torch.empty(0, device="meta"), 1) == (0, 0)


def churn(seed: int) -> None:
    """Make and free results of many sizes, and check that each keeps its value."""
    rng, held = random.Random(seed), []
    for step in range(150):
        if held and rng.random() < 0.5:
            value, tensor = held.pop(rng.randrange(len(held)))
            assert (tensor == value).all()
        else:
            value = float(1000 * seed + step)
            held.append((value, result(rng.randint(1, 9), value)))
    for value, tensor in held:
        assert (tensor == value).all()


def test_results_never_share_memory():
    moe_ext.keep_memory(40 * PAGE)  # some goes back, and some is offered to the system
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(churn, range(3)))
    assert kept() <= 40


def run(program: str) -> str:
    """Run a program with this module's names in a new process, and return its output."""
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{start}from test_memory import *\n{program}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_without_addresses_uses_what_is_kept():
    said = run("""
import resource
small = [result(8) for _ in range(8)]
between = [result(1) for _ in range(2)]
del small[::2]
assert kept() == 32
used = int(re.search(r"VmSize:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * PAGE, resource.RLIM_INFINITY))
tokens = torch.full((40, WIDTH), 1.0)  # 40 of the 60
plan = moe_ext.make_plan(torch.zeros(40, 1, dtype=torch.int32), 1)
large = moe_ext.dispatch(tokens, plan)
assert (large == 1).all()
print(kept())
""")
    assert float(said) == 0


def test_a_forked_child_has_memory_of_its_own():
    said = run("""
held, freed = result(2, 1.0), result(2, 2.0)
del freed
child = os.fork()
if child == 0:
    del held
    others = [result(2, value) for value in (3.0, 4.0)]
    assert all((it == value).all() for it, value in zip(others, (3.0, 4.0)))
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert (held == 1).all()
print(kept())
""")
    assert float(said) == 2

"""Memory that is kept for large results on a CPU: whose it is, how much, and where it goes."""

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import moe_ext
from moe_ext import memory
from moe_ext.cli import doctor

PAGE = 1 << 21
WIDTH = PAGE // 4  # of a row of a page

pytestmark = pytest.mark.skipif(
    moe_ext.keep_memory().limit == 0,
    reason="needs the compiled library, Linux and torch 2.11 or later",
)


@pytest.fixture(autouse=True)
def nothing_kept():
    """Each test begins with nothing kept, and with the limit of the process."""
    limit = moe_ext.keep_memory().limit
    moe_ext.keep_memory(0)
    moe_ext.keep_memory(limit)
    yield
    moe_ext.keep_memory(limit)


def result(pages: int, value: float = 0.0, width: int = WIDTH) -> Tensor:
    """An operator's result of so many pages, filled with the value."""
    plan = moe_ext.make_plan(torch.zeros(pages, 1, dtype=torch.int32), 1)
    return moe_ext.dispatch(torch.full((pages, width), value), plan)


def kept() -> int:
    """In pages."""
    return moe_ext.keep_memory().kept / PAGE


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


def test_a_result_takes_the_smallest_memory_that_holds_it():
    large, between, small = result(8), result(1), result(3)
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


def test_what_was_kept_longest_goes_first():
    moe_ext.keep_memory(8 * PAGE)
    old, *between = result(4), result(1), result(4), result(1), result(2)
    address = between[1].data_ptr()
    del old, between[1], between[2]
    assert kept() == 8
    assert result(4).data_ptr() == address


def test_a_limit_of_zero_keeps_none():
    moe_ext.keep_memory(0)
    some = result(4, 1.0)
    assert (some == 1).all()
    del some
    assert kept() == 0


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="limit must be at least 0 bytes, got -1"):
        moe_ext.keep_memory(-1)
    with pytest.raises(RuntimeError, match="keep_memory: limit must be at least 0 bytes, got -1"):
        torch.ops.moe_ext.keep_memory(torch.empty(0), -1)


def test_doctor_shows_it(monkeypatch):
    assert doctor._table(doctor._facts())["kept memory"] == str(moe_ext.keep_memory())
    monkeypatch.setattr(doctor, "keep_memory", lambda: memory.KeptMemory(0, 0))
    assert doctor._facts()["kept_memory"] == "none: it needs Linux and torch 2.11 or later"


def test_other_devices_keep_none():
    assert torch.ops.moe_ext.keep_memory(torch.empty(0, device="meta"), 1) == (0, 0)


def churn(seed: int) -> None:
    """Results of many sizes come and go; none is written by another's operator."""
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

"""Huge pages: what lies where afterwards, and what is said where there are none."""

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import moe_ext
from moe_ext.experts import pages

needs_huge_pages = pytest.mark.skipif(bool(pages.why_not_here()), reason=pages.why_not_here())


def of_mappings(tensor: torch.Tensor, entry: str) -> list[str]:
    """What the kernel says of the mappings that a tensor lies in."""
    begin, found, inside = tensor.data_ptr(), [], False
    end = begin + tensor.nbytes
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(match[1], 16) < end and begin < int(match[2], 16)
        elif inside and line.startswith(f"{entry}:"):
            found.append(line.split(":")[1])
    return found


@needs_huge_pages
def test_weights_stay_where_they_are_in_other_pages():
    model = nn.Sequential(nn.Linear(1024, 4096), nn.Linear(4, 4))
    model.register_buffer("same", model[0].weight.detach())
    weight = model[0].weight
    before, address = weight.detach().clone(), weight.data_ptr()
    found = moe_ext.huge_pages(model)
    assert found.total == sum(p.nbytes for p in model.parameters())  # the buffer counts once
    assert found.total - (4 << 21) < found.huge <= found.total
    assert not found.why_not
    # The kernel may have taken some back.
    assert any(int(text.split()[0]) for text in of_mappings(weight, "AnonHugePages"))
    assert weight.data_ptr() == address
    assert torch.equal(weight, before)
    assert re.fullmatch(r"1\d of 16 MiB in huge pages", str(found))


@needs_huge_pages
def test_memory_of_several_mappings_becomes_one():
    memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    model = nn.ParameterList([torch.frombuffer(memory, dtype=torch.float32).fill_(1)])
    ((address, size),) = pages._parts(pages._storages(model))
    # A mapping of its own around the border of two huge pages, as a heap leaves it.
    assert pages._madvise(address + (3 << 21) - 4096, 8192, pages._MADV_HUGEPAGE) == 0
    assert len(of_mappings(model[0], "Rss")) == 3
    found = moe_ext.huge_pages(model)
    assert found.huge == size
    assert not found.why_not


@needs_huge_pages
def test_own_experts_ask_for_huge_pages():
    experts = moe_ext.GroupedExperts(4, 1024, 1024)
    # Whether it has some is the system's affair.
    assert any(" hg" in flags for flags in of_mappings(experts.gate_up_proj, "VmFlags"))


@needs_huge_pages
def test_weights_mapped_from_a_file_are_left_alone(tmp_path):
    torch.save(nn.Linear(1024, 4096).state_dict(), tmp_path / "weights.pt")
    with torch.device("meta"):
        model = nn.Linear(1024, 4096)
    model.load_state_dict(torch.load(tmp_path / "weights.pt", mmap=True), assign=True)
    before = model.weight.detach().clone()
    found = moe_ext.huge_pages(model)
    assert torch.equal(model.weight, before)
    assert found.huge == 0 or not found.why_not
    if not found.huge:
        assert "mapped from a file" in found.why_not


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    found = moe_ext.huge_pages(nn.Linear(1024, 4096))
    assert found.huge == 0
    assert found.why_not == "needs Linux 6.1 or later, this is darwin"
    moe_ext.GroupedExperts(2, 8, 8)


def test_an_old_system_is_named(monkeypatch):
    monkeypatch.setattr(pages, "_madvise", lambda *args: pages.errno.EINVAL)
    assert "Linux 6.1 or later with transparent huge pages" in pages.why_not_here()


def test_tensors_without_memory_are_left_alone():
    with torch._subclasses.FakeTensorMode():
        fake = nn.Linear(1024, 4096)
    assert moe_ext.huge_pages(fake)[:2] == (0, 0)
    with torch.device("meta"):
        model = moe_ext.GroupedExperts(2, 1024, 1024)
    assert moe_ext.huge_pages(model)[:2] == (0, 0)
    assert moe_ext.huge_pages(nn.ReLU())[:2] == (0, 0)


def test_the_default_device_does_not_matter():
    module = nn.Linear(4, 4)
    with torch.device("meta"):
        found = moe_ext.huge_pages(module)
    assert found == moe_ext.huge_pages(module)

"""The path of the benches; drawn figures; a run with readings, for sinks and pictures."""

import sys

import pytest
import torch
from scripts import ROOT
from torch import nn

from moe_ext import GroupedExperts, MOELayer, TopKGate, stats
from moe_ext.monitor.sinks import JsonLines

sys.path.insert(0, str(ROOT / "bench"))


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that are drawn, which are not saved."""
    figures = []
    savefig = "matplotlib.figure.Figure.savefig"
    monkeypatch.setattr(savefig, lambda figure, *_, **__: figures.append(figure))
    return figures


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """Five readings of two layers, in training and in evaluation, and their file."""
    torch.manual_seed(0)
    layers = [
        MOELayer(TopKGate(16, 8, 2, capacity_factor=0.9), GroupedExperts(8, 16, 8)) for _ in "ab"
    ]
    model = nn.Sequential(*layers)
    counting = stats.track(model, detailed=True)
    sink = JsonLines(tmp_path_factory.mktemp("run") / "run.jsonl")
    readings = []
    for step in range(0, 50, 10):
        model.train()(torch.randn(40, 16))
        model.eval()(torch.randn(20, 16))
        readings.append((step, counting.read()))
        sink(readings[-1][1], step)
    return readings, sink.path

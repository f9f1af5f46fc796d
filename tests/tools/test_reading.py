"""The numbers and the text of a reading."""

import math

import pytest
import torch

from moe_ext import stats


def test_numbers_of_a_load_follow_their_definitions():
    load = torch.tensor([6, 2, 0, 0])
    layer = stats.LayerStats(4, 1, load, torch.tensor([3, 2, 0, 0]), 1.5)
    assert layer.dropped == pytest.approx(3 / 8)
    assert layer.max_over_mean == 3
    assert layer.cv == pytest.approx(load.double().std(correction=0).item() / 2)
    assert layer.load_entropy == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    )
    assert layer.dead == layer.scarce == [2, 3]
    few = stats.LayerStats(9, 1, torch.tensor([100, 100, 100, 5]), load, 1.0)
    assert (few.dead, few.scarce) == ([], [3])
    even = stats.LayerStats(4, 1, torch.ones(4).long(), torch.ones(4).long(), 1.0)
    assert (even.max_over_mean, even.cv, even.dead, even.dropped) == (1, 0, [], 0)
    assert even.load_entropy == pytest.approx(1)
    both = stats.Reading({"a": layer, "b": even}, {}).scalars()
    assert both["train/moe/max_over_mean"] == 2
    assert both["train/moe/max_over_mean_worst"] == 3
    assert both["train/moe/dead_worst"] == 2


def test_a_reading_prints_idle_experts():
    load = torch.tensor([8, 4, 2, 1, 1, 0, 0, 0])
    layer = stats.LayerStats(8, 1, load, load, 1.0)
    text = str(stats.Reading({"layers.0": layer}, {}))
    assert "5, 6, 7" in text
    assert "layers.0  █" in text
    assert "···" in text
    assert str(stats.Reading({}, {})) == "nothing was counted since the last reading"

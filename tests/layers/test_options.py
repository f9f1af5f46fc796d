"""Names of options: type checkers and run-time checks accept the same."""

import inspect
import re
import types
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import torch

import moe_ext
from moe_ext.deepspeed import sharded_moe
from moe_ext.deepspeed.gate import NOISE_SCALES
from moe_ext.ops import checks

E, H, F = 4, 6, 5


def names_of(function) -> dict[str, tuple]:
    """The Literal parameters of a function and the values they take."""

    def flat(hint) -> tuple:
        if get_origin(hint) in (Union, types.UnionType):
            return tuple(value for part in get_args(hint) for value in flat(part))
        return get_args(hint) if get_origin(hint) is Literal else (None,)

    hints = get_type_hints(function)
    found = {name: flat(hint) for name, hint in hints.items() if name != "return"}
    return {name: values for name, values in found.items() if set(values) != {None}}


def arguments() -> dict[str, tuple]:
    """Arguments that are valid with every name of an option."""
    logits = torch.randn(7, E)
    plan = moe_ext.make_plan(logits.topk(2).indices.int(), E)
    tokens, weights, swiglu = torch.randn(7, H), torch.rand(7, 2), {"activation": "swiglu"}
    up, down = torch.randn(E, 2 * F, H), torch.randn(E, H, F)
    return {
        "TopKGate": (moe_ext.TopKGate, (H, E, 2), {}),
        "GroupedExperts": (moe_ext.GroupedExperts, (E, H, F), {}),
        "MoE": (moe_ext.MoE, (H, torch.nn.Linear(H, H), E), {}),
        "gate": (moe_ext.gate, (logits, 2), {}),
        "route": (moe_ext.route, (logits, 2), {}),
        "make_plan": (moe_ext.make_plan, (plan.expert_ids, E), {}),
        "activate": (moe_ext.activate, (torch.randn(14, 2 * F), plan), swiglu),
        "feed_forward": (moe_ext.feed_forward, (tokens, plan, weights, up, down), swiglu),
        "topkgating": (sharded_moe.topkgating, (logits, 2, 1.0, 1), {}),
    }


@pytest.mark.parametrize("owner", arguments())
def test_an_option_takes_the_names_of_its_type_and_no_other(owner):
    function, args, kwargs = arguments()[owner]
    of_type = names_of(function.__init__ if inspect.isclass(function) else function)
    assert of_type
    for name, values in of_type.items():
        for value in values:
            # Activations without a gate have another width.
            if name != "activation" or value in checks.GATED or inspect.isclass(function):
                function(*args, **kwargs | {name: value})
        with pytest.raises((ValueError, RuntimeError), match=name) as refused:
            function(*args, **kwargs | {name: "wrong"})
        listed = re.findall(r"\w+", str(refused.value).split("must be ")[1].split("got")[0])
        listed = set(listed) - {"one", "of", "or", "None"}
        assert listed == {value for value in values if value not in (None, "None")}


def test_every_noise_has_a_scale():
    noise = names_of(moe_ext.TopKGate.__init__)["noisy_gate_policy"]
    assert set(NOISE_SCALES) == set(noise)

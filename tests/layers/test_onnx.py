"""Layers in ONNX Runtime, by torch.onnx.export(dynamo=True); what TorchScript is told."""

import numpy as np
import pytest
import torch

from moe_ext import GroupedExperts, MOELayer, TopKGate
from moe_ext.ops import checks

E, H, F = 6, 8, 16


def layer_for(activation="swiglu", **options) -> MOELayer:
    options = {"k": 2, "top2_2nd_expert_sampling": False, "drop_tokens": False} | options
    experts = GroupedExperts(E, H, F, activation=activation, bias=True)
    return MOELayer(TopKGate(H, E, **options), experts).eval()


def run_in_onnx(layer, x, tmp_path, inputs, **how):
    """The outputs of ONNX Runtime for some inputs, of a layer exported with x."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(layer, (x,), tmp_path / "layer.onnx", dynamo=True, verbose=False, **how)
    session = runtime.InferenceSession(tmp_path / "layer.onnx")
    name = session.get_inputs()[0].name
    return [torch.from_numpy(np.array(session.run(None, {name: y.numpy()})[0])) for y in inputs]


RULES = [
    {},
    {"k": 1, "normalize": "before"},
    {"scoring": "sigmoid", "expert_bias": True, "num_groups": 3, "topk_groups": 2, "scale": 2.5},
    {"scoring": "sqrtsoftplus", "num_groups": 2, "group_score": "top2_sum", "activation": "geglu"},
    {"activation": "swiglu_oai"},
    # Some experts drop routes, others have empty rows.
    {"k": 3, "drop_tokens": True, "eval_capacity_factor": 0.7, "min_capacity": 1},
    {
        "drop_tokens": True,
        "eval_capacity_factor": 0.7,
        "min_capacity": 1,
        "drop_policy": "position",
    },
]


@pytest.mark.parametrize("options", RULES, ids=" ".join)
def test_onnx_runtime_gives_the_layers_result(tmp_path, options):
    layer = layer_for(**options)
    x = torch.randn(3, 10, H)
    (out,) = run_in_onnx(layer, x, tmp_path, [x])
    torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-6)


def test_one_onnx_graph_serves_every_number_of_tokens(tmp_path):
    layer = layer_for()
    inputs = [torch.randn(3, tokens, H) for tokens in (10, 1, 33)]
    shapes = {"hidden": {1: torch.export.Dim("S")}}
    outs = run_in_onnx(layer, inputs[0], tmp_path, inputs, dynamic_shapes=shapes)
    for out, x in zip(outs, inputs, strict=True):
        torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-6)


def test_onnx_refuses_quantised_experts(tmp_path):
    layer = layer_for()
    layer.experts.quantize("int8")
    x = torch.randn(5, H)
    with pytest.raises(Exception, match=r"No ONNX function found for .*moe_ext\.quantized_mm"):
        run_in_onnx(layer, x, tmp_path, [x])


@pytest.mark.parametrize("part", ["layer", "gate", "experts", "model"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torchscript_names_what_to_use_instead(part):
    layer = layer_for()
    x = torch.randn(5, H)
    routing = layer.gate.route(x)
    module, call = {
        "layer": (layer, layer),
        "gate": (layer.gate, layer.gate),
        "experts": (
            layer.experts,
            lambda x: layer.experts.routed(x, routing.plan, routing.weights),
        ),
        "model": (torch.nn.Sequential(torch.nn.Linear(H, H), layer), layer),
    }[part]
    for compile in (lambda: torch.jit.script(module), lambda: torch.jit.trace(call, (x,))):
        with pytest.raises(RuntimeError) as raised:
            compile()
        assert str(raised.value) == checks.NO_TORCHSCRIPT
    assert "torch.export" in checks.NO_TORCHSCRIPT
    assert "torch.compile" in checks.NO_TORCHSCRIPT

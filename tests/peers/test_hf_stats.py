"""Monitoring models of transformers: stats, explain, ranges, and the callback of the Trainer."""

import pytest
import torch
import transformers
from test_hf_experts import model_of, tokens_of, training_arguments

import moe_ext.hf
from moe_ext import profiling, stats
from moe_ext.monitor.sinks import JsonLines, read_json_lines


def mixtral(implementation: str = "moe_ext"):
    return model_of("mixtral", experts_implementation=implementation)


def test_experts_of_transformers_are_counted():
    model = mixtral()
    counting = stats.track(model)
    tokens = tokens_of(rows=3, length=11)
    with torch.no_grad():
        logits = model(tokens, output_router_logits=True).router_logits
    read = counting.read().eval
    assert len(read) == 2
    for layer, of_layer in zip(read.values(), logits, strict=True):
        chosen = of_layer.view(33, 8).topk(2).indices.flatten()
        assert torch.equal(layer.load, chosen.bincount(minlength=8))
        assert (layer.tokens, layer.dropped) == (33, 0)


def test_divided_experts_are_not_summed():
    """Equal ids are different experts on different ranks."""
    model = mixtral()
    counting = stats.track(model)
    assert not counting.is_divided
    for _, module in moe_ext.hf.experts_modules(model):
        module._is_expert_parallel = True
    assert counting.is_divided
    with pytest.raises(ValueError, match=r"Stats.read: group must be None where transformers"):
        counting.read(group=object())


def test_another_implementation_is_refused():
    with pytest.raises(ValueError, match='with experts_implementation="moe_ext"'):
        stats.track(mixtral("eager"))


def test_explain_notes_another_implementation():
    model = mixtral("eager")
    (note,) = moe_ext.explain(model, tokens_of()).notes
    assert note.startswith("2 experts modules of transformers have")
    assert "experts_implementation='eager'" in note
    model.set_experts_implementation("moe_ext")
    assert moe_ext.explain(model, tokens_of()).notes == []


def test_explain_and_ranges_name_experts_of_transformers():
    model, tokens = mixtral(), tokens_of()
    names = [name for name, _ in moe_ext.hf.experts_modules(model)]
    attributes = [set(vars(module)) for module in model.modules()]
    found = moe_ext.explain(model, tokens)
    assert list(dict.fromkeys(call.layer for call in found.calls)) == names
    assert f"{names[0]} to {names[1]}, 2 alike:" in str(found)
    with torch.profiler.profile() as profiled, profiling.ranges(model):
        model(tokens)
    ranges = [event.name for event in profiled.events() if event.name.startswith("moe_ext.")]
    assert ranges == [f"moe_ext.layer {name}" for name in names]
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_the_callback_writes_readings(tmp_path):
    model = mixtral()
    data = [{"input_ids": ids, "labels": ids} for ids in tokens_of(rows=24, length=10)]
    options = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 3}
    arguments = training_arguments(tmp_path, **options)
    sink = JsonLines(tmp_path / "run.jsonl")
    with pytest.raises(ValueError, match=r"StatsCallback: a sink must be a function .* got 'run'"):
        moe_ext.hf.StatsCallback("run")
    callback = moe_ext.hf.StatsCallback(sink)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])
    trainer.train()
    readings = list(read_json_lines(sink.path))
    assert [step for step, _ in readings][:2] == [3, 6]
    for _, reading in readings[:2]:
        for layer in reading.train.values():
            assert (layer.calls, layer.tokens) == (3, 3 * 4 * 10)
            assert int(layer.load.sum()) == 2 * layer.tokens
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2
    first = readings[0][1].scalars()["train/moe/max_over_mean"]
    assert logged[0]["train/moe/max_over_mean"] == first
    # The model computes its load-balance loss, which its experts do not know.
    assert not [name for entry in logged for name in entry if "l_aux" in name]
    assert "l_aux" not in sink.path.read_text()
    assert {layer.l_aux for layer in readings[0][1].train.values()} == {None}
    assert all(m.observer is None for m in model.modules() if hasattr(m, "observer"))
    assert len(readings[0][1].train) == 2

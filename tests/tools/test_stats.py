"""stats counts every route once, and nothing else; the numbers and the text of a reading."""

import copy
import math
import pickle

import pytest
import torch
from processes import on_ranks
from torch import nn
from torch.utils.checkpoint import checkpoint

import moe_ext
from moe_ext import GroupedExperts, MOELayer, TopKGate, stats
from moe_ext.monitor.explain import _Trace

T, H, E = 48, 16, 8


def layer_of(k: int = 2, **options) -> MOELayer:
    options = {"top2_2nd_expert_sampling": False, "use_rts": False} | options
    return MOELayer(TopKGate(H, E, k, **options), GroupedExperts(E, H, 8))


def assert_of_plans(read: stats.LayerStats, layer: MOELayer, *calls) -> list:
    """Compare counts with the plans of these inputs, by the layer's gate. Returns the routings."""
    made = [layer.gate.route(x) for x in calls]
    assert (read.calls, read.tokens) == (len(calls), sum(map(len, calls)))
    assert torch.equal(read.load, sum(r.plan.load for r in made).long())
    assert torch.equal(read.kept, sum(r.plan.kept() for r in made).long())
    return made


def counted(layer: MOELayer, *calls, detailed: bool = False) -> stats.LayerStats:
    """The counts of a layer in training, after these calls."""
    counting = stats.track(layer, detailed=detailed)
    for x in calls:
        layer(x)
    return counting.read().train["MOELayer"]


@pytest.fixture
def inputs():
    return [torch.randn(T, H), torch.randn(17, H)]


def test_counts_are_those_of_the_plans(inputs):
    layer = layer_of(capacity_factor=0.7)
    read = counted(layer, *inputs)
    made = assert_of_plans(read, layer, *inputs)
    dropped = sum(int((r.plan.slots < 0).sum()) for r in made)
    assert dropped > 0
    assert read.dropped == pytest.approx(dropped / (2 * (T + 17)))
    assert read.l_aux == pytest.approx(float(sum(r.l_aux for r in made) / 2), rel=1e-6)
    assert read.pairs is None


def test_a_reading_begins_a_new_count(inputs):
    layer = layer_of()
    counting = stats.track(layer)
    layer(inputs[0])
    first = counting.read(reset=False)
    assert torch.equal(counting.read().train["MOELayer"].load, first.train["MOELayer"].load)
    assert counting.read() == stats.Reading({}, {})
    layer(inputs[0])
    assert torch.equal(counting.read().train["MOELayer"].load, first.train["MOELayer"].load)


def test_training_and_evaluation_have_separate_counts(inputs):
    layer = layer_of(capacity_factor=1.0, eval_capacity_factor=0.3)
    counting = stats.track(layer)
    layer(inputs[0])
    layer.eval()
    layer(inputs[1])
    reading = counting.read()
    assert reading.train["MOELayer"].tokens == T
    assert reading.eval["MOELayer"].tokens == 17


@pytest.mark.parametrize("detailed", [False, True])
def test_padding_does_not_count(inputs, detailed):
    layer = layer_of(drop_tokens=False)
    counting = stats.track(layer, detailed=detailed)
    layer(inputs[0])
    without = counting.read().train["MOELayer"]
    padded = torch.cat([inputs[0], torch.full((5, H), torch.nan)])
    used = torch.cat([torch.ones(T), torch.zeros(5)])
    layer(padded, used)
    read = counting.read().train["MOELayer"]
    # l_aux is the gate's, which averages over all tokens.
    torch.testing.assert_close(read._replace(l_aux=without.l_aux), without, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scoring", moe_ext.ops.checks.SCORINGS)
def test_detailed_numbers_follow_their_definitions(inputs, scoring):
    layer = layer_of(k=3, scoring=scoring, drop_tokens=False)
    read = counted(layer, inputs[0], detailed=True)
    (routing,) = assert_of_plans(read, layer, inputs[0])
    shares = routing.probs / routing.probs.sum(-1, keepdim=True)
    torch.testing.assert_close(read.importance, shares.double().mean(0))
    entropy = -(shares * shares.log()).sum(-1).mean() / math.log(E)
    assert read.router_entropy == pytest.approx(float(entropy), rel=1e-5)
    assert read.z_loss == pytest.approx(float(moe_ext.losses.z_loss(routing.logits)), rel=1e-5)
    assert read.agreement == 1
    chosen = torch.zeros(T, E).scatter(1, routing.plan.expert_ids.long(), 1)
    assert torch.equal(read.pairs.double(), (chosen.t() @ chosen).double())
    assert torch.equal(read.pairs.diagonal(), read.load)


def test_agreement_compares_with_the_logits_of_the_router(inputs):
    layer = layer_of(k=1, drop_tokens=False)
    counting = stats.track(layer, detailed=True)
    best = layer.gate.route(inputs[0]).plan.expert_ids
    recorded = best.clone()
    recorded[: T // 4] = (recorded[: T // 4] + 1) % E
    layer(inputs[0], expert_ids=recorded)
    assert counting.read().train["MOELayer"].agreement == 0.75


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpointed_forward_counts_once(inputs, use_reentrant, is_compiled):
    layer = layer_of()
    counting = stats.track(layer)
    x = inputs[0].requires_grad_()
    calls = []
    if is_compiled:
        torch._dynamo.reset()
        called = torch.compile(layer, backend="aot_eager", fullgraph=True)
    else:
        called = layer
        layer.gate.wg.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        checkpoint(called, x, use_reentrant=use_reentrant).sum().backward()
    assert len(calls) == (0 if is_compiled else 4)
    assert counting.read().train["MOELayer"].calls == 2


def checkpointed(layer: MOELayer):
    return lambda x: checkpoint(lambda x: layer.forward_with_aux(x)[0], x, use_reentrant=False)


@pytest.mark.parametrize("wrap", [lambda layer: layer, checkpointed])
@pytest.mark.parametrize("detailed", [False, True])
def test_compiled_layers_count_like_eager_ones(inputs, wrap, detailed):
    layer = layer_of(capacity_factor=0.7)
    counting = stats.track(layer, detailed=detailed)
    x = inputs[0].requires_grad_()
    wrap(layer)(x).sum().backward()
    expected = counting.read().train["MOELayer"]
    torch._dynamo.reset()
    compiled = torch.compile(wrap(layer), backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(x).sum().backward()
    read = counting.read().train["MOELayer"]
    counts = ("calls", "tokens", "load", "kept", *["pairs"] * detailed)
    expected = expected._replace(**{name: 3 * getattr(expected, name) for name in counts})
    torch.testing.assert_close(read, expected, rtol=1e-6, atol=0)


def test_nan_logits_give_nan_numbers(inputs):
    """Where training diverges the numbers say so."""
    read = counted(layer_of(), torch.full((T, H), torch.nan), detailed=True)
    assert math.isnan(read.router_entropy)
    assert math.isnan(read.z_loss)
    assert int(read.load.sum()) == 2 * T


def test_ties_agree_with_the_router():
    """torch.topk does not define which of equal logits it takes."""
    layer = layer_of(k=3, drop_tokens=False)
    nn.init.zeros_(layer.gate.wg.weight)
    assert counted(layer, torch.randn(T, H), detailed=True).agreement == 1


def test_many_choices_have_no_pairs(inputs):
    """In expert choice every token chooses every expert."""
    experts = 40
    gate = TopKGate(H, experts, experts, drop_policy="probs", normalize="never")
    layer = MOELayer(gate, GroupedExperts(experts, H, 8))
    read = counted(layer, inputs[0], detailed=True)
    assert read.load.tolist() == [T] * experts
    assert read.agreement == 1
    assert read.pairs is None


def test_tracking_changes_no_output_and_no_gradient(inputs):
    layer = layer_of(capacity_factor=0.7)
    x = inputs[0].requires_grad_()

    def results():
        out = layer(x)
        loss = out.square().sum() + layer.l_aux
        return out, *torch.autograd.grad(loss, [x, layer.gate.wg.weight])

    plain = results()
    with stats.track(layer, detailed=True) as counting:
        tracked = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))
    assert layer.observer is None
    results()
    assert counting.read().train["MOELayer"].calls == 1


def test_copies_explain_vmap_and_export_do_not_count(inputs):
    layer = layer_of(drop_tokens=False)
    counting = stats.track(layer)
    copy.deepcopy(layer)(inputs[0])
    moe_ext.explain(layer, inputs[0])
    torch.func.vmap(lambda x: layer.forward_with_aux(x)[0])(torch.stack([inputs[0]] * 2))
    exported = torch.export.export(layer, (inputs[0],), strict=True)
    exported.module()(inputs[0])
    assert counting.read() == stats.Reading({}, {})


def test_copies_of_foreign_modules_have_no_counters():
    """Experts modules of transformers have no __getstate__ that leaves the observer out."""
    module = nn.Linear(2, 2)
    module.num_experts = 2
    module.observer = stats._Counters(module, detailed=False)
    assert copy.deepcopy(module).observer is None
    assert pickle.loads(pickle.dumps(module)).observer is None


def test_a_later_stats_replaces_an_earlier_one(inputs):
    layer = layer_of()
    first = stats.track(layer)
    second = stats.track(layer)
    layer(inputs[0])
    first.stop()
    layer(inputs[0])
    assert first.read() == stats.Reading({}, {})
    assert second.read().train["MOELayer"].calls == 2


def test_layers_are_named_as_in_the_model(inputs):
    model = nn.Sequential(layer_of(), nn.Linear(H, H), layer_of())
    counting = stats.track(model)
    model(inputs[0])
    assert list(counting.read().train) == ["0", "2"]


class ForDeepSpeed(nn.Module):
    """A gate for DeepSpeed: it returns masks and `counted(exp_counts)`."""

    num_experts = E

    def __init__(self, gate, counted=lambda exp_counts: exp_counts):
        super().__init__()
        self.gate, self.counted = gate, counted

    def forward(self, x, used_token=None):
        l_aux, weights, mask, exp_counts = self.gate(x, used_token)
        return l_aux, weights, mask, self.counted(exp_counts)


def test_a_deepspeed_gate_counts_what_was_asked_for(inputs):
    """Its masks tell which routes were kept, its exp_counts which were asked for."""
    mine = layer_of(k=1, capacity_factor=0.5, drop_policy="position")
    layer = MOELayer(ForDeepSpeed(mine.gate), mine.experts)
    read = counted(layer, inputs[0], detailed=True)
    assert_of_plans(read, mine, inputs[0])
    assert read.dropped > 0
    assert read.router_entropy is None


def test_kept_is_at_most_load(inputs):
    """A gate may count its first choices only, as DeepSpeed's top-2 gate once did."""
    mine = layer_of(k=2)
    layer = MOELayer(ForDeepSpeed(mine.gate, lambda counts: counts // 2), mine.experts)
    read = counted(layer, inputs[0])
    assert torch.equal(read.load, read.kept)
    assert read.dropped == 0


@pytest.mark.parametrize("l_aux", [None, 0.5, torch.tensor(0.5)])
def test_l_aux_may_be_none_or_a_number(inputs, l_aux):
    plain = layer_of()

    class Gate(nn.Module):
        num_experts = E

        def route(self, tokens, used_token):
            return plain.gate.route(tokens, used_token)._replace(l_aux=l_aux)

    read = counted(MOELayer(Gate(), plain.experts), inputs[0])
    assert read.l_aux == (None if l_aux is None else 0.5)
    assert ("l_aux" in read.scalars()) == (l_aux is not None)


def test_calls_in_inference_mode_count(inputs):
    layer = layer_of().eval()
    with torch.inference_mode():
        counting = stats.track(layer)
        layer(inputs[0])
    layer(inputs[0])
    assert counting.read().eval["MOELayer"].calls == 2


def test_a_layer_from_the_meta_device_counts(inputs):
    layer = layer_of().to("meta")
    counting = stats.track(layer)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    with torch.inference_mode():
        layer(inputs[0])
    layer(inputs[0]).sum().backward()
    assert counting.read().train["MOELayer"].calls == 2


def test_counts_move_with_the_layer(inputs):
    layer = layer_of()
    counting = stats.track(layer)
    layer(inputs[0])
    counters = counting._counters["MOELayer"]
    before = counters.counts["train"].clone()
    counters._move(torch.device("cpu"))
    assert torch.equal(counters.counts["train"], before)


def test_counting_reads_no_value_back(inputs, monkeypatch):
    """The CPU plays the part of another device."""
    monkeypatch.setattr("moe_ext.monitor.explain._HOST", "elsewhere")
    layer = layer_of(capacity_factor=0.7)
    stats.track(layer, detailed=True)
    with _Trace() as trace:
        layer(inputs[0], torch.ones(T))
    assert trace.is_away
    assert trace.reads == 0


@on_ranks(2)
def test_reading_with_a_group_sums_all_ranks(rank):
    torch.manual_seed(0)
    layer = layer_of(capacity_factor=0.7)
    x = torch.randn(2, T, H)
    counting = stats.track(layer)
    layer(x[rank])
    read = counting.read(group=torch.distributed.group.WORLD).train["MOELayer"]
    assert_of_plans(read, layer, *x)


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

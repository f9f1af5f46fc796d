"""What a model's experts are asked for, counted on the device:

    stats = moe_ext.stats.track(model)
    ...                                  # train; nothing waits for the device
    print(stats.read())                  # one copy to the host, and a new count begins

A reading says for every layer which experts are idle, how uneven their load is and how much was
dropped; detailed ones also how sure the router is. sinks.py writes readings down, plot.py draws
them.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..layer import Aux
from ..ops.plan import Plan
from ..ops.registry import is_exporting
from ..routing import losses
from ..routing.route import Routing
from .patching import Layer, named_layers
from .reading import MODES, LayerStats, Reading

# Pairs of a token's choices are counted one by one.
MOST_CHOICES = 32


def track(model: nn.Module, *, detailed: bool = False) -> Stats:
    """Count what the experts of a model are asked for, from now on.

    Training and evaluation are counted apart, by the layer's mode. Tokens that used_token takes out
    count for nothing, but in l_aux, which is the gate's; a transformers model does not tell its
    experts which tokens are padding. What checkpointing computes again is counted once. Calls
    inside of torch.func's transforms and of torch.export are not counted, nor those of copies of a
    layer.

    Args:
        model: a MOELayer, or a module with some in it; the experts of transformers' models with
            experts_implementation="moe_ext" count too, without what only their router knows. A
            layer has one `Stats`: a later one takes its place.
        detailed: also the router's entropy, its z-loss, how far it is followed, and which experts
            are chosen together: some passes over [T, E] and [T, K, K]

    Raises:
        ValueError: the model has no such layer
    """
    return Stats(model, detailed)


class Stats:
    """The counters of a model, from `track`. A context manager that stops counting at its end.

    Args:
        model: as of `track`
        detailed: as of `track`
    """

    def __init__(self, model: nn.Module, detailed: bool) -> None:
        self._layers = dict(named_layers(model))
        if not self._layers:
            raise ValueError(
                f"stats.track: {type(model).__name__} has no MOELayer, nor experts of transformers "
                'with experts_implementation="moe_ext"'
            )
        self._counters = {name: _Counters(m, detailed) for name, m in self._layers.items()}
        for name, module in self._layers.items():
            module.observer = self._counters[name]

    def __enter__(self) -> Stats:
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    @property
    def is_divided(self) -> bool:
        """Whether transformers has given this process a part of the experts: ids of another process
        are others' experts."""
        return any(getattr(m, "_is_expert_parallel", False) for m in self._layers.values())

    def stop(self) -> None:
        """Count no more; what was counted can still be read."""
        for name, module in self._layers.items():
            if module.observer is self._counters[name]:
                module.observer = None

    def reset(self) -> None:
        """Begin a new count."""
        for counters in self._counters.values():
            counters.reset()

    @torch.no_grad()
    def read(self, *, reset: bool = True, group: dist.ProcessGroup | None = None) -> Reading:
        """What was counted since the last reset: one copy to the host.

        Args:
            reset: begin a new count
            group: the sum over all its processes, all of which call this; a process group, or
                dist.group.WORLD. With ExpertParallel every process counts the routes of its own
                tokens, to all experts.

        Raises:
            ValueError: a group was given where transformers divides the experts, of which each
                process knows its own alone
        """
        if group is not None and self.is_divided:
            raise ValueError(
                "Stats.read: group must be None where transformers divides the experts, whose "
                "processes count different ones"
            )
        of_layers = [(name, c, mode) for name, c in self._counters.items() for mode in MODES]
        packed = [counters.packed(mode) for _, counters, mode in of_layers]
        # Layers may be on several devices.
        total = torch.cat([p.to(packed[0].device) for p in packed])
        if group is not None:
            dist.all_reduce(total, group=group)
        parts = total.cpu().split([len(p) for p in packed])
        if reset:
            self.reset()
        reading = Reading({}, {})
        for (name, counters, mode), part in zip(of_layers, parts, strict=True):
            layer = counters.unpacked(part)
            if layer.calls:
                getattr(reading, mode)[name] = layer
        return reading


def _add_once(total: Tensor, new: Tensor) -> None:
    # A backward runs what is checkpointed again.
    if torch._C._current_graph_task_id() == -1:
        total.add_(new)


# What is compiled may be checkpointed too: whether it runs again is asked while it runs.
_add_once_compiled = torch.library.custom_op(
    "moe_ext::add_once", _add_once, mutates_args=("total",)
)


class _Counters:
    """Sums of one layer, in training and in evaluation; called with what the layer decided.

        counts  int64    calls, tokens, with_loss | load [E] | kept [E] | followed | pairs [E, E]
        sums    float64  l_aux | entropy, squares | importance [E]

    with_loss counts the calls whose gate gave an l_aux. followed, entropy and what stands after
    them are there only if `detailed`. Each tensor is changed at one place of a call: two views of
    a tensor that both change are not safe in torch.compile.
    """

    def __init__(self, module: Layer, detailed: bool) -> None:
        self.module = module
        self.detailed = detailed
        self.num_experts = E = module.num_experts
        first = next((p for p in module.parameters()), None)
        device = torch.device("cpu") if first is None else first.device
        self.lengths = (3 + 2 * E + (1 + E * E) * detailed, 1 + (2 + E) * detailed)
        self._place(device)

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a layer is not counted."""

    def __reduce__(self) -> tuple:
        return type(None), ()

    def _place(self, device: torch.device) -> None:
        """Zeros on a device."""
        real = torch.float32 if device.type == "mps" else torch.float64
        # In-place sums of a tensor that was made in inference mode could not be made outside.
        with torch.inference_mode(False):
            self.one = torch.ones(1, dtype=torch.int64, device=device)
            self.none = torch.zeros_like(self.one)
            self.counts, self.sums = (
                {mode: torch.zeros(length, dtype=dtype, device=device) for mode in MODES}
                for length, dtype in zip(self.lengths, (torch.int64, real), strict=True)
            )
        if device.type == "cuda":
            # CUDA graphs of torch.compile take no input that changes, but at a fixed address.
            for tensor in (*self.counts.values(), *self.sums.values()):
                torch._dynamo.mark_static_address(tensor)

    def _move(self, device: torch.device) -> None:
        before = self.counts, self.sums
        self._place(device)
        if any(tensor.is_meta for tensor in before[0].values()):
            return  # nothing was counted
        for old, new in zip(before, (self.counts, self.sums), strict=True):
            for mode in MODES:
                new[mode].copy_(old[mode])

    def __call__(
        self, plan: Plan, aux: Aux | None, routing: Routing | None, used_token: Tensor | None
    ) -> None:
        if is_exporting() or torch._C._are_functorch_transforms_active():
            return
        if self.one.device != plan.load.device:
            self._move(plan.load.device)
        mode = "train" if self.module.training else "eval"
        used = None if used_token is None else used_token.reshape(-1) != 0
        add = _add_once_compiled if torch.compiler.is_compiling() else _add_once
        with torch.no_grad():
            add(self.counts[mode], self._count(plan, aux, routing, used))
            if aux is not None:
                add(self.sums[mode], self._sum(aux, routing, used))

    def _count(
        self, plan: Plan, aux: Aux | None, routing: Routing | None, used: Tensor | None
    ) -> Tensor:
        T = plan.slots.shape[0]
        tokens = torch.full_like(self.one, T) if used is None else used.sum().reshape(1)
        load = plan.load if aux is None else aux.exp_counts.to(plan.load.device)
        kept = load if plan.capacity is None else plan.kept()
        has_loss = aux is not None and aux.l_aux is not None
        pieces = [self.one, tokens, self.one if has_loss else self.none, load, kept]
        if self.detailed:
            pieces += [_followed(plan, routing).reshape(1), _pairs(plan).flatten()]
        return torch.cat(pieces)

    def _sum(self, aux: Aux, routing: Routing | None, used: Tensor | None) -> Tensor:
        dtype = self.sums["train"].dtype
        l_aux = aux.l_aux
        if not isinstance(l_aux, Tensor):
            # A gate of one's own may have no loss, or a plain number, which is not copied there.
            l_aux = self.one.new_full((), l_aux or 0.0, dtype=dtype)
        pieces = [l_aux.reshape(1).to(self.one.device, dtype)]
        if not self.detailed:
            return torch.cat(pieces)
        if routing is None:
            pieces.append(pieces[0].new_zeros(2 + self.num_experts))
        else:
            # A token that is taken out may hold anything, NaN too.
            probs = losses.shares(_of_used(routing.probs, used))
            squares = routing.logits.logsumexp(dim=-1, keepdim=True).square()
            of_tokens = torch.special.entr(probs), _of_used(squares, used)
            pieces += [part.sum(dtype=dtype).reshape(1) for part in of_tokens]
            pieces.append(probs.sum(dim=0, dtype=dtype))
        return torch.cat(pieces)

    def packed(self, mode: str) -> Tensor:
        """Counts and sums in a row; integers are exact up to 2 ** 53, in float32 up to 2 ** 24."""
        sums = self.sums[mode]
        return torch.cat([self.counts[mode].to(sums.dtype), sums])

    def reset(self) -> None:
        for tensors in (self.counts, self.sums):
            for mode in MODES:
                tensors[mode].zero_()

    def unpacked(self, packed: Tensor) -> LayerStats:
        """packed: of a mode, on the host"""
        E, num_counts = self.num_experts, len(self.counts["train"])
        counts, sums = packed[:num_counts].long(), packed[num_counts:].double()
        calls, tokens, with_loss = counts[:3].tolist()
        load, kept = counts[3 : 3 + 2 * E].view(2, E)
        load = load.maximum(kept)  # a foreign gate may count some of its choices alone
        l_aux = _ratio(sums[0], with_loss) if with_loss else None
        stats = LayerStats(tokens, calls, load, kept, l_aux)
        if not self.detailed:
            return stats
        followed, pairs = counts[3 + 2 * E], counts[4 + 2 * E :].view(E, E)
        stats = stats._replace(pairs=pairs if pairs.any() else None)
        entropy, squares, importance = sums[1], sums[2], sums[3:]
        # Every token has a share of one: without any, there was no router to look at.
        if importance.sum() == 0:
            return stats
        return stats._replace(
            importance=importance / tokens,
            router_entropy=_ratio(entropy, tokens * math.log(max(E, 2))),
            z_loss=_ratio(squares, tokens),
            agreement=_ratio(followed, int(load.sum())),
        )


def _followed(plan: Plan, routing: Routing | None) -> Tensor:
    """Choices that are among the best K by the logits, which equal ones all are. []"""
    if routing is None:
        return plan.load.new_zeros(())
    E = plan.num_experts
    last = routing.logits.topk(plan.slots.shape[1], dim=-1).values[:, -1:]
    chosen = routing.logits.gather(-1, plan.expert_ids.clamp(0, E - 1).long())
    is_worse = chosen < last
    return (_are_ids(plan.expert_ids, E) & ~is_worse).sum()


def _pairs(plan: Plan) -> Tensor:
    """How many tokens chose both experts. [E, E]"""
    K, E = plan.slots.shape[1], plan.num_experts
    if K > MOST_CHOICES:
        return plan.load.new_zeros(E, E)
    ids = torch.where(_are_ids(plan.expert_ids, E), plan.expert_ids, -1)
    one, other = ids.unsqueeze(2), ids.unsqueeze(1)
    pairs = torch.where((one >= 0) & (other >= 0), one * E + other, -1)
    return losses.expert_load(pairs.flatten(1), E * E).view(E, E)


def _are_ids(experts: Tensor, num_experts: int) -> Tensor:
    return (experts >= 0) & (experts < num_experts)


def _of_used(values: Tensor, used: Tensor | None) -> Tensor:
    """Zero for tokens that are taken out. values: [T, ...]"""
    return values if used is None else torch.where(used.unsqueeze(-1), values, 0)


def _ratio(total: Tensor, count: float) -> float:
    return float(total) / count if count else 0.0

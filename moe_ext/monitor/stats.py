"""Count the load of a model's experts, on the device:

    stats = moe_ext.stats.track(model)
    ...                                  # train; the host does not wait for the device
    print(stats.read())                  # one copy to the host, then a new count begins

A reading tells which experts are idle, how uneven their load is and how much was dropped. `sinks`
write readings to files, `plot` draws them.
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
from .patching import Observed, named_layers, refuse_no_layers
from .reading import MODES, LayerStats, Reading

# With more choices per token, pairs are not counted: their number grows with its square.
MOST_CHOICES = 32


def track(model: nn.Module, *, detailed: bool = False) -> Stats:
    """Start to count the load of a model's experts.

    Training and evaluation have separate counts, by the layer's mode. A forward that checkpointing
    repeats counts once. Tokens that `used_token` leaves out do not count, except in `l_aux`, which
    is the gate's. Calls inside of torch.func and torch.export do not count, nor do calls of a copy
    of a layer.

    Args:
        model: a MOELayer, a module that has some, or a model of transformers with
            experts_implementation="moe_ext". The experts of transformers do not know the router,
            nor which tokens are padding. A layer has one `Stats`: a new one replaces it.
        detailed: also count the router's entropy and z-loss, its agreement with the choice, and
            pairs of experts: some passes over [T, E] and [T, K, K]

    Raises:
        ValueError: the model has no such layer
    """
    return Stats(model, detailed)


class Stats:
    """The counters of a model, as `track` returns them. A context manager: its end stops counting.

    Args:
        model: as in `track`
        detailed: as in `track`
    """

    def __init__(self, model: nn.Module, detailed: bool) -> None:
        refuse_no_layers("stats.track", model)
        self._counters = {name: _Counters(layer, detailed) for name, layer in named_layers(model)}
        for counters in self._counters.values():
            counters.module.observer = counters

    def __enter__(self) -> Stats:
        return self

    def __exit__(self, *error) -> None:
        self.stop()

    @property
    def is_divided(self) -> bool:
        """Whether transformers divides the experts among ranks; equal ids then are different
        experts on different ranks."""
        modules = [counters.module for counters in self._counters.values()]
        return any(getattr(module, "_is_expert_parallel", False) for module in modules)

    def stop(self) -> None:
        """Stop counting; the counts can still be read."""
        for counters in self._counters.values():
            if counters.module.observer is counters:
                counters.module.observer = None

    def reset(self) -> None:
        """Begin a new count."""
        for counters in self._counters.values():
            counters.reset()

    @torch.no_grad()
    def read(self, *, reset: bool = True, group: dist.ProcessGroup | None = None) -> Reading:
        """Return the counts since the last reset; this waits for the device.

        Args:
            reset: begin a new count
            group: sum the counts of all ranks of this process group, as dist.group.WORLD; every
                rank has to call. With ExpertParallel a rank counts the routes of its own tokens, to
                all experts.

        Raises:
            ValueError: a group was given and transformers divides the experts
        """
        if group is not None and self.is_divided:
            raise ValueError(
                "Stats.read: group must be None where transformers divides the experts, got a "
                "group; ranks count different experts, so read each rank without a group"
            )
        of_layers = [(name, c, mode) for name, c in self._counters.items() for mode in MODES]
        packed = [counters.packed(mode) for _, counters, mode in of_layers]
        # Layers may be on different devices.
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
    # A backward repeats the forward of a checkpoint: it must not count again.
    if torch._C._current_graph_task_id() == -1:
        total.add_(new)


# Compiled code may be checkpointed too, so a custom operator makes this test at run time.
_add_once_compiled = torch.library.custom_op(
    "moe_ext::add_once", _add_once, mutates_args=("total",)
)


class _Counters:
    """The counts of one layer, in training and in evaluation; the layer's observer.

        counts  int64    calls, tokens, with_loss | load [E] | kept [E] | followed | pairs [E, E]
        sums    float64  l_aux | entropy, squares | importance [E]

    with_loss counts the calls whose gate had an l_aux. followed, entropy and the fields after them
    exist only if detailed=True. A call changes each tensor once: torch.compile is not safe with two
    views of a tensor that both change.
    """

    def __init__(self, module: Observed, detailed: bool) -> None:
        self.module = module
        self.detailed = detailed
        self.num_experts = E = module.num_experts
        first = next((p for p in module.parameters()), None)
        device = torch.device("cpu") if first is None else first.device
        self.lengths = (3 + 2 * E + (1 + E * E) * detailed, 1 + (2 + E) * detailed)
        self._place(device)

    def __reduce__(self) -> tuple:
        """A copy of a layer has no counters."""
        return type(None), ()

    def _place(self, device: torch.device) -> None:
        """Create zero counts on a device."""
        real = torch.float32 if device.type == "mps" else torch.float64
        # A tensor of inference mode could not be changed outside of it.
        with torch.inference_mode(False):
            self.one = torch.ones(1, dtype=torch.int64, device=device)
            self.none = torch.zeros_like(self.one)
            self.counts, self.sums = (
                {mode: torch.zeros(length, dtype=dtype, device=device) for mode in MODES}
                for length, dtype in zip(self.lengths, (torch.int64, real), strict=True)
            )
        if device.type == "cuda":
            # CUDA graphs of torch.compile accept a changed input only at a fixed address.
            for tensor in self._tensors():
                torch._dynamo.mark_static_address(tensor)

    def _tensors(self) -> list[Tensor]:
        return [*self.counts.values(), *self.sums.values()]

    def _move(self, device: torch.device) -> None:
        before = self._tensors()
        self._place(device)
        for old, new in zip(before, self._tensors(), strict=True):
            if not old.is_meta:  # else nothing was counted
                new.copy_(old)

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
            # A custom gate may have no loss, or a Python number, which new_full does not copy.
            l_aux = self.one.new_full((), l_aux or 0.0, dtype=dtype)
        pieces = [l_aux.reshape(1).to(self.one.device, dtype)]
        if not self.detailed:
            return torch.cat(pieces)
        if routing is None:
            pieces.append(pieces[0].new_zeros(2 + self.num_experts))
        else:
            # A token that is left out may hold anything, also NaN.
            probs = losses.shares(_of_used(routing.probs, used))
            squares = routing.logits.logsumexp(dim=-1, keepdim=True).square()
            of_tokens = torch.special.entr(probs), _of_used(squares, used)
            pieces += [part.sum(dtype=dtype).reshape(1) for part in of_tokens]
            pieces.append(probs.sum(dim=0, dtype=dtype))
        return torch.cat(pieces)

    def packed(self, mode: str) -> Tensor:
        """Concatenate counts and sums. Counts are exact up to 2 ** 53, in float32 up to 2 ** 24."""
        sums = self.sums[mode]
        return torch.cat([self.counts[mode].to(sums.dtype), sums])

    def reset(self) -> None:
        for tensor in self._tensors():
            tensor.zero_()

    def unpacked(self, packed: Tensor) -> LayerStats:
        """The inverse of `packed`, for a tensor on the CPU."""
        E, num_counts = self.num_experts, len(self.counts["train"])
        counts, sums = packed[:num_counts].long(), packed[num_counts:].double()
        calls, tokens, with_loss = counts[:3].tolist()
        load, kept = counts[3 : 3 + 2 * E].view(2, E)
        load = load.maximum(kept)  # a custom gate may count its first choices only
        l_aux = _ratio(sums[0], with_loss) if with_loss else None
        stats = LayerStats(tokens, calls, load, kept, l_aux)
        if not self.detailed:
            return stats
        followed, pairs = counts[3 + 2 * E], counts[4 + 2 * E :].view(E, E)
        stats = stats._replace(pairs=pairs if pairs.any() else None)
        entropy, squares, importance = sums[1], sums[2], sums[3:]
        # The scores of a token sum to one: a sum of zero means that no router was seen.
        if importance.sum() == 0:
            return stats
        return stats._replace(
            importance=importance / tokens,
            router_entropy=_ratio(entropy, tokens * math.log(max(E, 2))),
            z_loss=_ratio(squares, tokens),
            agreement=_ratio(followed, int(load.sum())),
        )


def _followed(plan: Plan, routing: Routing | None) -> Tensor:
    """Count the choices that are among the best K by the logits; ties count. []"""
    if routing is None:
        return plan.load.new_zeros(())
    E = plan.num_experts
    last = routing.logits.topk(plan.slots.shape[1], dim=-1).values[:, -1:]
    chosen = routing.logits.gather(-1, plan.expert_ids.clamp(0, E - 1).long())
    is_worse = chosen < last
    return (_are_ids(plan.expert_ids, E) & ~is_worse).sum()


def _pairs(plan: Plan) -> Tensor:
    """Count the tokens that chose both experts of a pair. [E, E]"""
    K, E = plan.slots.shape[1], plan.num_experts
    if K > MOST_CHOICES:
        return plan.load.new_zeros(E, E)
    ids = torch.where(_are_ids(plan.expert_ids, E), plan.expert_ids, -1)
    one, other = ids.unsqueeze(2), ids.unsqueeze(1)
    pairs = torch.where((one >= 0) & (other >= 0), one * E + other, -1)
    return losses.expert_load(pairs.flatten(1), E * E).view(E, E)


def _are_ids(expert_ids: Tensor, num_experts: int) -> Tensor:
    return (expert_ids >= 0) & (expert_ids < num_experts)


def _of_used(values: Tensor, used: Tensor | None) -> Tensor:
    """Replace the values of tokens that are left out by zero. values: [T, ...]"""
    return values if used is None else torch.where(used.unsqueeze(-1), values, 0)


def _ratio(total: Tensor, count: float) -> float:
    return float(total) / count if count else 0.0

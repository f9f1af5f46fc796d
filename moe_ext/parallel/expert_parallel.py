"""Experts divided among the processes of a group."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from .. import options
from ..experts.base import ExpertParameters, Experts
from ..experts.padded import routed_by, run_padded
from ..experts.shared import SharedExperts
from ..ops.checks import accumulate_dtype
from ..ops.functional import combine, dispatch, has_autocast
from ..ops.plan import Plan, make_plan
from ..process_group import GroupAttribute
from .all_to_all import Exchange, opens_backward
from .consistency import DTYPES, MOST_PARTS, Call, Disagreement, Record, disagreement, record_of
from .deepep import Journey
from .misuse import begin_call, mark_state, refuse_state, remember
from .permute import once_per_process, once_per_route, rooms_of_experts, travel
from .sharding import divide
from .tensor_parallel import drop_tokens, gather_tokens


class ExpertParallel(ExpertParameters, Experts):
    """Experts of which every rank of a group holds a part: expert parallelism.

    Args:
        experts: the experts here, as many on every rank. Their ids among all follow the group's
            order: those of the first rank come first. `ExpertParallel.of` takes all experts and
            keeps this rank's part.
        group: a process group; or a mesh of one dimension; or one of two, nodes and places in a
            node: then rows travel between nodes together, and are sorted out inside
        dedup: send a token once to a rank that has several of its experts, and weigh there. Fewer
            bytes; what is summed is the same, in another order. In two levels a token goes once to
            a node, and there once to a rank: experts divided among nodes, which divide theirs.
        overlap: so many parts, of which one travels while the experts work on another
        uneven_tokens: ranks may have different numbers of tokens, or none, with a capacity too.
            Without a capacity they always may.
        average: gradients of the experts' parameters are those of the mean of the ranks' losses,
            as data-parallel wrappers have all others, not of the sum. `parallel.data_parallel` and
            `parallel.fully_shard` set it.
        tensor_group: ranks that hold the same tokens and routes (tensor parallelism): each sends
            its share, and all get the sum
        deepep: a `deep_ep.ElasticBuffer` of the group: tokens travel by its kernels, in bfloat16
            on NVIDIA GPUs. Not run with DeepEP itself yet, only with a stand-in for its buffer.
        num_local_experts: of `experts` that are no moe_ext.Experts, as of MOELayer
        ep_group_name: what parameters carry as `group_name`, beside `allreduce = False`, for
            DeepSpeed's optimizers

    Parameters, buffers and submodules are those of `experts`, under their own names: a rank's
    state dict has the names that all experts have in one process. `moe_ext.parallel` has what
    reduces their gradients and saves them.

    With a capacity, equal on all ranks, an exchange is of equal parts, known beforehand; it
    compiles whole. Otherwise rows are counted first, which the host reads: one synchronisation per
    call (two with dedup in two levels), where torch.compile breaks its graph. A group of one rank
    exchanges nothing.

    All ranks make the same ExpertParallels on a group in the same order, then the same calls, and
    the same backwards: one without tokens too. Every exchange opens with a check of that.

    Raises:
        ValueError: arguments that do not fit
        RuntimeError: in a call, on all ranks, where they differ in the layer they call, its options
            or what they call it with. It names what differs; on a GPU only in the first call, with
            gradients and without, and not in compiled code. Where experts raise an exception on
            one rank, the others get NaN from them, and all raise in the next call.
    """

    tensor_group = GroupAttribute()
    local: nn.Module
    _met: set[bool]  # the modes of autograd in which ranks have compared on the host

    def __init__(
        self,
        experts: nn.Module,
        group: dist.ProcessGroup | DeviceMesh,
        *,
        dedup: bool = False,
        overlap: int = 1,
        uneven_tokens: bool = False,
        average: bool = False,
        tensor_group: dist.ProcessGroup | None = None,
        deepep: Any = None,
        num_local_experts: int | None = None,
        ep_group_name: str | None = None,
    ) -> None:
        name = "ExpertParallel"
        if not isinstance(experts, nn.Module):
            raise ValueError(
                f"{name}: experts must be a module of experts, got {type(experts).__name__}"
            )
        if num_local_experts is None:
            num_local_experts = getattr(experts, "num_experts", None)
        num_local_experts = options.integer(name, "num_local_experts", num_local_experts, 1)
        if isinstance(experts, SharedExperts):
            raise ValueError(
                f"{name}: experts must be the routed ones alone, got SharedExperts; give it an "
                "ExpertParallel"
            )
        everyone = None
        if dedup and isinstance(group, DeviceMesh) and group.ndim == 2:
            everyone = Exchange(group)
            nodes, places = group.get_all_groups()
            experts = ExpertParallel(
                experts, places, dedup=True, num_local_experts=num_local_experts
            )
            experts._met = {True, False}
            num_local_experts, group = experts.num_experts, nodes
        try:
            exchange = Exchange(group)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        options.names(
            name,
            dedup=(dedup, (True, False)),
            uneven_tokens=(uneven_tokens, (True, False)),
            average=(average, (True, False)),
        )
        if deepep is not None and (
            tensor_group is not None or overlap != 1 or isinstance(group, DeviceMesh)
        ):
            raise ValueError(f"{name}: deepep goes with a process group, without the other options")
        super().__init__(num_local_experts * exchange.size)
        self.exchange = exchange
        self._everyone = everyone or exchange
        self.dedup = dedup
        self.overlap = options.integer(name, "overlap", overlap, 1)
        options.numbers(name, overlap=(overlap, 1, MOST_PARTS))
        self.uneven_tokens = uneven_tokens
        self.average = average
        self.tensor_group = tensor_group
        self.deepep = deepep
        self.record().number_of(self)
        self._met = set()
        for member in (*experts._parameters, *experts._buffers, *experts._modules):
            if hasattr(ExpertParallel, member):
                raise ValueError(f"{name}: experts must not have a member called {member!r}")
        # Not a submodule: its members are this one's.
        self.__dict__["local"] = experts
        self.expert_group_name = ep_group_name or f"ep_size_{self.size}"
        for members in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[members] = experts.__dict__[members]
        self.mark()
        self.register_state_dict_post_hook(mark_state)
        remember(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # A copy is a layer of its own. One rank alone may have it, as the best so far: such a copy
        # must not count, and has no number in the group's Record.
        remember(self)

    @classmethod
    def of(
        cls, experts: nn.Module, group: dist.ProcessGroup | DeviceMesh, **kwargs: Any
    ) -> ExpertParallel:
        """Keep this rank's part of all experts.

        Args:
            experts: all of them, alike on every rank: GroupedExperts, ModuleExperts, or others with
                stacked parameters [E, ...] or a ModuleList of E experts
            group: as of ExpertParallel
            **kwargs: other arguments of ExpertParallel

        Raises:
            ValueError: experts that do not divide evenly
        """
        try:
            exchange = Exchange(group)
        except ValueError as error:
            raise ValueError(f"{cls.__name__}: {error}") from None
        return cls(divide(experts, exchange.rank, exchange.size), group, **kwargs)

    @property
    def hidden_size(self) -> int | None:
        return getattr(self.local, "hidden_size", None)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of the exchange; None for an exchange in two levels."""
        return self.exchange.group

    @property
    def size(self) -> int:
        """How many ranks share the experts."""
        local = self.local
        return self.exchange.size * (local.size if isinstance(local, ExpertParallel) else 1)

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        local = self.local
        if not isinstance(local, ExpertParallel):
            return self.exchange.rank
        return self.exchange.rank * local.size + local.rank

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.size

    def experts_here(self) -> nn.Module:
        """The experts of this rank, as they were given."""
        local = self.local
        return local.experts_here() if isinstance(local, ExpertParallel) else local

    def extra_repr(self) -> str:
        return (
            f"{type(self.local).__name__}, num_experts={self.num_experts}, "
            f"rank={self.rank}, size={self.size}, dedup={self.dedup}, "
            f"overlap={self.overlap}, uneven_tokens={self.uneven_tokens}"
        )

    def train(self, mode: bool = True):
        self.local.train(mode)
        return super().train(mode)

    def reset_parameters(self) -> None:
        reset = getattr(self.local, "reset_parameters", None)
        if reset is not None:
            reset()

    # Names and layouts are the experts' own matter.

    def _save_to_state_dict(self, *args) -> None:
        self.local._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        refuse_state(self, local_metadata)
        self.local._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def unobserved(self) -> dict[str, Any]:
        """As of `Layer.unobserved`: the first calls of a process compare more."""
        return {"_met": set(self._met)}

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        return self(tokens, plan, weights)[0]

    def routed_beside(
        self, work: Callable[[], Tensor], tokens: Tensor, plan: Plan, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`routed`, and the result of `work`, which runs while rows travel.

        Args:
            work: a function that needs nothing of the experts
            tokens: [T, H]
            plan: of all experts
            weights: [T, K]
        """
        return self(tokens, plan, weights, work)

    # As every module's, of arguments of its own; `routed` is what experts have in common.
    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        plan: Plan,
        weights: Tensor,
        work: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of every token's experts, wherever they are, and what `work` gives.

        Args:
            tokens: [T, H]
            plan: of all experts
            weights: [T, K]
            work: a function that needs nothing of the experts, called while rows travel

        Returns:
            ([T, H], the result of `work` or None)
        """
        if plan.num_experts != self.num_experts:
            raise RuntimeError(
                f"ExpertParallel: plan must be of E = {self.num_experts} experts, "
                f"got {plan.num_experts}"
            )
        if self.exchange.size == 1:
            done = None if work is None else work()
            return self._routed_here(tokens, plan, weights), done
        # Data-parallel wrappers may cast what they pass on.
        weights = weights.to(accumulate_dtype(tokens.dtype))
        call = self._call(tokens, plan, weights)
        if torch.compiler.is_compiling():
            return self._exchanged(call, False, tokens, plan, weights, work)
        is_named = call.grad_enabled not in self._met
        self._met.add(call.grad_enabled)
        exchange = self._exchanged if self.tensor_group is None else self._compared
        with self.record().forward():
            return exchange(call, is_named, tokens, plan, weights, work)

    def _compared(
        self, call: Call, is_named: bool, tokens, plan, weights, work
    ) -> tuple[Tensor, Tensor | None]:
        """`_exchanged`, after a comparison with the ranks that share these tokens. What differs
        there is told to all others."""
        self._begin_exchange()
        error = None
        if is_named or tokens.device.type == "cpu":
            error = disagreement(self.tensor_group, call, tokens)
        call = call._replace(sharers_differ=error is not None)
        try:
            return self._exchanged(call, is_named, tokens, plan, weights, work)
        except Disagreement as told:
            raise error or told from None

    def _exchanged(
        self, call: Call, is_named: bool, tokens, plan, weights, work
    ) -> tuple[Tensor, Tensor | None]:
        if self.deepep is not None or self._everyone is not self.exchange:
            self._begin_exchange()
            none = plan.load.new_empty(self._everyone.size, 0)
            self._everyone.counts(call, none, is_named)
        if self.deepep is not None:
            return self._by_deepep(tokens, plan, weights, work)
        if self._sends_equal_parts(plan):
            return self._equal(call, is_named, tokens, plan, weights, work)
        return self._counted(call, tokens, plan, weights, work)

    def _call(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Call:
        is_enabled, device_type = torch.is_grad_enabled(), tokens.device.type
        dtype = autocast_dtype = DTYPES.index(tokens.dtype)
        if has_autocast(tokens.device):
            autocast_dtype = DTYPES.index(torch.get_autocast_dtype(device_type))
        return Call(
            layer=begin_call(id(self)),
            has_failed=not torch.compiler.is_compiling() and self.record().begin_forward(),
            is_backward=False,
            dedup=self.dedup,
            uneven_tokens=self.uneven_tokens,
            average=self.average,
            deepep=self.deepep is not None,
            drops_tokens=plan.capacity is not None,
            grad_enabled=is_enabled,
            tokens_require_grad=is_enabled and tokens.requires_grad,
            weights_require_grad=is_enabled and weights.requires_grad,
            dtype=dtype,
            autocast_dtype=autocast_dtype,
            overlap=self.overlap,
            tensor_parallel_size=self._sharers(),
            sharers_differ=False,
            num_experts=self.num_experts,
            hidden_size=tokens.shape[1],
            k=plan.slots.shape[1],
            capacity=(plan.capacity or 0) if self._sends_equal_parts(plan) else 0,
        )

    def _sends_equal_parts(self, plan: Plan) -> bool:
        return plan.capacity is not None and not self.uneven_tokens and not self.dedup

    def _equal(
        self, call: Call, is_named: bool, tokens, plan, weights, work
    ) -> tuple[Tensor, Tensor | None]:
        """Every expert's room [C, H] goes to its process, empty rows too."""
        E, H = plan.num_experts, tokens.shape[1]
        rooms = self._my_share(dispatch(tokens, plan).view(E, plan.capacity, H), 1)
        before = 0 if self.tensor_group is None else self.tensor_group.rank() * rooms.shape[1]
        kept = (plan.kept() - before).clamp(0, rooms.shape[1])
        self._begin_exchange()
        # DeepSpeed's experts take the rows as they arrive.
        as_rooms = not isinstance(self.local, Experts)
        trips = rooms_of_experts(self.exchange, call, rooms, kept, self.overlap, is_named, as_rooms)
        run = self._rooms_here if as_rooms else self._routed_here
        parts, result, failure = self._travel(call, trips, run, work)
        rooms = _joined([part.view(E, -1, H) for part in parts], 1)
        rooms = gather_tokens(rooms, 1, self.tensor_group)[:, : plan.capacity]
        if failure is not None:
            raise failure
        return combine(rooms.reshape(E * plan.capacity, H), plan, weights), result

    # Sizes that differ in every call: compiled, each would be a program of its own.
    @torch.compiler.disable
    def _counted(self, call: Call, tokens, plan, weights, work) -> tuple[Tensor, Tensor | None]:
        """Rows that routes own, and no others."""
        num_tokens = tokens.shape[0]
        experts = self._my_share(torch.where(plan.slots >= 0, plan.expert_ids, -1), 0, -1)
        tokens, weights = self._my_share(tokens, 0), self._my_share(weights, 0)
        split = [x.tensor_split(self.overlap) for x in (tokens, experts, weights)]
        parts = list(zip(*split, strict=True))
        self._begin_exchange()
        pack = once_per_process if self.dedup else once_per_route
        trips, plans = pack(self.exchange, call, parts)
        backs, result, failure = self._travel(call, trips, self._routed_here, work)
        outs = [
            combine(rows, plan, None if self.dedup else weights)
            for rows, plan, (_, _, weights) in zip(backs, plans, parts, strict=True)
        ]
        out = gather_tokens(_joined(outs, 0), 0, self.tensor_group)
        if failure is not None:
            raise failure
        return out[:num_tokens], result

    def _travel(
        self, call: Call, trips, run, work
    ) -> tuple[list[Tensor], Tensor | None, BaseException | None]:
        """The rows that came back, the result of `work`, and an exception to raise when all other
        ranks have what they wait for."""
        backs, result, failure, nodes = travel(trips, run, work)
        if not torch.compiler.is_compiling():
            self.record().is_open = False
        if failure is not None:
            self.record().has_failed = True
        return opens_backward(backs, self._everyone, call, nodes), result, failure

    def _begin_exchange(self) -> None:
        if not torch.compiler.is_compiling():
            self.record().is_open = True

    def record(self) -> Record:
        """What this rank remembers of the group."""
        return record_of(self._everyone.first_group)

    def _by_deepep(self, tokens, plan, weights, work) -> tuple[Tensor, Tensor | None]:
        experts = torch.where(plan.slots >= 0, plan.expert_ids, -1)
        journey = Journey(self.deepep, self.num_experts)
        arrived, weights, ids = journey.depart(tokens, weights, experts)
        result = None if work is None else work()
        journey.wait()
        there = make_plan(ids.int(), self.num_experts // self.exchange.size, order="token")
        return journey.come_back(self._routed_here(arrived, there, weights)), result

    def _routed_here(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        return self._averaged(
            lambda x, w: routed_by(self.local)(self.local, x, plan, w), tokens, weights
        )

    def _rooms_here(self, rooms: Tensor) -> Tensor:
        return self._averaged(partial(run_padded, self.local), rooms)

    def _averaged(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not self.average or self.size == 1:
            return run(*inputs)
        # A smaller gradient inside, for all parameters there are. Processes that share their tokens
        # have one loss together.
        losses = self.size / self._sharers()
        out = run(*(_Scaled.apply(x, losses) for x in inputs))
        return _Scaled.apply(out, 1 / losses)

    def _sharers(self) -> int:
        return 1 if self.tensor_group is None else dist.get_world_size(self.tensor_group)

    def _my_share(self, tensor: Tensor, dim: int, filler: int = 0) -> Tensor:
        """Of `dim`, filled up to equal shares; where none share, all of it."""
        if missing := -tensor.shape[dim] % self._sharers():
            padding = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
            tensor = F.pad(tensor, padding, value=filler)
        return drop_tokens(tensor, dim, self.tensor_group)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    # One part alone would be copied.
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class _Scaled(Function):
    """The same, with a gradient times a factor."""

    @staticmethod
    def forward(tensor, factor):
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None

"""Experts divided among the processes of a group."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from .. import mappings, options
from ..contracts import accumulate_dtype
from ..experts import ExpertParameters, Experts, routed
from ..functional import combine, dispatch
from ..losses import expert_load
from ..plan import Plan, make_plan
from .division import divide
from .exchange import Exchange, Path, back, finish, start

DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)


class Trip(NamedTuple):
    """A part of the work: what goes out, and what becomes of it.

    out: tensors [R, ...] that travel together
    arrive: of what came, gives the tokens, plan and weights of the experts here
    """

    path: Path
    out: tuple[Tensor, ...]
    arrive: Callable[..., tuple[Tensor, Plan, Tensor]]


class ExpertParallel(ExpertParameters, Experts):
    """Experts of which every process of a group has its part: expert parallelism.

    experts: the experts here, as many in every process. Their ids among all follow the group's
        order: those of the first process come first. `ExpertParallel.of` takes all experts and
        keeps this process's part.
    group: a process group; or a mesh of one dimension; or one of two, nodes and places in a node:
        then rows travel between nodes together, and are sorted out inside
    dedup: send a token once to a process that has several of its experts, and weigh there. Fewer
        bytes; what is summed is the same, in another order.
    overlap: so many parts, of which one travels while the experts work on another
    uneven_tokens: processes may have different numbers of tokens, or none, with a capacity too.
        Without a capacity they always may.
    average: gradients of the experts' parameters are those of the mean of the processes' losses, as
        data-parallel wrappers have all others, not of the sum. `parallel.data_parallel` and
        `parallel.fully_shard` set it.
    tensor_group: processes that hold the same tokens and routes (tensor parallelism): each sends
        its share, and all get the sum
    num_local_experts: of `experts` that are no moe_ext.Experts, as of MOELayer
    ep_group_name: what parameters carry as `group_name`, beside `allreduce = False`, for
        DeepSpeed's optimizers

    Parameters, buffers and submodules are those of `experts`, under their own names: a process's
    state dict has the names of all experts' in one process. `moe_ext.parallel` has what reduces
    their gradients and saves them.

    With a capacity, equal on all processes, an exchange is of equal parts, known beforehand; it
    compiles whole. Otherwise rows are counted first, which the host reads: one synchronisation per
    call, where torch.compile breaks its graph. A group of one process exchanges nothing.

    All processes make the same calls, and the same backwards: one without tokens too. In the first
    call they compare what they were made with, and where they disagree all raise RuntimeError,
    naming the field (not in compiled code). Raises ValueError for arguments that do not fit.
    """

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
        num_local_experts: int | None = None,
        ep_group_name: str | None = None,
    ) -> None:
        name = "ExpertParallel"
        if not isinstance(experts, nn.Module) or isinstance(experts, ExpertParallel):
            raise ValueError(
                f"{name}: experts must be a module of experts, got {type(experts).__name__}"
            )
        if num_local_experts is None:
            num_local_experts = getattr(experts, "num_experts", None)
        num_local_experts = options.integer(name, "num_local_experts", num_local_experts, 1)
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
        super().__init__(num_local_experts * exchange.size)
        self.num_local_experts = num_local_experts
        self.exchange = exchange
        self.dedup = dedup
        self.overlap = options.integer(name, "overlap", overlap, 1)
        self.uneven_tokens = uneven_tokens
        self.average = average
        self.tensor_group = tensor_group
        self.expert_group_name = ep_group_name or f"ep_size_{exchange.size}"
        self._have_agreed = False
        # Not a submodule: its members are this one's.
        self.__dict__["local"] = experts
        for members in ("_parameters", "_buffers", "_modules"):
            self.__dict__[members] = experts.__dict__[members]
        self.mark()

    @classmethod
    def of(cls, experts: nn.Module, group: dist.ProcessGroup | DeviceMesh, **kwargs):
        """This process's part of all experts, which every process holds alike: GroupedExperts,
        ModuleExperts, or others with stacked parameters [E, ...] or a ModuleList of E experts.

        Raises ValueError where they do not divide evenly.
        """
        exchange = Exchange(group)
        return cls(divide(experts, exchange.rank, exchange.size), group, **kwargs)

    @property
    def hidden_size(self) -> int | None:
        return getattr(self.local, "hidden_size", None)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """None where the exchange is in two levels."""
        return self.exchange.group

    @property
    def size(self) -> int:
        return self.exchange.size

    def extra_repr(self) -> str:
        return (
            f"{type(self.local).__name__}, num_experts={self.num_experts}, "
            f"rank={self.exchange.rank}, size={self.size}, dedup={self.dedup}, "
            f"overlap={self.overlap}, uneven_tokens={self.uneven_tokens}"
        )

    def train(self, mode: bool = True):
        self.local.training = mode
        return super().train(mode)

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        return self(tokens, plan, weights)[0]

    def routed_beside(
        self, work: Callable[[], Tensor], tokens: Tensor, plan: Plan, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`work` is done while rows travel."""
        return self(tokens, plan, weights, work)

    def forward(
        self,
        tokens: Tensor,
        plan: Plan,
        weights: Tensor,
        work: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of every token's experts, wherever they are, and what `work` gives.

        tokens: [T, H], weights: [T, K], plan: of all experts -> [T, H]
        """
        if plan.num_experts != self.num_experts:
            raise RuntimeError(
                f"ExpertParallel: plan must be of E = {self.num_experts} experts, "
                f"got {plan.num_experts}"
            )
        if self.size == 1:
            done = None if work is None else work()
            return routed(self.local, tokens, plan, weights), done
        if not self._have_agreed and not torch.compiler.is_compiling():
            self._agree(tokens, plan)
            self._have_agreed = True
        if self._sends_equal_parts(plan):
            return self._equal(tokens, plan, weights, work)
        return self._counted(tokens, plan, weights, work)

    def _sends_equal_parts(self, plan: Plan) -> bool:
        return plan.capacity is not None and not self.uneven_tokens and not self.dedup

    def _agree(self, tokens: Tensor, plan: Plan) -> None:
        fields = {
            "num_experts": self.num_experts,
            "hidden_size": tokens.shape[1],
            "dtype": tokens.dtype,
            "k": plan.slots.shape[1],
            "dedup": self.dedup,
            "overlap": self.overlap,
            "uneven_tokens": self.uneven_tokens,
            "average": self.average,
            "drops tokens": plan.capacity is not None,
            "capacity": plan.capacity if self._sends_equal_parts(plan) else 0,
        }
        numbers = [DTYPES.index(x) if x in DTYPES else int(x) for x in fields.values()]
        mine = torch.tensor(numbers, dtype=torch.int64, device=tokens.device)
        of_all = self.exchange.counts(mine.expand(self.size, -1)).tolist()
        for i, (name, value) in enumerate(fields.items()):
            kind = DTYPES.__getitem__ if value in DTYPES else type(value)
            first, *others = (kind(numbers[i]) for numbers in of_all)
            for rank, other in enumerate(others, start=1):
                if other == first:
                    continue
                hint = "; with uneven_tokens=True it may differ" if name == "capacity" else ""
                raise RuntimeError(
                    f"ExpertParallel: all processes must have the same {name}, got {first} in the "
                    f"group's process 0 and {other} in its process {rank}{hint}"
                )

    def _equal(self, tokens, plan, weights, work) -> tuple[Tensor, Tensor | None]:
        """Every expert's room [C, H] goes to its process, empty rows too."""
        E, H = plan.num_experts, tokens.shape[1]
        W, L = self.size, self.num_local_experts
        rooms = dispatch(tokens, plan).view(E, plan.capacity, H)
        kept = plan.kept().view(W, L)
        if self._shares_tokens():
            rooms = self._my_share(rooms, 1)
            done = dist.get_rank(self.tensor_group) * rooms.shape[1]
            kept = (kept - done).clamp(0, rooms.shape[1])
        load = self.exchange.counts(kept)
        trips, done = [], 0
        for part in rooms.tensor_split(self.overlap, dim=1):
            C = part.shape[1]
            ids = _ids_of_rooms((load - done).clamp(0, C), C)

            def arrive(rows: Tensor, ids: Tensor = ids, C: int = C):
                return rows, make_plan(ids, L, W * C), _ones(rows)

            trips.append(Trip(self.exchange.equal(L * C), (part.reshape(-1, H),), arrive))
            done += C
        parts, result = self._travel(trips, work)
        rooms = torch.cat([part.view(E, -1, H) for part in parts], dim=1)
        if self._shares_tokens():
            rooms = mappings.gather_tokens(rooms.contiguous(), 1, self.tensor_group)
        rooms = rooms[:, : plan.capacity]
        return combine(rooms.reshape(E * plan.capacity, H), plan, weights), result

    def _counted(self, tokens, plan, weights, work) -> tuple[Tensor, Tensor | None]:
        """Rows that routes own, and no others."""
        experts = torch.where(plan.slots >= 0, plan.experts, -1)
        num_tokens = tokens.shape[0]
        if self._shares_tokens():
            tokens, weights = self._my_share(tokens, 0), self._my_share(weights, 0)
            experts = self._my_share(experts, 0, -1)
        split = [x.tensor_split(self.overlap) for x in (tokens, experts, weights)]
        parts = list(zip(*split, strict=True))
        pack = self._once_per_process if self.dedup else self._once_per_route
        trips, plans = pack(parts)
        backs, result = self._travel(trips, work)
        outs = [
            combine(rows, plan, None if self.dedup else weights)
            for rows, plan, (_, _, weights) in zip(backs, plans, parts, strict=True)
        ]
        out = torch.cat(outs) if len(outs) > 1 else outs[0]
        if self._shares_tokens():
            out = mappings.gather_tokens(out, 0, self.tensor_group)[:num_tokens]
        return out, result

    def _once_per_route(self, parts) -> tuple[list[Trip], list[Plan]]:
        W, L = self.size, self.num_local_experts
        plans = [make_plan(ids, self.num_experts, order="token") for _, ids, _ in parts]
        loads = torch.stack([plan.load.view(W, L) for plan in plans], dim=1)
        counts = torch.cat([loads.sum(dim=2, keepdim=True, dtype=loads.dtype), loads], dim=2)
        paths, received, sums = self.exchange.counted(counts)
        plans = [_without_empty_rows(*pair) for pair in zip(plans, paths, strict=True)]
        local = torch.arange(L, dtype=torch.int32, device=counts.device).repeat(W)
        trips = []
        for i, (plan, path, (tokens, _, _)) in enumerate(zip(plans, paths, parts, strict=True)):

            def arrive(rows: Tensor, load: Tensor = received[:, i, 1:], total: int = sums[i][0]):
                ids = local.repeat_interleave(load.flatten(), output_size=total)
                return rows, make_plan(ids[:, None], L, order="token"), _ones(rows)

            trips.append(Trip(path, (dispatch(tokens, plan),), arrive))
        return trips, plans

    def _once_per_process(self, parts) -> tuple[list[Trip], list[Plan]]:
        W, L = self.size, self.num_local_experts
        owners = [torch.where(ids >= 0, ids // L, -1) for _, ids, _ in parts]
        plans = [make_plan(_first_of_each(ranks), W, order="token") for ranks in owners]
        rows = torch.stack([plan.load for plan in plans], dim=1)
        routes = torch.stack([expert_load(ranks, W) for ranks in owners], dim=1)
        counts = torch.stack([rows.to(routes.dtype), routes], dim=2)
        paths, _, sums = self.exchange.counted(counts)
        plans = [_without_empty_rows(*pair) for pair in zip(plans, paths, strict=True)]
        trips = []
        for i, (plan, path, ranks, (tokens, ids, weights)) in enumerate(
            zip(plans, paths, owners, parts, strict=True)
        ):
            token = plan.sources // ids.shape[1]
            to = ranks.flatten()[plan.sources]
            is_there = ranks[token] == to[:, None]
            there = torch.where(is_there, ids[token] % L, -1)
            weighed = torch.where(is_there, dispatch(weights, plan), 0)

            def arrive(rows: Tensor, ids: Tensor, weights: Tensor, total: int = sums[i][1]):
                plan = make_plan(ids, L, order="token")
                return rows, plan._replace(sources=plan.sources[:total]), weights

            trips.append(Trip(path, (dispatch(tokens, plan), there, weighed), arrive))
        return trips, plans

    def _travel(self, trips: list[Trip], work) -> tuple[list[Tensor], Tensor | None]:
        """Every part to its experts and back. The next one travels while the experts work."""

        def depart(trip: Trip):
            return [start(tensor, trip.path) for tensor in trip.out]

        coming = depart(trips[0])
        result = None if work is None else work()
        leaving = []
        for i, trip in enumerate(trips):
            arriving = coming
            if i + 1 < len(trips):
                coming = depart(trips[i + 1])
            arrived = trip.arrive(*(finish(tensor) for tensor in arriving))
            leaving.append(start(self._routed_here(*arrived), back(trip.path)))
        return [finish(rows) for rows in leaving], result

    def _routed_here(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        if not self.average:
            return routed(self.local, tokens, plan, weights)
        # A smaller gradient inside, for all parameters there are.
        tokens, weights = _Scaled.apply(tokens, self.size), _Scaled.apply(weights, self.size)
        return _Scaled.apply(routed(self.local, tokens, plan, weights), 1 / self.size)

    def _shares_tokens(self) -> bool:
        return self.tensor_group is not None and dist.get_world_size(self.tensor_group) > 1

    def _my_share(self, tensor: Tensor, dim: int, filler: int = 0) -> Tensor:
        size = dist.get_world_size(self.tensor_group)
        missing = -tensor.shape[dim] % size
        padding = [0, 0] * (tensor.dim() - 1 - dim) + [0, missing]
        return mappings.drop_tokens(F.pad(tensor, padding, value=filler), dim, self.tensor_group)


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


def _ones(rows: Tensor) -> Tensor:
    return torch.ones(rows.shape[0], 1, dtype=accumulate_dtype(rows.dtype), device=rows.device)


def _ids_of_rooms(load: Tensor, capacity: int) -> Tensor:
    """The experts [W * L * C, 1] of rows in rooms of which the first `load` [W, L] are filled."""
    L = load.shape[1]
    ids = torch.arange(L, dtype=torch.int32, device=load.device)[:, None]
    place = torch.arange(capacity, dtype=torch.int32, device=load.device)
    return torch.where(place < load[..., None], ids, -1).view(-1, 1)


def _first_of_each(ranks: Tensor) -> Tensor:
    """[T, K] with -1 for what stands in an earlier column too."""
    equal = ranks[:, :, None] == ranks[:, None, :]
    return torch.where(equal.tril(-1).any(dim=2), -1, ranks)


def _without_empty_rows(plan: Plan, path: Path) -> Plan:
    # All rows of a plan without gaps that routes own come first.
    sent = path[0].send if hasattr(path[0], "send") else path[0].sizes
    return plan._replace(sources=plan.sources[: sum(sent)])

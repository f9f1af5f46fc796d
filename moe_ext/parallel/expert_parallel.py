"""Expert parallelism: the ranks of a group hold a part of the experts each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed.device_mesh import DeviceMesh

from .. import options
from ..experts.base import ExpertParameters, Experts
from ..experts.padded import routed, run_padded
from ..experts.shared import SharedExperts
from ..ops.checks import accumulate_dtype
from ..ops.functional import has_autocast
from ..ops.plan import Plan
from .communicator import Communicator
from .consistency import DTYPES, MAX_OVERLAP, CallRecord, ConsistencyError, compare_tensor_group
from .misuse import begin_call, instances, mark_state, refuse_state
from .places import to_places, without_gap
from .sharding import check_part, divide, expert_range
from .tensor_parallel import TokenShards
from .transports import AllToAllTransport, DeepEPTransport, TwoLevelTransport


class ExpertParallel(ExpertParameters, Experts):
    """Experts divided among the ranks of a group: expert parallelism.

    Args:
        experts: this rank's experts. Expert ids follow the group's order: the first rank's experts
            come first. `ExpertParallel.of` takes all experts and keeps this rank's part.
        group: a process group, a mesh of one dimension, or a mesh of nodes and local ranks. On the
            latter rows for one node are collected before they cross to it.
        dedup: send a token once to a rank that has several of its experts, and weight the outputs
            there: fewer bytes, and the same sum in another order. On a mesh of nodes a token goes
            once to a node, and there once to a rank.
        overlap: number of chunks; one is sent while the experts work on another
        uneven_tokens: with a capacity too, ranks may have different numbers of tokens, or none.
            Without a capacity they always may.
        average: gradients of the experts' parameters are those of the mean of the ranks' losses,
            as data-parallel wrappers have all others, instead of the sum. `parallel.data_parallel`
            and `parallel.fully_shard` set it.
        tensor_group: ranks that hold the same tokens and routes (tensor parallelism). Each sends
            its share, and all get the sum.
        deepep: a `deep_ep.ElasticBuffer` of the group: its kernels send tokens, in bfloat16 on
            NVIDIA GPUs. Tested with a stand-in for the buffer, not with DeepEP yet.
        num_local_experts: number of `experts` that are not moe_ext.Experts, as for MOELayer
        num_experts: E, the number of all ranks' experts; None is equally many on every rank. If E
            is not a multiple of the ranks, the first ranks hold one expert more: 10 experts on 4
            ranks are 3, 3, 2 and 2. Experts must then be moe_ext.Experts.
        ep_group_name: the parameters' `group_name`, which stands beside `allreduce = False` for
            DeepSpeed's optimizers

    Parameters, buffers and submodules are those of `experts`, under their own names. A state dict
    has the names that all experts have on one rank. `moe_ext.parallel` reduces their gradients and
    saves them. The attributes `dedup`, `overlap`, `uneven_tokens`, `average` and `deepep` may be
    set between calls, on all ranks.

    All ranks create the same ExpertParallels on a group in the same order, then make the same calls
    and the same backwards: a rank without tokens too. A group of one rank exchanges nothing.
    docs/parallel.md says where the host waits for counts, and lists all errors.

    Raises:
        ValueError: invalid arguments
        RuntimeError: in a call, on all ranks, where they call different layers, or one with
            different options or inputs, or where experts raised an exception in the last call
    """

    local: nn.Module
    _compared_modes: set[bool]  # grad modes in which the host has compared the ranks

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
        num_experts: int | None = None,
        ep_group_name: str | None = None,
    ) -> None:
        num_local_experts = _num_local_experts(experts, num_local_experts)
        communicator = Communicator(group)
        flags = {"dedup": dedup, "uneven_tokens": uneven_tokens, "average": average}
        options.names(_NAME, **{name: (flag, (True, False)) for name, flag in flags.items()})
        overlap = options.integer(_NAME, "overlap", overlap, 1)
        options.numbers(_NAME, overlap=(overlap, 1, MAX_OVERLAP))
        if deepep is not None and (
            tensor_group is not None or overlap != 1 or isinstance(group, DeviceMesh)
        ):
            raise ValueError(
                f"{_NAME}: deepep needs a process group, and neither tensor_group nor overlap, got "
                f"group = {group!r}, tensor_group = {tensor_group!r}, overlap = {overlap}"
            )
        if num_experts is None:
            num_experts = num_local_experts * communicator.size
        super().__init__(num_experts)
        check_part(
            experts, num_local_experts, self.num_experts, communicator.rank, communicator.size
        )
        self.communicator = communicator
        self.dedup = dedup
        self.overlap = overlap
        self.uneven_tokens = uneven_tokens
        self.average = average
        self.deepep = deepep
        self.shards = TokenShards(tensor_group)
        self.transport = self._choose_transport(group, experts)
        self.communicator.state.number_of(self)
        self._compared_modes = set()
        self._adopt(experts)
        self.expert_group_name = ep_group_name or f"ep_size_{self.size}"
        self.mark()
        self.register_state_dict_post_hook(mark_state)
        instances[id(self)] = self

    def _choose_transport(
        self, group: dist.ProcessGroup | DeviceMesh, experts: nn.Module
    ) -> AllToAllTransport | TwoLevelTransport:
        if self.dedup and self.communicator.group is None:
            assert isinstance(group, DeviceMesh)
            return TwoLevelTransport(group, self.shards)
        # Other modules take capacity buffers [ranks, E_local, C, H].
        as_buffer = not isinstance(experts, Experts)
        return AllToAllTransport(self.communicator, self.shards, as_buffer=as_buffer)

    def _adopt(self, experts: nn.Module) -> None:
        """Share the experts' parameters, buffers and submodules.

        Not as a submodule, which would prefix the names in a state dict. Both modules share each
        dict itself: FSDP and `load_state_dict(assign=True)` replace parameters in it.
        """
        for member in (*experts._parameters, *experts._buffers, *experts._modules):
            if hasattr(ExpertParallel, member):
                raise ValueError(f"{_NAME}: experts must not have a member called {member!r}")
        self.__dict__["local"] = experts
        for members in ("_parameters", "_buffers", "_non_persistent_buffers_set", "_modules"):
            self.__dict__[members] = experts.__dict__[members]

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        # A copy is a layer of its own. One rank alone may keep one, such as its best model: so a
        # copy gets no number until its first call.
        instances[id(self)] = self

    @classmethod
    def of(
        cls, experts: nn.Module, group: dist.ProcessGroup | DeviceMesh, **kwargs: Any
    ) -> ExpertParallel:
        """Keep this rank's part of all experts.

        Args:
            experts: all experts, equal on every rank: GroupedExperts, ModuleExperts, or others with
                stacked parameters [E, ...] or a ModuleList of E experts
            group: as in ExpertParallel
            **kwargs: other arguments of ExpertParallel

        Raises:
            ValueError: fewer experts than ranks
        """
        communicator = Communicator(group)
        part = divide(experts, communicator.rank, communicator.size)
        return cls(part, group, num_experts=cast(int, experts.num_experts), **kwargs)

    @property
    def hidden_size(self) -> int | None:
        return getattr(self.local, "hidden_size", None)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The group of the exchange; None on a mesh of nodes and local ranks."""
        return self.communicator.group

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same tokens."""
        return self.shards.group

    @property
    def size(self) -> int:
        """The number of ranks that share the experts."""
        return self.communicator.size

    @property
    def rank(self) -> int:
        """This rank's index among them."""
        return self.communicator.rank

    @property
    def num_local_experts(self) -> int:
        return len(expert_range(self.num_experts, self.rank, self.size))

    @property
    def _is_uneven(self) -> bool:
        return self.num_experts % self.size > 0

    def experts_here(self) -> nn.Module:
        """This rank's experts, as they were given."""
        return self.local

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

    # Experts may save other names and layouts than those of their parameters.

    def _save_to_state_dict(self, *args) -> None:
        self.local._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        refuse_state(self, local_metadata)
        self.local._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def unobserved(self) -> dict[str, Any]:
        """As in `Layer.unobserved`: the first calls of a process compare more."""
        return {"_compared_modes": set(self._compared_modes)}

    def routed(self, tokens: Tensor, plan: Plan, weights: Tensor) -> Tensor:
        return self(tokens, plan, weights)[0]

    def routed_beside(
        self, work: Callable[[], Tensor], tokens: Tensor, plan: Plan, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self(tokens, plan, weights, work)

    # Modules have forwards with different arguments; `routed` is the interface of all experts.
    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        plan: Plan,
        weights: Tensor,
        work: Callable[[], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sum of every token's experts on all ranks, and the result of `work`.

        Args:
            tokens: [T, H]
            plan: of all experts
            weights: [T, K]
            work: a function that does not need the experts' output; it overlaps with communication

        Returns:
            ([T, H], the result of `work` or None)
        """
        if plan.num_experts != self.num_experts:
            raise RuntimeError(
                f"ExpertParallel: plan must be of E = {self.num_experts} experts, "
                f"got {plan.num_experts}"
            )
        if self.size == 1:
            result = None if work is None else work()
            return self._run_local_experts(tokens, plan, weights), result
        # Data-parallel wrappers may cast what they pass on.
        weights = weights.to(accumulate_dtype(tokens.dtype))
        if self._is_uneven:
            plan = to_places(plan, self.size)
        call = self._call_record(tokens, plan, weights)
        run = self._run_local_experts
        transport: AllToAllTransport | TwoLevelTransport | DeepEPTransport = self.transport
        if self.deepep is not None:
            transport = DeepEPTransport(self.deepep, self.communicator)
        if torch.compiler.is_compiling():
            return transport.exchange(call, False, tokens, plan, weights, run, work)
        on_host = call.grad_enabled not in self._compared_modes
        self._compared_modes.add(call.grad_enabled)
        with self.communicator.state.call():
            error = None
            if self.tensor_group is not None:
                self.communicator.begin_exchange()
                if on_host or tokens.device.type == "cpu":
                    # How its ranks differ. The exchange tells all other ranks.
                    error = compare_tensor_group(self.tensor_group, call, tokens)
            call = call._replace(tensor_group_differs=error is not None)
            try:
                return transport.exchange(call, on_host, tokens, plan, weights, run, work)
            except ConsistencyError as told:
                raise error or told from None

    def _call_record(self, tokens: Tensor, plan: Plan, weights: Tensor) -> CallRecord:
        is_enabled, device_type = torch.is_grad_enabled(), tokens.device.type
        dtype = autocast_dtype = DTYPES.index(tokens.dtype)
        if has_autocast(tokens.device):
            autocast_dtype = DTYPES.index(torch.get_autocast_dtype(device_type))
        call = CallRecord(
            layer=begin_call(id(self)),
            has_failed=not torch.compiler.is_compiling() and self.communicator.state.take_failure(),
            is_backward=False,
            tensor_group_differs=False,
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
            tensor_parallel_size=self.shards.size,
            num_experts=self.num_experts,
            num_gaps=plan.num_experts - self.num_experts,
            hidden_size=tokens.shape[1],
            k=plan.slots.shape[1],
            capacity=plan.capacity or 0,
        )
        return call if call.has_equal_capacity else call._replace(capacity=0)

    def _run_local_experts(self, *inputs) -> Tensor:
        """inputs: tokens, plan and weights; or a capacity buffer"""
        if len(inputs) == 1:
            return self._averaged(partial(run_padded, self.local), *inputs)
        tokens, plan, weights = inputs
        if self._is_uneven:
            plan = without_gap(plan, self.num_local_experts)
        return self._averaged(lambda x, w: routed(self.local, x, plan, w), tokens, weights)

    def _averaged(self, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        if not self.average or self.size == 1:
            return run(*inputs)
        # Gradients are smaller inside `run`, and so at all parameters. Ranks of a tensor_group have
        # one loss together.
        losses = self.size / self.shards.size
        out = run(*(_ScaleGradient.apply(x, losses) for x in inputs))
        return _ScaleGradient.apply(out, 1 / losses)


_NAME = "ExpertParallel"


def _num_local_experts(experts: nn.Module, number: int | None) -> int:
    """Check the module of experts and return how many it holds."""
    if not isinstance(experts, nn.Module):
        raise ValueError(
            f"{_NAME}: experts must be a module of experts, got {type(experts).__name__}"
        )
    if number is None:
        number = getattr(experts, "num_experts", None)
    number = options.integer(_NAME, "num_local_experts", number, 1)
    if isinstance(experts, SharedExperts):
        raise ValueError(
            f"{_NAME}: experts must be routed experts, got SharedExperts; pass it an "
            "ExpertParallel: SharedExperts(ExpertParallel(experts, group), shared)"
        )
    return number


class _ScaleGradient(Function):
    """Return the tensor and multiply its gradient by a factor."""

    @staticmethod
    def forward(tensor, factor):
        return tensor.view_as(tensor)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.factor = inputs

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None

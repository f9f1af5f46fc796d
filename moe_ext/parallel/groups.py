"""Process groups for expert parallelism, and data-parallel training with them."""

import math
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .expert_parallel import ExpertParallel


class Groups(NamedTuple):
    """This rank's process groups for expert parallelism and data parallelism.

    Attributes:
        mesh: all ranks, with dimensions "ep" and "dp", or "node", "local_rank" and "dp"
        ep: the ranks that share the experts; pass it to ExpertParallel
        dp: the ranks with the same experts; experts' gradients are reduced over them
    """

    mesh: DeviceMesh
    ep: dist.ProcessGroup | DeviceMesh
    dp: dist.ProcessGroup

    def world(self) -> DeviceMesh:
        """All ranks in one dimension; all other gradients are reduced over them."""
        return DeviceMesh(self.mesh.device_type, torch.arange(dist.get_world_size(), device="cpu"))


def make_groups(
    ep: int | tuple[int, int],
    dp: int | None = None,
    *,
    neighbours_share: bool = True,
    device_type: str | None = None,
    timeout: timedelta | None = None,
) -> Groups:
    """Create the groups of all ranks: `ep` ranks share the experts, which have `dp` copies.

    All ranks call it together.

    Args:
        ep: the number of ranks that share the experts; or (nodes, local ranks), for an all-to-all
            in two levels where both are more than one
        dp: the number of copies of every expert; None is as many as there are ranks for
        neighbours_share: consecutive ranks share the experts; otherwise they hold copies
        device_type: of the groups' tensors; None is the accelerator's, or "cpu" under gloo
        timeout: how long a rank waits for another one of its groups; None is the world's timeout

    Raises:
        ValueError: ep * dp is not the number of ranks, or torch.distributed is not initialised
    """
    if not dist.is_initialized():
        raise ValueError(
            "make_groups: torch.distributed is not initialised; call init_process_group() first, "
            "in processes started by torchrun"
        )
    shape = (ep,) if isinstance(ep, int) else tuple(ep)
    world, size = dist.get_world_size(), math.prod(shape)
    if min(shape) < 1 or len(shape) > 2:
        raise ValueError(f"make_groups: ep must be a number or (nodes, local ranks), got {ep!r}")
    if dp is None:
        dp = max(world // size, 1)
    if size * dp != world:
        raise ValueError(f"make_groups: ep * dp must be the {world} ranks, got {ep} * {dp}")
    # A level of size 1 needs no all-to-all.
    shape = tuple(number for number in shape if number > 1) or (1,)
    if device_type is None:
        is_gloo = dist.get_backend() == "gloo"
        accelerator = None if is_gloo else torch.accelerator.current_accelerator()
        device_type = "cpu" if accelerator is None else accelerator.type
    ranks = torch.arange(world, device="cpu")
    by_copy = ranks.view(dp, size).t() if neighbours_share else ranks.view(size, dp)
    names = ("ep",) if len(shape) == 1 else ("node", "local_rank")
    table = by_copy.reshape(*shape, dp)
    if timeout is None:
        assert dist.group.WORLD is not None
        timeout = dist.group.WORLD._get_backend(torch.device(device_type)).options._timeout
    # Always new groups: a mesh would reuse the world's group where it can, with its timeout and
    # with the messages of failed calls.
    mine = []
    for dim in range(table.ndim):
        lines = table.movedim(dim, -1).flatten(0, -2).tolist()
        mine += [dist.new_subgroups_by_enumeration(lines, timeout=timeout)[0]]
    mesh = DeviceMesh.from_group(mine, device_type, mesh=table, mesh_dim_names=(*names, "dp"))
    group = mesh.get_group("ep") if len(shape) == 1 else mesh[names]
    return Groups(mesh, group, mesh.get_group("dp"))


def rank_load(load: Tensor, group: dist.ProcessGroup | DeviceMesh) -> Tensor:
    """Count the routes of all ranks' tokens to each rank's experts, before dropping.

    Args:
        load: [E] integers, routes of this rank's tokens, such as `layer.exp_counts`
        group: the ranks that share the experts

    Returns:
        [size of the group] int64, the same on all ranks
    """
    total = load.to(torch.int64, copy=True)
    for one in _groups_of(group):
        dist.all_reduce(total, group=one)
    return torch.stack([part.sum() for part in total.tensor_split(group.size())])


def experts_of(model: nn.Module) -> dict[str, ExpertParallel]:
    """The ExpertParallels of more than one rank, by name in the model."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExpertParallel) and module.size > 1
    }


def data_parallel(model: nn.Module, groups: Groups, **options: Any) -> DistributedDataParallel:
    """Wrap a model with ExpertParallel parts in DistributedDataParallel.

    Gradients are averaged over all ranks. DistributedDataParallel reduces all but the experts',
    which are reduced over their copies: each copy has the gradients of all tokens sent to it.
    `no_sync` holds for both.

    Args:
        model: the model
        groups: from `make_groups`
        **options: of DistributedDataParallel

    Raises:
        ValueError: no parameter but the experts' requires gradients
    """
    experts = experts_of(model)
    names = [
        name
        for path, part in experts.items()
        for name, _ in (*part.named_parameters(path), *part.named_buffers(path))
    ]
    if not any(p.requires_grad and name not in names for name, p in model.named_parameters()):
        raise ValueError(
            "data_parallel: DistributedDataParallel needs a parameter to reduce, but only experts' "
            "require gradients; use fully_shard"
        )
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    parallel = DistributedDataParallel(model, **options)
    parallel.reduces_experts = True  # type: ignore[assignment]
    parallel.register_forward_pre_hook(_decide)
    for module in experts.values():
        module.average = True
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), group=groups.dp, group_src=0)
        for parameter in module.parameters():
            if parameter.requires_grad and dist.get_world_size(groups.dp) > 1:
                _reduce(parameter, parallel, groups.dp)
    return parallel


def _decide(parallel: nn.Module, args: tuple) -> None:
    """A forward decides whether its backward reduces, as in DistributedDataParallel."""
    if torch.is_grad_enabled():
        parallel.reduces_experts = parallel.require_backward_grad_sync


def _reduce(
    parameter: nn.Parameter, parallel: DistributedDataParallel, copies: dist.ProcessGroup
) -> None:
    @parameter.register_post_accumulate_grad_hook
    def reduce(parameter: nn.Parameter) -> None:
        if not parallel.reduces_experts:
            return
        grad = parameter.grad
        assert grad is not None
        grad /= dist.get_world_size(copies)
        work = dist.all_reduce(grad, group=copies, async_op=True)
        # At the end of this backward.
        torch.autograd.Variable._execution_engine.queue_callback(work.wait)


def fully_shard(model: nn.Module, groups: Groups, **options: Any) -> nn.Module:
    """Shard a model with ExpertParallel parts by FSDP2, and average gradients over all ranks.

    Each ExpertParallel is sharded among its copies, the rest of the model among all ranks.

    Args:
        model: the model, or a block of it; wrap blocks before the whole
        groups: from `make_groups`
        **options: of torch.distributed.fsdp.fully_shard, except the mesh. A lower precision
            rounds routes' weights too.

    Returns:
        model

    A gate that is sharded by itself needs
    `torch.distributed.fsdp.register_fsdp_forward_method(gate, "route")`.
    """
    for module in experts_of(model).values():
        if isinstance(module, fsdp.FSDPModule):
            continue
        module.average = True
        fsdp.fully_shard(module, mesh=groups.mesh["dp"], **options)
        module.mark()
    fsdp.fully_shard(model, mesh=groups.world(), **options)
    # FSDP hooks `forward` alone.
    if hasattr(model, "forward_with_aux"):
        fsdp.register_fsdp_forward_method(model, "forward_with_aux")
    return model


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, groups: Groups, max_norm: float) -> Tensor:
    """Clip gradients by their norm over the parameters of all ranks, each counted once.

    Args:
        model: the model, wrapped or not
        groups: from `make_groups`
        max_norm: as in torch.nn.utils.clip_grad_norm_

    Returns:
        the norm [] before clipping, float64, the same on all ranks
    """
    of_experts = {id(p) for module in experts_of(model).values() for p in module.parameters()}
    shared = [p for p in model.parameters() if id(p) not in of_experts]
    mine = [p for p in model.parameters() if id(p) in of_experts]
    device = torch.device(groups.mesh.device_type)
    squares = _squares(mine, device)
    for group in _groups_of(groups.ep):
        dist.all_reduce(squares, group=group)
    norm = (squares + _squares(shared, device)).sqrt()
    # One call cannot handle DTensors of two meshes.
    for parameters in (shared, mine):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _groups_of(group: dist.ProcessGroup | DeviceMesh) -> list[dist.ProcessGroup]:
    return group.get_all_groups() if isinstance(group, DeviceMesh) else [group]


def _squares(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    """The sum of squares of all gradients, over all shards."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    by_mesh: dict[DeviceMesh, Tensor] = {}
    for parameter in parameters:
        grad, mesh = parameter.grad, getattr(parameter, "device_mesh", None)
        part = total if mesh is None else by_mesh.setdefault(mesh, torch.zeros_like(total))
        if grad is not None:
            grad = grad.to_local() if isinstance(grad, DTensor) else grad
            dtype = torch.promote_types(grad.dtype, torch.float32)
            part += torch.linalg.vector_norm(grad, dtype=dtype).double().square()
    # FSDP2 shards over the last dimension of its mesh and replicates over others.
    for mesh, part in by_mesh.items():
        dist.all_reduce(part, group=mesh.get_group(mesh.ndim - 1))
        total += part
    return total

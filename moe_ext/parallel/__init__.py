"""Expert parallelism on torch.distributed."""

from .checkpoint import global_state, local_state
from .expert_parallel import ExpertParallel
from .groups import Groups, clip_grad_norm_, data_parallel, fully_shard, make_groups, rank_load

__all__ = [
    "ExpertParallel",
    "Groups",
    "clip_grad_norm_",
    "data_parallel",
    "fully_shard",
    "global_state",
    "local_state",
    "make_groups",
    "rank_load",
]

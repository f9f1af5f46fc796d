"""The ranks of a run under torchrun, which share a model's experts and every batch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import parallel
from ..layer import Layer as MOELayer
from ..parallel import ExpertParallel


class Processes(NamedTuple):
    """The ranks of this run; one without groups."""

    rank: int = 0
    size: int = 1
    groups: parallel.Groups | None = None

    @classmethod
    def of_torchrun(cls, device: torch.device) -> Processes:
        if "TORCHELASTIC_RUN_ID" not in os.environ or dist.is_initialized():
            return cls()
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        world = dist.get_world_size()
        groups = parallel.make_groups(world, device_type=device.type)
        return cls(dist.get_rank(), world, groups)

    @property
    def group(self) -> dist.ProcessGroup | None:
        return None if self.groups is None else dist.group.WORLD

    def share(self, starts: Tensor) -> Tensor:
        """This rank's part of a batch."""
        if len(starts) % self.size:
            raise ValueError(
                f"a batch of {len(starts)} windows cannot be shared equally by {self.size} ranks; "
                "choose a number of ranks that divides it"
            )
        return starts[self.rank :: self.size]

    def total(self, value: Tensor) -> Tensor:
        if self.groups is not None:
            dist.all_reduce(value)
        return value

    def wrap(self, model: nn.Module, layers: Sequence[MOELayer]) -> nn.Module:
        """Divide these layers' experts among the ranks; average the other gradients."""
        if self.groups is None:
            return model
        for layer in layers:
            layer.experts = ExpertParallel.of(layer.experts, self.groups.ep)
        return parallel.data_parallel(model, self.groups)

    def clip(self, model: nn.Module, norm: float) -> None:
        if self.groups is None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)
        else:
            parallel.clip_grad_norm_(model, self.groups, norm)

    def end(self) -> None:
        if self.groups is not None:
            dist.destroy_process_group()


ALONE = Processes()

"""Classes and process groups that DeepSpeed's engine expects of MoE layers.

Without DeepSpeed, base classes are nn.Module and groups are None.
"""

import importlib.util
import warnings

import torch.distributed as dist
from torch import nn

from ..experts import convert
from ..experts.grouped import GroupedExperts
from ..parallel import ExpertParallel
from ..parallel.misuse import mark_state, unmarked


def _installed(name: str):
    """Import a module of DeepSpeed; None if DeepSpeed is missing or cannot be imported."""
    if importlib.util.find_spec("deepspeed") is None:
        return None
    try:
        return importlib.import_module(name)
    except Exception as error:  # a missing CUDA toolkit raises many kinds
        warnings.warn(
            f"moe_ext.deepspeed: DeepSpeed is installed, but import {name} failed: {error!r}. Its "
            "engine will not know the layers; fix its installation to use deepspeed.initialize",
            stacklevel=2,
        )
        return None


def their_class(module: str, name: str) -> type[nn.Module] | None:
    """A class of deepspeed.moe; None without DeepSpeed."""
    return getattr(_installed(f"deepspeed.moe.{module}"), name, None)


def known_as(module: str, name: str) -> type[nn.Module]:
    """A base class by which DeepSpeed's engine recognises a layer: deepspeed.moe.<module>.<name>.

    The engine finds MoE layers by isinstance. The class comes after the layer's other bases and has
    no constructor, so nothing of DeepSpeed's runs.
    """
    theirs = their_class(module, name)
    if theirs is None:
        return nn.Module
    return type(f"KnownAs{name}", (theirs,), {"__init__": nn.Module.__init__})


def expert_group(ep_size: int, use_data_before_expert_parallel: bool) -> dist.ProcessGroup | None:
    """DeepSpeed's group of the ranks that share experts; its optimizers and checkpoints use it.

    It is created if DeepSpeed does not have it yet: all ranks call this. It is None if DeepSpeed's
    communication is not initialised. Raises NotImplementedError if the engine runs with a
    tensor-parallel mpu.
    """
    comm = _installed("deepspeed.comm")
    if comm is None or not comm.is_initialized():
        return None
    groups = importlib.import_module("deepspeed.utils.groups")
    bwc = importlib.import_module("deepspeed.utils.bwc")
    if bwc.bwc_tensor_model_parallel_world_size(groups.mpu) > 1:
        raise NotImplementedError(
            "moe_ext.deepspeed: an mpu with tensor parallelism is not supported under DeepSpeed's "
            "engine; moe_ext.ExpertParallel(tensor_group=...) has it without the engine"
        )
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(
            ep_size, use_data_before_expert_parallel_=use_data_before_expert_parallel
        )
    return groups._get_expert_parallel_group(name)


def name_each_expert(moe: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    """A state-dict hook of an MoE: give grouped experts one key per expert.

    The engine saves each expert in a file of its own, by the number in its keys. load_state_dict of
    GroupedExperts takes the same keys.
    """
    experts = moe.get_submodule("deepspeed_moe.experts")
    here = experts.experts_here() if isinstance(experts, ExpertParallel) else experts
    prefix = f"{prefix}deepspeed_moe.experts."
    stacked = {key: value for key, value in state.items() if key.startswith(prefix)}
    # keep_vars returns the parameters themselves.
    is_kept = any(isinstance(value, nn.Parameter) for value in stacked.values())
    if not isinstance(here, GroupedExperts) or is_kept:
        return
    layout = convert.QWEN if f"{prefix}gate_up_proj" in stacked else convert.NEMOTRON
    grouped = {key.removeprefix(prefix): unmarked(state.pop(key)) for key in stacked}
    state.update(convert.from_grouped(grouped, convert.deepspeed(layout), prefix))
    if isinstance(experts, ExpertParallel):
        mark_state(experts, state, prefix, {})

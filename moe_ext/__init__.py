"""Mixture-of-experts layers for PyTorch: gate, plan, dispatch and combine as operators."""

import importlib
from typing import TYPE_CHECKING

from torch.utils import _pytree as pytree

from . import build, ops
from .deepspeed.gate import TopKGate
from .deepspeed.moe_layer import MOELayer
from .experts import convert
from .experts.base import Experts
from .experts.grouped import GroupedExperts
from .experts.module import ModuleExperts
from .experts.pages import huge_pages
from .experts.shared import SharedExperts
from .formats import QuantizedWeight
from .layer import Aux, total_l_aux
from .memory import keep_memory
from .monitor import profiling, stats
from .monitor.explain import explain
from .ops.feed_forward import feed_forward
from .ops.functional import (
    Choice,
    activate,
    combine,
    dispatch,
    gate,
    grouped_mm,
    mask_weights,
    route_dot,
)
from .ops.plan import Plan, make_plan
from .routing import choice_scores, losses
from .routing.route import Routing, route
from .routing.routers import CosineRouter

if TYPE_CHECKING:
    from . import deepspeed as deepspeed
    from . import hf as hf
    from . import parallel
    from .deepspeed.layer import MoE
    from .monitor import plot as plot
    from .monitor import sinks as sinks
    from .parallel import ExpertParallel

__version__ = "0.1.0"

# A named tuple is a pytree by itself; by name torch.export can save it too.
for _cls in (Aux, Choice, Plan, Routing):
    pytree._register_namedtuple(_cls, serialized_type_name=f"moe_ext.{_cls.__name__}")

__all__ = [
    "Aux",
    "Choice",
    "CosineRouter",
    "ExpertParallel",
    "Experts",
    "GroupedExperts",
    "MOELayer",
    "MoE",
    "ModuleExperts",
    "Plan",
    "QuantizedWeight",
    "Routing",
    "SharedExperts",
    "TopKGate",
    "activate",
    "build",
    "choice_scores",
    "combine",
    "convert",
    "dispatch",
    "explain",
    "feed_forward",
    "gate",
    "grouped_mm",
    "huge_pages",
    "keep_memory",
    "losses",
    "make_plan",
    "mask_weights",
    "ops",
    "parallel",
    "profiling",
    "route",
    "route_dot",
    "stats",
    "total_l_aux",
]


# Loaded on first use. Some need packages that not everyone has; torch's meshes and DTensors, and
# DeepSpeed, take most of a second to import.
_LAZY = {
    "ExpertParallel": ".parallel",
    "MoE": ".deepspeed.layer",
    "hf": "",
    "parallel": "",
    "plot": ".monitor",
    "sinks": ".monitor",
}


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = __name__ + _LAZY[name]
    if name[0].isupper():
        return getattr(importlib.import_module(package), name)
    return importlib.import_module(f"{package}.{name}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

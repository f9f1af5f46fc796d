"""Mixture-of-experts layers for PyTorch: gate, plan, dispatch and combine as operators."""

import importlib
from typing import TYPE_CHECKING

from torch.utils import _pytree as pytree

from . import build, convert, losses, ops, profiling, selection, stats
from .experts import Experts, ModuleExperts, SharedExperts
from .explanation import explain
from .feed_forward import feed_forward
from .functional import Choice, activate, combine, dispatch, gate, grouped_mm, keep, route_dot
from .grouped_experts import GroupedExperts
from .layer import Aux, MOELayer, total_l_aux
from .plan import Plan, make_plan
from .routers import CosineRouter
from .routing import Routing, route
from .topk_gate import TopKGate

if TYPE_CHECKING:
    from . import parallel
    from .deepspeed.layer import MoE
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
    "Routing",
    "SharedExperts",
    "TopKGate",
    "activate",
    "build",
    "combine",
    "convert",
    "dispatch",
    "explain",
    "feed_forward",
    "gate",
    "grouped_mm",
    "keep",
    "losses",
    "make_plan",
    "ops",
    "parallel",
    "profiling",
    "route",
    "route_dot",
    "selection",
    "stats",
    "total_l_aux",
]


# These need packages that not everyone has, or take long to load.
_MODULES = "deepspeed", "demo", "doctor", "hf", "plot", "sinks"


def __getattr__(name: str):
    # Loaded when asked for: torch's meshes and DTensors take most of a second, as does DeepSpeed.
    if name in ("ExpertParallel", "parallel"):
        parallel = importlib.import_module(".parallel", __name__)
        return parallel if name == "parallel" else parallel.ExpertParallel
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "MoE":
        return importlib.import_module(".deepspeed.layer", __name__).MoE
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})

"""Mixture-of-experts layers for PyTorch: gate, plan, dispatch and combine as operators."""

from . import build, ops
from .experts import Experts, GroupedExperts, ModuleExperts
from .functional import Choice, combine, dispatch, gate, grouped_mm, route_dot
from .layer import Aux, MOELayer
from .plan import Plan, make_plan
from .topk_gate import Routing, TopKGate

__version__ = "0.1.0"

__all__ = [
    "Aux",
    "Choice",
    "Experts",
    "GroupedExperts",
    "MOELayer",
    "ModuleExperts",
    "Plan",
    "Routing",
    "TopKGate",
    "build",
    "combine",
    "dispatch",
    "gate",
    "grouped_mm",
    "make_plan",
    "ops",
    "route_dot",
]

"""Mixture-of-experts layers for PyTorch: gate, plan, dispatch and combine as operators."""

from torch.utils import _pytree as pytree

from . import build, ops
from .experts import Experts, GroupedExperts, ModuleExperts
from .functional import Choice, combine, dispatch, gate, grouped_mm, route_dot
from .layer import Aux, MOELayer
from .plan import Plan, make_plan
from .topk_gate import Routing, TopKGate

__version__ = "0.1.0"

# A named tuple is a pytree by itself; by name torch.export can save it too.
for _cls in (Aux, Choice, Plan, Routing):
    pytree._register_namedtuple(_cls, serialized_type_name=f"moe_ext.{_cls.__name__}")

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

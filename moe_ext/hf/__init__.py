"""Run the experts of Hugging Face's transformers with moe_ext:

    import moe_ext.hf
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_ext")

or `model.set_experts_implementation("moe_ext")`. The import registers the name in this process.
`check(model)` raises now for an experts module that moe_ext does not support; a forward raises when
it reaches the module. `from_pretrained(path, "int4")` loads a model with frozen experts in 8 or 4
bits, `quantize(model, "int4")` freezes those of a loaded one. Needs transformers >= 5.7, and these
two >= 5.23.
"""

try:
    import transformers

    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 7):
        raise ImportError(f"got {transformers.__version__}")
except ImportError as error:
    raise ImportError(
        f"moe_ext.hf needs transformers >= 5.7: {error}; pip install -U transformers"
    ) from error

from .experts import NAME, ExpertsModule, Layout, check, experts_forward, experts_modules
from .packed import from_pretrained, quantize
from .quantizer import ExpertsConfig
from .reports import LayerReport, Report, report
from .stats import StatsCallback

__all__ = [
    "NAME",
    "ExpertsConfig",
    "ExpertsModule",
    "LayerReport",
    "Layout",
    "Report",
    "StatsCallback",
    "check",
    "experts_forward",
    "experts_modules",
    "from_pretrained",
    "quantize",
    "report",
]

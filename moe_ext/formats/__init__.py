"""Frozen weights in 8 and 4 bits."""

from .codes import FORMATS, Format
from .weight import QuantizedWeight, quantize_parameters, replace_parameter

__all__ = ["FORMATS", "Format", "QuantizedWeight", "quantize_parameters", "replace_parameter"]

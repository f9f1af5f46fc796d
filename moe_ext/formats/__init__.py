"""Frozen weights in 8 and 4 bits."""

from .codes import FORMATS, Format
from .weight import QuantizedWeight, replace_parameter

__all__ = ["FORMATS", "Format", "QuantizedWeight", "replace_parameter"]

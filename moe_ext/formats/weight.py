"""A weight in 8 or 4 bits, in the place of a parameter."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .. import options
from ..options import WeightFormat
from . import codes
from .codes import FORMATS, Codes


class QuantizedWeight(nn.Module):
    """A frozen weight [E, N, M] in a format of 8 or 4 bits: `feed_forward`, `grouped_mm` and
    experts take it where they take a weight.

    Products are those with `dequantize()`, but for rounding. Values and scales are parameters
    without gradients, so that they are saved and moved as others are; `.half()` and `.to(dtype)`
    leave them as they are.

    Args:
        values: [E, N, M * bits / 8] uint8, as in codes.py
        scales: [E, N, groups of a row] of the format's dtype
        zeros: [E, N, half as many, rounded up] uint8, zero points of int4
        format: "int8", "int4", "mxfp4" or "nf4"
        activations: "int8" to round every row of a product to 8 bits too, with a scale of its own;
            gradients are those without. None for exact products.

    Raises:
        ValueError: the tensors do not belong together, or a scale is zero, infinite or NaN
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self,
        values: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        *,
        format: WeightFormat,
        activations: str | None = None,
    ) -> None:
        super().__init__()
        options.names(
            "QuantizedWeight",
            format=(format, tuple(FORMATS)),
            activations=(activations, (None, "int8")),
        )
        self.format, self.activations = format, activations
        found = Codes(values, scales, zeros)
        if why := why_not(found, format):
            raise ValueError(f"QuantizedWeight: {why}")
        for name, tensor in found._asdict().items():
            parameter = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, parameter)

    @classmethod
    def quantize(
        cls,
        weight: Tensor,
        format: WeightFormat,
        group_size: int | None = None,
        *,
        zero_points: bool = False,
        activations: str | None = None,
    ) -> "QuantizedWeight":
        """The nearest numbers of a format.

        Args:
            weight: [E, N, M], finite
            format: as of the class
            group_size: numbers of a row that share a scale; of int4 32, 64 (if None) or 128
            zero_points: of int4: a group's numbers lie around a point of their own
            activations: as of the class

        Returns:
            the weight in its format

        Raises:
            ValueError: rows do not divide into groups, or a number is not finite
        """
        options.names(
            "QuantizedWeight",
            format=(format, tuple(FORMATS)),
            activations=(activations, (None, "int8")),
        )
        if zero_points and format != "int4":
            raise ValueError(f"QuantizedWeight: int4 alone has zero points, not {format}")
        if weight.dim() != 3:
            raise ValueError(f"QuantizedWeight: weight must be [E, N, M], got {list(weight.shape)}")
        try:
            # An expert at a time: numbers in float32 take up to eight times the memory.
            experts = [codes.encode(w, format, group_size, zero_points) for w in weight]
            if not experts:
                none = weight.new_zeros(weight.shape[1:])
                experts = [codes.encode(none, format, group_size, zero_points)]
        except ValueError as error:
            raise ValueError(f"QuantizedWeight: {error}") from None
        stacked: list[Any] = [
            None if parts[0] is None else torch.stack(parts)[: len(weight)]
            for parts in zip(*experts, strict=True)
        ]
        return cls(*stacked, format=format, activations=activations)

    @classmethod
    def from_mxfp4(
        cls, blocks: Tensor, scales: Tensor, *, activations: str | None = None
    ) -> "QuantizedWeight":
        """The weight of MXFP4 as gpt-oss ships it; nothing is copied.

        Args:
            blocks: [E, N, M / 32, 16] uint8
            scales: [E, N, M / 32] uint8
            activations: as of the class
        """
        return cls(blocks.flatten(-2), scales, format="mxfp4", activations=activations)

    @classmethod
    def from_nf4(
        cls, packed: Tensor, absmax: Tensor, shape: Iterable[int], *, activations: str | None = None
    ) -> "QuantizedWeight":
        """The weight of NF4 as bitsandbytes packs it, in blocks of 64.

        Args:
            packed: E * N * M / 2 bytes, with the first number of each in its upper half
            absmax: [E * N * M / 64] float32, not quantized itself
            shape: E, N, M
            activations: as of the class

        Raises:
            ValueError: blocks cross rows, or the tensors do not belong together
        """
        E, N, M = shape
        if M % 64:
            raise ValueError(f"QuantizedWeight: blocks of 64 cross rows of {M} numbers")
        of_bytes = packed.contiguous().view(torch.uint8)
        if of_bytes.numel() != E * N * M // 2 or absmax.numel() != E * N * M // 64:
            raise ValueError(
                f"QuantizedWeight: [{E}, {N}, {M}] has {E * N * M // 2} bytes and "
                f"{E * N * M // 64} maxima, not {of_bytes.numel()} and {absmax.numel()}"
            )
        of_bytes = of_bytes.view(E, N, M // 2)
        values, scales = of_bytes << 4 | of_bytes >> 4, absmax.view(E, N, M // 64)
        # A block of zeros has the maximum 0, and codes of 0.
        scales = torch.where(scales == 0, 1, scales)
        return cls(values, scales, format="nf4", activations=activations)

    @property
    def shape(self) -> torch.Size:
        """[E, N, M]"""
        E, N, size = self.values.shape
        return torch.Size([E, N, size * 8 // FORMATS[self.format].bits])

    @property
    def group_size(self) -> int:
        return self.shape[-1] // max(1, self.scales.shape[-1])

    @property
    def nbytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.parameters())

    def codes(self) -> Codes:
        return Codes(self.values, self.scales, self.zeros)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers that products take, rounded once to float32, then to dtype.

        Args:
            dtype: of the result

        Returns:
            [E, N, M]
        """
        return codes.decode(self.codes(), self.format).to(dtype)

    def extra_repr(self) -> str:
        rounded = f", activations={self.activations!r}" if self.activations else ""
        points = ", zero points" if self.zeros is not None else ""
        groups = "" if self.format == "int8" else f", group_size={self.group_size}"
        return f"{list(self.shape)}, {self.format}{groups}{points}{rounded}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *others) -> None:
        *_, error_msgs = others
        given = Codes(*(state_dict.get(prefix + name) for name in Codes._fields))
        if why := self._why_not(given):
            error_msgs.append(f"{prefix.removesuffix('.') or 'QuantizedWeight'}: {why}")
            return
        super()._load_from_state_dict(state_dict, prefix, *others)

    def _why_not(self, given: Codes) -> str | None:
        """Why tensors of a state cannot be this weight's. A state may have none of them."""
        if all(tensor is None for tensor in given):
            return None
        for name, tensor, own in zip(Codes._fields, given, self.codes(), strict=True):
            if (tensor is None) != (own is None):
                return f"{name} must {'not ' if own is None else ''}be beside the others"
            if tensor is not None and own is not None and tensor.shape != own.shape:
                return f"{name} must be {list(own.shape)}, got {list(tensor.shape)}"
        return why_not(given, self.format)


def why_not(found: Codes, format: str) -> str | None:
    """Say why tensors are not of a format; None where they are."""
    values, scales, zeros = found
    bits, _, dtype, _ = FORMATS[format]
    if values.dim() != 3 or values.dtype != torch.uint8:
        return f"values must be [E, N, bytes] of uint8, got {list(values.shape)} of {values.dtype}"
    if scales.dim() != 3 or scales.shape[:2] != values.shape[:2] or scales.dtype != dtype:
        return (
            f"scales must be [E, N, groups] of {dtype} with E, N = {list(values.shape[:2])}, got "
            f"{list(scales.shape)} of {scales.dtype}"
        )
    width, count = values.shape[-1] * 8 // bits, scales.shape[-1]
    if not codes.has_groups(format, width, count):
        sizes = codes.group_sizes(format)
        return f"{format} has a scale for {sizes} numbers of a row, not {count} for {width}"
    if zeros is not None:
        shape = (*scales.shape[:2], (count + 1) // 2)
        if format != "int4":
            return f"int4 alone has zero points, not {format}"
        if zeros.shape != shape or zeros.dtype != torch.uint8:
            return f"zeros must be {list(shape)} of uint8, got {list(zeros.shape)} of {zeros.dtype}"
    if scales.is_meta:
        return None
    numbers = codes.scale_numbers(scales)
    bad = ~numbers.isfinite() | (numbers == 0)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        return f"scales must be finite and not zero, got {scales[tuple(at)].item()} at {at}"
    return None


def replace_parameter(module: nn.Module, name: str, weight: QuantizedWeight) -> None:
    delattr(module, name)
    setattr(module, name, weight)

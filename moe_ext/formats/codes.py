"""Formats of weights in 8 or 4 bits: the numbers of codes, and the nearest codes of numbers.

A row of a weight has codes, and a scale for every group of them. A number is its code's, times the
scale of its group:

    format   numbers of codes                                       group        scales
    int8     -127 .. 127                                            a row        float32
    int4     -8 .. 7; with zero points 0 .. 15 less the group's     32, 64, 128  bfloat16
    mxfp4    0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives         32           powers of two
    nf4      16 quantiles of the normal distribution                64           float32

Two codes of 4 bits share a byte, the first one in its lower half; so do two zero points. mxfp4 is
OCP's (Microscaling Formats 1.0): E2M1 numbers, and scales as exponents E8M0 in uint8, 2^(s - 127).
The numbers of nf4 are those of QLoRA (arXiv:2305.14314).
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor


class Format(NamedTuple):
    """Attributes:
    bits: of a code
    groups: how many codes may share a scale; 0: those of a row
    scales: the scales' dtype
    numbers: of the codes, where there are 16
    """

    bits: int
    groups: tuple[int, ...]
    scales: torch.dtype
    numbers: tuple[float, ...] = ()


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FORMATS = {
    "int8": Format(8, (0,), torch.float32),
    "int4": Format(4, (32, 64, 128), torch.bfloat16, tuple(map(float, range(-8, 8)))),
    "mxfp4": Format(4, (32,), torch.uint8, (*_E2M1, *(-x for x in _E2M1))),
    "nf4": Format(4, (64,), torch.float32, _NF4),
}
DEFAULT_GROUP = {"int8": 0, "int4": 64, "mxfp4": 32, "nf4": 64}
E8M0_BIAS, E8M0_NAN = 127, 255


class Codes(NamedTuple):
    """A weight [..., N, M] in a format.

    Attributes:
        values: [..., N, M * bits / 8] uint8; of int8 the codes in two's complement
        scales: [..., N, groups of a row]
        zeros: [..., N, half as many, rounded up] uint8; None without zero points
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None


def group_sizes(format: str) -> str:
    """How many numbers of a row share a scale, for an error."""
    groups = FORMATS[format].groups
    return "all" if groups == (0,) else " or ".join(map(str, groups))


def has_groups(format: str, width: int, count: int) -> bool:
    """Whether rows of `width` numbers have `count` scales."""
    groups = FORMATS[format].groups
    if groups == (0,):
        return count == 1
    return count > 0 and width % count == 0 and width // count in groups


def group_of(format: str, width: int, group_size: int | None) -> int:
    """The codes of a group. Raises ValueError where rows of `width` numbers have no such groups."""
    known = FORMATS[format].groups
    group = DEFAULT_GROUP[format] if group_size is None else group_size
    if group not in known:
        expected = " or ".join(map(str, known))
        raise ValueError(f"{format} has groups of {expected} numbers, not {group}")
    if group == 0:
        return width
    if width == 0 or width % group:
        raise ValueError(
            f"{format}: rows of {width} numbers do not divide into groups of {group}; int8 takes "
            "rows of any size"
        )
    return group


def encode(weight: Tensor, format: str, group_size: int | None, zero_points: bool) -> Codes:
    """The nearest codes of finite numbers [N, M]; scales as large as a group's numbers need."""
    group = group_of(format, weight.shape[-1], group_size)
    rows = weight.detach().float().contiguous()
    if not rows.is_meta and not torch.isfinite(rows).all():
        raise ValueError(f"{format}: the weight has infinities or NaN")
    groups = rows.view(len(rows), rows.shape[1] // group if group else 1, group)
    if zero_points:
        return _encode_with_zeros(groups)
    codes, scales = {"int8": _int8, "int4": _int4, "mxfp4": _mxfp4, "nf4": _nf4}[format](groups)
    codes = codes.flatten(1)
    return Codes(codes if format == "int8" else pack(codes), scales, None)


def pack(codes: Tensor) -> Tensor:
    """Two codes to a byte, the first one in its lower half. [..., M] -> [..., M / 2] uint8."""
    pairs = codes.to(torch.uint8).unflatten(-1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4


def unpack(values: Tensor) -> Tensor:
    """[..., B] uint8 -> [..., 2 B] uint8, numbers below 16."""
    return torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)


def _positive(largest: Tensor) -> Tensor:
    """The scale of a group of zeros is 1."""
    return torch.where(largest == 0, 1, largest)


def _int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    largest = groups.abs().amax(-1) if groups.shape[-1] else groups.new_zeros(groups.shape[:2])
    scales = _positive(largest / 127)
    codes = (groups / scales.unsqueeze(-1)).round().clamp(-127, 127)
    return codes.to(torch.int8).view(torch.uint8), scales


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    # The number of the largest size becomes -8: the scale has the other sign.
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    scales = _positive((largest / -8).bfloat16())
    return (groups / scales.float().unsqueeze(-1)).round().clamp(-8, 7) + 8, scales


def _encode_with_zeros(groups: Tensor) -> Codes:
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scales = _positive(((high - low) / 15).bfloat16())
    wide = scales.float()
    zeros = (-low / wide).round().clamp(0, 15)
    codes = (groups / wide.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
    if zeros.shape[-1] % 2:
        zeros = torch.nn.functional.pad(zeros, (0, 1))
    return Codes(pack(codes.clamp(0, 15).flatten(1)), scales, pack(zeros))


def _mxfp4(groups: Tensor) -> tuple[Tensor, Tensor]:
    largest = _positive(groups.abs().amax(-1))
    exponents = torch.frexp(largest).exponent - 1 - 2  # 6 is 1.5 * 2^2
    tried = []
    for more in (0, 1):  # a number above 6 is cut off, or all have a bit less
        of_scale = (exponents + more).clamp(-E8M0_BIAS, E8M0_BIAS)
        scaled = torch.ldexp(groups, -of_scale.unsqueeze(-1))
        codes = _nearest_e2m1(scaled)
        found = torch.tensor(_E2M1, dtype=torch.float32, device=groups.device)[codes.long() & 7]
        error = (scaled.abs() - found).square().sum(-1) * 4**more  # in units of the first scale
        tried.append((codes, of_scale, error))
    (codes, of_scale, error), (other_codes, other_scale, other_error) = tried
    is_better = other_error < error
    codes = torch.where(is_better.unsqueeze(-1), other_codes, codes)
    return codes, (torch.where(is_better, other_scale, of_scale) + E8M0_BIAS).to(torch.uint8)


def _nearest_e2m1(numbers: Tensor) -> Tensor:
    """Ties go to the even code."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(_E2M1)]
    bounds = torch.tensor(middles, dtype=torch.float32, device=numbers.device)
    bounds[1::2] = torch.nextafter(bounds[1::2], bounds.new_zeros(()))
    return torch.bucketize(numbers.abs(), bounds) + 8 * numbers.signbit()


def _nf4(groups: Tensor) -> tuple[Tensor, Tensor]:
    scales = _positive(groups.abs().amax(-1))
    numbers = torch.tensor(_NF4, dtype=torch.float32, device=groups.device)
    bounds = (numbers[1:] + numbers[:-1]) / 2
    return torch.bucketize(groups / scales.unsqueeze(-1), bounds), scales


def scale_numbers(scales: Tensor) -> Tensor:
    """The numbers of scales, float32."""
    if scales.dtype != torch.uint8:
        return scales.float()
    exponents = scales.to(torch.int32) - E8M0_BIAS
    numbers = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), exponents)
    return numbers.masked_fill(scales == E8M0_NAN, torch.nan)


def decode(codes: Codes, format: str) -> Tensor:
    """The numbers of codes, float32 [..., N, M]: each a product of two, rounded once."""
    values, scales, zeros = codes
    wide = scale_numbers(scales)
    if format == "int8":
        return values.view(torch.int8).float() * wide
    known = unpack(values)
    if zeros is not None:
        groups = known.float().unflatten(-1, (scales.shape[-1], -1))
        numbers = groups - unpack(zeros)[..., : scales.shape[-1], None].float()
    else:
        known_numbers = FORMATS[format].numbers
        table = torch.tensor(known_numbers, dtype=torch.float32, device=values.device)
        numbers = table[known.long()].unflatten(-1, (scales.shape[-1], -1))
    return (numbers * wide.unsqueeze(-1)).flatten(-2)


def round_rows(rows: Tensor) -> Tensor:
    """Every row as whole numbers from -127 to 127, times a scale of its own. [R, M], float32 or
    float64."""
    if not rows.shape[-1]:
        return rows
    scales = _positive(rows.abs().amax(-1, keepdim=True) / 127)
    return (rows / scales).round() * scales

"""Convert expert weights between checkpoint layouts and GroupedExperts, bit for bit.

Shapes: E experts, H hidden, F ffn. Only weights are converted. In GroupedExperts' layout all of the
gate comes before the up; with activation="swiglu_oai" they alternate, which is GROUPED_OAI.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class PerExpert:
    """One tensor per expert e and layer: {parent}{e}.{up}.weight, {parent}{e}.{up}.bias.

    Args:
        up: the name of the layer with weight [F, H]
        down: the name of the layer with weight [H, F]
        gate: the name of the gate with weight [F, H], or None
        parent: the prefix of the expert's number
    """

    up: str
    down: str
    gate: str | None = None
    parent: str = ""
    dims: ClassVar[int] = 2

    @property
    def pattern(self) -> str:
        return re.escape(self.parent) + r"(?P<expert>[0-9]+)\..+"

    def has(self, name: str, prefix: str) -> bool:
        """Whether the layout has a tensor of this name.

        Args:
            name: a key of a state dict
            prefix: the prefix of the layout's names
        """
        return re.fullmatch(re.escape(prefix) + self.pattern, name) is not None

    def inspect(self, names: Collection[str]) -> tuple[int, bool]:
        """The number of experts and whether they have a gate, from names that match the pattern.

        Args:
            names: keys of a state dict

        Raises:
            ValueError: the experts are not numbered 0, 1, 2, ... without a gap
        """
        matches = (re.fullmatch(self.pattern, name) for name in names)
        numbers = {match.string: match["expert"] for match in matches if match}
        # Each expert has at least one name, so more experts than names leave a gap. Strings are
        # compared because a number may be longer than int() takes.
        possible = set(map(str, range(len(numbers))))
        if wrong := [name for name, number in numbers.items() if number not in possible]:
            raise ValueError(
                "convert: experts must be numbered 0, 1, 2, ... without a gap, got "
                f"{_first(wrong)} among {len(numbers)} names"
            )
        return 1 + max(map(int, numbers.values())), self.gate is not None

    def sources(self, stacked: str, num_experts: int) -> list[str]:
        """The names of the tensors that make up a tensor of GroupedExperts, in order.

        Args:
            stacked: the tensor's name in GroupedExperts
            num_experts: E
        """
        up = {"up_proj": [self.up]} if self.gate is None else {"gate_up_proj": [self.gate, self.up]}
        layers = (up | {"down_proj": [self.down]}).get(stacked.removesuffix("_bias"))
        if layers is None:
            raise ValueError(f"convert: {self} has no place for {stacked}")
        kind = "bias" if stacked.endswith("_bias") else "weight"
        return [f"{self.parent}{e}.{layer}.{kind}" for e in range(num_experts) for layer in layers]

    def join(self, stacked: str, tensors: list[Tensor], num_experts: int) -> Tensor:
        rows = tensors[0].shape[0] * len(tensors) // num_experts
        return torch.cat(tensors).unflatten(0, (num_experts, rows))

    def split(self, stacked: str, tensor: Tensor, number: int) -> list[Tensor]:
        # A view would keep all experts alive, in memory and in a saved file.
        return [piece.clone() for piece in tensor.flatten(0, 1).tensor_split(number)]


@dataclass(frozen=True)
class Stacked:
    """One tensor for all experts, with GroupedExperts' names.

    Args:
        transposed: weights are [E, H, 2F] (without a gate [E, H, F]) and [E, F, H]
        interleaved: gate and up alternate, in the bias too; otherwise all of the gate comes first
        parent: the prefix of the names
    """

    transposed: bool = False
    interleaved: bool = False
    parent: str = ""
    dims: ClassVar[int] = 3

    @property
    def pattern(self) -> str:
        return re.escape(self.parent) + r"(gate_up|up|down)_proj[^.]*"

    def has(self, name: str, prefix: str) -> bool:
        return re.fullmatch(re.escape(prefix) + self.pattern, name) is not None

    def inspect(self, names: Collection[str]) -> tuple[int, bool]:
        return 1, f"{self.parent}up_proj" not in names

    def sources(self, stacked: str, num_experts: int) -> list[str]:
        return [self.parent + stacked]

    def join(self, stacked: str, tensors: list[Tensor], num_experts: int) -> Tensor:
        (tensor,) = tensors
        if self.transposed and not stacked.endswith("_bias"):
            tensor = tensor.mT
        if stacked.startswith("gate"):
            F, odd = divmod(tensor.shape[1], 2)
            _require(not odd, self.parent + stacked, "be of even width (gate and up)", tensors[0])
            tensor = _reorder(tensor, (F, 2)) if self.interleaved else tensor
        return tensor.contiguous()

    def split(self, stacked: str, tensor: Tensor, number: int) -> list[Tensor]:
        if self.interleaved and stacked.startswith("gate"):
            tensor = _reorder(tensor, (2, tensor.shape[1] // 2))
        if self.transposed and not stacked.endswith("_bias"):
            tensor = tensor.mT
        return [tensor.contiguous()]


WeightLayout = PerExpert | Stacked
StateDict = Mapping[str, Tensor]

GROUPED = Stacked()
GROUPED_OAI = Stacked(interleaved=True)
GPT_OSS = Stacked(transposed=True, interleaved=True)
MIXTRAL = PerExpert(gate="w1", up="w3", down="w2")
QWEN = DEEPSEEK = PerExpert(gate="gate_proj", up="up_proj", down="down_proj")
NEMOTRON = PerExpert(up="up_proj", down="down_proj")


def deepspeed(expert: PerExpert) -> PerExpert:
    """The layout of DeepSpeed's Experts, whose modules have the layers of `expert`.

    With an nn.Sequential of Linear, ReLU, Linear it is deepspeed(PerExpert(up="0", down="2")).

    Args:
        expert: the layers of one module
    """
    return replace(expert, parent=f"deepspeed_experts.{expert.parent}")


def to_grouped(state: StateDict, layout: WeightLayout, prefix: str = "") -> dict[str, Tensor]:
    """Convert one experts module to the state dict of a GroupedExperts, in the layout GROUPED.

    One with activation="swiglu_oai" takes `from_grouped(of this, GROUPED_OAI)`.

    Args:
        state: a state dict that contains the module, such as a whole model's
        layout: the layout of its experts
        prefix: the prefix of the layout's names, such as "model.layers.0.mlp.experts."

    Returns:
        GroupedExperts' names without the prefix; dtype and device stay. Every tensor is contiguous;
        a tensor that is equal in both layouts is the given object.

    Raises:
        ValueError: no expert is found, the experts are not numbered 0, 1, 2, ..., tensors are
            missing (an expert's, or a bias that another has), an expert holds something else (such
            as the scales of quantised weights), or shapes, dtypes or devices do not fit each other
    """
    layout = replace(layout, parent=prefix + layout.parent)
    pattern = re.compile(layout.pattern)
    found = {name: tensor for name, tensor in state.items() if pattern.fullmatch(name)}
    if not found:
        raise ValueError(f"convert: the state dict has no experts of {layout}")
    num_experts, gated = layout.inspect(found)
    names = ["gate_up_proj" if gated else "up_proj", "down_proj"]
    if any(name.endswith("bias") for name in found):
        names += [f"{name}_bias" for name in names]
    sources = {name: layout.sources(name, num_experts) for name in names}
    _complete(found, [source for group in sources.values() for source in group])
    grouped = {}
    for name, group in sources.items():
        tensors = [found[source] for source in group]
        _alike(group, tensors, layout.dims - name.endswith("bias"))
        grouped[name] = layout.join(name, tensors, num_experts)
    _fit(grouped, prefix)
    return grouped


def from_grouped(state: StateDict, layout: WeightLayout, prefix: str = "") -> dict[str, Tensor]:
    """Convert the state dict of a GroupedExperts to one experts module: the inverse of to_grouped.

    Args:
        state: of a GroupedExperts, in the layout GROUPED
        layout: the layout of the result
        prefix: the prefix of the result's names

    Raises:
        ValueError: the state is not that of a GroupedExperts, or only one of `state` and `layout`
            has a gate
    """
    layout = replace(layout, parent=prefix + layout.parent)
    result: dict[str, Tensor] = {}
    for name, tensor in to_grouped(state, GROUPED).items():
        group = layout.sources(name, tensor.shape[0])
        result |= zip(group, layout.split(name, tensor, len(group)), strict=True)
    return result


def detect(state: StateDict, prefix: str = "") -> WeightLayout | None:
    """Detect the layout of expert 0 under the prefix; None if it is unknown.

    GPT_OSS has the names of GROUPED: shapes and biases tell them apart.

    Args:
        state: a state dict, such as a whole model's
        prefix: the prefix of the layout's names
    """
    for layout in (MIXTRAL, QWEN, NEMOTRON):
        for known in (layout, deepspeed(layout)):
            if f"{prefix}{known.parent}0.{known.gate or known.up}.weight" in state:
                return known
    if f"{prefix}up_proj" in state:
        return GROUPED
    up, down = (state.get(f"{prefix}{name}_proj") for name in ("gate_up", "down"))
    if up is None or down is None:
        return None
    # Both are H; transposed they are 2F and F.
    if up.shape[-1:] == down.shape[-2:-1]:
        return GROUPED
    return GPT_OSS if f"{prefix}gate_up_proj_bias" in state else None


def convert_state_dict(
    state: StateDict, source: WeightLayout, target: WeightLayout
) -> dict[str, Tensor]:
    """Convert all experts in a model's state dict from `source` to `target`.

    Experts are expected in modules named "experts", which keep their place in the model. All other
    entries are passed on unchanged.

    Args:
        state: a model's state dict
        source: the layout of its experts
        target: the layout of the result

    Raises:
        ValueError: there are no experts, a name of the target exists already, or to_grouped or
            from_grouped raises
    """
    pattern = re.compile(rf"(?P<place>(?:.*\.)?experts\.){source.pattern}")
    result: dict[str, Tensor] = {}
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if match := pattern.fullmatch(name):
            modules.setdefault(match["place"], {})[name] = tensor
        else:
            result[name] = tensor
    if not modules:
        raise ValueError(f"convert: the state dict has no experts of {source}")
    for place, module in modules.items():
        converted = from_grouped(to_grouped(module, source, place), target, place)
        if taken := result.keys() & converted.keys():
            raise ValueError(f"convert: the state dict has {sorted(taken)} already")
        result |= converted
    return result


def _reorder(tensor: Tensor, sizes: tuple[int, int]) -> Tensor:
    """Rows a * sizes[1] + b of dimension 1 in the order of b, then a."""
    return tensor.unflatten(1, sizes).transpose(1, 2).flatten(1, 2)


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _require(fits: bool, name: str, what: str, tensor: Tensor) -> None:
    if not fits:
        raise ValueError(f"convert: {name} must {what}, got {_describe(tensor)}")


def _complete(found: Collection[str], expected: Collection[str]) -> None:
    for problem, names in (
        ("not of the layout", set(found).difference(expected)),
        ("missing", set(expected).difference(found)),
    ):
        if names:
            raise ValueError(f"convert: {problem}: {_first(names)}")


def _first(names: Collection[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(sorted(names)[:most]) + more


def _alike(names: list[str], tensors: list[Tensor], dims: int) -> None:
    _require(tensors[0].dim() == dims, names[0], f"have {dims} dimensions", tensors[0])
    first = _describe(tensors[0])
    for name, tensor in zip(names, tensors, strict=True):
        _require(_describe(tensor) == first, name, f"be {first} like {names[0]}", tensor)


def _fit(grouped: StateDict, prefix: str) -> None:
    up, weight = next(iter(grouped.items()))
    E, width, H = weight.shape
    F = width // 2 if up == "gate_up_proj" else width
    shapes = {"down_proj": (E, H, F), f"{up}_bias": (E, width), "down_proj_bias": (E, H)}
    for name in list(grouped)[1:]:
        what = f"be {list(shapes[name])} beside {up} {list(weight.shape)} in GroupedExperts"
        _require(grouped[name].shape == shapes[name], prefix + name, what, grouped[name])

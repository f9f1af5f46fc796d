"""Experts in 8 and 4 bits by ggml, ONNX Runtime and KTransformers, on one CPU thread.

`PEERS[name](up, down, top_k)` packs float weights: up [E, 2F, H], the gates first, and down
[E, H, F]. It gives an object with

    run(tokens, expert_ids, weights)    all SwiGLU experts' weighted sum, [T, H] -> [T, H]
    rounded(weight)                     the numbers that packing makes of weights [E, N, K]
    bytes_per_weight                    scales included

`available()` tells why a peer cannot run here. `huge_pages()` moves packed weights to huge pages.
They are installed by hand, beside this project's torch:

    pip install llama-cpp-python            # ggml; it is compiled, for five minutes
    pip install onnx "onnxruntime>=1.31"
    pip install --no-deps kt-kernel safetensors gguf pyyaml    # it asks for another torch
"""

import ctypes
import functools
import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from ggml_peer import Ggml
from torch import Tensor

# The number of each code.
INT8, INT4 = torch.arange(-128.0, 128.0), torch.arange(-8.0, 8.0)
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MXFP4 = torch.cat([_E2M1, -_E2M1])


class Packed(NamedTuple):
    codes: Tensor  # [E, N, K], a byte each
    scales: Tensor  # [E, N, K / group], float32
    table: Tensor

    def bytes(self) -> Tensor:
        """The codes; those of 4 bits in pairs, the first one in the low half."""
        if self.table is INT8:
            return self.codes
        return (self.codes[..., ::2] | self.codes[..., 1::2] << 4).contiguous()

    def numbers(self) -> Tensor:
        rows = self.table[self.codes.int()].unflatten(-1, (self.scales.shape[-1], -1))
        return (rows * self.scales.unsqueeze(-1)).flatten(-2)


def pack(
    weight: Tensor, table: Tensor, group: int, stored: Callable[[Tensor], Tensor] = Tensor.float
) -> Packed:
    """Pack weights [E, N, K] in groups along K. `stored` gives the scales that are kept."""
    ordered, codes = table.sort()
    middles, codes = (ordered[1:] + ordered[:-1]) / 2, codes.to(torch.uint8)
    found = []
    for one in weight:
        rows = one.float().unflatten(-1, (-1, group))
        scales = stored(rows.abs().amax(-1, keepdim=True).clamp(min=1e-30) / ordered[-1]).float()
        nearest = torch.bucketize(rows / scales, middles)
        found.append((codes[nearest].flatten(-2), scales.squeeze(-1)))
    return Packed(*map(torch.stack, zip(*found, strict=True)), table)


class OnnxRuntime:
    """com.microsoft.QMoE; tokens are float32, or int8 in products if `int8` or weights are."""

    @staticmethod
    def load() -> tuple[Any, Any]:
        parser, runtime = map(importlib.import_module, ("onnx.parser", "onnxruntime"))
        version = tuple(map(int, runtime.__version__.split(".")[:2]))
        if version < (1, 31):
            # Earlier operators lack accuracy_level.
            raise ImportError(f"needs onnxruntime 1.31 or later, not {runtime.__version__}")
        return parser, runtime

    def __init__(
        self, up: Tensor, down: Tensor, top_k: int, table: Tensor, group: int, int8: bool = True
    ) -> None:
        parser, runtime = self.load()
        self.pack = partial(pack, table=table, group=group)
        (E, H, _), bits = down.shape, len(table).bit_length() - 1
        self.num_experts, self.bytes_per_weight = E, bits / 8 + 4 / group
        values = {}
        # The operator takes a gate's row, then the row that it multiplies.
        turns = up.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
        for name, packed in (("up", self.pack(turns)), ("down", self.pack(down))):
            values |= {name: packed.bytes(), f"{name}_scales": packed.scales}
        # Weights stay outside the model, whose format ends at 2 GB.
        outside = ", ".join(
            f"{'uint8' if v.dtype == torch.uint8 else 'float'}{[*v.shape]} {n}"
            ' = ["location": "none"]'
            for n, v in values.items()
        )
        model = parser.parse_model(f"""
            <ir_version: 10, opset_import: ["": 20, "com.microsoft": 1]>
            experts (float[T, {H}] tokens, float[T, {E}] chosen, float[T, {E}] weights)
                => (float[T, {H}] out) <{outside}> {{
                out = com.microsoft.QMoE <
                    k = {top_k}, activation_type = "swiglu", activation_alpha = 1.0,
                    activation_beta = 0.0, swiglu_fusion = 1, expert_weight_bits = {bits},
                    block_size = {group}, weights_prepacked = 0, accuracy_level = {4 * int8}
                > (tokens, chosen, up, up_scales, , down, down_scales, , , , , , , , weights)
            }}""")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        kept = [runtime.OrtValue.ortvalue_from_numpy(v.numpy()) for v in values.values()]
        options.add_external_initializers([*values], kept)
        self.session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def run(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        ids, none = expert_ids.long(), torch.zeros(len(tokens), self.num_experts)
        chosen, weights = none.scatter(1, ids, 1.0), none.scatter(1, ids, weights.float())
        given = {"tokens": tokens.float(), "chosen": chosen, "weights": weights}
        (out,) = self.session.run(None, {n: v.numpy() for n, v in given.items()})
        return torch.from_numpy(out).to(tokens.dtype)

    def rounded(self, weight: Tensor) -> Tensor:
        return self.pack(weight).numbers()


def _kt_kernel() -> tuple[Any, Any]:
    from kt_kernel import kt_kernel_ext

    config = kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [1]
    return kt_kernel_ext.moe, kt_kernel_ext.CPUInfer(config)


class KTransformers:
    """Experts of kt-kernel; tokens are bfloat16, int8 weights have a scale a row.

    A thread of its own computes, while the caller's waits at work: it needs two cores.
    """

    MAX_TOKENS = 512
    KINDS: ClassVar = {
        "int8": ("AMXInt8_MOE", INT8, None),
        "int4": ("AMXInt4_KGroup_MOE", INT4, 32),
        "mxfp4": ("AMXFP4_KGroup_MOE", MXFP4, 32),
    }
    load = staticmethod(functools.cache(_kt_kernel))

    def __init__(self, up: Tensor, down: Tensor, top_k: int, format: str) -> None:
        (moe, self.thread), self.top_k = self.load(), top_k
        (E, H, ffn), (kind, self.table, self.group) = down.shape, self.KINDS[format]
        bits = 8 if self.table is INT8 else 4
        self.bytes_per_weight = bits / 8 + (2 / self.group if self.group else 0)
        self.on_gpu, order, kept = torch.zeros(E, dtype=torch.bool), torch.arange(E), []
        config = moe.MOEConfig(E, top_k, H, ffn, self.on_gpu.data_ptr())
        config.pool, config.max_len = self.thread.backend_, self.MAX_TOKENS
        config.quant_config.bits, config.quant_config.group_size = bits, self.group or 0
        for name, weight in (("gate", up[:, :ffn]), ("up", up[:, ffn:]), ("down", down)):
            if self.group:
                packed = self._pack(weight)
                kept += [packed.bytes(), packed.scales.bfloat16()]
                for field, value in zip(("projs", "scales"), kept[-2:], strict=True):
                    setattr(config, f"{name}_{field}", [[t.data_ptr() for t in value]])
            else:
                kept.append(weight.bfloat16().contiguous())
                setattr(config, f"{name}_proj", kept[-1].data_ptr())
        self.experts = getattr(moe, kind)(config)
        self.thread.submit(self.experts.load_weights_task(order.data_ptr()))
        self.thread.sync()

    def _pack(self, weight: Tensor) -> Packed:
        if self.table is MXFP4:
            # A group's largest number lies between 4 and 8 scales, which are powers of two.
            return pack(weight, MXFP4, 32, lambda s: ((6 * s).log2().floor() - 2).exp2())
        if self.table is INT4:
            return pack(weight, INT4, 32, Tensor.bfloat16)
        # kt-kernel packs int8 itself, in this way.
        return pack(weight.bfloat16(), INT8, weight.shape[-1])

    def run(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        if len(tokens) > self.MAX_TOKENS:
            # kt-kernel would write past its buffers.
            raise ValueError(f"expected at most {self.MAX_TOKENS} tokens, got {len(tokens)}")
        T, rows = torch.tensor([len(tokens)]), tokens.bfloat16().contiguous()
        ids, weights = expert_ids.long().contiguous(), weights.float().contiguous()
        out = torch.empty_like(rows)
        places = [t.data_ptr() for t in (ids, weights, rows, out)]
        self.experts.forward(T.data_ptr(), self.top_k, *places, False)
        return out.to(tokens.dtype)

    def rounded(self, weight: Tensor) -> Tensor:
        return self._pack(weight).numbers()


PEERS: dict[str, Callable[..., Any]] = {
    **{f"ggml {name}": partial(Ggml, format=name) for name in Ggml.TYPES},
    "ONNX Runtime int8": partial(OnnxRuntime, table=INT8, group=64),
    "ONNX Runtime int4": partial(OnnxRuntime, table=INT4, group=64, int8=False),
    "ONNX Runtime int4, int8 tokens": partial(OnnxRuntime, table=INT4, group=64),
    **{
        f"KTransformers {name}": partial(KTransformers, format=name) for name in KTransformers.KINDS
    },
}


def available() -> dict[str, str | None]:
    """Why each peer cannot run here; None where it can."""
    reasons: dict[str, str | None] = dict.fromkeys(PEERS)
    for name, make in PEERS.items():
        try:
            make.func.load()
        except Exception as error:
            reasons[name] = f"{type(error).__name__}: {error}"
    return reasons


def huge_pages() -> None:
    """Move this process's large anonymous memory to huge pages, packed weights among it."""
    libc, page, collapse = ctypes.CDLL(None), 2 << 20, 25
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, access, _, _, inode = line.split()[:5]
        begin, end = (int(side, 16) for side in span.split("-"))
        begin, end = -(-begin // page) * page, end // page * page
        if access.startswith("rw") and inode == "0" and begin < end:
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), collapse)

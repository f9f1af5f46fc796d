"""Experts in formats of ggml by ggml itself, from the shared library in llama-cpp-python."""

import ctypes
import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from ctypes import c_bool, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

F32, I32 = 0, 26  # enum ggml_type


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Functions:
    """Functions of libggml; arguments and results are pointers or integers, 64 bits each."""

    def __init__(self) -> None:
        spec = importlib.util.find_spec("llama_cpp")
        if spec is None or spec.origin is None:
            raise ImportError("needs llama-cpp-python")
        self._library = ctypes.CDLL(str(Path(spec.origin).parent / "lib/libggml-cpu.so"))

    def __getattr__(self, name: str) -> Callable[..., int]:
        function = getattr(self._library, f"ggml_{name}")
        function.restype = c_int64

        def call(*args: object) -> int:
            return function(*(c_int64(a) if isinstance(a, int) else a for a in args))

        return call


def _view(address: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    memory = (ctypes.c_uint8 * size).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Ggml:
    """A graph of ggml_mul_mat_id, ggml_swiglu and a weighted sum; tokens are float32.

    Weights are repacked as llama.cpp does by default, where ggml has a kernel for that.
    """

    TYPES: ClassVar = {"q8_0": 8, "q4_0": 2, "q4_K": 12, "mxfp4": 39}
    load = staticmethod(functools.cache(_Functions))

    def __init__(self, up: Tensor, down: Tensor, top_k: int, format: str) -> None:
        self.c, self.type, self.top_k = self.load(), self.TYPES[format], top_k
        self.bytes_per_weight = self.c.row_size(self.type, 1024) / 1024
        self.backend = self.c.backend_cpu_init()
        self.c.backend_cpu_set_n_threads(self.backend, 1)
        self.owned: list[tuple[int, int]] = []
        self.graphs: dict[int, tuple] = {}
        self.hidden = up.shape[-1]
        self.up, self.down = map(self._store, (up, down))

    def __del__(self) -> None:
        self._free(0)

    def _free(self, kept: int) -> None:
        while len(self.owned) > kept:
            context, buffer = self.owned.pop()
            self.c.backend_buffer_free(buffer)
            self.c.free(context)

    def _context(self) -> int:
        size = self.c.tensor_overhead() * 128 + self.c.graph_overhead()
        return self.c.init(_InitParams(size, None, True))

    def _quantize(self, weight: Tensor) -> Tensor:
        N, K = weight.shape
        source = weight.float().contiguous()
        packed = torch.empty(N * self.c.row_size(self.type, K), dtype=torch.uint8)
        self.c.quantize_chunk(self.type, source.data_ptr(), packed.data_ptr(), 0, N, K, None)
        return packed

    def _buffer_types(self) -> Iterator[int]:
        registry = self.c.backend_cpu_reg()
        name = ctypes.c_char_p(b"ggml_backend_dev_get_extra_bufts")
        function = self.c.backend_reg_get_proc_address(registry, name)
        give = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(function)
        kinds = give(self.c.backend_reg_dev_get(registry, 0))
        yield from itertools.takewhile(bool, (kinds[i] for i in itertools.count()))
        yield self.c.backend_cpu_buffer_type()

    def _store(self, weight: Tensor) -> int:
        c, (E, N, K), owned = self.c, weight.shape, len(self.owned)
        for kind in self._buffer_types():
            self._free(owned)
            context = self._context()
            tensor = c.new_tensor_3d(context, self.type, K, N, E)
            buffer = c.backend_alloc_ctx_tensors_from_buft(context, kind)
            self.owned.append((context, buffer))
            rows = c.new_tensor_3d(context, F32, K, 1, 1)
            ids = c.new_tensor_2d(context, I32, self.top_k, 1)
            product = c.mul_mat_id(context, tensor, rows, ids)
            if c.backend_supports_op(self.backend, product) & 0xFF:
                break
        packed = torch.cat([self._quantize(w) for w in weight])
        c.backend_tensor_set(tensor, packed.data_ptr(), 0, packed.numel())
        return tensor

    def _graph(self, out: int, context: int) -> int:
        graph = self.c.new_graph(context)
        self.c.build_forward_expand(graph, out)
        self.owned.append((context, self.c.backend_alloc_ctx_tensors(context, self.backend)))
        return graph

    def _experts(self, T: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        c, H, K, context = self.c, self.hidden, self.top_k, self._context()
        rows = c.new_tensor_3d(context, F32, H, 1, T)
        ids = c.new_tensor_2d(context, I32, K, T)
        weights = c.new_tensor_3d(context, F32, 1, K, T)
        hidden = c.swiglu(context, c.mul_mat_id(context, self.up, rows, ids))
        weighed = c.mul(context, c.mul_mat_id(context, self.down, hidden, ids), weights)
        parts = [c.view_2d(context, weighed, H, T, K * H * 4, k * H * 4) for k in range(K)]
        out = functools.reduce(partial(c.add, context), parts) if K > 1 else weighed
        graph, at = self._graph(out, context), c.get_data
        places = _view(at(ids), T, K, dtype=torch.int32)
        return graph, _view(at(rows), T, H), places, _view(at(weights), T, K), _view(at(out), T, H)

    def _compute(self, graph: int) -> None:
        if status := self.c.backend_graph_compute(self.backend, graph) & 0xFFFFFFFF:
            raise RuntimeError(f"expected status 0 of ggml_backend_graph_compute, got {status}")

    def run(self, tokens: Tensor, expert_ids: Tensor, weights: Tensor) -> Tensor:
        T = len(tokens)
        if T not in self.graphs:
            self.graphs[T] = self._experts(T)
        graph, *inputs, out = self.graphs[T]
        for mine, theirs in zip(inputs, (tokens, expert_ids, weights), strict=True):
            mine.copy_(theirs)
        self._compute(graph)
        return out.to(tokens.dtype, copy=True)

    def rounded(self, weight: Tensor) -> Tensor:
        rows, context, owned = weight.flatten(0, 1), self._context(), len(self.owned)
        tensor = self.c.new_tensor_2d(context, self.type, rows.shape[1], rows.shape[0])
        out = self.c.cast(context, tensor, F32)
        graph, packed = self._graph(out, context), self._quantize(rows)
        self.c.backend_tensor_set(tensor, packed.data_ptr(), 0, packed.numel())
        self._compute(graph)
        numbers = _view(self.c.get_data(out), *weight.shape).clone()
        self._free(owned)
        return numbers
